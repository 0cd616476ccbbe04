"""What the control plane keeps per block of the pool and per entry of a block table, in bytes."""

import sys

import msgspec
import numpy as np
import pytest

from pagedkv import Scheduler
from pagedkv.core.reclaim import HIT_LEVEL, CachedOrder
from pagedkv.core.table import ENTRY_COLUMNS
from tests.core.fakes import grouped, make_config

NUM_BLOCKS = 10_000


def arrays(owner):
    return [value for value in vars(owner).values() if isinstance(value, np.ndarray)]


def nbytes(scheduler):
    """What the pool and all that makes its blocks findable take."""
    pool, index = scheduler.manager.pool, scheduler.manager.index
    held = {id(a): a for owner in (pool, pool.cached, index) for a in arrays(owner)}
    lines = [line.ids for line in pool.cached._lines.values()]
    return sum(a.nbytes for a in [*held.values(), *lines])


@pytest.mark.parametrize("num_groups", [1, 2, 5])
@pytest.mark.parametrize("reclaim", sorted(HIT_LEVEL))
def test_a_pool_block_takes_at_most_40_bytes_findable_or_not(reclaim, num_groups):
    config = grouped(make_config(16, NUM_BLOCKS), num_groups)
    cache = msgspec.structs.replace(config.cache, reclaim=reclaim)
    scheduler = Scheduler(msgspec.structs.replace(config, cache=cache))
    pool, index = scheduler.manager.pool, scheduler.manager.index
    rng = np.random.default_rng(0)
    for _ in range(3):  # every block has been cached, and the lines have grown and turned over
        ids = scheduler.manager.allocate(NUM_BLOCKS)
        digests = [rng.bytes(16) for _ in range(NUM_BLOCKS // num_groups)]
        index.insert_many(digests, ids.reshape(-1, num_groups))
        pool.release(ids, np.ones(NUM_BLOCKS, np.bool_))
        assert len(index) == NUM_BLOCKS // num_groups
    assert nbytes(scheduler) / NUM_BLOCKS <= 40


def test_nothing_else_grows_with_the_pool():
    """What is not an array here holds as little for a large pool as for a small one."""
    small, large = (Scheduler(make_config(16, n)).manager for n in (10, NUM_BLOCKS))
    for one, other in ((small.pool, large.pool), (small.index, large.index)):
        for name, value in vars(one).items():
            if isinstance(value, np.ndarray | CachedOrder):
                continue
            assert sys.getsizeof(value) == sys.getsizeof(vars(other)[name]), name


def test_an_entry_of_a_block_table_takes_at_most_24_bytes():
    table = Scheduler(make_config(16, 64)).table
    wide = [a for a in arrays(table) if a.ndim == 3]
    assert len(wide) == len(ENTRY_COLUMNS)
    assert sum(a.itemsize for a in wide) <= 24
