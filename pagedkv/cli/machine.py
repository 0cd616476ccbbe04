"""What this runs on: versions, processor, memory, threads. No torch unless it is there already."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

__all__ = [
    "PACKAGES",
    "busy_cores",
    "cores",
    "cpu_model",
    "idle_cores",
    "machine",
    "simd",
    "tell_of_compiling",
    "tell_of_neighbours",
    "threads",
    "versions",
]

PACKAGES = (
    "torch",
    "xformers",
    "numba",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "msgspec",
    "rich",
    "matplotlib",
)
# The instructions that attention and matrix kernels choose between, oldest first.
_SIMD = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def versions() -> dict[str, str | None]:
    """Return installed versions by package, Python and pagedkv first; None where one is absent."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    from pagedkv import __version__

    found: dict[str, str | None] = {
        "pagedkv": __version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Return the processor, the cores this process may use, the memory and the system."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": _memory(),
        "simd": simd(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "threads": threads(),
    }


def cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def idle_cores() -> int:
    """Return how many of the processors other work left idle in the last minute, at least one.

    Threads that wait for each other at every layer wait for the operating system where others
    compute: beside two busy processes on two cores, a demo of 15 s took 219 s with two threads
    and 33 s with one.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, cores() - round(busy))


def busy_cores(seconds: float = 0.1) -> float:
    """Return how many of the machine's processors others keep busy just now, 0 if it does not tell.

    Cost: that many seconds, in which this process must not compute.
    """

    def ticks() -> tuple[int, int]:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        counts = [int(word) for word in words]
        return sum(counts), sum(counts[3:5])  # idle, and waiting for a disk

    try:
        all_before, idle_before = ticks()
        time.sleep(seconds)
        all_after, idle_after = ticks()
    except (OSError, ValueError):
        return 0.0
    passed = max(1, all_after - all_before)
    return (1 - (idle_after - idle_before) / passed) * (os.cpu_count() or 1)


def tell_of_neighbours(busy: float) -> None:
    """Say on standard error that others leave torch's threads too few processors, if they do.

    Args:
        busy: What `busy_cores` found before torch, which is there now, was loaded.
    """
    num_threads, num_cores = sys.modules["torch"].get_num_threads(), os.cpu_count() or 1
    if num_threads > 1 and num_cores - busy < num_threads - 0.5:
        print(
            f"pagedkv: others keep {busy:.1f} of {num_cores} processors busy, and {num_threads} "
            "threads that wait for each other may take many times as long as one: try "
            "OMP_NUM_THREADS=1",
            file=sys.stderr,
        )


def tell_of_compiling() -> None:
    """Say on a terminal that kernels are compiled now, if they are not on disk yet."""
    try:
        from pagedkv.device.cpu.kernel import cached
    except ImportError:  # nothing to compile
        return
    if sys.stderr.isatty() and not cached("float32"):
        print("pagedkv: compiling kernels, once on this machine: half a minute", file=sys.stderr)


def threads() -> dict[str, int | str | None]:
    """Return torch's thread count, if torch is loaded, and the variables that rule threads."""
    counts: dict[str, int | str | None] = {}
    if "torch" in sys.modules:
        counts["torch"] = sys.modules["torch"].get_num_threads()
    return counts | {name: os.environ.get(name) for name in _THREAD_VARIABLES}


def cpu_model() -> str:
    """Return the processor's own name, or its architecture where the system does not tell."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.processor() or platform.machine()


def simd() -> list[str]:
    """Return the vector instructions that the processor has, of those that kernels care about."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return [name for name in _SIMD if name in present]
    return []


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
