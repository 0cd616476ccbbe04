"""The measurements behind ``pagedkv eval``: every policy over the same tokens."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pagedkv.cli import passages
from pagedkv.cli.flags import check_counts, engine_config, given, make_llm
from pagedkv.cli.passages import Passage, Text
from pagedkv.cli.quality import METRICS, Metric, compare
from pagedkv.cli.quality_report import show_quality
from pagedkv.cli.results import check_outputs, provenance, write_result
from pagedkv.config import EngineConfig, with_fields
from pagedkv.core.arrays import Float64
from pagedkv.core.plan import StepOutput, StepPlan, StepResult
from pagedkv.core.request import SamplingParams
from pagedkv.errors import ConfigError
from pagedkv.eviction import Policy, format_policy, policy

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM
    from pagedkv.device.outputs import ScoreOutput

__all__ = ["Cell", "cells", "run"]


class Cell(Struct, frozen=True, kw_only=True):
    """One combination of a sweep.

    Attributes:
        eviction: As it was given.
        budget: None for a policy that keeps everything.
        granularity: Who decides apart.
        policy: What it comes to.
    """

    eviction: str
    budget: int | None
    granularity: str
    policy: Policy

    @property
    def label(self) -> str:
        """A few words for a progress bar."""
        return self.eviction if self.budget is None else f"{self.eviction} {self.budget}"


def cells(
    evictions: Sequence[str], budgets: Sequence[int], granularities: Sequence[str], chunk: int
) -> list[Cell]:
    """Return every combination, the full cache first and once, even where it was not asked for.

    Raises:
        PolicyError: An expression cannot be read or its parts contradict each other.
        ConfigError: A list is empty.
    """
    lists = {"--eviction": evictions, "--budget": budgets, "--granularity": granularities}
    for flag, given_list in lists.items():
        if not given_list:
            raise ConfigError("the list is empty", where=flag, remedy="give at least one")
    full = Cell(eviction="full", budget=None, granularity=granularities[0], policy=policy("full"))
    return [full] + [
        Cell(
            eviction=text,
            budget=budget,
            granularity=granularity,
            policy=policy(text, budget=budget, chunk=chunk),
        )
        for granularity in granularities
        for text in evictions
        if text != "full"
        for budget in budgets
    ]


def run(args: argparse.Namespace) -> int:
    """Measure, show a table, write JSON and draw."""
    outputs = {"--output-json": args.output_json, "--plot": args.plot}
    check_outputs(outputs, (args.text, args.config))
    check_counts(args, num_tokens=2, output_len=1, source_len=1, filler_len=1, chunk=1)
    check_counts(args, num_samples=1, offset=0)
    base = engine_config(args)
    todo = cells(args.eviction, args.budget, args.granularity, args.chunk)
    configs = {
        name: with_fields(base, granularity=name, seed=args.seed) for name in args.granularity
    }
    llm = make_llm(args, configs[todo[0].granularity])
    text, material = _material(args, llm)
    metric = METRICS[args.task]
    start = time.perf_counter()
    with Watch(sum(len(each.token_ids) for each in material) * len(todo)) as watch:
        measured = _measure(args, llm, configs, todo, material, watch)
    result = {
        "task": args.task,
        "metric": metric.name,
        "elapsed_time": time.perf_counter() - start,
        "text": {"name": text.name, "sha256": text.sha256, "num_tokens": len(text.token_ids)},
        "passages": [
            {"num_tokens": len(each.token_ids), "start": each.start, "depth": each.depth}
            for each in material
        ],
        "cells": [_cell_result(metric, args.seed, *each, measured[0]) for each in measured],
        **provenance(args.model, llm.model.dtype_name, llm.config, args.seed, _workload(args)),
    }
    show_quality(result, to_stderr=args.output_json == "-")
    write_result(result, args.output_json)
    if args.plot:
        from pagedkv.cli.quality_plot import draw_quality

        draw_quality(result, args.plot)
    return 0


def _workload(args: argparse.Namespace) -> dict[str, Any]:
    names = ("verb", "model", "dtype", "config", "seed", "output_json", "plot", "debug")
    return {k: v for k, v in vars(args).items() if "." not in k and k not in names}


# What is read


def _material(args: argparse.Namespace, llm: "LLM") -> tuple[Text, list[Passage]]:
    if llm.model.tokenizer is None:
        raise ConfigError(
            "the model has no tokenizer", where="--model", remedy="give one that reads text"
        )
    encode = passages.encoder(llm.model.tokenizer)
    text = passages.load_text(args.text, encode)

    def windows(length: int) -> list[list[int]]:
        return text.windows(args.num_samples, length, seed=args.seed, offset=args.offset)

    if args.task == "copy":
        whole = windows(2 * args.filler_len + args.source_len)
        return text, passages.copy_passages(whole, args.filler_len, args.source_len)
    if args.task == "passkey":
        whole = windows(args.num_tokens)
        return text, passages.passkey_passages(
            whole, args.num_tokens, args.depths, encode, seed=args.seed
        )
    if args.task == "agreement":
        return text, _continued(llm, windows(args.num_tokens), args.output_len)
    return text, passages.plain_passages(windows(args.num_tokens))


def _continued(llm: "LLM", windows: list[list[int]], output_len: int) -> list[Passage]:
    """Let the full cache go on from every window; what it wrote counts."""
    most = llm.config.model.max_model_len - 1  # what is scored is a prompt, with room for a token
    if len(windows[0]) + output_len > most:
        raise ConfigError(
            f"{len(windows[0])} tokens and {output_len} more are asked for; the model takes {most}",
            where="--num-tokens, --output-len",
            remedy="give fewer",
        )
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    outputs = llm.generate(windows, params, eviction="full")
    return [
        Passage(token_ids=output.prompt_token_ids + output.token_ids, start=len(window))
        for window, output in zip(windows, outputs, strict=True)
    ]


# Measuring


class Measured(Struct, frozen=True, kw_only=True):
    """One cell's run: per passage its scores and the most blocks it held; else of all."""

    scores: "list[ScoreOutput]"
    blocks: list[int]
    bytes_per_block: int
    bytes_moved: int
    seconds: float


class Watch:
    """Watches engines at work: draws a bar on a terminal, and remembers who held how many blocks.

    Args:
        total: Tokens that will be computed.
    """

    def __init__(self, total: int) -> None:
        self._held: dict[int, int] = {}
        self._block_size = 1
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._progress.stop()

    def begin(self, llm: "LLM", label: str) -> None:
        """Look at an engine from now on, and forget what others held."""
        self._held = {}
        self._block_size = llm.config.cache.block_size
        self._progress.update(self._task, description=label)
        if self._observe not in llm.engine.observers:
            llm.engine.observers.append(self._observe)

    @property
    def blocks(self) -> list[int]:
        """The most blocks that each sequence held while a step ran, in order of their ids."""
        return [self._held[seq_id] for seq_id in sorted(self._held)]

    def _observe(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        blocks = (-(-plan.num_resident // self._block_size)).sum(axis=0)
        for seq_id, count in zip(plan.seq_ids.tolist(), blocks.tolist(), strict=True):
            self._held[seq_id] = max(self._held.get(seq_id, 0), count)
        self._progress.advance(self._task, plan.num_tokens)


def _measure(
    args: argparse.Namespace,
    llm: "LLM",
    configs: dict[str, EngineConfig],
    todo: list[Cell],
    material: list[Passage],
    watch: Watch,
) -> list[tuple[Cell, Measured, list[Float64]]]:
    """Run every cell over the material; cells of one granularity share an engine."""
    from pagedkv.device.llm import LLM

    metric, granularity = METRICS[args.task], todo[0].granularity
    longer = given(args, "model").get("max_model_len")
    done = []
    for cell in todo:
        if cell.granularity != granularity:
            granularity, model = cell.granularity, llm.model
            llm = LLM(model, config=configs[granularity], max_model_len=longer)
        watch.begin(llm, cell.label)
        before = llm.scheduler.stats().tokens_moved
        start = time.perf_counter()
        scores = llm.score([each.token_ids for each in material], eviction=cell.policy)
        measured = Measured(
            scores=scores,
            blocks=watch.blocks,
            bytes_per_block=llm.store.num_bytes // llm.scheduler.manager.pool.num_blocks,
            bytes_moved=(llm.scheduler.stats().tokens_moved - before) * llm.store.bytes_per_slot,
            seconds=time.perf_counter() - start,
        )
        items = [metric.of(each, one) for each, one in zip(material, scores, strict=True)]
        done.append((cell, measured, items))
    return done


def _cell_result(
    metric: Metric,
    seed: int,
    cell: Cell,
    measured: Measured,
    items: list[Float64],
    full: tuple[Cell, Measured, list[Float64]],
) -> dict[str, Any]:
    scores = measured.scores
    return {
        "eviction": cell.eviction,
        "budget": cell.budget,
        "granularity": cell.granularity,
        "expression": format_policy(cell.policy),
        "value": metric.value(items),
        "vs_full": msgspec.to_builtins(compare(metric, items, full[2], seed=seed)),
        "kv_bytes": float(np.mean(measured.blocks)) * measured.bytes_per_block,
        "evicted_fraction": float(
            np.mean([one.num_evicted_tokens / len(one.token_ids) for one in scores])
        ),
        "bytes_moved": measured.bytes_moved,
        "forfeited_mass": float(np.mean([one.forfeited_mass for one in scores])),
        "num_preemptions": sum(one.num_preemptions for one in scores),
        "per_passage": [metric.value([each]) for each in items],
        "elapsed_time": measured.seconds,
    }
