"""Columns that no policy reads are not kept: what policies decide is the same as if all were."""

import pytest

from pagedkv.core.table import ENTRY_COLUMNS
from tests.core.answers import Service
from tests.core.test_retention import POLICIES, make_config, make_request


def decided(names, kept=()):
    """What requests of these policies forgot, and what it weighed; half of them come later."""
    service = Service(make_config(num_blocks=120, caching=True))
    service.scheduler.table.kept_columns = kept
    requests = [make_request(i, 30 + 7 * i, POLICIES[name]) for i, name in enumerate(names)]
    service.add(*requests[::2])
    for _ in range(6):
        service.step()
    found = service.add(*requests[1::2]).run().finished
    assert len(found) == len(names)
    return {key: (end.num_evicted_tokens, end.forfeited_mass) for key, end in found.items()}


@pytest.mark.parametrize("names", [[name] for name in POLICIES if name != "full"] + [[*POLICIES]])
def test_decisions_are_those_of_all_columns(names):
    found = decided(names)
    assert found == decided(names, ENTRY_COLUMNS[1:])
    assert any(evicted for evicted, _ in found.values())


def test_sums_of_attention_do_not_ask_where_blocks_stand():
    service = Service(make_config()).add(make_request(0, 60, POLICIES["h2o"])).run()
    assert "first_position" not in service.scheduler.table.kept_columns
