"""Logits to tokens: penalties, filters and seeded draws, the same for a row in any batch.

Floating-point sums depend on their order, and a library picks that order by the shape of the
batch. So probabilities are first cut to whole numbers (`_ONE` is the likeliest token's weight):
integer sums are exact in every order, and what a row draws cannot depend on its neighbours.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.core.arrays import Float32, Int32
from pagedkv.core.plan import SamplingBatch, StepResult
from pagedkv.device.logits import adjust, penalise
from pagedkv.device.staging import fetch
from pagedkv.errors import InvalidRequest

__all__ = ["sample", "token_logprobs", "uniforms"]

_UInt64 = npt.NDArray[np.uint64]
_Index = npt.NDArray[np.intp]

# Below this temperature a row is greedy; vLLM draws the line at the same place.
_GREEDY = 1e-5
# The weight of a row's likeliest token. 2**40 leaves room to add up 2**22 tokens in an int64, and
# what cutting to whole numbers loses, vocab_size * 2**-40, is below float32's own rounding.
_ONE = 2.0**40
# exp(-28) * 2**40 < 1: a token this far below the likeliest has weight 0 and is never drawn.
_SILENT = -28.0
# Room for the rounding of exp and log where a bound only has to be safe, not tight.
_SLACK = 1e-3
# Tokens per block. Sums and maxima of blocks tell which few blocks are worth a closer look.
_SHIFT = 6
_BLOCK = 1 << _SHIFT
# Finer, where a bound on the sum of many small weights must be tight.
_GROUP = 16


def sample(logits: Tensor, batch: SamplingBatch) -> StepResult:
    """Draw one token per row.

    The order is that of vLLM's V1 sampler: what is allowed, biased or forbidden; repetition,
    frequency and presence penalties; argmax where the temperature is below 1e-5; else temperature,
    min_p, top_k, top_p and a draw. Of equal logits the lowest id is the likelier, so top_k keeps
    exactly k (vLLM keeps all that tie with the k-th). At least one token is always kept.
    Log-probabilities are natural, and those of the model's own logits, before biases, penalties,
    temperature and filters (vLLM's default, ``logprobs_mode="raw_logprobs"``).

    A row's answer is a pure function of its own logits, parameters, seed and position: bit for bit
    the same alone, in any batch and at any place in it, on one kind of device.

    Args:
        logits: [S, V] Log-odds as the model gives them; not changed. -inf forbids a token.
        batch: The rows' parameters; its penalties and adjustments hold tokens from 0 to V - 1.

    Returns:
        token_ids [S], -1 where a row holds NaN or +inf, or nothing but -inf, when all is done: such
        a row has no distribution to draw from, and the others are unharmed. The log-probability
        arrays only if a row asked; K is at most V. What a row did not ask for, or does not have,
        is NaN, with the id -1.

    Raises:
        InvalidRequest: The batch does not describe as many rows as the logits have.

    Cost:
        Greedy: one pass over the logits. A draw: some five passes and 12 bytes per logit. top_k
        sorts about k tokens and min_p those it keeps; top_p alone sorts the tokens above a bound
        on the tail, a few hundred of a peaked distribution and up to all of a flat one.
    """
    _check(logits, batch)
    raw = logits.detach().float()
    x = _changed(raw, batch)
    ids, peak = _likeliest(x)
    rows = np.flatnonzero((ids >= 0) & (batch.temperature >= _GREEDY))
    if rows.size:
        ids[rows] = _drawn(x, peak, batch, rows)
    if batch.most_logprobs < 0:
        return StepResult(token_ids=ids)
    return _with_logprobs(raw, ids, batch)


def uniforms(seed: _UInt64, position: Int32) -> npt.NDArray[np.float64]:
    """Return one number in [0, 1) per row, of 53 random bits, a pure function of seed and position.

    Position p of a seed is output p of a SplitMix64 generator (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014; Stafford's mix 13). The generator
    starts from the mixed seed, so that neighbouring seeds do not walk the same path.

    Args:
        seed: [S] Any 64 bits.
        position: [S] From 0.
    """
    steps = position.astype(np.uint64) + np.uint64(1)
    bits = _mix(_mix(seed) + steps * np.uint64(0x9E3779B97F4A7C15))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, np.float64)


def _mix(z: _UInt64) -> _UInt64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check(logits: Tensor, batch: SamplingBatch) -> None:
    if logits.ndim != 2 or logits.shape[0] != len(batch.seed):
        raise InvalidRequest(
            f"logits of shape {tuple(logits.shape)} for {len(batch.seed)} rows",
            where="sample",
            remedy="give one row of logits per row of the batch",
        )


def _changed(raw: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits with all that is asked of tokens; themselves if nothing is."""
    if batch.adjustments is None and batch.penalties is None:
        return raw
    x = raw.clone()
    if batch.adjustments is not None:
        adjust(x, batch.adjustments)
    if batch.penalties is not None:
        penalise(x, batch, batch.penalties)
    return x


def _likeliest(x: Tensor) -> tuple[Int32, Tensor]:
    """Return each row's likeliest token, -1 where that is no number, and its logit."""
    # Of equal logits both take the first. numpy's argmax is vectorised; torch's is 7 times slower.
    on_cpu = x.device.type == "cpu"
    best = torch.from_numpy(x.numpy().argmax(-1)) if on_cpu else x.argmax(-1)
    peak = x.gather(1, best[:, None])[:, 0]
    return fetch(torch.where(peak.isfinite(), best, -1).int()), peak


class _Draw(NamedTuple):
    """The parameters of R rows on the logits' device, one number each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, batch: SamplingBatch, rows: _Index, vocab: int, device: torch.device) -> "_Draw":
        """Gather these rows' columns; top_k is V where it is off."""
        k = batch.top_k[rows].astype(np.int64)
        k[(k <= 0) | (k > vocab)] = vocab
        uniform = uniforms(batch.seed[rows], batch.position[rows])
        # What is above 0 as asked may be 0 in fp32, and the likeliest token always stays.
        top_p = np.maximum(batch.top_p[rows], np.finfo(np.float32).tiny)
        columns = (batch.temperature[rows], k, top_p, batch.min_p[rows], uniform)
        return cls(*(torch.from_numpy(column).to(device) for column in columns))


def _drawn(x: Tensor, peak: Tensor, batch: SamplingBatch, rows: _Index) -> Int32:
    """Draw for these rows, taking each kind of filter together: only who filters pays for it."""
    vocab = x.shape[1]
    k = batch.top_k[rows]
    few = ((k > 0) & (k < vocab)) | (batch.min_p[rows] > 0)
    kind = np.where(few, 2, batch.top_p[rows] < 1)
    out = np.empty(len(rows), np.int32)
    for which, draw_tokens in enumerate((_draw_all, _draw_nucleus, _draw_few)):
        member = np.flatnonzero(kind == which)
        if member.size:
            draw = _Draw.of(batch, rows[member], vocab, x.device)
            own = _rows_of(x, rows[member])
            y = _below_peak(own, _rows_of(peak, rows[member]), draw.temperature)
            out[member] = fetch(draw_tokens(y, draw, vocab))
    return out


def _rows_of(x: Tensor, rows: _Index) -> Tensor:
    return x if len(rows) == len(x) else x[torch.as_tensor(rows, device=x.device)]


def _below_peak(x: Tensor, peak: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Return [R, V'] scaled logits that are at most 0, V' being V rounded up to whole blocks."""
    rows, vocab = x.shape
    y = x.new_empty(rows, -(-vocab // _BLOCK) * _BLOCK)
    torch.sub(x, peak[:, None], out=y[:, :vocab])
    if temperature is not None:
        y.div_(temperature[:, None])
    y[:, vocab:] = -math.inf
    return y


def _weights(y: Tensor, *, reuse: bool = False) -> Tensor:
    """Return the whole-number weights of scaled logits; `reuse` spares memory by spoiling them."""
    return torch.exp(y, out=y if reuse else None).mul_(_ONE).to(torch.int64)


def _blocks(y: Tensor) -> Tensor:
    return y.view(len(y), -1, _BLOCK)


def _draw_all(y: Tensor, draw: _Draw, vocab: int) -> Tensor:
    """Draw from the whole vocabulary: find the block first, then the token in it."""
    weights = _blocks(_weights(y, reuse=True))
    sums = weights.sum(-1)
    ends = sums.cumsum(-1)
    target = _target(draw.uniform, ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True)
    rest = target - (ends - sums).gather(1, block)
    inside = weights[torch.arange(len(y), device=y.device), block[:, 0]].cumsum(-1)
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]


def _draw_few(y: Tensor, draw: _Draw, vocab: int) -> Tensor:
    """Draw from what top_k and min_p keep, narrowed by top_p."""
    peaks = _blocks(y).amax(-1)
    floor = torch.maximum(_kth_floor(y, peaks, draw.top_k, vocab), draw.min_p.log() - _SLACK)
    ranked, ids = _ranked(y, peaks, floor.clamp(min=_SILENT))
    weights = _weights(ranked)
    weights[ranked.exp() < draw.min_p[:, None]] = 0
    weights[torch.arange(ids.shape[1], device=y.device) >= draw.top_k[:, None]] = 0
    return _draw_ranked(weights, ids, weights.sum(-1, keepdim=True), draw)


def _draw_nucleus(y: Tensor, draw: _Draw, vocab: int) -> Tensor:
    """Draw from what top_p alone keeps."""
    groups = _weights(y).view(len(y), -1, _GROUP).sum(-1)
    total = groups.sum(-1, keepdim=True)
    rest = (1 - draw.top_p.double())[:, None] * total
    floor = (_tail_floor(groups, rest) / _ONE).log() - _SLACK
    ranked, ids = _ranked(y, _blocks(y).amax(-1), floor.float().clamp(min=_SILENT))
    return _draw_ranked(_weights(ranked), ids, total, draw)


def _draw_ranked(weights: Tensor, ids: Tensor, total: Tensor, draw: _Draw) -> Tensor:
    """Draw from ranked tokens: those before which less than top_p of the total weight lies."""
    ends = weights.cumsum(-1)
    kept = (ends - weights) < draw.top_p.double()[:, None] * total
    limit = ends.gather(1, kept.sum(-1, keepdim=True) - 1)
    place = torch.searchsorted(ends, _target(draw.uniform, limit), right=True)
    return ids.gather(1, place)[:, 0]


def _target(uniform: Tensor, total: Tensor) -> Tensor:
    """Return [R, 1] whole numbers from 0 to total - 1."""
    target = (uniform[:, None] * total).to(torch.int64)
    return torch.minimum(target, total - 1)


def _kth_floor(y: Tensor, peaks: Tensor, k: Tensor, vocab: int) -> Tensor:
    """Return [R] a value that each row's k-th largest reaches: its k-th largest block maximum."""
    most = int(k.masked_fill(k >= vocab, 0).max())
    if 2 * most > peaks.shape[1]:
        # Nearly every block would hold one: take the maxima of eight tokens, whichever they are.
        peaks = y.view(len(y), 8, -1).amax(1)
    most = min(most, peaks.shape[1])
    if most == 0:
        return y.new_full((len(y),), -math.inf)
    floor = peaks.topk(most).values.gather(1, (k.clamp(1, most) - 1)[:, None])[:, 0]
    return floor.masked_fill(k > most, -math.inf)


def _tail_floor(groups: Tensor, rest: Tensor) -> Tensor:
    """Return [R] a weight below which a row's tokens hold `rest` at most: no nucleus needs them.

    Tokens below w weigh no more than their group does, and no more than _GROUP * w in a group. So
    the floor is the water level at which groups, cut off at _GROUP * w, hold just the rest.
    """
    rising = _sorted_rows(groups)
    before = rising.cumsum(-1) - rising
    higher = torch.arange(groups.shape[1], 0, -1, device=groups.device)
    full = (before + rising * higher > rest).int().argmax(-1, keepdim=True)
    level = (rest - before.gather(1, full)) / higher[full]
    return level[:, 0] / _GROUP


def _ranked(y: Tensor, peaks: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Rank each row's entries that reach its floor, highest first, of equals the lowest id first.

    Args:
        y: [R, V'] Numbers up to 0.
        peaks: [R, V' / _BLOCK] The maxima of its blocks.
        floor: [R] Some entry of every row reaches it.

    Returns:
        values [R, C] and ids [R, C], C the most that any row has; rows with fewer are filled with
        -inf and an id beyond every vocabulary.
    """
    rows, padded = y.shape
    block = _flat_nonzero(peaks >= floor[:, None])
    block_row = block // peaks.shape[1]
    near = y.view(-1, _BLOCK).index_select(0, block)
    hit = _flat_nonzero(near >= floor[block_row, None])
    which = hit >> _SHIFT
    counts = torch.bincount(block_row.index_select(0, which), minlength=rows)
    width = int(counts.max())
    # Bits of floats from 0 up order as the floats do, so one integer sorts by (-value, id).
    values = near.view(-1).index_select(0, hit).abs_()
    token = ((block << _SHIFT) - block_row * padded).index_select(0, which).add_(hit & (_BLOCK - 1))
    last = (0x7F800000 << 32) | 0xFFFFFFFF
    keys = torch.full((rows, width), last, dtype=torch.int64, device=y.device)
    used = torch.arange(width, device=y.device) < counts[:, None]
    keys.masked_scatter_(used, (values.view(torch.int32).long() << 32).bitwise_or_(token))
    keys = _sorted_rows(keys)
    return -(keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF


def _flat_nonzero(mask: Tensor) -> Tensor:
    # numpy finds the few set bytes of a mask 5 times as fast as torch on a CPU.
    if mask.device.type != "cpu":
        return mask.view(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _sorted_rows(keys: Tensor) -> Tensor:
    # numpy sorts with vector instructions: 8 times as fast as torch on a CPU. In place.
    if keys.device.type != "cpu":
        return keys.sort(dim=-1).values
    keys.numpy().sort(axis=-1)
    return keys


def _with_logprobs(raw: Tensor, ids: Int32, batch: SamplingBatch) -> StepResult:
    """Add the log-probabilities that rows asked for to the tokens that were drawn."""
    wanted, width = batch.num_logprobs, min(batch.most_logprobs, raw.shape[1])
    logprobs = np.full(len(ids), np.nan, np.float32)
    top_ids = np.full((len(ids), width), -1, np.int32)
    top = np.full((len(ids), width), np.nan, np.float32)
    rows = np.flatnonzero((wanted >= 0) & (ids >= 0))
    if rows.size:
        own = _rows_of(raw, rows)
        logprobs[rows], top_ids[rows], top[rows] = token_logprobs(
            own, ids[rows], wanted[rows], width
        )
    return StepResult(token_ids=ids, logprobs=logprobs, top_ids=top_ids, top_logprobs=top)


def token_logprobs(
    x: Tensor, ids: Int32, wanted: Int32, width: int
) -> tuple[Float32, Int32, Float32]:
    """Return the given tokens' log-probabilities, and the likeliest tokens of each row.

    Args:
        x: [R, V] float32 logits.
        ids: [R] A token of each row.
        wanted: [R] How many of the likeliest each row asks for, at most ``width``.
        width: K, the width of what is returned.

    Returns:
        [R] log-probabilities of ``ids``, then ids [R, K] and log-probabilities [R, K] of the
        likeliest; -1 and NaN beyond what a row asked for.
    """
    y = _below_peak(x, x.amax(-1))
    total = _blocks(_weights(y)).sum(-1).sum(-1, keepdim=True)
    log_total = (total.double() / _ONE).log()
    index = torch.as_tensor(ids.astype(np.int64), device=x.device)[:, None]
    drawn = (y.gather(1, index) - log_total)[:, 0].float().cpu().numpy()
    top_ids = np.full((len(ids), width), -1, np.int32)
    top = np.full((len(ids), width), np.nan, np.float32)
    if width:
        k = torch.as_tensor(wanted.astype(np.int64), device=x.device)
        peaks = _blocks(y).amax(-1)
        ranked, order = _ranked(y, peaks, _kth_floor(y, peaks, k, x.shape[1]))
        ranked, order = ranked[:, :width], order[:, :width]
        column = torch.arange(order.shape[1], device=x.device)
        absent = column >= k[:, None]
        values = (ranked - log_total).float().masked_fill(absent, math.nan)
        top_ids[:, : order.shape[1]] = order.masked_fill(absent, -1).int().cpu().numpy()
        top[:, : order.shape[1]] = values.cpu().numpy()
    return drawn, top_ids, top
