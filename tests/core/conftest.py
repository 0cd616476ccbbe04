"""A scheduler in the middle of things."""

import pytest

from tests.core.fakes import Driver, make_config, make_request


@pytest.fixture
def busy():
    """A scheduler with sequences that run, forked, wait and were preempted."""
    driver = Driver(make_config(4, 10, max_num_seqs=4, events=True))
    driver.add(make_request("runs", 9, max_tokens=12))
    driver.add(make_request("forked", [40] * 6, n=2, max_tokens=12))
    driver.add(make_request("waits", [41] * 30, max_tokens=2))
    driver.step()
    driver.step()
    return driver
