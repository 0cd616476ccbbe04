"""Reading prompts from arguments, files and standard input."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec

from pagedkv.errors import ConfigError, InvalidRequest

__all__ = ["Prompt", "gather_prompts", "read_prompts"]

Prompt = str | dict[str, Any]
"""Text, or an object with ``prompt``, ``prompt_token_ids`` or ``messages``."""

_KEYS = ("prompt", "prompt_token_ids", "messages")


def gather_prompts(arguments: list[str], path: str | None, stdin: TextIO) -> list[Prompt]:
    """Return the prompts given as arguments, then those of a file, else standard input as one.

    Args:
        path: A file of prompts; ``-`` reads them from standard input.

    Raises:
        InvalidRequest: There is no prompt, or a line holds none.
        ConfigError: The file cannot be read.
    """
    prompts: list[Prompt] = list(arguments)
    if path is not None:
        prompts += read_prompts(path, stdin)
    elif not prompts and not stdin.isatty():
        text = stdin.read().rstrip("\n")
        prompts += [text] if text else []
    if not prompts:
        raise InvalidRequest(
            "there is no prompt",
            where="generate",
            remedy="give one as an argument, with --prompts-file, or on standard input",
        )
    return prompts


def read_prompts(path: str, stdin: TextIO | None = None) -> list[Prompt]:
    """Read a file of prompts, one a line; empty lines are passed over.

    A line that begins with ``{``, and every line of a file called .json or .jsonl, is JSON with
    ``prompt``, ``prompt_token_ids`` or ``messages``; any other line is itself the prompt.

    Raises:
        InvalidRequest: A line is not such an object and should be; names file and line.
        ConfigError: The file cannot be read.
    """
    name = "standard input" if path == "-" else path
    return list(_parse(_read(path, stdin or sys.stdin), name))


def _read(path: str, stdin: TextIO) -> str:
    if path == "-":
        return stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"cannot be read: {fault}", where=path, remedy="give a readable text file"
        ) from None


def _parse(text: str, name: str) -> Iterator[Prompt]:
    is_json = name.endswith((".json", ".jsonl"))
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.startswith("{") or (is_json and line.strip()):
            yield _object(line, f"{name}:{number}")
        elif line.strip():
            yield line


def _object(line: str, where: str) -> dict[str, Any]:
    remedy = f"give a JSON object with one of {', '.join(_KEYS)}, in a line"
    try:
        prompt = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError) as fault:
        raise InvalidRequest(f"not a JSON object: {fault}", where=where, remedy=remedy) from None
    if not any(key in prompt for key in _KEYS):
        raise InvalidRequest("an object without a prompt", where=where, remedy=remedy)
    if not isinstance(prompt.get("prompt", ""), str):
        raise InvalidRequest("the prompt is not text", where=where, remedy=remedy)
    return prompt
