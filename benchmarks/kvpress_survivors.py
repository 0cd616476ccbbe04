"""Do pagedkv and kvpress keep the same tokens, where their policies mean the same?

    python benchmarks/kvpress_survivors.py ours survivors/          in pagedkv's environment
    python benchmarks/kvpress_survivors.py theirs survivors/        in one with kvpress

Two environments, because kvpress 0.5.5 needs transformers below 5.3 and pagedkv 5.0 or later:

    python -m venv kvp && kvp/bin/pip install kvpress==0.5.5 safetensors

The first run makes a small random Llama, serves prompts through the engine in blocks of one token,
so that a block is a token, and saves weights, prompts and the positions that every layer and KV
head still holds after the prompt. The second runs the same prompts through kvpress on the same
weights and reads from its cache which keys are left. What must be equal are sets of tokens, per
layer and head:

    streaming   StreamingLLMPress(n_sink=4): first four and last
    knorm       KnormPress: the smallest keys, per head
    tova        TOVAPress: what the last query attends to, mean over all heads; it also keeps the
                last token, which ours is told to do by recent=1

One round, at the end of the prompt, with original positions: kvpress compresses there and turns no
query. Nothing else of the two coincides: its DecodingPress scores what it has just evicted by
another rule, its observed attention is a mean where H2O sums.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0
LENGTHS = (64, 97, 200)
KEPT = 0.5
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Name: expression, granularity, press.
CASES = {
    "streaming": ("sinks=4", "sequence", "StreamingLLMPress"),
    "knorm": ("score=key_norm", "head", "KnormPress"),
    "tova": ("recent=1 + score=last", "layer", "TOVAPress"),
}


def main() -> int:
    """Run one of the two halves; 1 if survivors differ, 2 if kvpress is not there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("half", choices=("ours", "theirs"))
    parser.add_argument(
        "folder", type=Path, help="where the first half leaves what the second reads"
    )
    args = parser.parse_args()
    if args.half == "ours":
        ours(args.folder)
        return 0
    if importlib.util.find_spec("kvpress") is None:
        print("kvpress is not installed here; see this file's head for how", file=sys.stderr)
        return 2
    return theirs(args.folder)


def prompts() -> list[list[int]]:
    """Return the prompts, equal in both halves."""
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, SHAPE["vocab_size"], length).tolist() for length in LENGTHS]


# pagedkv


def ours(folder: Path) -> None:
    """Save weights and what the engine keeps: [layers][heads] -> positions, per case and prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pagedkv import LLM
    from pagedkv.cli.machine import versions

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # attention that prefers some tokens clearly
    model.save_pretrained(folder)
    found = {}
    for name, (expression, granularity, _) in CASES.items():
        llm = LLM(str(folder), block_size=1, num_blocks=4096, granularity=granularity)
        found[name] = [kept(llm, expression, prompt) for prompt in prompts()]
    (folder / "ours.json").write_text(json.dumps({"versions": versions(), "survivors": found}))
    print(f"saved {len(CASES)} cases of {len(LENGTHS)} prompts in {folder}")


def kept(llm: Any, expression: str, prompt: list[int]) -> list[list[list[int]]]:
    """Return the positions that are resident when the prompt is computed and evicted once."""
    from pagedkv import Request, SamplingParams

    size = len(prompt)
    text = f"{expression} + budget={int(size * KEPT)} + chunk={size} + positions=original"
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.scheduler.table.kept_columns = ("first_position",)  # whatever the policy reads itself
    llm.scheduler.add(
        Request(request_id="r", prompt_token_ids=prompt, sampling=params, eviction=text)
    )
    llm.engine.step()
    table, layout = llm.scheduler.table, llm.scheduler.layout
    row = int(table.running[0])
    assert int(table.num_computed[row]) == size
    per_layer = []
    for layer in range(SHAPE["num_hidden_layers"]):
        groups = SHAPE["num_key_value_heads"] // layout.heads_per_group
        first = layout.group_of[layer]
        tables = [table.first_position[g, row, : table.num_blocks[g, row]].tolist()
                  for g in range(first, first + groups)]  # fmt: skip
        per_layer.append(tables * (SHAPE["num_key_value_heads"] // groups))
    llm.scheduler.abort("r")
    return per_layer


# kvpress


def theirs(folder: Path) -> int:
    """Compress the same prompts with kvpress and compare; 1 if any set of tokens differs."""
    import kvpress
    import transformers
    from safetensors.torch import load_file

    saved = json.loads((folder / "ours.json").read_text())
    config = transformers.LlamaConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    version = importlib.metadata.version("kvpress")
    mine = saved["versions"]
    print(f"kvpress {version}, transformers {transformers.__version__}, seed {SEED}")
    print(f"ours: pagedkv {mine['pagedkv']}, transformers {mine['transformers']}")
    wrong = 0
    for name, (_, _, press) in CASES.items():
        same = total = 0
        for prompt, own in zip(prompts(), saved["survivors"][name], strict=True):
            options = {"n_sink": 4} if name == "streaming" else {}
            ratio = 1 - int(len(prompt) * KEPT) / len(prompt)
            left = compressed(
                model, getattr(kvpress, press)(compression_ratio=ratio, **options), prompt
            )
            pairs = [
                (set(a), set(b))
                for x, y in zip(own, left, strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            same += sum(a == b for a, b in pairs)
            total += len(pairs)
            assert all(len(a) < len(prompt) for a, _ in pairs), "nothing was evicted"
        wrong += total - same
        print(f"{name:<10} {press:<18} {same} of {total} (prompt, layer, head) sets are the same")
    return 1 if wrong else 0


@torch.no_grad()
def compressed(model: Any, press: Any, prompt: list[int]) -> list[list[list[int]]]:
    """Return the positions whose keys are left in kvpress's cache, by matching them to all keys."""
    from transformers import DynamicCache

    ids = torch.tensor([prompt])
    whole, left = DynamicCache(), DynamicCache()
    model.model(ids, past_key_values=whole, use_cache=True)
    with press(model):
        model.model(ids, past_key_values=left, use_cache=True)
    found = []
    for full, part in zip(whole.layers, left.layers, strict=True):
        distance = torch.cdist(part.keys[0], full.keys[0])  # [heads, kept, prompt]
        assert float(distance.amin(-1).max()) < 1e-3, "a kept key is none of the prompt's"
        found.append(distance.argmin(-1).tolist())
    return found


if __name__ == "__main__":
    sys.exit(main())
