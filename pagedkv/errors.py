"""Every error that pagedkv raises on purpose.

    PagedKVError
     +-- ConfigError         a configuration value, file, variable or flag is wrong
     |    +-- PolicyError    an eviction policy cannot be read or cannot hold together
     +-- InvalidRequest      a request's prompt or sampling parameters are wrong
     +-- NeverFits           a request could not be served even by an empty pool
     +-- OutOfBlocks         the pool cannot give the blocks that were asked for now
     +-- InvalidTransition   a call came in a state that does not allow it
     +-- CorruptTier         bytes that came back from another tier are not what was written
     +-- TraceError          a workload trace holds what cannot be replayed
     +-- Unattainable        a search has no answer within its bounds
     +-- WorkerLost          a process that did part of the work was killed
     +-- UnsupportedBackend  no operator or executor can serve this model, dtype or device
     +-- ModelNotFound       the model's name, directory or file leads nowhere
          +-- CorruptModel   it leads somewhere, but what lies there is damaged or incomplete

A message has three parts: where the fault is, what is wrong, and what would do instead.
Raising one of these leaves the state as it was, unless the raiser's docstring says otherwise.
"""

import difflib

__all__ = [
    "ConfigError",
    "CorruptModel",
    "CorruptTier",
    "InvalidRequest",
    "InvalidTransition",
    "ModelNotFound",
    "NeverFits",
    "OutOfBlocks",
    "PagedKVError",
    "PolicyError",
    "TraceError",
    "Unattainable",
    "UnsupportedBackend",
    "WorkerLost",
    "closest",
    "is_text",
    "shown",
]


class PagedKVError(Exception):
    """The root of the tree.

    Args:
        what: What is wrong, as a clause ("block_size is 0").
        where: The field, file or request it was found in ("cache.block_size").
        remedy: What would do instead, as an imperative ("give a whole number from 1 to 256").
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}; {remedy}" if remedy else head)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.remedy)


def shown(value: object, most: int = 80) -> str:
    """Return a value as a message shows it: its repr, if it has one, cut to ``most`` characters."""
    try:
        return f"{value!r:.{most}}"
    except Exception:  # a repr may raise anything; an integer's does beyond 4,300 digits
        size = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{size}>"


def closest(name: str, known: list[str], *, cutoff: float = 0.6) -> str:
    """Return the known name that a misspelt or foreign one most likely stands for, or nothing.

    Args:
        cutoff: How alike they must be at least, from 0 to 1.
    """
    meant = _ELSEWHERE.get(_plain(name))
    if meant is not None:
        for each in known:
            if _plain(each) == meant:
                return each
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), "")


def _plain(name: str) -> str:
    """A flag's name as that of the setting behind it."""
    return name.partition("=")[0].lstrip("-").replace("-", "_")


_ELSEWHERE = {
    # vLLM
    "gpu_memory_utilization": "kv_cache_memory_fraction",
    "num_gpu_blocks_override": "num_blocks",
    "swap_space": "num_cpu_blocks",
    # SGLang
    "mem_fraction_static": "kv_cache_memory_fraction",
    "max_running_requests": "max_num_seqs",
    "context_length": "max_model_len",
    "page_size": "block_size",
    # kvpress
    "compression_ratio": "ratio",
}
"""What other engines call settings of ours."""


def is_text(value: object) -> bool:
    """Return whether a value is text that can be written down: without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rebuild(kind: type[PagedKVError], what: str, where: str, remedy: str) -> PagedKVError:
    return kind(what, where=where, remedy=remedy)


class ConfigError(PagedKVError):
    """A configuration value, file, variable or flag is wrong."""


class PolicyError(ConfigError):
    """An eviction policy cannot be read, or its parts cannot hold together."""


class InvalidRequest(PagedKVError):
    """A request's prompt or sampling parameters are wrong."""


class NeverFits(PagedKVError):
    """A request could not be served even if the pool were empty."""


class OutOfBlocks(PagedKVError):
    """The pool cannot give the blocks that were asked for now."""


class InvalidTransition(PagedKVError):
    """A call came in a state that does not allow it."""


class CorruptTier(PagedKVError):
    """Bytes that came back from another tier are not what was written there."""


class TraceError(PagedKVError):
    """A workload trace holds what cannot be replayed: named by file and line."""


class Unattainable(PagedKVError):
    """A search has no answer: the target is met nowhere, or everywhere, within its bounds."""


class WorkerLost(PagedKVError):
    """A process that did part of the work ended before it had answered."""


class UnsupportedBackend(PagedKVError):
    """No operator or executor can serve this model, dtype, head size or device."""


class ModelNotFound(PagedKVError):
    """A model's name, directory or file leads nowhere."""


class CorruptModel(ModelNotFound):
    """A model was found, but its files are damaged, truncated or incomplete."""
