"""What a user gets back, in vLLM's words."""

import numpy as np
from msgspec import Struct

from pagedkv.core.arrays import Float32, Int32
from pagedkv.errors import PagedKVError

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "ScoreOutput"]


class Logprob(Struct, frozen=True, kw_only=True):
    """The log-probability of one token at one place.

    Attributes:
        rank: 1 is the likeliest; None where only the value is known.
    """

    logprob: float
    rank: int | None = None


class CompletionOutput(Struct, frozen=True, kw_only=True):
    """One generated sequence.

    Attributes:
        token_ids: The generated tokens, a stop token included.
        text: Their text, without special tokens and without the stop string.
        finish_reason: ``stop``, ``length``, ``abort``, ``error``; None while it runs.
        stop_reason: The stop token's id or the stop string, if one ended it and it was not eos.
        logprobs: Per token, id to log-probability, the drawn token first; None if not asked for.
        cumulative_logprob: The sum of its tokens' log-probabilities; None unless they were asked
            for, or sequences were ranked by it: by ``best_of``, or a beam search.
        error: What went wrong, if ``finish_reason`` is ``error``.
        num_preemptions: How often its blocks were taken, and it had to wait.
        num_swaps: How often they were kept in host memory instead of computed again.
        num_shrinks: How often it had to forget blocks because others lacked them.
        num_evicted_tokens: Tokens that its eviction policy has forgotten, mean over groups; 0 says
            that the policy never fired.
        forfeited_mass: The attention mass that they got from the last query before they went,
            summed, mean over groups.
        leave_one_out_error: How far leaving them out moves the attention output: the mean over
            the queries that saw each block, or token, before it went, summed over those that
            went, mean over groups. None unless the policy scores by it (``lobo``).
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    error: str = ""
    num_preemptions: int = 0
    num_swaps: int = 0
    num_shrinks: int = 0
    num_evicted_tokens: float = 0.0
    forfeited_mass: float = 0.0
    leave_one_out_error: float | None = None


class RequestOutput(Struct, frozen=True, kw_only=True):
    """A request and its ``n`` generated sequences, by index.

    The first sequence's fields can be read on the output itself: ``output.text``.

    Attributes:
        num_cached_tokens: Prompt tokens that the prefix cache spared.
        prompt_logprobs: Per prompt token, id to log-probability, the token itself first; None for
            the first token, which nothing predicts. None as a whole if not asked for.
        finished: Whether every sequence has ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first sequence's tokens."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first sequence ended."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """The first sequence's log-probabilities."""
        return self.outputs[0].logprobs

    @property
    def num_preemptions(self) -> int:
        """How often its sequences were preempted, all together."""
        return sum(output.num_preemptions for output in self.outputs)

    @property
    def num_evicted_tokens(self) -> float:
        """Tokens that its sequences have forgotten, all together."""
        return sum(output.num_evicted_tokens for output in self.outputs)

    @property
    def forfeited_mass(self) -> float:
        """The attention mass that its sequences have forfeited, all together."""
        return sum(output.forfeited_mass for output in self.outputs)

    @property
    def leave_one_out_error(self) -> float | None:
        """The leave-one-out error of what its sequences have forgotten; None if not scored."""
        errors = [output.leave_one_out_error for output in self.outputs]
        return None if None in errors else sum(error for error in errors if error is not None)


class ScoreOutput(Struct, frozen=True, kw_only=True, eq=False):
    """The log-probabilities of given tokens under an eviction policy, and what it forgot.

    T is the number of tokens; the first is predicted by nothing.

    Attributes:
        token_ids: The tokens.
        logprobs: [T - 1] Of each token after the first, given those before it that were still
            resident.
        greedy: [T - 1] The likeliest token in each one's place.
        num_evicted_tokens: As in `CompletionOutput`.
        forfeited_mass: As in `CompletionOutput`.
        leave_one_out_error: As in `CompletionOutput`.
        num_preemptions: As in `CompletionOutput`.
    """

    token_ids: list[int]
    logprobs: Float32
    greedy: Int32
    num_evicted_tokens: float = 0.0
    forfeited_mass: float = 0.0
    leave_one_out_error: float | None = None
    num_preemptions: int = 0

    @classmethod
    def of(cls, output: RequestOutput) -> "ScoreOutput":
        """Read the scores of a request that asked for its prompt's and the likeliest tokens'.

        Raises:
            PagedKVError: The request ended with an error.
        """
        if error := output.outputs[0].error:
            raise PagedKVError(error)
        assert output.prompt_logprobs is not None
        logprobs = np.empty(len(output.prompt_token_ids) - 1, np.float32)
        greedy = np.empty(len(logprobs), np.int32)
        for i, entries in enumerate(output.prompt_logprobs[1:]):
            assert entries is not None
            logprobs[i] = entries[output.prompt_token_ids[i + 1]].logprob
            greedy[i] = next((token for token, entry in entries.items() if entry.rank == 1), -1)
        return cls(
            token_ids=output.prompt_token_ids,
            logprobs=logprobs,
            greedy=greedy,
            num_evicted_tokens=output.num_evicted_tokens,
            forfeited_mass=output.forfeited_mass,
            leave_one_out_error=output.leave_one_out_error,
            num_preemptions=output.num_preemptions,
        )

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability."""
        return float(np.exp(-self.logprobs.mean(dtype=np.float64)))
