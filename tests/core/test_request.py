"""The life of a sequence, arrow by arrow."""

from itertools import product

import numpy as np
import pytest

from pagedkv import InvalidTransition, SamplingParams
from pagedkv.core.request import TRANSITIONS, Sequence, Status
from tests.core.fakes import Driver, make_config, make_request


def make_sequence(status):
    seq = Sequence(0, make_request("a", 3), np.arange(3, dtype=np.int32), index=0, seed=0)
    seq.status = status
    return seq


@pytest.mark.parametrize(("before", "after"), list(product(Status, Status)))
def test_a_sequence_moves_along_the_arrows_and_no_other_way(before, after):
    seq = make_sequence(before)
    if after in TRANSITIONS[before]:
        seq.move(after)
        assert seq.status is after
    else:
        with pytest.raises(InvalidTransition, match=f"'a': {before.name} cannot become"):
            seq.move(after)
        assert seq.status is before


def test_nothing_leaves_the_end_and_everything_reaches_it():
    assert TRANSITIONS[Status.FINISHED] == frozenset()
    assert all(Status.FINISHED in TRANSITIONS[s] for s in Status if s is not Status.FINISHED)


def test_a_request_passes_through_the_states_as_it_is_served():
    driver = Driver(make_config(4, 6, prefix_caching=False))
    first = driver.scheduler.sequence(driver.add(make_request("first", 12, max_tokens=5))[0])
    seq = driver.scheduler.sequence(driver.add(make_request("second", 12, max_tokens=5))[0])
    seen = [seq.status]
    while driver.scheduler.has_unfinished():
        driver.step()
        if seq.status is not seen[-1]:
            seen.append(seq.status)
    assert seen == [
        Status.WAITING,
        Status.RUNNING,
        Status.PREEMPTED,
        Status.RUNNING,
        Status.FINISHED,
    ]
    assert first.status is Status.FINISHED
    with pytest.raises(KeyError):
        driver.scheduler.sequence(seq.seq_id)


def test_sampling_has_vllms_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.seed, params.logprobs, params.stop) == (16, None, None, ())


def test_sampling_parameters_do_not_change():
    with pytest.raises(AttributeError):
        SamplingParams().n = 2
