"""Observers that abort or raise, and interrupts at the worst moments: nothing is left behind."""

from typing import Any

import pytest

from pagedkv import LLM, InvalidTransition, SamplingParams
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model

PROMPTS = [[7 * i + j for j in range(9)] for i in range(4)]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-random")


@pytest.fixture
def llm(model: LoadedModel) -> LLM:
    """Two of four requests run at once."""
    return LLM(model, block_size=4, num_blocks=60, max_num_seqs=2, max_num_batched_tokens=32)


def params(count: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **fields)


def is_clean(llm: LLM) -> bool:
    """Whether neither scheduler nor LLM remembers anything, and the next request is served."""
    stats, collector = llm.scheduler.stats(), llm._collector
    assert not llm.scheduler.has_unfinished()
    assert (stats.blocks_held, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert not any([collector._requests, collector._watched, collector._scored, llm._done])
    llm.engine.observers[1:] = []
    return len(llm.generate([PROMPTS[0]], params(3))[0].token_ids) == 3


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"n": 2},
        {"n": 1, "best_of": 2},
        {"beam_width": 2},
    ],
    ids=str,
)
def test_an_observer_may_abort_a_request_in_the_step_it_is_told_of(
    llm: LLM, extra: dict[str, Any]
) -> None:
    asked = params(8, **extra)
    whole = {o.request_id: o for o in llm.generate(PROMPTS, asked)}
    told = []

    def abort(*step: Any) -> None:
        told.append(step)
        if len(told) == 3:
            llm.abort("4")

    llm.engine.observers.append(abort)
    outputs = llm.generate(PROMPTS, asked)
    first, *rest = outputs
    assert {each.finish_reason for each in first.outputs} == {"abort"}
    drawn = first.outputs[0].token_ids
    if not extra.get("best_of") and not extra.get("beam_width"):
        assert drawn == whole["0"].token_ids[: len(drawn)]
        assert len(drawn) == 3
    if "logprobs" in extra:
        assert first.logprobs is not None
        assert len(first.logprobs) == len(drawn)
    assert [o.token_ids for o in rest] == [o.token_ids for o in list(whole.values())[1:]]
    assert is_clean(llm)


@pytest.mark.parametrize("fault", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_an_observer_that_raises_in_a_step_with_an_end_leaves_nothing_behind(
    llm: LLM, fault: BaseException
) -> None:
    def fail(plan: Any, result: Any, output: Any) -> None:
        if output.finished:
            raise fault

    llm.engine.observers.append(fail)
    lengths = [params(n, logprobs=1) for n in (3, 9, 9, 9)]
    with pytest.raises(type(fault)):
        llm.generate(PROMPTS, lengths)
    assert is_clean(llm)


@pytest.mark.parametrize("method", ["observe", "finish"])
def test_an_interrupt_while_outputs_are_gathered_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    gather = getattr(llm._collector, method)

    def interrupted(*args: Any) -> Any:
        if llm.scheduler.totals.num_finished:
            raise KeyboardInterrupt
        return gather(*args)

    with monkeypatch.context() as patched:
        patched.setattr(llm._collector, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, [params(n, logprobs=1) for n in (3, 9, 9, 9)])
    assert is_clean(llm)


def test_an_interrupt_while_requests_are_queued_takes_them_back(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = llm._collector.track

    def interrupted(request: Any, *args: Any, **options: Any) -> None:
        if request.request_id == "2":
            raise KeyboardInterrupt
        track(request, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(llm._collector, "track", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, params(3))
    assert is_clean(llm)


def test_a_request_that_is_ended_at_the_scheduler_is_not_waited_for(llm: LLM) -> None:
    def abort(*step: Any) -> None:
        if llm.scheduler.totals.num_steps == 3:
            llm.scheduler.abort("0")

    llm.engine.observers.append(abort)
    step, left = llm.engine.step, iter(range(100))

    def counted() -> Any:
        assert next(left) < 50, "it waits for ever"
        return step()

    llm.engine.step = counted  # type: ignore[method-assign]
    with pytest.raises(InvalidTransition, match=r"request '0'.*use LLM\.abort"):
        llm.generate(PROMPTS, params(9))
    assert is_clean(llm)


def test_requests_of_others_on_the_same_scheduler_are_carried_along(llm: LLM) -> None:
    from pagedkv import Request

    llm.scheduler.add(Request(request_id="mine", prompt_token_ids=PROMPTS[1], sampling=params(2)))
    (output,) = llm.generate([PROMPTS[0]], params(9))
    assert len(output.token_ids) == 9
    assert is_clean(llm)
