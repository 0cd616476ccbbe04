"""Greedy generation shown token by token, with the KV cache and without it.

Behind ``pagedkv generate --show-steps``; the verb needs one call:

    show_steps(llm, prompt, max_tokens=32, stop=("\\n",), write=print)
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from pagedkv.core.request import SamplingParams
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.meter import Meter, Work, run_without_cache

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM
    from pagedkv.device.outputs import RequestOutput

__all__ = ["Step", "show_steps"]

_WIDTH = 100
_HEAD = """\
        with the cache   without it
  step  tokens    MFLOP  tokens    MFLOP  chance  next token      text so far"""
_ROWS = (
    ("tokens through the layers", "tokens", 1),
    ("MFLOP  queries, keys, values, output", "projections", 1e6),
    ("       attention over the context", "attention", 1e6),
    ("       MLP", "mlp", 1e6),
    ("       vocabulary", "head", 1e6),
    ("       all", "flops", 1e6),
    ("MB     weights read", "weights_read", 1e6),
    ("       keys and values read", "kv_read", 1e6),
    ("       keys and values written", "kv_written", 1e6),
    ("       handed from layer to layer", "handed_on", 1e6),
    ("       all", "bytes_moved", 1e6),
)


class Step(Struct, frozen=True, kw_only=True):
    """One generated token and what it cost.

    Attributes:
        chance: Its probability under the model.
        text: The prompt and everything generated up to it.
        cached: The work with the cache.
        uncached: The work of computing the whole text so far anew.
        agrees: Whether both ways gave the same token.
    """

    token_id: int
    chance: float
    text: str
    cached: Work
    uncached: Work
    agrees: bool


def show_steps(
    llm: "LLM",
    prompt: str,
    *,
    max_tokens: int = 32,
    stop: tuple[str, ...] = ("\n",),
    write: Callable[[str], None] = print,
) -> list[Step]:
    """Generate greedily from one prompt and print each step as it is computed.

    Every step runs twice: once in the engine, and once over the whole text so far with an empty
    cache, which is what generation costs without one.

    Args:
        llm: An idle `LLM`; its scheduler serves this one request and is idle again afterwards.
        prompt: Text; a model without a tokenizer is refused.
        max_tokens: The most steps.
        stop: Strings that end the run.
        write: Is given each line of output, without a line break.

    Returns:
        What was shown.

    Raises:
        InvalidRequest, NeverFits: As `LLM.generate`.
    """
    steps: list[Step] = []
    for step in _run(llm, prompt, max_tokens, stop):
        if not steps:
            write(f"{prompt!r} has {step.uncached.tokens} tokens.\n")
            write(_HEAD)
        steps.append(step)
        write(_line(llm, len(steps), step))
    for line in _totals(steps):
        write(line)
    return steps


def _run(llm: "LLM", prompt: str, max_tokens: int, stop: tuple[str, ...]) -> Iterator[Step]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop, logprobs=0)
    with _metered(llm) as meter:
        for output in llm.stream(prompt, params):
            if not output.token_ids:
                continue  # it ended with an error before its first token
            work = sum(meter.steps, Work())
            meter.steps.clear()
            yield _step(llm, prompt, output, work)


def _step(llm: "LLM", prompt: str, output: "RequestOutput", work: Work) -> Step:
    token_id = output.token_ids[-1]
    before = output.prompt_token_ids + output.token_ids[:-1]
    anew, uncached = run_without_cache(llm.model, before)
    assert output.logprobs is not None
    return Step(
        token_id=token_id,
        chance=math.exp(output.logprobs[-1][token_id].logprob),
        text=prompt + output.text,
        cached=work,
        uncached=uncached,
        agrees=int(anew.token_ids[0]) == token_id,
    )


@contextmanager
def _metered(llm: "LLM") -> Iterator[Meter]:
    """Count the engine's work for a while."""
    executor = llm.engine.executor
    assert isinstance(executor, TorchExecutor)
    meter = Meter(executor)
    llm.engine.executor = meter
    try:
        yield meter
    finally:
        llm.engine.executor = executor


# Words


def _line(llm: "LLM", number: int, step: Step) -> str:
    token = repr(llm.model.tokenizer.decode([step.token_id]))
    costs = "".join(
        f"{work.tokens:8d} {work.flops / 1e6:8,.0f}" for work in (step.cached, step.uncached)
    )
    head = f"{number:6d}{costs}  {step.chance:6.1%}  {token:<15} "
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(step.text.split()))
    room = _WIDTH - len(head)
    return head + (text if len(text) <= room else "…" + text[len(text) - room + 1 :])


def _totals(steps: list[Step]) -> Iterator[str]:
    if not steps:
        yield "No token was generated."
        return
    cached = sum((step.cached for step in steps), Work())
    uncached = sum((step.uncached for step in steps), Work())
    yield f"\n  {f'in all {len(steps)} steps':<38}{'with':>12}{'without':>12}"
    for words, field, unit in _ROWS:
        less, more = getattr(cached, field), getattr(uncached, field)
        digits = 0 if unit == 1 else 1
        numbers = f"{less / unit:12,.{digits}f}{more / unit:12,.{digits}f}"
        yield f"  {words:<38}{numbers}{more / max(less, 1):8.1f} x"
    wrong = sum(not step.agrees for step in steps)
    yield f"\n  The price: {cached.kv_written / 1e6:,.2f} MB of keys and values stay in memory."
    if wrong:
        yield f"  The two ways differ in {wrong} tokens: near ties, decided by rounding."
    else:
        yield "  Both ways chose the same token at every step: the cache changes no result."
