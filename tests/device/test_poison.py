"""Under PAGEDKV_AUDIT=1 no read of what nobody wrote, or of what was given back, goes unseen."""

from collections.abc import Callable

import msgspec
import pytest

from pagedkv import LLM, SamplingParams
from pagedkv.core.plan import StepPlan, StepResult
from pagedkv.device.quantize import dequantize

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(3 + i, 30 + 5 * i)) for i in range(5)]


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDKV_AUDIT", "1")


def small(**fields: object) -> LLM:
    return LLM("tiny-random", **{"block_size": 4, "num_blocks": 200} | fields)


def watch(llm: LLM, change: Callable[[StepPlan], StepPlan]) -> None:
    """Have the executor see what `change` makes of the scheduler's plans."""
    execute = llm.engine.executor.execute

    def changed(plan: StepPlan) -> StepResult:
        return execute(change(plan))

    llm.engine.executor.execute = changed  # type: ignore[method-assign]


def used_blocks(plan: StepPlan) -> list[int]:
    """The blocks of a plan's first sequence."""
    count = -(-int(plan.num_resident[0, 0]) // 4)
    return plan.block_table[0, 0, :count].tolist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("audited")
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_blank_blocks_and_unwritten_tails_are_nan_and_what_is_resident_is_not(kind: str) -> None:
    llm = small(enable_prefix_caching=False, kv_cache_dtype=kind)
    pool, store, freed = llm.scheduler.manager.pool, llm.store, 0
    execute, seen = llm.engine.executor.execute, set[int]()

    def checked(plan: StepPlan) -> StepResult:
        nonlocal freed
        result = execute(plan)
        keys = dequantize(store.keys, llm.model.geometry.head_dim).isnan().flatten(3).all(-1).all(0)
        blank = pool.is_blank()
        assert keys[blank].all()
        blocks, tokens = used_blocks(plan), int(plan.num_resident[0, 0])
        own = keys[blocks].flatten()
        assert not own[:tokens].any()
        assert own[tokens:].all()
        seen.update(blocks)
        freed += sum(blank[block] for block in seen)
        return result

    llm.engine.executor.execute = checked  # type: ignore[method-assign]
    lengths = (2, 12)
    llm.generate(PROMPTS[:2], [msgspec.structs.replace(GREEDY, max_tokens=n) for n in lengths])
    assert freed > 0


@pytest.mark.parametrize(("value", "reason"), [("1", "error"), ("0", "length")])
def test_a_read_of_a_freed_block_ends_a_request_only_when_audited(
    monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setenv("PAGEDKV_AUDIT", value)
    llm = small(enable_prefix_caching=False)
    seen: set[int] = set()

    def misdirected(plan: StepPlan) -> StepPlan:
        freed = [block for block in sorted(seen) if llm.scheduler.manager.pool.is_blank()[block]]
        seen.update(used_blocks(plan))
        if not freed:
            return plan
        table = plan.block_table.copy()
        table[:, :, 1] = freed[0]
        return msgspec.structs.replace(plan, block_table=table)

    watch(llm, misdirected)
    short = msgspec.structs.replace(GREEDY, max_tokens=2)
    first, second = llm.generate(PROMPTS[:2], [short, GREEDY])
    assert first.finish_reason == "length"
    assert second.finish_reason == reason


@pytest.mark.parametrize(
    "fields",
    [
        {"eviction": "sinks=4 + recent=8 + budget=16 + chunk=8"},
        {"eviction": "score=sum + budget=16 + chunk=8 + unit=token"},
        {"eviction": "h2o", "granularity": "head", "num_blocks": 2000},
        {"num_blocks": 34, "num_cpu_blocks": 60, "swap_cost": 0.0},
        {"kv_cache_dtype": "int8"},
    ],
    ids=str,
)
def test_nothing_that_is_right_reads_it(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
) -> None:
    params = [msgspec.structs.replace(GREEDY, n=2, temperature=0.7, seed=i) for i in range(5)]
    params[0] = msgspec.structs.replace(GREEDY, beam_width=3)
    tokens = []
    for value in "01":
        monkeypatch.setenv("PAGEDKV_AUDIT", value)
        outputs = small(**fields).generate(PROMPTS, params)
        tokens.append([each.token_ids for output in outputs for each in output.outputs])
    assert tokens[0] == tokens[1]
