"""The measurements behind ``pagedkv bench``."""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from pagedkv.cli.datasets import (
    BenchRequest,
    custom_requests,
    prefix_repetition_requests,
    random_requests,
)
from pagedkv.cli.flags import check_counts, engine_config, given, make_llm, sampling_params
from pagedkv.cli.report import RunProgress, show
from pagedkv.cli.results import (
    check_outputs,
    latency_result,
    provenance,
    throughput_result,
    totals_between,
    write_result,
)
from pagedkv.config import EngineConfig, with_fields
from pagedkv.core.request import SamplingParams
from pagedkv.errors import ConfigError

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM
    from pagedkv.device.outputs import RequestOutput

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Measure, show a table and write JSON; 1 if a request failed."""
    check_outputs(
        {"--output-json": args.output_json}, (getattr(args, "dataset_path", None), args.config)
    )
    config = with_fields(engine_config(args), seed=args.seed)
    params = sampling_params(args, temperature=0.0)
    measure = _throughput if args.mode == "throughput" else _latency
    result, title = measure(args, config, params)
    show(result, title, to_stderr=args.output_json == "-")
    write_result(result, args.output_json)
    if failed := result["failed"]:
        print(f"pagedkv: error: {failed} sequences ended with an error", file=sys.stderr)
    return 1 if result["failed"] else 0


# Throughput


def _throughput(
    args: argparse.Namespace, config: EngineConfig, params: SamplingParams
) -> tuple[dict[str, Any], str]:
    if args.num_warmups < 0:
        raise ConfigError(
            f"it is {args.num_warmups}", where="--num-warmups", remedy="give 0 or more"
        )
    make_requests = _dataset(args)
    llm = make_llm(args, config)
    requests = make_requests(llm.config.model.vocab_size)
    _warm_up(llm, requests[: args.num_warmups])
    before = llm.scheduler.stats()
    with RunProgress(llm, len(requests) * params.n) as progress:
        start = time.perf_counter()
        outputs = _serve(llm, requests, params)
        elapsed = time.perf_counter() - start
    totals = totals_between(before, llm.scheduler.stats())
    result = throughput_result(elapsed, _lengths(outputs), totals)
    result["computed_tokens"] = progress.computed_tokens
    result["peak_kv_cache_usage"] = progress.peak_usage
    result["bytes_moved"] = totals["tokens_moved"] * llm.store.bytes_per_slot
    result["evicted_tokens"] = sum(output.num_evicted_tokens for output in outputs)
    result["failed"] = _failed(outputs)
    result |= provenance(args.model, llm.model.dtype_name, llm.config, args.seed, _workload(args))
    return result, f"throughput of {args.model}, {llm.model.dtype_name}, {len(requests)} requests"


def _dataset(args: argparse.Namespace) -> Callable[[int], list[BenchRequest]]:
    """Return what makes the requests once the vocabulary is known; files are read now."""
    check_counts(args, num_prompts=1, input_len=1, output_len=1, prefix_len=0, suffix_len=1)
    name = args.dataset_name or ("custom" if args.dataset_path else "random")
    if (name == "custom") != bool(args.dataset_path):
        raise ConfigError(
            f"dataset {name} and --dataset-path do not go together"
            if args.dataset_path
            else "dataset custom needs a file",
            where="--dataset-name",
            remedy="give --dataset-path with dataset custom and with no other",
        )
    if name == "custom":
        requests = custom_requests(args.dataset_path, args.num_prompts, output_len=args.output_len)
        return lambda vocab_size: requests
    if name == "random":
        return functools.partial(
            random_requests,
            args.num_prompts,
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.prefix_len or 0,
            seed=args.seed,
        )
    return functools.partial(
        prefix_repetition_requests,
        args.num_prompts,
        prefix_len=256 if args.prefix_len is None else args.prefix_len,
        suffix_len=args.suffix_len,
        num_prefixes=args.num_prefixes,
        output_len=args.output_len,
        seed=args.seed,
    )


def _warm_up(llm: "LLM", requests: list[BenchRequest]) -> None:
    """Serve a few tokens: compiling and first allocations are not what is measured."""
    short = [
        BenchRequest(prompt=request.prompt, output_len=min(4, request.output_len))
        for request in requests
    ]
    if short:
        _serve(llm, short, SamplingParams(temperature=0.0))
    llm.scheduler.reset_prefix_cache()


def _serve(llm: "LLM", requests: list[BenchRequest], params: SamplingParams) -> list[Any]:
    each = [
        msgspec.structs.replace(params, max_tokens=request.output_len, ignore_eos=True)
        for request in requests
    ]
    return llm.generate([request.prompt for request in requests], each)


def _lengths(outputs: list["RequestOutput"]) -> list[tuple[int, int]]:
    return [
        (len(output.prompt_token_ids) if completion.index == 0 else 0, len(completion.token_ids))
        for output in outputs
        for completion in output.outputs
    ]


def _failed(outputs: list["RequestOutput"]) -> int:
    return sum(bool(completion.error) for output in outputs for completion in output.outputs)


def _workload(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that made the requests, and those of sampling that were given."""
    names = ("verb", "model", "dtype", "config", "seed", "output_json", "debug")
    flags = {k: v for k, v in vars(args).items() if "." not in k and k not in names}
    return flags | {"sampling": {"temperature": 0.0} | given(args, "sampling")}


# Latency


def _latency(
    args: argparse.Namespace, config: EngineConfig, params: SamplingParams
) -> tuple[dict[str, Any], str]:
    check_counts(args, num_iters=1, num_iters_warmup=0, batch_size=1, input_len=1, output_len=1)
    llm = make_llm(args, config)
    requests = random_requests(
        args.batch_size,
        llm.config.model.vocab_size,
        input_len=args.input_len,
        output_len=args.output_len,
        seed=args.seed,
    )
    latencies: list[float] = []
    failed = 0
    rounds = args.num_iters_warmup + args.num_iters
    with RunProgress(llm, rounds * len(requests) * params.n):
        for _ in range(rounds):
            llm.scheduler.reset_prefix_cache()
            start = time.perf_counter()
            outputs = _serve(llm, requests, params)
            latencies.append(time.perf_counter() - start)
            failed += _failed(outputs)
    result = latency_result(latencies[args.num_iters_warmup :]) | {"failed": failed}
    result |= provenance(args.model, llm.model.dtype_name, llm.config, args.seed, _workload(args))
    title = (
        f"latency of {args.model}, {llm.model.dtype_name}, batch of {args.batch_size}, "
        f"{args.input_len} tokens in, {args.output_len} out"
    )
    return result, title
