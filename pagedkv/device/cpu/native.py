"""Compiling functions for this machine, through numba's disk cache where that can be had."""

import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from pagedkv.errors import UnsupportedBackend

__all__ = ["compile_native", "on_disk", "sources"]

OPTIONS = {"error_model": "numpy"}


@cache
def sources() -> str:
    """Return a digest of all native code of this folder.

    numba's disk cache looks at the file of the function that is compiled, and not at what that
    imports: a function that mentions this digest is compiled anew when any of it changes.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files)).hexdigest()


def compile_native(signature: Any, function: Callable[..., None], what: str) -> Any:
    """Return a function compiled: from numba's disk cache, or to it.

    If the cache cannot be read or written, a warning says so and the function is compiled all the
    same. The object must outlive its address.

    Args:
        signature: numba's, of what and to what.
        function: Works on addresses and numbers.
        what: What to call it in messages.

    Raises:
        UnsupportedBackend: It cannot be compiled here.
    """
    try:
        return cfunc(signature, cache=True, **OPTIONS)(function)
    except Exception as error:  # numba raises many unrelated kinds, of its cache and of compiling
        reason = f"{type(error).__name__}: {error}"
    try:
        compiled = cfunc(signature, **OPTIONS)(function)
    except Exception as error:
        raise UnsupportedBackend(
            f"pagedkv_cpu was tried and refused: {what} did not compile "
            f"({type(error).__name__}: {error})",
            where="device.cpu",
            remedy="install a numba that supports this Python, or use ReferenceOp",
        ) from error
    warnings.warn(
        f"{what} was compiled without numba's disk cache ({reason}), and will be at every start; "
        "delete what numba cached for pagedkv, or set NUMBA_CACHE_DIR to a folder that can be "
        "written",
        RuntimeWarning,
        stacklevel=2,
    )
    return compiled


class _FromDisk(CFunc):
    """Loads what is cached and compiles nothing."""

    def _compile_uncached(self) -> None:
        raise LookupError("it is not cached")


def on_disk(signature: Any, function: Callable[..., None]) -> bool:
    """Return whether `compile_native` would find a function in the disk cache. Cost: loading it."""
    found = _FromDisk(function, normalize_signature(signature), locals={}, options=OPTIONS)
    try:
        found.enable_caching()
        found.compile()
    except Exception:  # not there, nowhere to look for it, or damaged
        return False
    return True
