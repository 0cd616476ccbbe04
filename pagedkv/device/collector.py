"""From steps to outputs: gathers each request's text, log-probabilities and ends."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from pagedkv.core.arrays import Float32, Int32
from pagedkv.core.plan import PromptLogprobs, PromptTargets, StepOutput, StepPlan, StepResult
from pagedkv.core.request import FinishedSequence, Request
from pagedkv.device.outputs import CompletionOutput, Logprob, RequestOutput
from pagedkv.device.text import TextStream

__all__ = ["OutputCollector"]


class _Tracked:
    """A request in work: what has been gathered of each of its sequences, by index."""

    def __init__(self, request: Request, prompt: str | None, seq_ids: list[int]) -> None:
        self.request = request
        self.prompt = prompt
        self.seq_ids = seq_ids
        self.cumulative = [0.0] * len(seq_ids)
        self.completions: list[CompletionOutput | None] = [None] * len(seq_ids)
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []


class _Watched:
    """A sequence whose every token is looked at, because text or log-probabilities need it."""

    def __init__(self, tracked: _Tracked, index: int, text: TextStream) -> None:
        self.tracked = tracked
        self.index = index
        self.text = text
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []


class OutputCollector:
    """Turns the outputs of steps into the outputs of requests.

    Only sequences that stream, have stop strings or want log-probabilities cost anything per
    token; the text of all others is decoded once, at their end.

    Args:
        tokenizer: The model's; None leaves every text empty.
        hidden: Ids that are not shown, beside the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, hidden: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._requests: dict[str, _Tracked] = {}
        self._watched: dict[int, _Watched] = {}
        self._scored: dict[int, _Tracked] = {}  # by the sequence that computes the prompt

    def track(
        self, request: Request, prompt: str | None, seq_ids: list[int], *, streams: bool = False
    ) -> None:
        """Begin to gather a request's outputs.

        Args:
            streams: Whether `snapshots` will be asked for it.
        """
        tracked = self._requests[request.request_id] = _Tracked(request, prompt, seq_ids)
        params = request.sampling
        if params.prompt_logprobs is not None:
            tracked.prompt_logprobs = [None] * len(request.prompt_token_ids)
            self._scored[seq_ids[0]] = tracked
        if (streams and params.grows) or params.stop or params.logprobs is not None:
            for index, seq_id in enumerate(seq_ids):
                text = TextStream(
                    self._tokenizer,
                    params.stop,
                    hidden=self._hidden,
                    min_tokens=params.min_tokens,
                )
                self._watched[seq_id] = _Watched(tracked, index, text)

    def observe(
        self, plan: StepPlan, result: StepResult, output: StepOutput
    ) -> list[tuple[int, str]]:
        """Take in a step's tokens for the sequences that are watched, and what it scored.

        Returns:
            The sequences whose text now holds a stop string, and the string.
        """
        if plan.prompt_targets is not None and result.prompt_logprobs is not None:
            self._take_scores(plan.prompt_targets, result.prompt_logprobs)
        if not self._watched:
            return []
        seen = np.isin(output.seq_ids, np.fromiter(self._watched, np.int64, len(self._watched)))
        stops = []
        for i in np.flatnonzero(seen).tolist():
            seq_id, token = int(output.seq_ids[i]), int(output.token_ids[i])
            watched = self._watched[seq_id]
            watched.token_ids.append(token)
            watched.text.push([token])
            sample = int(output.sample[i])
            if plan.sampling.num_logprobs[sample] >= 0:
                wanted = int(plan.sampling.num_logprobs[sample])
                watched.logprobs.append(_logprobs(result, sample, token, wanted))
            if watched.text.stopped is not None:
                stops.append((seq_id, watched.text.stopped))
        return stops

    def _take_scores(self, targets: PromptTargets, scores: PromptLogprobs) -> None:
        for i, seq_id in enumerate(targets.seq_ids.tolist()):
            if seq_id in self._scored:  # it may have been aborted meanwhile
                place, token = int(targets.place[i]), int(targets.token_ids[i])
                self._scored[seq_id].prompt_logprobs[place] = _entries(
                    token, scores.logprobs[i], scores.top_ids[i], scores.top_logprobs[i]
                )

    def finish(self, finished: list[FinishedSequence]) -> list[RequestOutput]:
        """Take in sequences that ended; return the requests that are complete with them.

        Those of requests that are not tracked, or not any more, are passed over.
        """
        complete = []
        for end in finished:
            tracked = self._requests.get(end.request_id)
            if tracked is None:
                continue
            tracked.completions[end.index] = self._completion(end)
            tracked.cumulative[end.index] = end.cumulative_logprob or 0.0
            tracked.num_cached_tokens = max(tracked.num_cached_tokens, end.num_cached_tokens)
            if None not in tracked.completions:
                del self._requests[end.request_id]
                complete.append(self._output(tracked))
        return complete

    def forget(self, request_id: str) -> None:
        """Drop all that was gathered of a request, if it is tracked."""
        tracked = self._requests.pop(request_id, None)
        for seq_id in tracked.seq_ids if tracked is not None else ():
            self._watched.pop(seq_id, None)
            self._scored.pop(seq_id, None)

    def _likeliest(self, tracked: _Tracked) -> list[CompletionOutput]:
        """Return the ``n`` likeliest of ``best_of`` sequences; those that failed come last."""

        def rank(i: int) -> tuple[bool, float, int]:
            done = tracked.completions[i]
            assert done is not None
            return done.finish_reason in ("error", "abort"), -tracked.cumulative[i], i

        best = sorted(range(len(tracked.completions)), key=rank)[: tracked.request.sampling.n]
        chosen = [tracked.completions[i] for i in best]
        return [replace(done, index=i) for i, done in enumerate(chosen) if done is not None]

    def _completion(self, end: FinishedSequence) -> CompletionOutput:
        watched = self._watched.pop(end.seq_id, None)
        self._scored.pop(end.seq_id, None)
        reason, stop_reason, logprobs = end.finish_reason, end.stop_reason, None
        if watched is None:
            text = self._decode(end.token_ids)
        else:
            watched.text.finish()
            text = watched.text.text
            if watched.text.stopped is not None:  # it may have met its length at the same token
                reason, stop_reason = "stop", watched.text.stopped
            if watched.tracked.request.sampling.logprobs is not None:
                logprobs = watched.logprobs
        return CompletionOutput(
            index=end.index,
            text=text,
            token_ids=end.token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=logprobs,
            error=end.error,
            num_preemptions=end.num_preemptions,
            num_swaps=end.num_swaps,
            num_shrinks=end.num_shrinks,
            num_evicted_tokens=end.num_evicted_tokens,
            forfeited_mass=end.forfeited_mass,
            leave_one_out_error=end.leave_one_out_error,
            cumulative_logprob=_total(logprobs, end.token_ids, end.cumulative_logprob),
        )

    def _decode(self, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        shown = [token for token in token_ids if token not in self._hidden]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=True)
        return text

    def snapshots(self, output: StepOutput) -> list[RequestOutput]:
        """Return the requests that a step gave tokens to and that have not finished, as they are.

        Only for requests tracked with ``streams``; those whose outputs are chosen at their end, by
        ``best_of`` or a beam search, have nothing to show before.
        """
        touched: dict[str, _Tracked] = {}
        for seq_id in output.seq_ids.tolist():
            if seq_id in self._watched:
                tracked = self._watched[seq_id].tracked
                if tracked.request.sampling.grows:
                    touched[tracked.request.request_id] = tracked
        return [self._output(tracked) for tracked in touched.values()]

    def _output(self, tracked: _Tracked) -> RequestOutput:
        outputs = [
            self._partial(tracked, index) if done is None else done
            for index, done in enumerate(tracked.completions)
        ]
        if tracked.request.sampling.ranks and None not in tracked.completions:
            outputs = self._likeliest(tracked)
        return RequestOutput(
            request_id=tracked.request.request_id,
            prompt=tracked.prompt,
            prompt_token_ids=list(map(int, tracked.request.prompt_token_ids)),
            outputs=outputs,
            num_cached_tokens=tracked.num_cached_tokens,
            prompt_logprobs=tracked.prompt_logprobs or None,
            finished=None not in tracked.completions,
        )

    def _partial(self, tracked: _Tracked, index: int) -> CompletionOutput:
        watched = self._watched[tracked.seq_ids[index]]
        return CompletionOutput(
            index=index,
            text=watched.text.text,
            token_ids=watched.token_ids.copy(),
            logprobs=watched.logprobs.copy() or None,
            cumulative_logprob=_total(watched.logprobs or None, watched.token_ids),
        )


def _total(
    logprobs: list[dict[int, Logprob]] | None, token_ids: list[int], known: float | None = None
) -> float | None:
    """Return the sum of the tokens' log-probabilities, if it is known or they are."""
    if logprobs is None:
        return known
    return sum(entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=True))


def _logprobs(result: StepResult, sample: int, token: int, wanted: int) -> dict[int, Logprob]:
    """Return the drawn token's entry, then those of the ``wanted`` likeliest."""
    assert result.logprobs is not None
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    top_ids, top = result.top_ids[sample, :wanted], result.top_logprobs[sample, :wanted]
    return _entries(token, result.logprobs[sample], top_ids, top)


def _entries(
    token: int, logprob: np.float32, top_ids: Int32, top_logprobs: Float32
) -> dict[int, Logprob]:
    """Return a token's entry, then those of the likeliest in its place; ids of -1 fill."""
    entries = {token: Logprob(logprob=float(logprob))}
    pairs = zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)
    for rank, (top, value) in enumerate(pairs, 1):
        if top >= 0:
            entries[top] = Logprob(logprob=value, rank=rank)
    return entries
