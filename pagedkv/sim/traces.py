"""What is in a workload, in numbers; and workloads written out as trace files."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np

from pagedkv.core.prefix import extend_chain
from pagedkv.errors import ConfigError
from pagedkv.files import replacing
from pagedkv.sim.ranges import check
from pagedkv.sim.sketch import Distribution
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["WRITERS", "Written", "trace_stats", "write_trace"]

_PERCENTS = (5.0, 25.0, 50.0, 75.0, 95.0, 99.0)


def _spread(values: Distribution) -> dict[str, float]:
    found = {f"p{percent:g}": float(values.percentile(percent)) for percent in _PERCENTS}
    return {"mean": values.mean, "min": values.least, **found, "max": values.greatest}


class _Reuse:
    """How much of the prompts an unbounded cache would hold; a digest per unique block."""

    def __init__(self, workload: Workload, block_size: int) -> None:
        self._size = block_size
        self._own = workload.block_size == block_size
        self._seen: set[bytes] = set()
        self.blocks = self.hit_blocks = self.hit_tokens = 0

    def add(self, request: SimRequest) -> None:
        prompt = request.prompt
        if self._own and prompt.exact is None:
            raw = prompt.streams.tobytes()
            chain = [raw[i : i + 8] for i in range(0, len(raw), 8)]
        else:
            chain, tokens = [], prompt.token_ids()
            extend_chain(chain, tokens, len(tokens) // self._size, self._size, "")
        hits = next((i for i, h in enumerate(chain) if h not in self._seen), len(chain))
        self._seen.update(chain[hits:])
        self.blocks += len(chain)
        self.hit_blocks += hits
        self.hit_tokens += min(hits * self._size, len(prompt))


def trace_stats(workload: Workload, *, block_size: int | None = None) -> dict[str, Any]:
    """Return counts, rates, lengths and reuse of a workload, in one pass.

    Memory grows with unique blocks (about 100 bytes each) and with tenants, with nothing else.

    Args:
        block_size: For reuse; the trace's own if omitted, 16 where it has none.

    Raises:
        ConfigError: The block size is out of range.
        TraceError: The workload cannot be read.
    """
    size = (workload.block_size or 16) if block_size is None else block_size
    check("trace", block_size=size)
    reuse = _Reuse(workload, size)
    inputs, outputs, gaps = Distribution(), Distribution(), Distribution()
    per_tenant: dict[str, int] = {}
    sessions: set[str] = set()
    first = last = None
    follow_ups = 0
    for arrival in workload:
        if last is not None:
            gaps.add(arrival.arrival - last)
        first = arrival.arrival if first is None else first
        last = arrival.arrival
        for request in arrival.turns():
            follow_ups += request is not arrival
            inputs.add(len(request.prompt))
            outputs.add(request.output_len)
            per_tenant[request.tenant] = per_tenant.get(request.tenant, 0) + 1
            if request.session:
                sessions.add(request.session)
            reuse.add(request)
    span = (last or 0.0) - (first or 0.0)
    top = sorted(per_tenant.values(), reverse=True)
    return {
        "name": workload.name,
        "num_requests": inputs.count,
        "num_follow_ups": follow_ups,
        "num_sessions": len(sessions),
        "num_tenants": len(per_tenant),
        "busiest_tenant_share": top[0] / inputs.count if top else 0.0,
        "span_seconds": span,
        "requests_per_second": (inputs.count - follow_ups) / span if span else None,
        "interarrival_cv": gaps.deviation / gaps.mean if gaps.mean else None,
        "input_tokens": _spread(inputs) if inputs.count else None,
        "output_tokens": _spread(outputs) if outputs.count else None,
        "total_input_tokens": int(inputs.total),
        "total_output_tokens": int(outputs.total),
        "block_size": size,
        "unique_blocks": reuse.blocks - reuse.hit_blocks,
        "ideal_token_hit_ratio": reuse.hit_tokens / max(1.0, inputs.total),
        "ideal_block_hit_ratio": reuse.hit_blocks / max(1, reuse.blocks),
        "skipped_rows": dict(workload.skipped),
    }


# Writing


def _write_hashed(workload: Iterable[SimRequest], out: IO[str], block_size: int) -> int:
    """Write Mooncake's format: chained ids, numbered as they first appear."""
    numbers: dict[bytes, int] = {}
    count = 0
    for request in workload:
        prompt = request.prompt.token_ids()
        chain: list[bytes] = []
        whole = len(prompt) // block_size * block_size
        extend_chain(chain, prompt, whole // block_size, block_size, "")
        if whole < len(prompt):  # a partial block has an id as well; of other length, another one
            tail = np.full(block_size, -1, np.int32)
            tail[: len(prompt) - whole] = prompt[whole:]
            padded = np.concatenate([prompt[:whole], tail])
            extend_chain(chain, padded, len(chain) + 1, block_size, "")
        row = {
            "timestamp": round(request.arrival * 1000, 3),
            "input_length": len(prompt),
            "output_length": request.output_len,
            "hash_ids": [numbers.setdefault(h, len(numbers)) for h in chain],
        }
        if request.tenant:
            row["tenant"] = request.tenant
        out.write(msgspec.json.encode(row).decode() + "\n")
        count += 1
    return count


def _write_exact(workload: Iterable[SimRequest], out: IO[str], block_size: int) -> int:
    """Write LLMServingSim's format: the very tokens."""
    del block_size
    count = 0
    for request in workload:
        row = {
            "input_toks": len(request.prompt),
            "output_toks": request.output_len,
            "arrival_time_ns": round(request.arrival * 1e9),
            "input_tok_ids": request.prompt.token_ids().tolist(),
        }
        out.write(msgspec.json.encode(row).decode() + "\n")
        count += 1
    return count


def _write_azure(workload: Iterable[SimRequest], out: IO[str], block_size: int) -> int:
    """Write Azure's table: times and lengths; what prompts share is lost."""
    del block_size
    out.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    count = 0
    start = np.datetime64("2000-01-01T00:00:00", "us")
    for request in workload:
        when = str(start + np.timedelta64(round(request.arrival * 1e6), "us")).replace("T", " ")
        out.write(f"{when},{len(request.prompt)},{request.output_len}\n")
        count += 1
    return count


_LOSES = {
    "mooncake": ("session", "priority"),
    "timed_trace": ("session", "priority"),
    "llmservingsim": ("session", "priority", "tenant"),
    "azure": ("session", "priority", "tenant", "prefix", "begin"),
}
"""Per format, what of `_WORDS` it has no place for."""

_WORDS = {
    "session": "sessions",
    "priority": "priorities",
    "tenant": "tenants",
    "prefix": "prefixes that prompts share",
    "begin": "that the first request comes after time 0",
}


class Written(NamedTuple):
    """What became of a workload: the requests written; what was lost, in words, and of how many."""

    num_requests: int
    lost: dict[str, int]


def _noting(workload: Workload, format: str, lost: Counter[str]) -> Iterator[SimRequest]:
    """Yield the requests of a workload, and count what the format cannot say of them."""
    heads: set[bytes] = set()  # what prompts began with so far
    for number, request in enumerate(workload):
        prompt = request.prompt
        head = (prompt.streams[:1] if prompt.exact is None else prompt.exact[:16]).tobytes()
        says = {
            "session": bool(request.session),
            "priority": request.priority != 0,
            "tenant": bool(request.tenant),
            "prefix": head in heads,
            "begin": number == 0 and request.arrival > 0,
        }
        heads.add(head)
        lost.update(_WORDS[name] for name in _LOSES[format] if says[name])
        yield request


WRITERS: dict[str, Callable[[Iterable[SimRequest], IO[str], int], int]] = {
    "mooncake": _write_hashed,
    "timed_trace": _write_hashed,
    "llmservingsim": _write_exact,
    "azure": _write_azure,
}
"""Per format, what writes it; returns the requests written."""


def write_trace(
    workload: Workload, path: str | Path, format: str, *, block_size: int | None = None
) -> Written:
    """Write a workload as a trace file and return the number of requests, and what was lost.

    What was at the path is replaced once all is written, so a workload may be read from the file
    that it is written to; a fault leaves the file as it was. ``-`` is standard output.

    Args:
        block_size: Tokens per id, where the format has ids: the workload's own, or 512.

    Raises:
        ConfigError: The format is not written or cannot hold follow-ups, the block size is out of
            range, or the file cannot be written.
        TraceError: The workload cannot be read.
    """
    if format not in WRITERS:
        raise ConfigError(
            f"{format!r} is not written", where="format", remedy=f"give {', '.join(WRITERS)}"
        )
    if workload.closed_loop:
        raise ConfigError(
            "its follow-ups come when answers have ended, and these formats hold fixed times",
            where=workload.name,
            remedy="read it with closed_loop off (--open-loop), or simulate it directly",
        )
    size = (workload.block_size or 512) if block_size is None else block_size
    check("trace", block_size=size)
    lost: Counter[str] = Counter()
    with replacing(path) as out:
        count = WRITERS[format](_noting(workload, format, lost), out, size)
    return Written(count, dict(lost))
