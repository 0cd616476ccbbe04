"""What the control plane keeps per block of the pool and per entry of a block table, in bytes."""

import numpy as np

from pagedkv import Scheduler
from pagedkv.core.pool import BlockPool
from pagedkv.core.table import ENTRY_COLUMNS
from tests.core.fakes import make_config


def arrays(owner):
    return [value for value in vars(owner).values() if isinstance(value, np.ndarray)]


def test_a_pool_block_takes_at_most_40_bytes():
    scheduler = Scheduler(make_config(16, 10_000))
    pool, index = scheduler.manager.pool, scheduler.manager.index
    for _ in range(3):  # every block has been cached, and the lines have grown and turned over
        pool.release(pool.allocate(10_000), np.ones(10_000, np.bool_))
    pool.forget(pool.allocate(0))
    lines = sum(line.ids.nbytes for line in pool.cached._lines.values())
    held = sum(a.nbytes for a in arrays(pool) + arrays(pool.cached)) + lines
    held += index.entry_of.nbytes
    assert held / 10_000 <= 40
    pool.forget(np.arange(10_000, dtype=np.int32))


def test_no_pool_array_is_left_out():
    names = {name for name, value in vars(BlockPool(4)).items() if isinstance(value, np.ndarray)}
    assert names == {"ref_count", "_blank", "_mark"}


def test_an_entry_of_a_block_table_takes_at_most_24_bytes():
    table = Scheduler(make_config(16, 64)).table
    wide = [a for a in arrays(table) if a.ndim == 3]
    assert len(wide) == len(ENTRY_COLUMNS)
    assert sum(a.itemsize for a in wide) <= 24
