"""What came of a plan, looked over as a whole before anything of it is taken in."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.core.arrays import Bool
from pagedkv.core.plan import Observed, PromptLogprobs, PromptTargets, StepPlan, StepResult
from pagedkv.errors import InvalidTransition, shown

__all__ = ["checked_result", "not_finite"]

_WHOLE, _REAL = "iu", "f"  # kinds of dtypes


def checked_result(plan: StepPlan, result: StepResult, vocab_size: int) -> StepResult:
    """Return a result as arrays, once it answers all of a plan; what nobody asked for is left out.

    Args:
        vocab_size: A drawn token outside it says that the draw failed; nothing else of it counts.

    Raises:
        InvalidTransition: It is not one whole number per sample; or log-probabilities that were
            asked for, or observations, are absent, of another type or shape, or not finite.
    """
    if not isinstance(result, StepResult):
        raise _refusal(f"the result is {shown(result)}", "give a StepResult")
    token_ids = _array("token_ids", result.token_ids, _WHOLE, plan.sample_rows.shape)
    _check_observed(plan, result.observed)
    asked = plan.sampling.most_logprobs
    if asked < 0 and plan.prompt_targets is None and result.prompt_logprobs is None:
        return StepResult(token_ids=token_ids, observed=result.observed)
    logprobs = top_ids = top_logprobs = None
    if asked >= 0:
        num = len(plan.sample_rows)
        logprobs = _array("logprobs", result.logprobs, _REAL, (num,))
        top_ids, top_logprobs = _likeliest(result, num, min(asked, vocab_size))
        counts = (plan.sampling.num_logprobs >= 0) & (token_ids >= 0) & (token_ids < vocab_size)
        if not np.isfinite(logprobs[counts]).all():
            raise _refusal("the result's logprobs are not finite", "give those of what was drawn")
    return StepResult(
        token_ids=token_ids,
        observed=result.observed,
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        prompt_logprobs=_checked_scores(plan.prompt_targets, result.prompt_logprobs, vocab_size),
    )


def _checked_scores(
    targets: PromptTargets | None, scores: PromptLogprobs | None, vocab_size: int
) -> PromptLogprobs | None:
    if targets is None and scores is None:
        return None
    if targets is None or not isinstance(scores, PromptLogprobs):
        num = 0 if targets is None else len(targets.index)
        raise _refusal(
            f"the result's prompt_logprobs are {shown(scores)} for {num} prompt targets",
            "answer every prompt target of the plan, with PromptLogprobs",
        )
    num = len(targets.index)
    width = min(int(targets.num_logprobs.max()), vocab_size)
    logprobs = _array("prompt_logprobs.logprobs", scores.logprobs, _REAL, (num,))
    top_ids, top_logprobs = _likeliest(scores, num, width, "prompt_logprobs.")
    return PromptLogprobs(logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


def _likeliest(
    answer: StepResult | PromptLogprobs, num: int, width: int, prefix: str = ""
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the alternatives that an answer names: [num, K] ids and log-probabilities."""
    if not width:
        return np.empty((num, 0), np.int32), np.empty((num, 0), np.float32)
    return (
        _array(f"{prefix}top_ids", answer.top_ids, _WHOLE, (num, width)),
        _array(f"{prefix}top_logprobs", answer.top_logprobs, _REAL, (num, width)),
    )


def _array(name: str, value: object, kinds: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return a value as an array of such a dtype and shape; columns there may be more."""
    try:
        array = np.asarray(value)
    except Exception:  # a ragged list, a tensor elsewhere, an object's own conversion
        array = np.array(None)
    if array.size == 0:  # an empty list says nothing of its type
        array = array.astype(np.int32 if kinds == _WHOLE else np.float32)
    fits = array.ndim == len(shape) and array.shape[0] == shape[0]
    if not fits or array.shape[1:] < shape[1:] or array.dtype.kind not in kinds:
        kind, more = "whole numbers" if kinds == _WHOLE else "floats", len(shape) > 1
        raise _refusal(
            f"the result's {name} are {array.dtype} of shape {array.shape}",
            f"give {kind} of shape {shape}{' or wider' * more}, as the plan asks for",
        )
    return array


def _check_observed(plan: StepPlan, observed: list[Observed]) -> None:
    groups = len(plan.block_table)
    wanted = [(groups, len(each.members), each.width) for each in plan.observations]
    given = observed if isinstance(observed, list) else [None]
    if len(given) != len(wanted) or not all(map(_observes, given, wanted)):
        raise _refusal(
            f"the result's observations are not floats of the shapes {wanted}",
            "answer every observation of the plan, in order, in arrays",
        )


def _observes(seen: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(seen, Observed) and all(
        isinstance(each, np.ndarray) and each.shape == shape and each.dtype.kind in _REAL
        for each in (seen.values, seen.mass)
    )


def _refusal(what: str, remedy: str) -> InvalidTransition:
    return InvalidTransition(what, where="commit", remedy=remedy)


def not_finite(plan: StepPlan, result: StepResult) -> Bool:
    """Return which of the plan's sequences were observed to be no finite numbers: [B]."""
    wrong: Bool = np.zeros(len(plan.rows), np.bool_)
    for wanted, seen in zip(plan.observations, result.observed, strict=True):
        for values in (seen.values, seen.mass):
            # One pass, the fastest; which of them it is, or whether squares are just too large,
            # is rarely asked.
            flat = values.ravel()
            if not np.isfinite(flat @ flat):
                wrong[wanted.members] |= ~np.isfinite(values).all(axis=(0, 2))
    return wrong
