"""The fixture that audits every owner of state after every test: does it see them all?"""

from collections import Counter

import pytest

from pagedkv import CacheConfig, Engine, Scheduler, StepResult
from pagedkv.core.manager import BlockManager
from pagedkv.core.pool import BlockPool
from pagedkv.core.prefix import PrefixIndex
from pagedkv.core.reclaim import CachedOrder
from pagedkv.core.table import SequenceTable
from tests.conftest import OWNERS, Auditor
from tests.core.fakes import Driver, make_config, make_request


def test_it_knows_who_owns_state():
    assert set(OWNERS) >= {Scheduler, BlockManager, BlockPool, PrefixIndex, SequenceTable}


def test_it_records_every_owner_that_a_test_makes(auditor):
    Scheduler()
    BlockPool(3)
    assert Counter(type(owner) for owner in auditor.owners) == Counter(
        [*OWNERS, BlockPool, CachedOrder]
    )


def corrupt_sequence_id(scheduler):
    scheduler.sequence(0).seq_id = 7


def corrupt_row_of_waiting(scheduler):
    scheduler.sequence(1).row = 3


def corrupt_row_of_running(scheduler):
    scheduler.table.sequences[0] = scheduler.sequence(1)


def corrupt_waiting(scheduler):
    scheduler.sequence(1).siblings = [scheduler.sequence(1)]


def corrupt_held_by_nobody(scheduler):
    scheduler.table.sequences[3] = scheduler.sequence(0)
    scheduler.table.seq_id[3] = 0
    scheduler.table.num_free_rows -= 1


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (corrupt_sequence_id, "filed under another's id"),
        (corrupt_row_of_waiting, "sequence 1 and its row disagree"),
        (corrupt_row_of_running, "row 0 is another's"),
        (corrupt_waiting, "neither waits nor runs"),
        (corrupt_held_by_nobody, "held by nobody"),
    ],
)
def test_it_finds_a_scheduler_that_does_not_add_up(auditor, corrupt, finding):
    scheduler = running_and_waiting()
    auditor.audit()
    corrupt(scheduler)
    with pytest.raises(AssertionError, match=finding):
        auditor.audit()
    auditor.excuse(*auditor.owners)


def running_and_waiting():
    driver = Driver(make_config(4, 4))
    driver.add(make_request("runs", 9))
    driver.add(make_request("waits", [40] * 9))
    driver.step()
    return driver.scheduler


def test_it_finds_a_broken_pool_inside_a_scheduler(auditor):
    scheduler = Scheduler()
    pool = scheduler.manager.pool
    pool._state[0] = 1
    with pytest.raises(AssertionError, match="a free block is held"):
        auditor.audit()
    auditor.excuse(*auditor.owners)


def test_owners_too_many_to_keep_are_audited_on_the_way_out(monkeypatch):
    recorder = Auditor()
    monkeypatch.setattr(recorder, "keep", 2)
    broken, sound = BlockPool(1), BlockPool(1)
    recorder.record(broken)
    recorder.record(sound)
    broken._state[0] = 1
    with pytest.raises(AssertionError, match="a free block is held"):
        recorder.record(BlockPool(1))
    broken._state[0] = 0


def test_the_environment_asks_for_an_audit_after_every_step(monkeypatch):
    class Broken:
        def execute(self, plan):
            scheduler.manager.pool._num_blank -= 1
            return StepResult(token_ids=[1] * len(plan.sample_rows))

    def step(value):
        nonlocal scheduler
        monkeypatch.setenv("PAGEDKV_AUDIT", value)
        scheduler = running_and_waiting()
        Engine(scheduler, Broken()).step()

    scheduler = None
    with pytest.raises(AssertionError, match="neither held nor free"):
        step("1")
    scheduler.manager.pool._num_blank += 1
    step("0")
    scheduler.manager.pool._num_blank += 1


def test_a_pool_needs_no_config_to_be_audited():
    BlockManager(CacheConfig(num_blocks=2), 1).audit()
