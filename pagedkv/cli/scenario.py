"""One run as the flags say: configuration, hardware and workload, and what came of it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.cli.flags import given
from pagedkv.cli.workloads import workload
from pagedkv.config import EngineConfig, load_config
from pagedkv.core.scheduler import Scheduler
from pagedkv.errors import ConfigError, PagedKVError, TraceError
from pagedkv.sim.cost import CostModel
from pagedkv.sim.perfetto import write_perfetto
from pagedkv.sim.presets import cost_preset
from pagedkv.sim.replay import CLAIRVOYANT, Oracle
from pagedkv.sim.report import cdf_table
from pagedkv.sim.result import SimResult, simulate
from pagedkv.sim.slo import objective
from pagedkv.sim.workload import Workload

__all__ = ["Run", "config_of", "cost_of", "one_run", "rehearse", "settled", "simulated", "told"]

Run = dict[str, Any]


def cost_of(args: argparse.Namespace) -> CostModel:
    """Return the cost model that the flags name.

    Raises:
        ConfigError: The file is not a cost model.
    """
    if args.cost_json is None:
        return cost_preset(args.hardware)
    try:
        return msgspec.json.decode(Path(args.cost_json).read_bytes(), type=CostModel)
    except (OSError, msgspec.DecodeError) as fault:
        raise ConfigError(
            f"it is not a cost model: {fault}",
            where=args.cost_json,
            remedy="write one with `pagedkv simulate --calibrate --cost-json FILE`",
        ) from None


def config_of(args: argparse.Namespace) -> EngineConfig:
    """Return the engine's configuration: flags over environment over file, as everywhere.

    Where none of them says, the model is the cost model's and takes as much text as traces hold.
    """
    shape = cost_of(args).shape
    usual = {
        "model.max_model_len": 2**21,
        "model.num_layers": shape.num_layers,
        "model.num_kv_heads": shape.num_kv_heads,
    }
    flags = given(args)
    if args.seed is not None:
        flags["scheduler.seed"] = args.seed
    if args.reclaim is not None:
        flags["cache.reclaim"] = "lru" if args.reclaim == CLAIRVOYANT else args.reclaim
    return load_config(args.config, overrides=flags, defaults=usual)


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags, and what they leave open as environment and file have it."""
    config = config_of(args)
    reclaim = args.reclaim or config.cache.reclaim
    return argparse.Namespace(**vars(args) | {"seed": config.scheduler.seed, "reclaim": reclaim})


def simulated(
    args: argparse.Namespace, processes: int = 1, *, source: Workload | None = None
) -> tuple[SimResult, EngineConfig]:
    """Run one simulation as the flags say, of another workload if one is given."""
    config, source = config_of(args), workload(args) if source is None else source
    prepare: Callable[[Scheduler], None] | None = None
    if args.reclaim == CLAIRVOYANT:
        if args.replicas > 1:
            raise ConfigError(
                "the oracle foresees one queue",
                where="--reclaim clairvoyant",
                remedy="use one replica",
            )
        prepare = Oracle(source, config.cache.block_size).prepare
    found = simulate(
        config,
        source,
        cost=cost_of(args),
        slo=objective(args.goodput),
        replicas=args.replicas,
        routing=args.routing,
        max_concurrency=args.max_concurrency,
        leap=not args.no_leap,
        watch=args.perfetto is not None,
        detail=args.save_detailed,
        processes=processes,
        prepare=prepare,
    )
    return found, config


def rehearse(varied: dict[str, Any], args: argparse.Namespace) -> None:
    """Do all of a run but serve the workload, so that mistakes show before anything runs."""
    try:
        workload(args)
        simulated(args, source=Workload("nothing", tuple))
    except PagedKVError as fault:
        raise told(fault, varied) from None


def told(fault: PagedKVError, varied: dict[str, Any]) -> PagedKVError:
    """Return an error that says in which run of a sweep it came up."""
    if not varied:
        return fault
    point = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in varied.items())
    where = f"{point}: {fault.where}" if fault.where else point
    return type(fault)(fault.what, where=where, remedy=fault.remedy)


def one_run(varied: dict[str, Any], args: argparse.Namespace, processes: int = 1) -> Run:
    """Simulate once and return plain data, for this process or another."""
    try:
        found, config = simulated(args, processes)
    except PagedKVError as fault:
        raise told(fault, varied) from None
    asked = found.summary["completed"] + found.summary["failed"]
    if not asked:
        raise TraceError(
            "there is no request in it",
            where=args.trace or args.workload,
            remedy="look at it with `pagedkv trace stats`",
        )
    if args.perfetto:
        write_perfetto(found, Path(args.perfetto))
    rate = None if args.trace else args.request_rate
    return {
        "varied": varied,
        "workload": args.trace or args.workload,
        "hardware": args.cost_json or args.hardware,
        "seed": args.seed,
        "config": msgspec.to_builtins(config),
        "summary": found.summary
        | {"num_prompts": asked, "request_rate": "inf" if rate == float("inf") else rate},
        "tenants": found.tenants,
        "occupancy": found.occupancy.table(),
        "cdf": cdf_table(found),
    }
