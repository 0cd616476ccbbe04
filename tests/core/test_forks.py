"""Many sequences for one prompt: one prefill, shared blocks, copies only where they part."""

import numpy as np
import pytest

from tests.core.fakes import Driver, alone, make_config, make_request


@pytest.mark.parametrize("n", [2, 3, 4])
def test_forks_share_the_prompt_and_copy_its_last_block_once_less_than_they_are(n):
    driver = Driver(make_config(4, 20))
    driver.run(make_request("a", 6, n=n, max_tokens=2))
    assert [plan.num_tokens for plan in driver.plans] == [6, n]
    first, second = driver.plans
    assert len(first.sample_rows) == n
    assert len(second.copies) == n - 1
    assert len(np.unique(second.copies[:, 0])) == 1
    assert len(np.unique(second.block_table[0, :, 0])) == 1, "the full block stays shared"
    assert second.copies[0, 0] == second.block_table[0, -1, 1], "the last writer keeps it"


def test_each_group_copies_its_own_blocks():
    driver = Driver(make_config(4, 30), num_groups=3)
    driver.run(make_request("a", 6, n=3, max_tokens=2))
    assert driver.executor.num_copies == 3 * 2


def test_a_prompt_that_ends_with_a_block_is_never_copied():
    driver = Driver(make_config(4, 20))
    driver.run(make_request("a", 8, n=3, max_tokens=6))
    assert driver.executor.num_copies == 0


def test_forks_draw_with_their_own_seeds_and_are_told_apart_by_index():
    request = make_request("a", 6, n=3, seed=5, max_tokens=6)
    driver = Driver(make_config(4, 20))
    ends = driver.run(request)
    assert [ends["a", i].token_ids for i in range(3)] == [
        tokens for tokens, _ in alone(request, driver.scheduler.config)
    ]
    assert len({tuple(ends["a", i].token_ids) for i in range(3)}) == 3
    assert driver.plans[0].sampling.seed.tolist() == [5, 6, 7]


def test_the_first_of_many_draws_what_a_single_sequence_would():
    driver = Driver(make_config(4, 40))
    ends = driver.run(make_request("many", 6, n=3, seed=5), make_request("one", 6, seed=5))
    assert ends["many", 0].token_ids == ends["one", 0].token_ids


def test_a_prompt_computed_in_chunks_forks_when_it_is_done():
    driver = Driver(make_config(4, 20, max_num_batched_tokens=4))
    driver.run(make_request("a", 10, n=3, max_tokens=3))
    assert [len(plan.sample_rows) for plan in driver.plans[:3]] == [0, 0, 3]


def test_requests_without_a_seed_draw_different_ones_and_the_same_again_in_another_run():
    def seeds(config_seed):
        driver = Driver(make_config(4, 20, seed=config_seed))
        for name in "ab":
            driver.scheduler.add(make_request(name, 3, seed=None))
        return driver.scheduler.schedule().sampling.seed.tolist()

    assert len(set(seeds(0))) == 2
    assert seeds(0) == seeds(0)
    assert seeds(0) != seeds(1)


def test_one_of_many_may_end_before_the_others():
    whole = Driver(make_config()).run(make_request("a", 6, n=3, max_tokens=9))
    token = whole["a", 1].token_ids[1]
    others = [t for i in (0, 2) for t in whole["a", i].token_ids[:4]]
    assert token not in others
    ends = Driver(make_config()).run(
        make_request("a", 6, n=3, max_tokens=4, stop_token_ids=(token,))
    )
    assert ends["a", 1].finish_reason == "stop"
    assert [len(ends["a", i].token_ids) for i in (0, 2)] == [4, 4]


def test_many_wait_until_there_are_rows_for_all_of_them():
    driver = Driver(make_config(4, 40, max_num_seqs=4))
    driver.add(make_request("a", 3, n=2, max_tokens=4))
    driver.add(make_request("b", 3, n=3, max_tokens=2))
    driver.step()
    assert driver.plans[0].seq_ids.tolist() == [0]
    driver.run()
    assert len(driver.finished) == 5


def test_a_fork_that_was_preempted_goes_on_from_its_own_tokens():
    request = make_request("a", 7, n=4, max_tokens=14)
    driver = Driver(make_config(4, 12))
    ends = driver.run(request)
    assert driver.scheduler.stats().num_preemptions > 0
    answers = alone(request, driver.scheduler.config)
    assert [ends["a", i].token_ids for i in range(4)] == [tokens for tokens, _ in answers]


def test_many_preempted_before_they_forked_wait_and_come_back_together():
    driver = Driver(make_config(4, 9, max_num_batched_tokens=8, prefix_caching=False))
    driver.add(make_request("first", 7, max_tokens=20))
    driver.step()
    many = make_request("many", [40] * 27, n=3, max_tokens=2)
    driver.add(many)
    while not driver.scheduler.stats().num_preemptions:
        driver.step()
    assert driver.scheduler.stats().num_waiting == 1
    assert len(driver.scheduler.table.free_rows) == 7
    driver.run()
    answers = alone(many, driver.scheduler.config)
    assert [driver.finished["many", i].token_ids for i in range(3)] == [t for t, _ in answers]
    assert [driver.finished["many", i].num_preemptions for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abort_ends_all_of_them_at_any_moment_and_frees_everything(steps, in_flight):
    driver = Driver(make_config(4, 20, max_num_batched_tokens=4))
    driver.add(make_request("many", 10, n=3, max_tokens=9))
    driver.add(make_request("other", [40] * 6, max_tokens=9))
    for _ in range(steps):
        driver.step()
    if in_flight:
        driver.step(between=lambda: driver.abort("many"))
    else:
        driver.abort("many")
    ends = [end for (name, _), end in driver.finished.items() if name == "many"]
    assert [(end.index, end.finish_reason) for end in ends] == [(i, "abort") for i in range(3)]
    driver.run()
    assert driver.finished["other", 0].finish_reason == "length"
    assert driver.scheduler.stats().blocks_held == 0
    assert len(driver.scheduler.table.free_rows) == driver.scheduler.table.num_rows
