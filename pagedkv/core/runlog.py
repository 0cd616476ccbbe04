"""A run written down, and done again: every call to a scheduler and every plan it made.

Plans follow from calls alone, so a log replays on any machine without model or device, and each
plan must come out byte for byte as it was. Arrays are kept as dtype, shape and bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from pagedkv.config import EngineConfig
from pagedkv.core.params import SamplingParams
from pagedkv.core.plan import Observed, PromptLogprobs, StepOutput, StepPlan, StepResult
from pagedkv.core.request import FinishedSequence, Request
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import InvalidTransition
from pagedkv.eviction import Policy

__all__ = ["RunLog", "plan_bytes", "replay"]

_STRUCTS = (Observed, Policy, PromptLogprobs, Request, SamplingParams, StepResult)
_NAMES = {struct.__name__: struct for struct in _STRUCTS}


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": value.dtype.str, "shape": value.shape, "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, msgspec.Struct):
        fields = {name: _pack(getattr(value, name)) for name in value.__struct_fields__}
        return {"struct": type(value).__name__, "fields": fields}
    return [_pack(each) for each in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and "array" in value:
        return np.frombuffer(value["data"], value["array"]).reshape(value["shape"])
    if isinstance(value, dict):
        fields = {name: _unpack(each) for name, each in value["fields"].items()}
        return _NAMES[value["struct"]](**fields)
    return [_unpack(each) for each in value] if isinstance(value, list) else value


def plan_bytes(plan: StepPlan) -> bytes:
    """Return all of a plan as bytes; equal plans give equal bytes, on any machine."""
    return msgspec.msgpack.encode(_pack(plan))


class RunLog:
    """A scheduler that writes down what is asked of it and what it plans.

    Use it wherever a `Scheduler` goes, and close it, or leave its ``with`` block, at the end.

    Args:
        scheduler: A fresh one: what it did before is not in the log.
        path: The file to write; what stands there is replaced.
    """

    def __init__(self, scheduler: Scheduler, path: str | Path) -> None:
        self._scheduler = scheduler
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by `close`
        self._write(["config", msgspec.to_builtins(scheduler.config)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, entry: list[Any]) -> None:
        data = msgspec.msgpack.encode(entry)
        self._file.write(len(data).to_bytes(4, "little") + data)

    def add(self, request: Request) -> list[int]:
        """As `Scheduler.add`; a refused request is not logged."""
        ids = self._scheduler.add(request)
        self._write(["add", _pack(request)])
        return ids

    def abort(self, request_id: str) -> list[FinishedSequence]:
        """As `Scheduler.abort`."""
        ended = self._scheduler.abort(request_id)
        self._write(["abort", request_id])
        return ended

    def stop(self, seq_id: int, stop_reason: str) -> list[FinishedSequence]:
        """As `Scheduler.stop`."""
        ended = self._scheduler.stop(seq_id, stop_reason)
        self._write(["stop", [int(seq_id), stop_reason]])
        return ended

    def schedule(self) -> StepPlan:
        """As `Scheduler.schedule`."""
        plan = self._scheduler.schedule()
        self._write(["plan", plan_bytes(plan)])
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """As `Scheduler.commit`."""
        output = self._scheduler.commit(plan, result)
        self._write(["commit", _pack(result)])
        return output

    def discard(self, plan: StepPlan) -> None:
        """As `Scheduler.discard`."""
        self._scheduler.discard(plan)
        self._write(["discard", None])

    def reset_prefix_cache(self) -> None:
        """As `Scheduler.reset_prefix_cache`."""
        self._scheduler.reset_prefix_cache()
        self._write(["reset", None])


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        try:
            kind, value = msgspec.msgpack.decode(data[at + 4 : at + 4 + size])
        except (msgspec.DecodeError, ValueError) as fault:
            raise InvalidTransition(
                f"byte {at} begins no entry: {fault}",
                where=str(path),
                remedy="give a file that RunLog wrote and closed",
            ) from None
        yield kind, value
        at += 4 + size


def replay(path: str | Path) -> Iterator[StepPlan]:
    """Do a logged run again, and yield its plans, each equal to the logged one byte for byte.

    Raises:
        InvalidTransition: The file is no log, or a plan comes out otherwise; the message names it.
    """
    path = Path(path)
    scheduler, plan = Scheduler(), None
    for kind, value in _entries(path):
        if kind == "config":
            scheduler = Scheduler(msgspec.convert(value, EngineConfig))
        elif kind == "plan":
            plan = scheduler.schedule()
            if plan_bytes(plan) != value:
                raise InvalidTransition(
                    f"plan {plan.step} is not what it was",
                    where=str(path),
                    remedy="replay with the version, and the victim function, that wrote it",
                )
            yield plan
        elif kind in ("commit", "discard"):
            assert plan is not None
            scheduler.discard(plan) if kind == "discard" else scheduler.commit(plan, _unpack(value))
        else:
            _call(scheduler, kind, value)


def _call(scheduler: Scheduler, kind: str, value: Any) -> None:
    """Make one of the calls that make no plan."""
    if kind == "add":
        scheduler.add(_unpack(value))
    elif kind == "abort":
        scheduler.abort(value)
    elif kind == "stop":
        scheduler.stop(*value)
    else:
        scheduler.reset_prefix_cache()
