"""What users hand in, put in order: one prompt or many, parameters for all or one each."""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.request import SamplingParams
from pagedkv.errors import InvalidRequest

__all__ = ["Message", "Prompt", "as_conversations", "as_prompts", "encode", "per_prompt"]

Prompt = str | Many[int] | Int32 | Mapping[str, Any]
"""Text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids``, and ``cache_salt``."""

Message = Mapping[str, str]


def as_prompts(prompts: Prompt | Many[Prompt]) -> list[Prompt]:
    """Tell one prompt from many: a string, a mapping or a flat list of ids is one.

    Raises:
        InvalidRequest: They are neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Many | np.ndarray) or isinstance(prompts, bytes):
        raise InvalidRequest(
            f"the prompts are {prompts!r:.80}",
            where="prompts",
            remedy="give a text, a list of token ids, or a list of those",
        )
    many = list(prompts)
    if many and isinstance(many[0], int | np.integer):
        return [many]
    return many


def per_prompt(
    params: SamplingParams | Many[SamplingParams] | None, count: int
) -> Many[SamplingParams]:
    """Return one set of sampling parameters for each prompt.

    Raises:
        InvalidRequest: They are not as many as the prompts, or something else.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    each = list(params) if isinstance(params, list | tuple) else []
    if not isinstance(params, list | tuple) or any(not isinstance(p, SamplingParams) for p in each):
        raise InvalidRequest(
            f"the sampling parameters are {params!r:.80}",
            where="sampling_params",
            remedy="give SamplingParams(...), or a list of them",
        )
    if len(each) != count:
        raise InvalidRequest(
            f"{len(each)} sampling parameters for {count} prompts",
            where="sampling_params",
            remedy="give one for all or one each",
        )
    return each


def as_conversations(messages: Many[Message] | Many[Many[Message]]) -> list[Many[Message]]:
    """Tell one conversation from many: a list of messages is one.

    Raises:
        InvalidRequest: They are neither.
    """
    many = list(messages) if isinstance(messages, list | tuple) else [messages]
    if many and all(isinstance(message, Mapping) for message in many):
        if messages is not many[0] and isinstance(messages, list | tuple):
            return [many]  # type: ignore[list-item]
    elif many and all(isinstance(each, list | tuple) for each in many):
        return many  # type: ignore[return-value]
    raise InvalidRequest(
        f"the messages are {messages!r:.80}",
        where="messages",
        remedy='give a list of messages such as {"role": "user", "content": "..."}',
    )


def encode(tokenizer: Any, text: str, where: str) -> list[int]:
    """Return a text's token ids.

    Raises:
        InvalidRequest: There is no tokenizer, or the text is not valid Unicode.
    """
    if tokenizer is None:
        raise InvalidRequest(
            "the prompt is text and the model has no tokenizer",
            where=where,
            remedy="give token ids",
        )
    check_unicode(text, where)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def check_unicode(text: str, where: str) -> None:
    """Refuse half a surrogate pair, which is how undecodable bytes of a terminal arrive.

    Raises:
        InvalidRequest: The text cannot be written in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise InvalidRequest(
            f"character {fault.start} of the text is half a surrogate pair",
            where=where,
            remedy="give valid Unicode text",
        ) from None
