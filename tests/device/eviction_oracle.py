"""The slow truth about eviction: one sequence, one softmax per query over exactly what survives.

Nothing of the paged path is used. Keys arrive unrotated (every token is fed at position 0) and are
kept in plain lists, one vector per token; for each query they are rotated afresh, in fp64, to the
positions that the tokens have *now*. Masses are sums of softmax probabilities. Scores, rounds and
choices are the plain ones of `tests.eviction.naive`, which share nothing with the package.
"""

import functools
import math
import random

import torch
import transformers

from pagedkv import CacheConfig, EngineConfig, Request, SamplingParams, SchedulerConfig
from pagedkv.device.assembly import assemble
from pagedkv.device.bridge import forward, register
from pagedkv.device.models import _examined
from pagedkv.device.tiny import _draw
from tests.core.test_retention import kept_by
from tests.eviction import naive

__all__ = ["Oracle", "Server", "build_model", "random_prompt"]

SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
FIELDS = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "gpt_neox": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {},
}

CONTENT = {"key_norm": -1, "key_diff": -1, "value_key_norm": 1}
"""Scores that a block's content decides, and whether much of them is good or bad."""


@functools.cache
def build_model(model_type, **fields):
    """A small random model of an architecture, examined as `load_model` would."""
    register()
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | FIELDS[model_type] | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="pagedkv")
    for name, parameter in model.named_parameters():
        _draw(name, parameter.data, 0)
    return _examined(model.eval().requires_grad_(False), None, f"small {model_type}")


class Table(naive.Table):
    """The blocks of one table, whose queries are heard from the oracle and not made up."""

    def __init__(self, policy, size, prompt):
        unit = 1 if policy.unit == "token" else size
        super().__init__(policy, unit, prompt, 0, 0, 0, stride=size)
        self.ends = {}

    def epoch_end(self, query):
        if query not in self.ends:
            self.ends[query] = super().epoch_end(query)
        return self.ends[query]

    def tokens(self):
        """The tokens that survive, in order."""
        return [block.first + i for block in self.blocks for i in range(block.fill)]

    def add(self, masses):
        """One more token, whose query put ``masses[i]`` on the i-th block."""
        if not self.blocks or self.blocks[-1].fill == self.size:
            self.blocks.append(naive.Block(self.computed))
        self.blocks[-1].fill += 1
        for block, mass in zip(self.blocks, masses, strict=True):
            if block.fill == self.size:
                block.seen.append((self.computed, mass, self.resident))
        self.computed += 1

    def rank(self, block):
        if self.policy.score in CONTENT:
            return CONTENT[self.policy.score] * block.static
        return super().rank(block)

    def slide(self, window):
        """Forget whole blocks of slots that no later query can see."""
        while window and self.blocks and self.stride <= self.resident - window + 1:
            del self.blocks[: self.stride // self.size]


class Oracle:
    """One sequence under one policy. An `AttentionStep`.

    Attributes:
        survivors: Computed tokens to the first positions of each table's blocks, after every round.
        num_evicted: Tokens forgotten, mean over tables.
        forfeited: Mass that their blocks had from the latest query, mean over tables.
        left_out: Mean leave-one-out error over the queries that saw them, mean over tables.
    """

    def __init__(self, loaded, policy, block_size, num_prompt, granularity="sequence"):
        geometry = loaded.geometry
        self.loaded, self.policy = loaded, policy
        self.layers, self.heads = geometry.num_layers, geometry.num_kv_heads
        self.per_head = geometry.num_query_heads // self.heads
        self.windows = [window_of(loaded.model.config, i) for i in range(self.layers)]
        self.angles = [frequencies_of(loaded.model, i) for i in range(self.layers)]
        self.rotary = any(len(angles) for angles in self.angles)
        shape = {"sequence": (1, 1), "layer": (self.layers, 1), "head": (self.layers, self.heads)}
        rows, columns = shape[granularity]
        self.tables = [
            [Table(policy, block_size, num_prompt) for _ in range(columns)] for _ in range(rows)
        ]
        self.memory = {
            (layer, head): ([], []) for layer in range(self.layers) for head in range(self.heads)
        }
        self.size = self.tables[0][0].size
        if policy.gqa == "sum":
            heard = self.per_head * self.heads // columns * (self.layers // rows)
            for table in self.flat:
                table.even = heard
        self.survivors = {}
        self.num_evicted = self.forfeited = self.left_out = 0.0

    @property
    def flat(self):
        return [table for heads in self.tables for table in heads]

    @property
    def computed(self):
        return self.tables[0][0].computed

    def feed(self, tokens, most=10**6):
        """Compute tokens, at most so many at once and never across a round; the last's logits."""
        while tokens:
            upto = self.tables[0][0].epoch_end(self.computed)
            count = min(len(tokens), most, upto - self.computed)
            logits = self._forward(tokens[:count])
            tokens = tokens[count:]
        return logits

    def generate(self, prompt, max_tokens, most=10**6):
        """Greedy continuation: the tokens, and the logits that each was taken from."""
        written, seen, tokens = [], [], list(prompt)
        for _ in range(max_tokens):
            seen.append(self.feed(tokens, most))
            tokens = [int(seen[-1].argmax())]
            written += tokens
        return written, torch.stack(seen)

    def _forward(self, tokens):
        count, start = len(tokens), self.computed
        self.mass = {id(table): {} for table in self.flat}
        self.heard = {id(table): [{} for _ in range(count)] for table in self.flat}
        self.static = {}
        places = torch.zeros(count) if self.rotary else torch.arange(start, start + count)
        logits = forward(
            self.loaded, torch.tensor(tokens), places.long(), self, torch.tensor([count - 1])
        )[0]
        self._count(count)
        return logits

    def attend(self, layer_idx, query, key, value, scaling):
        out = torch.empty(query.shape, dtype=torch.float64)
        for head in range(self.heads):
            asks = slice(head * self.per_head, (head + 1) * self.per_head)
            keys, values = self.memory[layer_idx, head]
            keys += key[:, head].double()
            values += value[:, head].double()
            out[:, asks] = self._attend_head(layer_idx, head, query[:, asks].double(), scaling)
        return out.to(query.dtype)

    def _attend_head(self, layer, head, query, scaling):
        """[T, H, D] of one KV head's queries."""
        table = self.tables[layer % len(self.tables)][head % len(self.tables[0])]
        new = list(range(table.computed, table.computed + len(query)))
        tokens = table.tokens() + new
        cache = self.policy.positions == "cache"
        places = torch.arange(len(tokens)) if cache else torch.tensor(tokens)
        keys, values = (torch.stack([x[t] for t in tokens]) for x in self.memory[layer, head])
        keys = rotate(keys, places, self.angles[layer])
        at = places[len(tokens) - len(new) :]
        asked = rotate(query.transpose(0, 1), at, self.angles[layer])
        distance = at[:, None] - places[None, :]
        hidden = distance < 0
        if self.windows[layer]:
            hidden |= distance >= self.windows[layer]
        scores = (asked @ keys.T * scaling).masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1)
        out = weights @ values
        self._hear(table, weights, values, out)
        self._examine(table, keys, values)
        return out.transpose(0, 1)

    def _hear(self, table, weights, values, out):
        """Keep what each query of each head [H, T] put on each block."""
        for block in range(math.ceil(weights.shape[2] / self.size)):
            part = slice(block * self.size, (block + 1) * self.size)
            mass = weights[:, :, part].sum(-1)
            told = mass
            if self.policy.score == "lobo":
                alone = (weights[:, :, part] / mass.clamp_min(1e-300)[:, :, None]) @ values[part]
                told = mass / (1 - mass).clamp_min(1e-6) * (out - alone).norm(dim=-1)
            for i, heads in enumerate(told.T.tolist()):
                self.heard[id(table)][i].setdefault(block, []).extend(heads)
            self.mass[id(table)].setdefault(block, []).extend(mass[:, -1].tolist())

    def _examine(self, table, keys, values):
        """Keep what the content of every block that has just filled says of it."""
        if self.policy.score not in CONTENT:
            return
        unit = keys / keys.norm(dim=-1, keepdim=True)
        for block in range(table.sealed, len(keys) // self.size):
            part = slice(block * self.size, (block + 1) * self.size)
            if self.policy.score == "key_diff":
                mean = unit[: part.stop].mean(0)
                value = (unit[part] @ mean / mean.norm()).mean()
            else:
                norms = keys[part].norm(dim=-1)
                over = values[part].norm(dim=-1) if self.policy.score == "value_key_norm" else None
                value = (norms if over is None else over / norms).mean()
            self.static.setdefault((id(table), block), []).append(float(value))

    def _count(self, count):
        """Let the tables take in what the forward brought, and hold the round that is due."""
        reduce = {"sum": sum, "mean": lambda xs: sum(xs) / len(xs), "max": max}[self.policy.gqa]
        for table in self.flat:
            sealed = table.sealed
            for heard in self.heard[id(table)]:
                seen = -(-(table.resident + 1) // self.size)
                table.add([reduce(heard[block]) for block in range(seen)])
            for index in range(sealed, table.sealed):
                table.blocks[index].static = reduce(self.static.get((id(table), index), [0.0]))
            for index, block in enumerate(table.blocks):
                latest = self.mass[id(table)][index]
                block.latest = sum(latest) / len(latest)
        self._slide()
        if self.tables[0][0].at_round():
            before = [list(table.blocks) for table in self.flat]
            self._evict()
            self._certify(before)
        self.survivors[self.computed] = [[b.first for b in t.blocks] for t in self.flat]

    def _window(self, row):
        return min(self.windows) if len(self.tables) == 1 else self.windows[row]

    def _slide(self):
        for row, heads in enumerate(self.tables):
            for table in heads:
                table.slide(self._window(row))

    def _evict(self):
        """Hold a round; layers with a sliding window lose only what it hides."""
        spared = [
            (table, list(table.blocks))
            for row, heads in enumerate(self.tables)
            for table in heads
            if self._window(row)
        ]
        naive.evict_row(self.tables)
        for table, blocks in spared:
            table.blocks = blocks

    def _certify(self, before):
        for table, blocks in zip(self.flat, before, strict=True):
            gone = [block for block in blocks if block not in table.blocks]
            self.num_evicted += self.size * len(gone) / len(before)
            self.forfeited += sum(block.latest for block in gone) / len(before)
            if self.policy.score == "lobo":
                self.left_out += sum(map(table.rank, gone)) / len(before)


def rotate(vectors, places, angles):
    """Turn pairs (i, i + n) of [..., T, D] by place times angle; the rest stays."""
    pairs = len(angles)
    if not pairs:
        return vectors
    turn = places.double()[:, None] * angles
    a, b, rest = vectors.split([pairs, pairs, vectors.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def window_of(config, layer):
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    return window if not kinds or kinds[layer] == "sliding_attention" else 0


def frequencies_of(model, layer):
    """The angles of one position in a layer, from the model's own rotary modules."""
    config = model.config
    rotated = getattr(config, "no_rope_layers", None)
    if rotated is not None and not rotated[layer]:
        return torch.zeros(0, dtype=torch.float64)
    buffers = {
        name.rpartition(".")[2]: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    kinds = getattr(config, "layer_types", None)
    named = f"{kinds[layer]}_inv_freq" if kinds else ""
    buffer = buffers.get(named, buffers.get("inv_freq"))
    return torch.zeros(0, dtype=torch.float64) if buffer is None else buffer.double()


def random_prompt(length, seed=0, vocab=SMALL["vocab_size"]):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


class Server:
    """An engine that remembers what there is to compare, keyed by request id and index.

    Attributes:
        logits: What each token was drawn from.
        survivors: Computed tokens to the first positions of each table's blocks, after each step.
        finished: The sequences that ended.
        plans: Every plan that computed something.
        peak: The most blocks held after a step was planned.
        audits: Every how many steps the scheduler is audited.
    """

    def __init__(self, loaded, granularity="sequence", *, max_model_len=None, **fields):
        cache = {"block_size": 4, "num_blocks": 1024, "granularity": granularity}
        cache |= {name: fields.pop(name) for name in list(fields) if name in CACHE_FIELDS}
        limits = {"max_num_seqs": 64, "max_num_batched_tokens": 96} | fields
        config = EngineConfig(cache=CacheConfig(**cache), scheduler=SchedulerConfig(**limits))
        self.engine = assemble(loaded, config, max_model_len=max_model_len)
        self.scheduler, self.executor = self.engine.scheduler, self.engine.executor
        self.scheduler.table.kept_columns = ("first_position",)  # whatever policies read
        self.loaded, self.granularity = loaded, granularity
        self._forward, self.executor.forward = self.executor.forward, self._recorded
        self.requests, self.names = {}, {}
        self.logits, self.survivors, self.finished, self.plans = {}, {}, {}, []
        self.peak, self.audits = 0, 1

    def _recorded(self, plan):
        self.latest, observed = self._forward(plan)
        self.peak = max(self.peak, self.scheduler.manager.pool.num_held)
        return self.latest, observed

    def add(self, name, prompt, eviction=None, **sampling):
        params = {"temperature": 0, "ignore_eos": True, "max_tokens": 16, "seed": 0} | sampling
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            eviction=eviction,
            sampling=SamplingParams(**params),
        )
        for index, seq_id in enumerate(self.scheduler.add(request)):
            self.names[seq_id] = name, index
        self.requests[name] = request
        return request

    def step(self):
        plan, _, output = self.engine.step()
        if plan.num_tokens:
            self.plans.append(plan)
        for seq_id, sample in zip(output.seq_ids.tolist(), output.sample.tolist(), strict=True):
            self.logits.setdefault(self.names[seq_id], []).append(self.latest[sample])
        table = self.scheduler.table
        for row in table.running.tolist():
            name = self.names[int(table.seq_id[row])]
            kept = self.survivors.setdefault(name, {})
            kept[int(table.num_computed[row])] = kept_by(table, row)
        for end in output.finished:
            self.end(end)
        if len(self.plans) % self.audits == 0:
            self.scheduler.audit()
        return output

    def end(self, finished):
        self.finished[finished.request_id, finished.index] = finished

    def run(self, max_steps=4000):
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished():
                return self
            self.step()
        raise AssertionError("no progress")

    def oracle(self, name):
        """The oracle for a request, before anything was computed."""
        request = self.requests[name]
        policy = self.scheduler.retention.resolve(request.eviction)
        length = len(request.prompt_token_ids)
        return Oracle(
            self.loaded, policy, self.scheduler.table.block_size, length, self.granularity
        )


CACHE_FIELDS = ("block_size", "num_blocks", "enable_prefix_caching", "eviction")
