"""How tokens are drawn, and when drawing stops."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pagedkv.config import (
    LARGEST_INT32,
    LARGEST_INT64,
    Checked,
    ModelConfig,
    Natural,
    Positive,
    TokenId,
)
from pagedkv.errors import InvalidRequest, PagedKVError, is_text, shown

__all__ = ["SamplingParams"]

Temperature = Annotated[float, Meta(ge=0, le=1e6)]
_NOT_WITH_BEAMS = (
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "logprobs",
    "prompt_logprobs",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
)
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


def _as_tuple(value: Any) -> Any:
    """Return a list, range or array as a tuple, None as an empty one; anything else as it is."""
    if isinstance(value, list | tuple | range) or (isinstance(value, np.ndarray) and value.ndim):
        return tuple(i.item() if isinstance(i, np.generic) else i for i in value)
    return () if value is None else value


def _as_biases(given: Any) -> Any:
    """Return a mapping with plain numbers, also for keys that are text, as JSON has them."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"logit_bias is {shown(given)}",
            where="sampling.logit_bias",
            remedy="give numbers by token id, as {11: -5.0}",
        )
    plain = [[x.item() if isinstance(x, np.generic) else x for x in pair] for pair in given.items()]
    biases = {
        int(key) if isinstance(key, str) and re.fullmatch("[0-9]{1,10}", key) else key: value
        for key, value in plain
    }
    if len(biases) < len(plain):
        raise InvalidRequest(
            "logit_bias names a token twice, by number and by text",
            where="sampling.logit_bias",
            remedy="give one bias for each token",
        )
    return biases


class SamplingParams(Checked, frozen=True, kw_only=True):
    """How tokens are drawn and when drawing stops; the words and defaults are vLLM's.

    Attributes:
        n: Sequences to draw for the prompt; they share its blocks and fork copy-on-write.
        best_of: Sequences to draw, of which the ``n`` likeliest are returned, by the sum of their
            log-probabilities; None draws ``n``.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keep the likeliest tokens until their probabilities sum to this.
        top_k: Keep this many likeliest tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than this fraction of the likeliest.
        seed: Fixes the draws of this request, whatever else is in the batch.
        max_tokens: The most tokens to generate; None goes on to the model's length.
        min_tokens: Before so many tokens, none that would end the sequence is drawn, and no stop
            string ends the text. The model's own end may be drawn if it is ignored anyway; vLLM
            bars it then as well.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Token ids that end the sequence, beside the model's own.
        ignore_eos: Go on past the model's end-of-sequence tokens.
        logprobs: Report this many likeliest alternatives per token; 0 only the token's own.
        prompt_logprobs: The same for the prompt's tokens after the first. All of them are then
            computed: none is taken from the prefix cache.
        repetition_penalty: Above 1 makes tokens of prompt and output less likely (Keskar 2019).
        presence_penalty: Subtracted from the logit of every token already generated.
        frequency_penalty: The same, times how often it was generated.
        logit_bias: By token id, what is added to its logit before penalties, as ``{11: -5}``, in
            JSON ``{"11": -5}``; -100 all but forbids.
        allowed_token_ids: Draw no other tokens than these; None draws any.
        beam_width: Search with this many beams instead of drawing, and return the ``n`` best; the
            rules are transformers'. Beams share blocks as far as they are alike.
        length_penalty: A found sequence is judged by the sum of its log-probabilities divided by
            its length to this power; above 0 favours long ones.
        early_stopping: When a search ends: once as many are found as there are beams (True), when
            by its present length no beam is likely to become better (False), or when none can
            (``never``).
    """

    section: ClassVar[str] = "sampling"
    error: ClassVar[type[PagedKVError]] = InvalidRequest

    n: Positive = 1
    best_of: Positive | None = None
    temperature: Temperature = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=LARGEST_INT32)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Natural | None = None
    max_tokens: Positive | None = 16
    min_tokens: Natural = 0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=64)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=64)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[TokenId, Bias] | None = None
    allowed_token_ids: tuple[TokenId, ...] | None = None
    beam_width: Annotated[int, Meta(ge=2, le=LARGEST_INT64)] | None = None
    length_penalty: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        msgspec.structs.force_setattr(self, "stop", _as_tuple(stop))
        msgspec.structs.force_setattr(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple(self.allowed_token_ids)
            msgspec.structs.force_setattr(self, "allowed_token_ids", allowed)
        msgspec.structs.force_setattr(self, "logit_bias", _as_biases(self.logit_bias))
        if isinstance(self.early_stopping, str) and self.early_stopping != "never":
            raise InvalidRequest(
                f"early_stopping is {shown(self.early_stopping)}",
                where="sampling.early_stopping",
                remedy="give True, False or 'never'",
            )
        super().__post_init__()
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(
                f"best_of is {self.best_of} and n is {self.n}",
                where="sampling.best_of",
                remedy="draw at least as many as are returned",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens} and max_tokens is {self.max_tokens}",
                where="sampling.min_tokens",
                remedy="allow at least as many tokens as there must be",
            )
        if self.allowed_token_ids == ():
            raise InvalidRequest(
                "allowed_token_ids is empty",
                where="sampling.allowed_token_ids",
                remedy="give the tokens that may be drawn, or None for all",
            )
        if self.beam_width is not None:
            self._check_search(self.beam_width)
        if "" in self.stop:
            raise InvalidRequest(
                "an empty stop string", where="sampling.stop", remedy="give strings with text"
            )
        if not all(map(is_text, self.stop)):
            raise InvalidRequest(
                f"stop is {shown(self.stop)}",
                where="sampling.stop",
                remedy="give text that can be encoded as UTF-8",
            )

    def _check_search(self, width: int) -> None:
        """Refuse what has no meaning where nothing is drawn, or what beams cannot report."""
        if width < self.n:
            raise InvalidRequest(
                f"beam_width is {width} and n is {self.n}",
                where="sampling.beam_width",
                remedy="search with at least as many beams as are returned",
            )
        for name in _NOT_WITH_BEAMS:
            default = {field.name: field.default for field in msgspec.structs.fields(self)}[name]
            value = getattr(self, name)
            if value != default and not (name == "temperature" and value == 0):
                raise InvalidRequest(
                    f"{name} is {value!r} and beam_width {width}",
                    where=f"sampling.{name}",
                    remedy="leave it out: a beam search goes by the model's own log-probabilities",
                )

    def ends_at(self, model: ModelConfig) -> list[int]:
        """Return the tokens of the vocabulary that end a sequence, in ascending order."""
        ends = {*self.stop_token_ids, *(() if self.ignore_eos else model.eos_token_ids)}
        return sorted(token for token in ends if token < model.vocab_size)

    def named_stop(self, token: int | None, eos_token_ids: tuple[int, ...]) -> int | None:
        """Return a stop token that ended a sequence, unless it is the model's own, unasked for."""
        return None if token in eos_token_ids and not self.ignore_eos else token

    def num_candidates(self, num_stop_ids: int) -> int | None:
        """Return how many next tokens each beam names: enough to go on whatever ends."""
        width = self.beam_width
        return None if width is None else width * (1 + max(1, num_stop_ids))

    @property
    def width(self) -> int:
        """Sequences that run for the prompt."""
        return self.beam_width or self.best_of or self.n

    @property
    def grows(self) -> bool:
        """Whether what is drawn first is returned: else it is chosen once all has been drawn."""
        return self.beam_width is None and not self.ranks

    @property
    def ranks(self) -> bool:
        """Whether only the likeliest of the drawn sequences are returned."""
        return self.beam_width is None and self.width > self.n
