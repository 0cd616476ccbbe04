"""What one step of generation costs with a KV cache and without: the tables of docs/concepts.md.

    python benchmarks/kv_cache_cost.py
    python benchmarks/kv_cache_cost.py --models tiny-random-gpt2 --lengths 16,64

Each number is counted while a model runs, by hooks on its linear layers and its attention; nothing
is timed, so the numbers are the same on every machine. With the cache: the engine has computed all
tokens but the last, and computes that one. Without: it computes all of them, from empty blocks.
`gpt2-small` is GPT-2's shape (12 layers of width 768, 124 M parameters) with random weights: what a
step costs does not depend on their values.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging as transformers_logging

from pagedkv import CacheConfig, EngineConfig, Request, SamplingParams, SchedulerConfig
from pagedkv.cli.machine import machine, versions
from pagedkv.device.assembly import assemble
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.meter import Meter, Work, run_without_cache
from pagedkv.device.models import load_model

SEED = 0
ROWS = (
    ("**GFLOP**", None, 1),
    ("queries, keys, values, output", "projections", 1e9),
    ("attention over the context", "attention", 1e9),
    ("MLP", "mlp", 1e9),
    ("vocabulary", "head", 1e9),
    ("all", "flops", 1e9),
    ("**MB**", None, 1),
    ("weights read", "weights_read", 1e6),
    ("keys and values read", "kv_read", 1e6),
    ("keys and values written", "kv_written", 1e6),
    ("handed from layer to layer", "handed_on", 1e6),
)


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="gpt2-small,smollm2-135m")
    parser.add_argument("--lengths", default="16,128,1000", help="tokens of context, by comma")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    facts = {"machine": machine(), "versions": versions(), "seed": SEED}
    print(heading(facts))
    results = {}
    for name in args.models.split(","):
        results[name] = measure(load(name), lengths)
        print("\n".join(table(name, results[name])))
    if args.json:
        args.json.write_bytes(msgspec.json.encode(facts | {"models": results}))


def heading(facts: dict[str, Any]) -> str:
    """Return one line that says on what the numbers were made."""
    packages = ("pagedkv", "python", "torch", "transformers", "numpy")
    found = ", ".join(f"{name} {facts['versions'][name]}" for name in packages)
    threads = torch.get_num_threads()
    return f"On {facts['machine']['cpu']}, {threads} threads, seed {facts['seed']}; {found}.\n"


def load(name: str) -> LoadedModel:
    """Load a model by name; `gpt2-small` is made on the spot."""
    if name != "gpt2-small":
        return load_model(name, progress=False)
    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(GPT2Config())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        return load_model(folder, progress=False)


def with_cache(loaded: LoadedModel, token_ids: list[int]) -> Work:
    """Return the work of computing the last token after all others."""
    config = EngineConfig(
        cache=CacheConfig(block_size=16, num_blocks=len(token_ids) // 16 + 2),
        scheduler=SchedulerConfig(max_num_batched_tokens=len(token_ids)),
    )
    engine = assemble(loaded, config)
    assert isinstance(engine.executor, TorchExecutor)
    engine.executor = meter = Meter(engine.executor)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    request = Request(request_id="0", prompt_token_ids=token_ids[:-1], sampling=params)
    engine.scheduler.add(request)
    for _ in engine.run():
        pass
    assert meter.steps[-1].tokens == 1, f"{len(token_ids)} tokens are too many for the model"
    return meter.steps[-1]


def measure(loaded: LoadedModel, lengths: list[int]) -> dict[str, Any]:
    """Return a model's shape, and the work of a step without and with the cache by length."""
    rng = np.random.default_rng(SEED)
    work = {}
    for length in lengths:
        token_ids = rng.integers(0, loaded.geometry.vocab_size, length).tolist()
        without = run_without_cache(loaded, token_ids)[1]
        work[str(length)] = {"without": without, "with": with_cache(loaded, token_ids)}
    return {
        "geometry": loaded.geometry,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "work": work,
    }


def table(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a markdown table: rows are parts, columns lengths without and with."""
    geometry, work = result["geometry"], result["work"]
    steps = [step for pair in work.values() for step in (pair["without"], pair["with"])]
    yield f"#### {name}: one step, float32\n"
    yield (
        f"{geometry.num_layers} layers, {geometry.num_query_heads} query heads, "
        f"{geometry.num_kv_heads} KV heads of {geometry.head_dim}, "
        f"{result['parameters'] / 1e6:.0f} M parameters; one token's keys and values take "
        f"{steps[1].kv_written:,} bytes.\n"
    )
    yield "| context | " + " | ".join(f"{n} without | {n} with" for n in work) + " |"
    yield "|---|" + "---:|" * len(steps)
    for words, field, unit in ROWS:
        cells = ["" if field is None else digits(getattr(step, field) / unit) for step in steps]
        yield f"| {words} | " + " | ".join(cells) + " |"
    yield ""


def digits(number: float) -> str:
    """Return a number in three digits, more only before the point."""
    after = next((n for n, bound in enumerate((100, 10, 1, 0.1)) if number >= bound), 4)
    return f"{number:,.{after}f}"


if __name__ == "__main__":
    main()
