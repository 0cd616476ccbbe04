"""Capacity searches: the edge is found, and where there is none, that is said."""

import pytest

from pagedkv import Unattainable
from pagedkv.sim.search import highest_rate, least_blocks


@pytest.mark.parametrize("edge", [0.003, 0.9, 7.3, 900.0])
def test_the_highest_rate_is_found_to_two_percent(edge):
    found = highest_rate(lambda rate: 1.0 if rate <= edge else 0.0, 0.9)
    assert edge / 1.02 <= found <= edge


def test_a_target_that_is_never_met_is_said():
    with pytest.raises(Unattainable, match=r"not met even at a rate of 0\.0002"):
        highest_rate(lambda rate: 0.5, 0.9)


def test_a_target_that_is_always_met_cannot_be_bracketed():
    with pytest.raises(Unattainable, match=r"still met at a rate of 4\.1e\+03"):
        highest_rate(lambda rate: 1.0, 0.9)


def test_the_fewest_blocks_are_found():
    assert least_blocks(lambda blocks: float(blocks >= 37), 0.9, 5000) == 37
    assert 3700 <= least_blocks(lambda blocks: float(blocks >= 3700), 0.9, 5000) <= 3737
    with pytest.raises(Unattainable, match="even with 5000 blocks"):
        least_blocks(lambda blocks: 0.0, 0.9, 5000)
