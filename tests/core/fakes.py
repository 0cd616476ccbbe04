"""A device that is all bookkeeping: it notices every block that holds what it should not."""

import zlib

import msgspec
import numpy as np

from pagedkv import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    Request,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    StepResult,
)
from pagedkv.core.batch import Batch
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import Sequence

VOCAB = 61
MODULUS = 2**61 - 1
NOTHING = -1
ROWS = 4


def make_config(
    block_size=4,
    num_blocks=64,
    *,
    model=None,
    prefix_caching=True,
    events=False,
    num_cpu_blocks=0,
    **scheduler,
):
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 64} | scheduler
    return EngineConfig(
        model=ModelConfig(**{"max_model_len": 4096, "vocab_size": VOCAB} | (model or {})),
        cache=CacheConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=prefix_caching,
            enable_kv_cache_events=events,
            num_cpu_blocks=num_cpu_blocks,
        ),
        scheduler=SchedulerConfig(**scheduler),
    )


def grouped(config, num_groups):
    """The same configuration with that many block tables per sequence."""
    model = msgspec.structs.replace(config.model, num_layers=num_groups)
    cache = msgspec.structs.replace(config.cache, granularity="layer")
    return msgspec.structs.replace(config, model=model, cache=cache)


def make_request(name, prompt, *, salt="", seed=0, **sampling):
    """A request whose prompt is a number of distinct tokens or a list of ids."""
    ids = [i % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(**{"max_tokens": 8, "seed": seed} | sampling)
    return Request(request_id=name, prompt_token_ids=ids, sampling=params, cache_salt=salt)


def draw(prefix, seed, position):
    """The next token: any change anywhere in the prefix, the seed or the position changes it."""
    ids = np.asarray(prefix, np.int32)
    key = np.array([seed, position], np.uint64)
    return zlib.crc32(key.tobytes(), zlib.crc32(ids.tobytes())) % VOCAB


def fingerprint(before, token):
    """What a model would store for a token: a value that depends on every token up to it."""
    return (before * 1_000_003 + token + 1) % MODULUS


class RecordingExecutor:
    """Keeps one token, position and fingerprint per slot and group, and reads all of it back.

    As in a model, what is stored for a token is computed from what is stored for the tokens
    before it, so a block with the right tokens but a wrong past is caught as well.

    Attributes:
        known: Sequence id to the tokens it must see; kept up to date by the `Driver`.
        salts: Sequence id to its request's salt.
    """

    def __init__(self, num_blocks, block_size, num_groups=1):
        self.block_size = block_size
        slots = (num_groups, num_blocks * block_size)
        self.token = np.full(slots, NOTHING, np.int64)
        self.position = np.full(slots, NOTHING, np.int64)
        self.fingerprint = np.full(slots, NOTHING, np.int64)
        self.salt = {}
        self.host = {}
        self.known = {}
        self.salts = {}
        self.num_copies = 0
        self.computed = []
        self._chains = {}

    def execute(self, plan):
        assert not len(plan.moves), "nobody here evicts"
        self._swap(plan.swap_out, plan.swap_in)
        self._copy(plan.copies)
        for g, slots in enumerate(plan.slot_mapping):
            assert len(np.unique(slots)) == len(slots), "two tokens are written to one slot"
            for b in range(len(plan.rows)):
                self._write(plan, g, b)
        seen = [self._read(plan, b) for b in range(len(plan.rows))]
        member = np.searchsorted(plan.query_start, plan.sample_index, side="right") - 1
        drawn = [
            draw(seen[b], seed, position)
            for b, seed, position in zip(
                member, plan.sampling.seed, plan.sampling.position, strict=True
            )
        ]
        tokens = np.array(drawn, np.int32)
        return StepResult(token_ids=tokens, logprobs=-np.ones(len(tokens), np.float32))

    def _swap(self, out, back):
        """Blocks go to host memory and come back under another number."""
        size = self.block_size
        for source, target in out.tolist():
            self.host[target] = [
                column[:, source * size :][:, :size].copy()
                for column in (self.token, self.position, self.fingerprint)
            ] + [self.salt[source]]
        for source, target in back.tolist():
            *columns, salt = self.host.pop(source)
            for column, kept in zip(
                (self.token, self.position, self.fingerprint), columns, strict=True
            ):
                column[:, target * size :][:, :size] = kept
            self.salt[target] = salt

    def _copy(self, copies):
        sources, targets = copies[:, 0], copies[:, 1]
        assert len(np.unique(targets)) == len(targets), "a block is the target of two copies"
        assert not np.isin(sources, targets).any(), "a copy overwrites another's source"
        size = self.block_size
        for source, target in copies.tolist():
            for column in (self.token, self.position, self.fingerprint):
                column[:, target * size :][:, :size] = column[:, source * size :][:, :size]
            self.salt[target] = self.salt[source]
        self.num_copies += len(copies)

    def _write(self, plan, g, b):
        begin, end = plan.query_start[b], plan.query_start[b + 1]
        seq_id = int(plan.seq_ids[b])
        slots = plan.slot_mapping[g, begin:end]
        first = int(plan.positions[begin])
        assert plan.positions[begin:end].tolist() == list(range(first, first + end - begin))
        assert plan.num_resident[g, b] == first + end - begin
        value = self.fingerprint[g, self._slots(plan, g, b)[first - 1]] if first else g + 1
        for i, slot in zip(range(begin, end), slots.tolist(), strict=True):
            value = fingerprint(int(value), int(plan.token_ids[i]))
            self.token[g, slot] = plan.token_ids[i]
            self.position[g, slot] = plan.positions[i]
            self.fingerprint[g, slot] = value
            self.salt[slot // self.block_size] = self.salts[seq_id]
            if g == 0:
                self.computed.append((seq_id, int(plan.positions[i])))

    def _slots(self, plan, g, b):
        used = -(-int(plan.num_resident[g, b]) // self.block_size)
        blocks = plan.block_table[g, b, :used].astype(np.int64)
        slots = blocks[:, None] * self.block_size + np.arange(self.block_size)
        return slots.ravel()[: plan.num_resident[g, b]]

    def _read(self, plan, b):
        """Return the tokens a sequence sees, after checking them in every group."""
        seq_id = int(plan.seq_ids[b])
        for g in range(len(plan.block_table)):
            slots = self._slots(plan, g, b)
            expected = self.known[seq_id][: len(slots)]
            seen = self.token[g, slots].tolist()
            assert seen == expected, f"sequence {seq_id} sees other tokens than its own"
            assert self.position[g, slots].tolist() == list(range(len(slots)))
            chain = self._chain(seq_id, g)[: len(slots)]
            assert self.fingerprint[g, slots].tolist() == chain, "computed from another past"
            salts = {self.salt[block] for block in (slots // self.block_size).tolist()}
            assert salts <= {self.salts[seq_id]}, "a block is shared between salts"
        return seen

    def _chain(self, seq_id, g):
        """Return the fingerprints that a sequence's tokens must have in a group."""
        chain = self._chains.setdefault((seq_id, g), [])
        for token in self.known[seq_id][len(chain) :]:
            chain.append(fingerprint(chain[-1] if chain else g + 1, token))
        return chain


class Driver:
    """A scheduler, the recording executor, and what each sequence should know."""

    def __init__(self, config, *, num_groups=1):
        cache = config.cache
        self.scheduler = Scheduler(grouped(config, num_groups))
        self.executor = RecordingExecutor(cache.num_blocks, cache.block_size, num_groups)
        self.requests = {}
        self.finished = {}
        self.plans = []

    def add(self, request):
        ids = self.scheduler.add(request)
        self.requests[request.request_id] = request
        for seq_id in ids:
            self.executor.known[seq_id] = [int(i) for i in request.prompt_token_ids]
            self.executor.salts[seq_id] = request.cache_salt
        return ids

    def abort(self, request_id):
        self._end(self.scheduler.abort(request_id))

    def step(self, between=lambda: None):
        """One step; ``between`` runs when the plan is out and not committed."""
        plan = self.scheduler.schedule()
        self._check_limits(plan)
        between()
        result = self.executor.execute(plan)
        output = self.scheduler.commit(plan, result)
        self.scheduler.audit()
        for seq_id, token in zip(output.seq_ids.tolist(), output.token_ids.tolist(), strict=True):
            self.executor.known[seq_id].append(token)
        self._end(output.finished)
        self.plans.append(plan)
        return output

    def _check_limits(self, plan):
        limits = self.scheduler.config.scheduler
        assert plan.num_tokens <= limits.max_num_batched_tokens
        assert len(plan.rows) <= limits.max_num_seqs
        most = limits.long_prefill_token_threshold or limits.max_num_batched_tokens
        if len(plan.rows) == 1:  # a lone prompt shares with nobody
            most = limits.max_num_batched_tokens
        assert np.diff(plan.query_start).max(initial=1) <= most

    def run(self, *requests, max_steps=10_000):
        """Serve requests to their end and return what finished, keyed by (request, index)."""
        for request in requests:
            self.add(request)
        while self.scheduler.has_unfinished():
            self.step()
            assert len(self.plans) <= max_steps, "no progress"
        return self.finished

    def _end(self, finished):
        for end in finished:
            key = (end.request_id, end.index)
            assert key not in self.finished, "a sequence ended twice"
            self.finished[key] = end


def alone(request, config, *, num_groups=1):
    """Answer a request as if nothing else existed: [(tokens, finish reason)] of its sequences."""
    params, size = request.sampling, config.cache.block_size
    stops = set(params.stop_token_ids)
    if not params.ignore_eos:
        stops |= set(config.model.eos_token_ids)
    answers = []
    for index in range(params.n):
        known = [int(i) for i in request.prompt_token_ids]
        limit = config.model.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(known) + params.max_tokens)
        start, reason = len(known), ""
        while not reason:
            known.append(draw(known, params.seed + index, len(known) - start))
            if known[-1] in stops:
                reason = "stop"
            elif len(known) >= limit:
                reason = "length"
            elif -(-len(known) // size) * num_groups > config.cache.num_blocks:
                reason = "error"
        answers.append((known[start:], reason))
    return answers


def plan_bytes(plan):
    """Everything in a plan as bytes, dtypes and shapes included."""
    parts = []
    for name in plan.__struct_fields__:
        value = getattr(plan, name)
        if hasattr(value, "__struct_fields__"):
            parts.append(plan_bytes(value))
        elif isinstance(value, list):
            parts += map(plan_bytes, value)
        elif isinstance(value, np.ndarray):
            parts.append(f"{name}{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            parts.append(f"{name}{value!r}".encode())
    return b"|".join(parts)


def make_manager(num_blocks, block_size=2, num_groups=1, **options):
    config = CacheConfig(num_blocks=num_blocks, block_size=block_size, **options)
    return BlockManager(config, ROWS, num_groups)


def bind_row(manager, row, tokens, salt=""):
    """Put a sequence in a row, as an admission does before it gives blocks."""
    request = Request(request_id=str(row), prompt_token_ids=tokens, cache_salt=salt)
    seq = Sequence(row, request, np.array(tokens, np.int32), index=0, seed=0)
    seq.row = row
    return seq


def admit_row(manager, row, tokens, salt=""):
    seq = bind_row(manager, row, tokens, salt)
    hits = manager.find_prefix(seq)
    manager.table.bind(seq, row, [])
    manager.admit(seq, hits)
    manager.table.start(row)
    return hits


def batch_of(manager, counts):
    """Rows and how many tokens each computes."""
    rows, tokens = np.array(list(counts), np.int32), np.array(list(counts.values()), np.int32)
    return Batch(manager.table, rows, tokens)
