"""Whatever a scheduler takes is written so that it replays; a damaged log is refused in words."""

import array
import collections
import random

import msgspec
import numpy as np
import pytest

from pagedkv import (
    EngineConfig,
    InvalidRequest,
    InvalidTransition,
    Request,
    SamplingParams,
    Scheduler,
)
from pagedkv.core.runlog import RunLog, plan_bytes, replay
from tests.core.answers import answer
from tests.core.fakes import make_config, make_request


class Tensor:
    """Stands for another library's array: numpy can read it, msgspec cannot write it."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


PROMPTS = {
    "list": list,
    "tuple": tuple,
    "range": lambda ids: range(1, 9),
    "generator": lambda ids: (i for i in ids),
    "deque": collections.deque,
    "array": lambda ids: array.array("i", ids),
    "int64": lambda ids: np.array(ids, np.int64),
    "every other": lambda ids: np.repeat(ids, 2)[::2],
    "tensor": Tensor,
}


def serve(path, request, draws=lambda ids: ids):
    plans = []
    with RunLog(Scheduler(make_config()), path) as scheduler:
        (first, *_) = scheduler.add(request)
        while scheduler.has_unfinished():
            plan = scheduler.schedule()
            plans.append(plan_bytes(plan))
            result = answer(plan)
            scheduler.commit(
                plan, msgspec.structs.replace(result, token_ids=draws(result.token_ids))
            )
            if plan.step == 4:
                scheduler.stop(np.int64(first), "END")
    return plans


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_of_any_kind_is_written_as_it_was_taken(tmp_path, kind):
    ids = list(range(1, 9))
    request = Request(
        request_id="a",
        prompt_token_ids=PROMPTS[kind](ids),
        sampling=SamplingParams(max_tokens=9, stop=("END", "é")),
        arrival=10**300,
    )
    plans = serve(tmp_path / "run", request)
    assert [plan_bytes(plan) for plan in replay(tmp_path / "run")] == plans
    assert len(plans) == 5
    assert list(request.prompt_token_ids) == ids


@pytest.mark.parametrize("draws", [list, tuple, Tensor, lambda ids: array.array("i", ids)])
def test_draws_of_any_kind_are_written_as_they_were_taken(tmp_path, draws):
    plans = serve(tmp_path / "run", make_request("a", 5, max_tokens=9), draws)
    assert [plan_bytes(plan) for plan in replay(tmp_path / "run")] == plans


def test_text_that_no_file_can_hold_is_refused_before_it_is_taken():
    for name in ("request_id", "tenant", "cache_salt"):
        fields = {"request_id": "a", "prompt_token_ids": [1], name: "\ud800"}
        with pytest.raises(InvalidRequest, match=rf"{name} is .*; give text that can be encoded"):
            Request(**fields)
    with pytest.raises(InvalidRequest, match=r"stop is .*; give text that can be encoded"):
        SamplingParams(stop=["fine", "\udfff"])


def test_a_log_names_every_field_of_a_request(tmp_path):
    request = Request(
        request_id="a",
        prompt_token_ids=[1, 2],
        sampling=SamplingParams(max_tokens=2, seed=5),
        priority=-3,
        tenant="t",
        arrival=2.5,
        cache_salt="s",
        eviction="sinks=4 + recent=4 + budget=16",
    )
    default = Request(request_id="", prompt_token_ids=())
    assert all(
        getattr(request, name) != getattr(default, name) for name in Request.__struct_fields__
    )
    taken = []

    class Noting(Scheduler):
        def add(self, request):
            taken.append(request)
            return super().add(request)

    with RunLog(Scheduler(), tmp_path / "run") as scheduler:
        scheduler.add(request)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pagedkv.core.runlog.Scheduler", Noting)
        list(replay(tmp_path / "run"))
    assert msgspec.structs.replace(taken[0], prompt_token_ids=[1, 2]) == request


def entries(*values):
    packed = [msgspec.msgpack.encode(value) for value in values]
    return b"".join(len(data).to_bytes(4, "little") + data for data in packed)


CONFIG = ["config", {}]
DAMAGED = {
    "a number": entries(5),
    "text": entries("ab"),
    "a plain file": b"hello world, not a log at all",
    "a size beyond the file": b"\xff\xff\xff\xff" + b"a" * 10,
    "half a size": b"\x03\x00",
    "three parts": entries([1, 2, 3]),
    "an unknown call": entries(CONFIG, ["foo", 1]),
    "an unknown field": entries(["config", {"nope": 1}]),
    "a field out of range": entries(["config", {"cache": {"block_size": -1}}]),
    "a plan that was not made": entries(CONFIG, ["plan", b"xx"]),
    "a result before any plan": entries(CONFIG, ["commit", {"token_ids": ["<i4", [0], b""]}]),
    "no result": entries(CONFIG, ["commit", None]),
    "a discard before any plan": entries(CONFIG, ["discard"]),
    "an abort of nobody": entries(CONFIG, ["abort", "zz"]),
    "an abort of a number": entries(CONFIG, ["abort", 3]),
    "a stop of nobody": entries(CONFIG, ["stop", 3, "END"]),
    "a request of one part": entries(CONFIG, ["add", {"struct": "Nope"}]),
    "a prompt of objects": entries(
        CONFIG, ["add", "a", ["|O", [1], b"12345678"], {}, 0, "", 0.0, "", None]
    ),
    "a prompt of another shape": entries(
        CONFIG, ["add", "a", ["<i4", [5], b"1234"], {}, 0, "", 0.0, "", None]
    ),
    "a policy that cannot be": entries(
        CONFIG, ["add", "a", ["<i4", [1], b"\1\0\0\0"], {}, 0, "", 0.0, "", "nonsense"]
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_log_is_refused_in_words(tmp_path, name):
    (tmp_path / "log").write_bytes(DAMAGED[name])
    with pytest.raises(InvalidTransition, match="the entry at byte") as caught:
        list(replay(tmp_path / "log"))
    assert caught.value.where == str(tmp_path / "log")
    assert caught.value.remedy


def test_a_log_that_is_not_there_is_refused_in_words(tmp_path):
    with pytest.raises(InvalidTransition, match="cannot be read"):
        list(replay(tmp_path / "nowhere"))


def test_damage_anywhere_is_noticed_or_harmless(tmp_path):
    """A byte is changed, or the file cut: the rest is refused in words, or replays."""
    serve(tmp_path / "run", make_request("a", 9, n=2, logprobs=0, max_tokens=7))
    whole = (tmp_path / "run").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        damaged, at = bytearray(whole), rng.randrange(len(whole))
        damaged[at] ^= 1 << rng.randrange(8)
        (tmp_path / "log").write_bytes(damaged if rng.random() < 0.8 else whole[:at])
        try:
            list(replay(tmp_path / "log"))
        except InvalidTransition:
            refused += 1
    assert refused > 200


def test_a_default_configuration_is_read_as_it_was(tmp_path):
    with RunLog(Scheduler(EngineConfig()), tmp_path / "run"):
        pass
    assert list(replay(tmp_path / "run")) == []
