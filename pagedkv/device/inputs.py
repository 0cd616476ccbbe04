"""What users hand in, put in order: one prompt or many, what goes with them for all or one each."""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any, NoReturn

import numpy as np

from pagedkv.core.arrays import Int32
from pagedkv.core.request import SamplingParams
from pagedkv.errors import InvalidRequest, closest, shown

__all__ = [
    "Message",
    "Prompt",
    "as_conversations",
    "as_prompts",
    "as_turns",
    "check_scorable",
    "check_stops",
    "encode",
    "per_prompt",
    "unpacked",
]

Prompt = str | Many[int] | Int32 | Mapping[str, Any]
"""Text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids``, and ``cache_salt``."""

Message = Mapping[str, Any]
"""``role`` and ``content``: text, or a list of parts such as ``{"type": "text", "text": "hi"}``."""

_CONTENTS = ("prompt", "prompt_token_ids")
_KEYS = (*_CONTENTS, "cache_salt")

# What may be given for all prompts or one each: its type, default, plural, and how to write one.
_EACH: dict[str, tuple[type, Any, str, str]] = {
    "sampling_params": (
        SamplingParams,
        SamplingParams(),
        "sampling parameters",
        "SamplingParams(...)",
    ),
    "priority": (int, 0, "priorities", "a whole number"),
    "tenant": (str, "", "tenants", "a name"),
}


def as_prompts(prompts: Prompt | Many[Prompt]) -> list[Prompt]:
    """Tell one prompt from many: a string, a mapping or a flat list of ids is one.

    Raises:
        InvalidRequest: They are neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = prompts.ndim > 0 if isinstance(prompts, np.ndarray) else isinstance(prompts, Many)
    if not listed or isinstance(prompts, bytes):
        raise InvalidRequest(
            f"the prompts are {prompts!r:.80}",
            where="prompts",
            remedy="give a text, a list of token ids, or a list of those",
        )
    many = list(prompts)
    if many and isinstance(many[0], int | np.integer):
        return [many]
    return many


def unpacked(prompt: Prompt, where: str) -> tuple[str | Many[int] | Int32, str]:
    """Return what a prompt says, as text or token ids, and the salt of its blocks.

    Raises:
        InvalidRequest: A mapping has a key that means nothing, or says two things, or none.
    """
    if not isinstance(prompt, Mapping):
        return prompt, ""
    for key in prompt:
        if key not in _KEYS:  # passed over, a misspelt salt would share blocks with everybody
            near = closest(str(key), list(_KEYS))
            raise InvalidRequest(
                f"a prompt has no key {shown(key)}",
                where=where,
                remedy=f"did you mean {near!r}?" if near else f"give {', '.join(_KEYS)}",
            )
    given = [key for key in _CONTENTS if key in prompt]
    if len(given) != 1:
        raise InvalidRequest(
            f"{' and '.join(_CONTENTS)} are both given" if given else "no prompt is given",
            where=where,
            remedy=f"give {' or '.join(_CONTENTS)}",
        )
    content = prompt[given[0]]
    if given[0] == "prompt_token_ids" and isinstance(content, str):
        raise InvalidRequest(
            f"prompt_token_ids is the text {shown(content)}",
            where=where,
            remedy="give it as prompt",
        )
    return content, prompt.get("cache_salt", "")


def per_prompt(name: str, given: Any, count: int) -> Many[Any]:
    """Return an argument's values, one for each prompt.

    Args:
        name: Which one: ``sampling_params``, ``priority`` or ``tenant``.
        given: One value for all, a list of one each, or None for the default.
        count: How many prompts there are.

    Raises:
        InvalidRequest: They are not as many as the prompts, or something else.
    """
    kind, default, plural, example = _EACH[name]
    if given is None or _is(given, kind):
        return [default if given is None else given] * count
    if not isinstance(given, list | tuple) or not all(_is(each, kind) for each in given):
        raise InvalidRequest(
            f"the {plural} are {shown(given)}",
            where=name,
            remedy=f"give {example}, or a list with one for each prompt",
        )
    if len(given) != count:
        raise InvalidRequest(
            f"{len(given)} {plural} for {count} prompts",
            where=name,
            remedy="give one for all or one each",
        )
    return given


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_stops(params: SamplingParams, where: str, *, has_text: bool) -> None:
    """Refuse stop strings that could never be met.

    Raises:
        InvalidRequest: There are stop strings and the model has no tokenizer.
    """
    if params.stop and not has_text:
        raise InvalidRequest(
            "stop strings need a tokenizer and the model has none",
            where=where,
            remedy="use stop_token_ids",
        )


def check_scorable(many: Many[Prompt]) -> None:
    """Refuse what has no token that others predict.

    Raises:
        InvalidRequest: One of them is not two token ids or more.
    """
    for index, tokens in enumerate(many):
        if isinstance(tokens, str | Mapping) or _length(tokens) < 2:
            raise InvalidRequest(
                "it is not two tokens or more",
                where=f"sequence {index} of token_ids",
                remedy="give token ids; the first is predicted by nothing and has no score",
            )


def _length(tokens: Any) -> int:
    try:
        return len(tokens)
    except TypeError:  # None, a number, or an array without dimensions
        return 0


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
    _refuse_messages(messages, "messages")


def as_turns(messages: Many[Message]) -> list[dict[str, Any]]:
    """Return a conversation's messages as chat templates take them: their content as one text.

    Parts of text are joined by line breaks. A message with ``tool_calls`` may have no content;
    whatever else a message says is for the template.

    Raises:
        InvalidRequest: A message has no role, or content that is not text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        _refuse_messages(messages, "messages")
    return [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _turn(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        _refuse_messages(message, where)
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return dict(message)
    parts = content if isinstance(content, list | tuple) else ()
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping) and part.get("type") == "text" and _is(part.get("text"), str)
    ]
    if not parts or len(texts) < len(parts):
        raise InvalidRequest(
            f"the content is {shown(content)}",
            where=where,
            remedy='give text, or parts such as {"type": "text", "text": "..."}',
        )
    return {**message, "content": "\n".join(texts)}


def _refuse_messages(given: object, where: str) -> NoReturn:
    raise InvalidRequest(
        f"{'the messages are' if where == 'messages' else 'the message is'} {shown(given)}",
        where=where,
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
