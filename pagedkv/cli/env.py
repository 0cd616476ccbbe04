"""``pagedkv env``: what a bug report needs."""

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from pagedkv.cli.flags import DTYPES
from pagedkv.cli.machine import machine, versions
from pagedkv.errors import UnsupportedBackend

if TYPE_CHECKING:
    from pagedkv.device.dispatch import Entry

__all__ = ["add_parser", "collect", "run"]

_DESCRIPTION = """\
Show versions, the processor and its vector instructions, threads, which attention operator would
serve each element type and whether its native kernel is compiled already, what every operator takes
and whether it runs here, and where models are kept. Paste it into a bug report.
"""
_EPILOG = """\
examples:
  pagedkv env
  pagedkv env --compile     compile the attention kernel now, so that no request waits for it
  pagedkv env --json
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "env",
        help="show versions, processor and attention kernel",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the attention kernel of every element type (10-30 s each, once)",
    )


def run(args: argparse.Namespace) -> int:
    """Print it."""
    facts = collect(compile_kernels=args.compile)
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(facts)).decode())
    else:
        print("\n".join(_lines(facts)))
    return 0


def collect(*, compile_kernels: bool = False) -> dict[str, Any]:
    """Return what the verb shows, as plain data.

    Args:
        compile_kernels: Compile, or load from disk, the kernels of all element types.
    """
    from pagedkv.device.weights import cache_dir

    attention = _attention(compile_kernels)  # loads torch, whose threads are then known
    return {
        "versions": versions(),
        "machine": machine(),
        "attention": attention,
        "model_cache": str(cache_dir()),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PAGEDKV_")},
    }


def _attention(compile_kernels: bool) -> dict[str, Any]:
    """Say by element type which operator serves it and why one does not, and of its kernel."""
    try:
        import torch

        from pagedkv.device.dispatch import OPERATORS, choose_operator
    except (ImportError, UnsupportedBackend) as fault:
        return {"unavailable": f"{fault}; install it with: pip install 'pagedkv[torch]'"}
    facts: dict[str, Any] = {
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None
    }
    for dtype in DTYPES:
        try:
            operator = choose_operator("cpu", getattr(torch, dtype)).NAME
            state = _kernel(dtype) if compile_kernels else _on_disk(dtype)
            facts[dtype] = f"{operator}, {_lanes()}, {state}"
        except UnsupportedBackend as fault:
            facts[dtype] = f"none: {fault}"
    facts["operators"] = [
        {
            "device": entry.device,
            "name": entry.name,
            "takes": entry.takes(),
            "here": _here(entry, cuda=bool(facts["cuda"])),
        }
        for entry in OPERATORS
    ]
    return facts


def _here(entry: "Entry", *, cuda: bool) -> str:
    """Say whether an operator runs on this machine, and if not why."""
    if entry.device == "cuda" and not cuda:
        return "no: torch sees no GPU"
    obstacle = entry.obstacle(entry.stored[0])
    return f"no: {obstacle}" if obstacle else "yes"


def _lanes() -> str:
    from pagedkv.device.cpu.simd import LANES

    return f"{LANES} lanes of fp32"


def _kernel(dtype: str) -> str:
    from pagedkv.device.cpu.kernel import warmup

    start = time.perf_counter()
    warmup((dtype,))
    return f"kernel ready after {time.perf_counter() - start:.1f} s"


def _on_disk(dtype: str) -> str:
    from pagedkv.device.cpu.kernel import cached

    return "kernel cached on disk" if cached(dtype) else "kernel compiles when an engine is made"


def _lines(facts: dict[str, Any]) -> list[str]:
    host = facts["machine"]
    memory = host["memory_bytes"]
    lines = [f"{name:14}{text or 'not installed'}" for name, text in facts["versions"].items()]
    lines += [
        "",
        f"{'processor':14}{host['cpu']}, {host['cores']} cores",
        f"{'instructions':14}{' '.join(host['simd']) or 'unknown'}",
        f"{'memory':14}{f'{memory / 2**30:.1f} GiB' if memory else 'unknown'}",
        f"{'system':14}{host['system']}, {host['architecture']}",
        f"{'threads':14}{_pairs(host['threads'])}",
        "",
        "attention",
    ]
    attention = dict(facts["attention"])
    operators = attention.pop("operators", [])
    lines += [f"  {name:12}{text or 'none'}" for name, text in attention.items()]
    lines += ["", "operators: the first that takes all of what is asked for attends"]
    lines += [f"  {each['device']:6}{each['name']:18}{each['takes']}" for each in operators]
    lines += [f"  {name:24}runs here: {here}" for name, here in _told(operators)]
    lines += ["", f"{'model cache':14}{facts['model_cache']}"]
    return lines + [f"{name}={value}" for name, value in facts["variables"].items()]


def _told(operators: list[dict[str, str]]) -> list[tuple[str, str]]:
    return list({each["name"]: each["here"] for each in operators}.items())


def _pairs(values: dict[str, Any]) -> str:
    shown = (f"{name} {value}" for name, value in values.items() if value is not None)
    return ", ".join(shown) or "unset"
