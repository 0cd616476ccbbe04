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
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import asdict

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Int32
from pagedkv.core.params import SamplingParams
from pagedkv.core.plan import StepOutput, StepPlan, StepResult
from pagedkv.core.request import FinishedSequence, Request
from pagedkv.core.result import checked_result
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import InvalidTransition, PagedKVError
from pagedkv.eviction import Policy

__all__ = ["RunLog", "plan_bytes", "replay"]


class _Entry(Struct, array_like=True):
    """A call, tagged with what was called."""


class _Config(_Entry, tag="config"):
    config: EngineConfig


class _Add(_Entry, tag="add"):
    """A request, its prompt as the scheduler took it."""

    request_id: str
    prompt_token_ids: Int32
    sampling: SamplingParams
    priority: int
    tenant: str
    arrival: float
    cache_salt: str
    eviction: str | Policy | None


class _Abort(_Entry, tag="abort"):
    request_id: str


class _Stop(_Entry, tag="stop"):
    seq_id: int
    stop_reason: str


class _Plan(_Entry, tag="plan"):
    data: bytes


class _Commit(_Entry, tag="commit"):
    result: StepResult


class _Discard(_Entry, tag="discard"):
    """A plan given up, by the caller or because its commit was interrupted."""

    interrupted: bool = False


class _Reset(_Entry, tag="reset"):
    pass


class _Array(Struct, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _Array(value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass, such as an enumeration's
            return kind(value)
    raise TypeError(f"a log cannot hold {type(value).__name__}")


def _unpacked(_: type, value: Any) -> npt.NDArray[Any]:
    array = msgspec.convert(value, _Array)
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_packed)
_DECODER = msgspec.msgpack.Decoder(
    _Config | _Add | _Abort | _Stop | _Plan | _Commit | _Discard | _Reset, dec_hook=_unpacked
)


def plan_bytes(plan: StepPlan) -> bytes:
    """Return all of a plan as bytes; equal plans give equal bytes, on any machine."""
    return _ENCODER.encode(plan)


class RunLog:
    """A scheduler that writes down what is asked of it and what it plans.

    Use it wherever a `Scheduler` goes, and close it, or leave its ``with`` block, at the end. What
    the scheduler refuses is not written; what it took is written as it took it.

    Args:
        scheduler: A fresh one: what it did before is not in the log.
        path: The file to write; what stands there is replaced.
    """

    def __init__(self, scheduler: Scheduler, path: str | Path) -> None:
        self._scheduler = scheduler
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by `close`
        self._write(_Config(scheduler.config))

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

    def _write(self, entry: _Entry) -> None:
        data = _ENCODER.encode(entry)
        self._file.write(len(data).to_bytes(4, "little") + data)

    def add(self, request: Request) -> list[int]:
        """As `Scheduler.add`."""
        ids = self._scheduler.add(request)
        prompt = self._scheduler.sequence(ids[0]).token_ids
        self._write(_Add(**(asdict(request) | {"prompt_token_ids": prompt})))
        return ids

    def abort(self, request_id: str) -> list[FinishedSequence]:
        """As `Scheduler.abort`."""
        ended = self._scheduler.abort(request_id)
        self._write(_Abort(request_id))
        return ended

    def stop(self, seq_id: int, stop_reason: str) -> list[FinishedSequence]:
        """As `Scheduler.stop`."""
        ended = self._scheduler.stop(seq_id, stop_reason)
        self._write(_Stop(int(seq_id), stop_reason))
        return ended

    def schedule(self) -> StepPlan:
        """As `Scheduler.schedule`."""
        plan = self._scheduler.schedule()
        self._write(_Plan(plan_bytes(plan)))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """As `Scheduler.commit`."""
        try:
            output = self._scheduler.commit(plan, result)
        except InvalidTransition:  # refused
            raise
        except BaseException:
            self._write(_Discard(interrupted=True))
            raise
        taken = checked_result(plan, result, self._scheduler.config.model.vocab_size)
        self._write(_Commit(taken))
        return output

    def discard(self, plan: StepPlan) -> None:
        """As `Scheduler.discard`."""
        self._scheduler.discard(plan)
        self._write(_Discard())

    def reset_prefix_cache(self) -> None:
        """As `Scheduler.reset_prefix_cache`."""
        self._scheduler.reset_prefix_cache()
        self._write(_Reset())


class _Replay:
    """A scheduler that is called again as it was before."""

    def __init__(self) -> None:
        self._scheduler = Scheduler()
        self._plan: Any = None
        self._interrupted = False

    def call(self, entry: _Entry) -> StepPlan | None:
        """Make one call; return the plan if it was for one."""
        match entry:
            case _Config():
                self._scheduler = Scheduler(entry.config)
            case _Add():
                self._scheduler.add(Request(**asdict(entry)))
            case _Abort():
                self._scheduler.abort(entry.request_id)
            case _Stop():
                self._scheduler.stop(entry.seq_id, entry.stop_reason)
            case _Plan():
                self._plan = self._scheduler.schedule()
                if plan_bytes(self._plan) != entry.data:
                    raise self._differs()
                return self._plan  # type: ignore[no-any-return]
            case _Commit():
                self._scheduler.commit(self._plan, entry.result)
            case _Discard():
                self._scheduler.discard(self._plan)
                self._interrupted |= entry.interrupted
            case _Reset():
                self._scheduler.reset_prefix_cache()
        return None

    def _differs(self) -> InvalidTransition:
        doubt = "; the commit of one before it was interrupted" if self._interrupted else ""
        return InvalidTransition(f"plan {self._plan.step} is not what it was{doubt}")


def replay(path: str | Path) -> Iterator[StepPlan]:
    """Do a logged run again, and yield its plans, each equal to the logged one byte for byte.

    Raises:
        InvalidTransition: The file is no log, is damaged, or a plan comes out otherwise; the
            message names the entry and what is wrong.
    """
    at, run = 0, _Replay()
    try:
        data = Path(path).read_bytes()
    except OSError as fault:
        raise _fault(path, f"it cannot be read: {fault}") from None
    while at < len(data):
        begin = at + 4
        size = int.from_bytes(data[at:begin], "little")
        try:
            plan = run.call(_DECODER.decode(data[begin : begin + size]))
        except (msgspec.MsgspecError, UnicodeError, PagedKVError) as fault:
            raise _fault(path, f"the entry at byte {at} cannot be done again: {fault}") from fault
        if plan is not None:
            yield plan
        at = begin + size


def _fault(path: str | Path, what: str) -> InvalidTransition:
    remedy = (
        "give a file that RunLog wrote and closed; replay it with the version, and the victim "
        "function, that wrote it"
    )
    return InvalidTransition(what, where=str(path), remedy=remedy)
