"""Values that cannot even be shown, and things of the wrong kind, are refused in words."""

import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    InvalidRequest,
    PolicyError,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
)
from pagedkv.errors import shown
from pagedkv.eviction import Policy, policy
from tests.core.answers import Service
from tests.core.fakes import make_config, make_request

HUGE = 10**5000
DIGITS = "9" * 5000


def request(**fields):
    return Request(**{"request_id": "a", "prompt_token_ids": [1]} | fields)


NUMBERS = [
    (lambda: request(priority=HUGE), InvalidRequest, "priority is <int of 16610 bits>"),
    (lambda: request(arrival=HUGE), InvalidRequest, "arrival is <int"),
    (lambda: request(request_id=HUGE), InvalidRequest, "request_id is <int"),
    (lambda: request(tenant=HUGE), InvalidRequest, "tenant is <int"),
    (lambda: request(sampling=HUGE), InvalidRequest, "sampling is <int"),
    (lambda: SamplingParams(max_tokens=HUGE), InvalidRequest, "max_tokens is <int"),
    (lambda: SamplingParams(n=HUGE), InvalidRequest, "n is <int"),
    (lambda: SamplingParams(beam_width=HUGE), InvalidRequest, "beam_width is <int"),
    (lambda: SamplingParams(seed=HUGE), InvalidRequest, "seed is <int"),
    (lambda: SamplingParams(temperature=HUGE), InvalidRequest, "temperature is <int"),
    (lambda: SamplingParams(temperature=10**400), InvalidRequest, "temperature is 1000"),
    (lambda: SamplingParams(max_tokens=2**63), InvalidRequest, "max_tokens is 92233"),
    (lambda: CacheConfig(num_blocks=HUGE), ConfigError, "num_blocks is <int"),
    (lambda: CacheConfig(kv_cache_memory_bytes=2**63), ConfigError, "kv_cache_memory_bytes is"),
    (lambda: SchedulerConfig(swap_cost=HUGE), ConfigError, "swap_cost is <int"),
    (lambda: SchedulerConfig(long_prefill_token_threshold=2**63), ConfigError, "d is 922"),
    (lambda: Policy(sinks=HUGE), PolicyError, "sinks is <int"),
    (lambda: Policy(threshold=HUGE), PolicyError, "threshold is <int"),
    (lambda: policy(f"sinks={DIGITS}"), PolicyError, "not a whole number of tokens"),
    (lambda: policy(f"recent={DIGITS}"), PolicyError, "not a whole number of tokens"),
    (lambda: policy(f"budget={DIGITS}"), PolicyError, "tokens"),
    (lambda: Scheduler(make_config(tenants=(f"a={DIGITS}",))), ConfigError, "give each tenant"),
]


@pytest.mark.parametrize(("make", "error", "told"), NUMBERS, ids=range(len(NUMBERS)))
def test_a_number_beyond_all_bounds_is_refused_in_words(make, error, told):
    with pytest.raises(error, match=told) as caught:
        make()
    assert caught.value.where
    assert caught.value.remedy
    assert len(caught.value.what) < 5200


@pytest.mark.parametrize("config", [{}, 3, CacheConfig(), EngineConfig])
def test_a_scheduler_is_made_from_a_configuration_only(config):
    with pytest.raises(ConfigError, match="give an EngineConfig"):
        Scheduler(config)


@pytest.mark.parametrize("victim", [3, "last_admitted", [1]])
def test_a_victim_is_a_function(victim):
    with pytest.raises(ConfigError, match=r"victim: it is .* give a function"):
        Scheduler(make_config(), victim=victim)


def crowded(victim):
    """A scheduler that has to push somebody back soon, and what the function may hold."""
    service = Service(make_config(4, 14, prefix_caching=False), victim=victim)
    for i in range(4):
        service.add(make_request(f"r{i}", [i] * (5 + 3 * i), max_tokens=16))
    return service


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (lambda rows: None, "chose row None"),
        (lambda rows: float(rows[-1]), "chose row 3.0"),
        (lambda rows: rows, "chose row array"),
        (lambda rows: 99, "chose row 99"),
        (lambda rows: HUGE, "chose row <int"),
    ],
    ids=["nothing", "a float", "all", "another", "huge"],
)
def test_a_choice_that_is_no_row_is_refused(choice, told):
    service = crowded(lambda table, rows: choice(rows))
    with pytest.raises(ConfigError, match=told) as caught:
        service.run()
    assert "return one of the rows given" in caught.value.remedy
    service.scheduler._pressure._victim = lambda table, rows: np.int64(rows[-1])
    assert len(service.run().finished) == 4


def test_a_victim_that_was_ended_while_it_was_chosen_is_refused():
    service = None

    def aborting(table, rows):
        row = int(rows[-1])
        service.scheduler.abort(table.sequences[row].request.request_id)
        return row

    service = crowded(aborting)
    with pytest.raises(ConfigError, match="has ended it"):
        service.run()
    service.scheduler._pressure._victim = lambda table, rows: int(rows[-1])
    assert len(service.run().finished) == 3


def test_what_cannot_be_shown_is_named_by_its_type():
    class Mute:
        def __repr__(self):
            raise RuntimeError("no")

    assert shown(Mute()) == "<Mute>"
    assert shown(HUGE) == "<int of 16610 bits>"
    assert shown("x" * 100, 10) == "'xxxxxxxxx"


def test_a_prompt_that_can_be_read_once_is_read_once():
    one = request(prompt_token_ids=iter([5, 6, 7]))
    assert list(one.prompt_token_ids) == list(one.prompt_token_ids) == [5, 6, 7]
    service = Service(make_config()).add(one).run()
    assert service.finished["a", 0].finish_reason == "length"
