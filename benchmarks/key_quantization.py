"""Should keys be stored in 8 bits before or after their rotation? Perplexity tells.

    python benchmarks/key_quantization.py
    python benchmarks/key_quantization.py --model tiny-random --length 64 --windows 1

transformers' own model, in fp32 and without a pool, sees each text in windows of so many tokens.
Keys are rounded as the pool's int8 rows round them, once as they leave their projection (they would
be rotated whenever they are read) and once as attention gets them; values are rounded both times.
Beside it, keys alone and values alone, to see whose rounding matters.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import pagedkv
from pagedkv.cli.machine import machine, versions
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model
from pagedkv.device.quantize import dequantize, quantize

OWN_TEXT = Path(pagedkv.__file__).parent / "cli" / "texts" / "moby_dick_1_2.txt"
KINDS = {  # what is rounded: keys before rotation, keys after it, values
    "nothing": (False, False, False),
    "keys before rotation, values": (True, False, True),
    "keys after rotation, values": (False, True, True),
    "keys before rotation": (True, False, False),
    "keys after rotation": (False, True, False),
    "values": (False, False, True),
}


def rounded(vectors: Tensor) -> Tensor:
    """Return what the pool would give back for vectors [..., D]."""
    return dequantize(quantize(vectors), vectors.shape[-1])


def network(loaded: LoadedModel, before: bool, after: bool, values: bool) -> Any:
    """Return transformers' model of the same weights, its keys and values rounded so."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any):
        key = rounded(key) if after else key
        value = rounded(value) if values else value
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    name = f"rounded_{before}_{after}_{values}"
    AttentionInterface.register(name, attend)
    model = AutoModelForCausalLM.from_config(loaded.model.config, attn_implementation=name)
    model.load_state_dict(loaded.model.state_dict(), assign=True)
    model.tie_weights()
    heads, dim = loaded.geometry.num_kv_heads, loaded.geometry.head_dim
    if before:
        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(_rounding(heads, dim))
    return model.eval().requires_grad_(False)


def _rounding(heads: int, dim: int) -> Callable[..., Tensor]:
    def hook(_module: Any, _given: Any, keys: Tensor) -> Tensor:
        return rounded(keys.unflatten(-1, (heads, dim))).flatten(-2)

    return hook


def perplexity(model: Any, windows: Sequence[Tensor]) -> float:
    """Return the perplexity over windows of token ids [1, length]."""
    surprise = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in windows]
    return float(torch.stack(surprise).double().mean().exp())


def main() -> None:
    """Print a line per way of rounding, a column per text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, action="append", help="text file, may be repeated")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=6, help="windows of each text")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    args = parser.parse_args()
    loaded = load_model(args.model, progress=False)
    files = args.text or [OWN_TEXT]
    read: dict[str, list[Tensor]] = {}
    for file in files:
        ids = torch.tensor([loaded.tokenizer.encode(file.read_text(encoding="utf-8"))])
        read[file.stem] = list(ids.split(args.length, dim=1)[: args.windows])
    facts = {"machine": machine(), "versions": versions(), "model": args.model, "files": list(read)}
    print(f"{args.model}, {args.windows} windows of {args.length} tokens, versions {versions()}\n")
    print(f"{'rounded to 8 bits':32}" + "".join(f"{name[:20]:>24}" for name in read))
    found: dict[str, dict[str, float]] = {}
    for kind, how in KINDS.items():
        model = network(loaded, *how)
        found[kind] = {name: perplexity(model, windows) for name, windows in read.items()}
        cells = (
            f"{value:14.4f} {100 * (value / found['nothing'][name] - 1):+8.3f}%"
            for name, value in found[kind].items()
        )
        print(f"{kind:32}" + "".join(cells), flush=True)
    if args.json:
        args.json.write_bytes(msgspec.json.encode(facts | {"perplexity": found}))


if __name__ == "__main__":
    main()
