"""A paged KV-block manager with an eviction-aware scheduler.

The names below are the public interface. Those that need torch are looked up when first used, so
``import pagedkv`` costs what the torch-free half costs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pagedkv.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    load_config,
)
from pagedkv.core.engine import Engine
from pagedkv.core.plan import Executor, SamplingBatch, StepOutput, StepPlan, StepResult
from pagedkv.core.request import FinishedSequence, Request, SamplingParams
from pagedkv.core.scheduler import Scheduler
from pagedkv.core.stats import SchedulerStats
from pagedkv.errors import (
    ConfigError,
    CorruptModel,
    CorruptTier,
    InvalidRequest,
    InvalidTransition,
    ModelNotFound,
    NeverFits,
    OutOfBlocks,
    PagedKVError,
    PolicyError,
    TraceError,
    Unattainable,
    UnsupportedBackend,
    WorkerLost,
)
from pagedkv.eviction import Policy, policy, presets
from pagedkv.sim.result import SimResult, simulate
from pagedkv.sim.workload import SimRequest, Workload

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM
    from pagedkv.device.outputs import CompletionOutput, RequestOutput, ScoreOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CacheConfig",
    "CompletionOutput",
    "ConfigError",
    "CorruptModel",
    "CorruptTier",
    "Engine",
    "EngineConfig",
    "Executor",
    "FinishedSequence",
    "InvalidRequest",
    "InvalidTransition",
    "ModelConfig",
    "ModelNotFound",
    "NeverFits",
    "OutOfBlocks",
    "PagedKVError",
    "Policy",
    "PolicyError",
    "Request",
    "RequestOutput",
    "SamplingBatch",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "ScoreOutput",
    "SimRequest",
    "SimResult",
    "StepOutput",
    "StepPlan",
    "StepResult",
    "TraceError",
    "Unattainable",
    "UnsupportedBackend",
    "WorkerLost",
    "Workload",
    "load_config",
    "policy",
    "presets",
    "simulate",
]

_NEEDS_TORCH = {
    "LLM": "pagedkv.device.llm",
    "CompletionOutput": "pagedkv.device.outputs",
    "RequestOutput": "pagedkv.device.outputs",
    "ScoreOutput": "pagedkv.device.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'pagedkv' has no attribute {name!r}")
    try:
        module = import_module(_NEEDS_TORCH[name])
    except ModuleNotFoundError as fault:
        raise ImportError(
            f"pagedkv.{name} needs {fault.name}; install it with: pip install 'pagedkv[demo]'"
        ) from fault
    return getattr(module, name)
