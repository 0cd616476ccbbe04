"""What a user gets back, in vLLM's words."""

from msgspec import Struct

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]


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
        error: What went wrong, if ``finish_reason`` is ``error``.
        num_preemptions: How often its blocks were taken and its tokens computed again.
        num_evicted_tokens: Tokens that its eviction policy has forgotten, mean over groups; 0 says
            that the policy never fired.
        forfeited_mass: The attention mass that their blocks got from the last query before they
            went, summed over blocks, mean over groups.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str = ""
    num_preemptions: int = 0
    num_evicted_tokens: float = 0.0
    forfeited_mass: float = 0.0

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the drawn tokens' log-probabilities; None if not asked for."""
        if self.logprobs is None:
            return None
        pairs = zip(self.logprobs, self.token_ids, strict=True)
        return sum(entry[token].logprob for entry, token in pairs)


class RequestOutput(Struct, frozen=True, kw_only=True):
    """A request and its ``n`` generated sequences, by index.

    The first sequence's fields can be read on the output itself: ``output.text``.

    Attributes:
        num_cached_tokens: Prompt tokens that the prefix cache spared.
        finished: Whether every sequence has ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
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
