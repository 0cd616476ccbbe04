"""What the CPU kernel's callers and threads agree on: tile sizes, records, and reading them.

A call is one record of 8-byte parameters; its work is a table of 128-byte items. Both hold plain
addresses and numbers, so that a thread needs nothing but the address of the first.
"""

import math

from .simd import LANES, Address, get, kernel, put, word32

TILE = 128  # keys looked at together: enough to share what a tile costs, few enough for L2
ROWS = 3 * LANES  # query rows that the wide form holds in registers
NEVER = -1.0e30  # a running maximum before any key was seen; finite, so differences are numbers
FAINT = 1.0e-30  # a block's sum below this is taken again against the block's own maximum
LN2 = math.log(2.0)

# Fields of the call's parameters, all 8 bytes; addresses unless said otherwise.
NEXT, THREAD, ITEMS, NUM_RUNS, SCRATCH, SCRATCH_BYTES, PARTIAL, ARRIVED = range(8)
QUERY, KEY, VALUE, OUT, LSE, BLOCK_LSE, TABLE, SLOT_BASE = range(8, 16)
QUERY_OFFSET, KEY_OFFSET, VALUE_OFFSET = range(16, 19)  # per head, bytes
QUERY_STRIDE, KEY_STRIDE, VALUE_STRIDE = range(19, 22)  # bytes per token or slot
TOKENS, KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, WIDTH, WINDOW, SLOPE, SCALE, RUNS = range(22, 32)
# By which row of angles queries are turned before they meet a table's entries, int32 like the table
# or 0 for none at all; the angles' cosines, sines, and sines the other way round, fp32 [U, PAIRS].
TURN, COS, SIN, BACK, PAIRS, INTERLEAVED = range(32, 38)
NUM_PARAMS = 38

# Fields of an item, all int64.
ROW, FIRST_QUERY, NUM_QUERIES, KEY_LOW, KEY_HIGH, HEAD_LOW, HEAD_HIGH, LIMIT = range(8)
RESIDENT, WIDE, TILE_ID, SPANS, SPAN, PARTIAL_AT, CLEAR_LOW, CLEAR_HIGH = range(8, 16)
NUM_FIELDS = 16


@kernel
def pad(n: int, to: int) -> int:
    """n rounded up to a multiple of `to`."""
    return (n + to - 1) // to * to


@kernel
def apart(n: int) -> int:
    """Numbers from line to line of n: odd in cache lines, so that lines share no cache set."""
    return pad(n, 16) | 16


@kernel
def visible(params: Address, item: Address, i: int) -> int:
    """How many keys, from the first, the i-th query of the tile may see."""
    seen = get(item, LIMIT) + get(params, SLOPE) * i
    return int(max(0, min(seen, get(item, RESIDENT))))


@kernel
def addresses(
    params: Address, item: Address, first: int, count: int, key_at: Address, value_at: Address
) -> None:
    """Byte offsets of `count` keys and values from index `first`, padded by repeating the last."""
    size = get(params, BLOCK_SIZE)
    row = get(item, ROW)
    table = get(params, TABLE) + 4 * row * get(params, WIDTH)
    base = get(get(params, SLOT_BASE), row)
    key_stride = get(params, KEY_STRIDE)
    value_stride = get(params, VALUE_STRIDE)
    entry = first // size
    inside = first - entry * size
    j = 0
    while j < count:
        slot = base + word32(table + 4 * entry) * size + inside
        run = min(size - inside, count - j)
        for _ in range(run):
            put(key_at + 8 * j, slot * key_stride)
            put(value_at + 8 * j, slot * value_stride)
            slot += 1
            j += 1
        entry += 1
        inside = 0
    for j in range(count, TILE):
        put(key_at + 8 * j, get(key_at, count - 1))
        put(value_at + 8 * j, get(value_at, count - 1))
