"""The prompts of a benchmark: seeded, as token ids, or from a file."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from pagedkv.cli.prompts import read_prompts
from pagedkv.errors import ConfigError

__all__ = [
    "BenchRequest",
    "custom_requests",
    "prefix_repetition_requests",
    "random_requests",
]


class BenchRequest(Struct, frozen=True, kw_only=True):
    """One request of a benchmark.

    Attributes:
        prompt: Text, or token ids.
        output_len: How many tokens to generate, whatever they are.
    """

    prompt: str | list[int]
    output_len: int


def random_requests(
    num_prompts: int,
    vocab_size: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[BenchRequest]:
    """Make prompts of random token ids.

    Lengths are drawn evenly from ``length * (1 - range_ratio)`` to ``length * (1 + range_ratio)``.

    Args:
        prefix_len: Tokens that all prompts begin with, on top of ``input_len``.

    Raises:
        ConfigError: A length or ratio is out of range.
    """
    _check_counts(num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    if not 0 <= range_ratio < 1:
        raise ConfigError(
            f"it is {range_ratio}", where="--random-range-ratio", remedy="give 0 to below 1"
        )
    if prefix_len < 0:
        raise ConfigError(f"it is {prefix_len}", where="--prefix-len", remedy="give 0 or more")
    rng = np.random.default_rng(seed)
    prefix = _ids(rng, vocab_size, prefix_len)
    inputs = _lengths(rng, input_len, range_ratio, num_prompts)
    outputs = _lengths(rng, output_len, range_ratio, num_prompts)
    return [
        BenchRequest(prompt=prefix + _ids(rng, vocab_size, length), output_len=output)
        for length, output in zip(inputs, outputs, strict=True)
    ]


def prefix_repetition_requests(
    num_prompts: int,
    vocab_size: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int = 0,
) -> list[BenchRequest]:
    """Make prompts that share a few prefixes, in shuffled order; suffixes are their own.

    Raises:
        ConfigError: A length is out of range, or there are more prefixes than prompts.
    """
    _check_counts(
        num_prompts=num_prompts,
        prefix_len=prefix_len,
        suffix_len=suffix_len,
        num_prefixes=num_prefixes,
        output_len=output_len,
    )
    if num_prefixes > num_prompts:
        raise ConfigError(
            f"{num_prefixes} prefixes for {num_prompts} prompts",
            where="--num-prefixes",
            remedy="give at most as many prefixes as prompts",
        )
    rng = np.random.default_rng(seed)
    prefixes = [_ids(rng, vocab_size, prefix_len) for _ in range(num_prefixes)]
    requests = [
        BenchRequest(
            prompt=prefixes[i % num_prefixes] + _ids(rng, vocab_size, suffix_len),
            output_len=output_len,
        )
        for i in range(num_prompts)
    ]
    return [requests[i] for i in rng.permutation(num_prompts)]


def custom_requests(path: str, num_prompts: int, *, output_len: int) -> list[BenchRequest]:
    """Read prompts from a file as `read_prompts` does, the first ``num_prompts`` of them.

    A JSON line may bring its own ``output_len``. A shorter file gives fewer requests: repeating
    prompts would measure the prefix cache instead.

    Raises:
        ConfigError, InvalidRequest: As `read_prompts`, or there is no prompt in the file.
    """
    _check_counts(num_prompts=num_prompts, output_len=output_len)
    requests = [
        _custom(prompt, output_len, where=Path(path).name)
        for prompt in read_prompts(path)[:num_prompts]
    ]
    if not requests:
        raise ConfigError("there is no prompt in it", where=path, remedy="give one prompt a line")
    return requests


def _custom(prompt: str | dict[str, Any], output_len: int, *, where: str) -> BenchRequest:
    fields = {"prompt": prompt} if isinstance(prompt, str) else prompt
    try:
        return msgspec.convert(
            {
                "prompt": fields.get("prompt", fields.get("prompt_token_ids")),
                "output_len": fields.get("output_len", output_len),
            },
            BenchRequest,
        )
    except msgspec.ValidationError as fault:
        raise ConfigError(
            str(fault), where=where, remedy="give text or token ids, and a whole output_len"
        ) from None


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(
                f"it is {count}", where="--" + name.replace("_", "-"), remedy="give 1 or more"
            )


def _ids(rng: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    ids: list[int] = rng.integers(0, vocab_size, count).tolist()
    return ids


def _lengths(rng: np.random.Generator, length: int, ratio: float, count: int) -> list[int]:
    low, high = max(1, int(length * (1 - ratio))), int(length * (1 + ratio))
    lengths: list[int] = rng.integers(low, high + 1, count).tolist()
    return lengths
