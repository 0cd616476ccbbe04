"""Who is admitted, who computes how much, who is pushed back, and who ends."""

import numpy as np
import pytest

from pagedkv import NeverFits
from tests.core.fakes import VOCAB, Driver, make_config, make_request


def counts(plan):
    """Tokens per sequence of a plan."""
    return dict(zip(plan.seq_ids.tolist(), np.diff(plan.query_start).tolist(), strict=True))


def stats(driver):
    return driver.scheduler.stats()


# Prefix hits


def test_a_cold_prompt_of_55_tokens_takes_4_blocks_of_which_3_can_be_found():
    driver = Driver(make_config(16, 10))
    driver.run(make_request("cold", 55, max_tokens=1))
    assert stats(driver).blocks_cached == 3
    assert stats(driver).blocks_free == 7
    assert stats(driver).prompt_tokens_cached == 0


@pytest.mark.parametrize(
    ("length", "cached"), [(55, 48), (64, 48), (65, 64), (16, 0), (17, 16), (1, 0)]
)
def test_a_prompt_sent_again_hits_every_full_block_but_leaves_a_token(length, cached):
    driver = Driver(make_config(16, 20, max_num_batched_tokens=256))
    driver.run(make_request("first", length, max_tokens=1))
    driver.add(make_request("again", length, max_tokens=1))
    driver.step()
    assert counts(driver.plans[-1]) == {1: length - cached}
    assert driver.finished["again", 0].num_cached_tokens == cached
    assert driver.finished["first", 0].num_cached_tokens == 0


def test_generated_tokens_can_be_found_as_well():
    """A chat's next turn begins with the answer to the turn before."""
    driver = Driver(make_config(4, 20))
    first = driver.run(make_request("turn 1", 6, max_tokens=7))["turn 1", 0]
    history = [*range(6), *first.token_ids]
    driver.run(make_request("turn 2", [*history, 50], max_tokens=1))
    # The last answer token was never computed, so the third block was not full.
    assert driver.finished["turn 2", 0].num_cached_tokens == 12


def test_equal_prompts_of_one_step_do_not_share_blocks_that_are_not_computed():
    driver = Driver(make_config(4, 20))
    driver.add(make_request("a", 9))
    driver.add(make_request("b", 9))
    driver.step()
    assert counts(driver.plans[0]) == {0: 9, 1: 9}
    assert stats(driver).prompt_tokens_cached == 0


def test_another_salt_computes_everything_itself():
    driver = Driver(make_config(4, 40))
    driver.run(make_request("a", 9, salt="tenant a"))
    driver.run(make_request("b", 9, salt="tenant b"), make_request("none", 9))
    assert stats(driver).prompt_tokens_cached == 0
    driver.run(make_request("a again", 9, salt="tenant a"))
    assert stats(driver).prompt_tokens_cached == 8


def test_without_prefix_caching_nothing_is_kept():
    driver = Driver(make_config(4, 20, prefix_caching=False))
    driver.run(make_request("a", 9))
    driver.run(make_request("b", 9))
    assert stats(driver).prompt_tokens_cached == 0
    assert stats(driver).blocks_free == 20


def test_after_a_reset_nothing_is_found_and_running_requests_go_on():
    driver = Driver(make_config(4, 20))
    driver.add(make_request("a", 9, max_tokens=6))
    driver.step()
    driver.scheduler.reset_prefix_cache()
    driver.run(make_request("b", 9, max_tokens=2))
    assert driver.finished["b", 0].num_cached_tokens == 0
    assert len(driver.finished["a", 0].token_ids) == 6


def test_more_groups_hit_the_same_tokens():
    driver = Driver(make_config(16, 30), num_groups=3)
    driver.run(make_request("first", 55, max_tokens=1))
    assert stats(driver).blocks_cached == 9
    driver.run(make_request("again", 55, max_tokens=1))
    assert driver.finished["again", 0].num_cached_tokens == 48


def test_after_a_reset_running_and_swapped_sequences_publish_nothing():
    config = make_config(4, 12, num_cpu_blocks=40)
    driver = Driver(config)
    for i in range(4):
        driver.add(make_request(f"r{i}", [i] * 9, max_tokens=14))
    while not stats(driver).num_swapped_out:
        driver.step()
    driver.scheduler.reset_prefix_cache()
    driver.run()
    swapped = [name for (name, _), end in driver.finished.items() if end.num_swaps]
    for name in swapped:
        prompt = [*driver.requests[name].prompt_token_ids, *driver.finished[name, 0].token_ids]
        driver.run(make_request(f"{name} again", prompt, max_tokens=1))
        assert driver.finished[f"{name} again", 0].num_cached_tokens == 0
    assert swapped


# The token budget


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    driver = Driver(make_config(4, 40, max_num_batched_tokens=10))
    driver.run(make_request("long", 25, max_tokens=1))
    assert [plan.num_tokens for plan in driver.plans] == [10, 10, 5]
    assert [len(plan.sample_rows) for plan in driver.plans] == [0, 0, 1]


def test_the_threshold_bounds_each_chunk_and_leaves_room_for_others():
    driver = Driver(make_config(4, 40, max_num_batched_tokens=10, long_prefill_token_threshold=6))
    driver.add(make_request("long", 25))
    driver.add(make_request("short", 3))
    driver.step()
    driver.step()
    assert counts(driver.plans[0]) == {0: 6, 1: 3}
    assert counts(driver.plans[1]) == {0: 6, 1: 1}


def test_a_running_prompt_takes_only_what_the_others_leave_of_the_budget():
    driver = Driver(make_config(4, 40, max_num_batched_tokens=4))
    driver.add(make_request("short", 1))
    driver.add(make_request("long", 20))
    driver.step()
    driver.step()
    assert [counts(plan) for plan in driver.plans] == [{0: 1, 1: 3}] * 2


def test_the_budget_goes_to_the_first_admitted_first():
    driver = Driver(make_config(4, 40, max_num_batched_tokens=4))
    for name in "abc":
        driver.add(make_request(name, 3))
    driver.step()
    assert counts(driver.plans[-1]) == {0: 3, 1: 1}
    driver.step()
    assert counts(driver.plans[-1]) == {0: 1, 1: 2, 2: 1}
    driver.step()
    assert counts(driver.plans[-1]) == {0: 1, 1: 1, 2: 2}


def test_no_more_sequences_run_than_there_are_rows():
    driver = Driver(make_config(4, 60, max_num_seqs=3))
    for i in range(5):
        driver.add(make_request(f"r{i}", 3, max_tokens=3))
    driver.step()
    assert (stats(driver).num_running, stats(driver).num_waiting) == (3, 2)
    driver.run()
    assert [name for name, _ in driver.finished] == [f"r{i}" for i in range(5)]


# Blocks


def test_a_sequence_takes_a_block_exactly_when_it_crosses_a_boundary():
    driver = Driver(make_config(4, 20))
    driver.add(make_request("a", 3, max_tokens=9))
    held = []
    while driver.scheduler.has_unfinished():
        held.append(driver.scheduler.manager.pool.num_held)
        driver.step()
    # The prompt and 8 of the 9 answers are computed: 11 tokens.
    assert held == [0, 1, 1, 2, 2, 2, 2, 3, 3]


def test_admission_waits_until_the_whole_prompt_fits_and_keeps_the_order():
    driver = Driver(make_config(4, 6))
    driver.add(make_request("holder", 13, max_tokens=4))
    driver.add(make_request("large", [40] * 12, max_tokens=1))
    driver.add(make_request("small", [41], max_tokens=1))
    driver.step()
    assert counts(driver.plans[-1]) == {0: 13}, "the small one must not overtake"
    driver.run()
    assert [name for name, _ in driver.finished] == ["holder", "large", "small"]


def test_admission_counts_what_running_prompts_have_yet_to_take():
    driver = Driver(make_config(4, 6, long_prefill_token_threshold=4))
    driver.add(make_request("long", 17, max_tokens=1))
    driver.add(make_request("other", [40] * 8, max_tokens=8))
    driver.run()
    assert stats(driver).num_preemptions == 0


def test_admission_counts_cached_blocks_that_it_would_revive():
    driver = Driver(make_config(4, 6))
    driver.run(make_request("first", 9, max_tokens=1))
    driver.add(make_request("holder", [40] * 13, max_tokens=2))
    driver.step()
    driver.add(make_request("again", 9, max_tokens=1))
    driver.step()
    assert 2 not in counts(driver.plans[-1])
    assert stats(driver).num_preemptions == 0


def test_a_shared_prefix_is_taken_from_the_pool_once():
    driver = Driver(make_config(4, 7))
    driver.add(make_request("a", [*range(16), 50], max_tokens=4))
    driver.step()
    driver.add(make_request("b", [*range(16), 51], max_tokens=4))
    driver.step()
    assert stats(driver).num_running == 2
    assert stats(driver).blocks_held == 6


def test_the_watermark_keeps_blocks_from_all_but_the_first():
    driver = Driver(make_config(4, 10, watermark=0.2))
    driver.add(make_request("first", 24, max_tokens=1, seed=1))
    driver.add(make_request("second", [40] * 12, max_tokens=1))
    driver.step()
    assert counts(driver.plans[-1]) == {0: 24}
    alone = Driver(make_config(4, 10, watermark=0.2))
    alone.run(make_request("all of it", 39, max_tokens=1))
    assert alone.finished["all of it", 0].finish_reason == "length"


# Preemption


def test_the_last_admitted_goes_back_first_and_comes_back_in_order():
    driver = Driver(make_config(4, 6, prefix_caching=False))
    for name in "abcdef":
        driver.add(make_request(name, 4, max_tokens=20))
    driver.step()
    driver.step()
    assert counts(driver.plans[-1]) == {0: 1, 1: 1, 2: 1}, "each of six needs a second block"
    ends = [end.num_preemptions for end in driver.run().values()]
    assert sum(ends) == stats(driver).num_preemptions
    back = [seq_id for plan in driver.plans[2:] for seq_id in plan.seq_ids.tolist()]
    assert list(dict.fromkeys(back)) == [0, 1, 2, 3, 4, 5]


def test_a_preempted_sequence_goes_before_those_that_came_later():
    driver = Driver(make_config(4, 6, prefix_caching=False))
    driver.add(make_request("a", 12, max_tokens=9))
    driver.add(make_request("b", 12, max_tokens=9))
    driver.step()
    driver.add(make_request("c", 1, max_tokens=1))
    driver.step()
    assert stats(driver).num_preemptions == 1
    assert counts(driver.plans[-1]) == {0: 1}
    driver.step()
    assert 2 not in counts(driver.plans[-1]), "the preempted one is next"


def test_a_preempted_sequence_keeps_its_tokens_and_finds_its_blocks_again():
    driver = Driver(make_config(4, 8))
    driver.run(
        make_request("a", [1] * 13, max_tokens=12), make_request("b", [2] * 13, max_tokens=12)
    )
    b = driver.finished["b", 0]
    assert b.num_preemptions >= 1
    assert b.num_cached_tokens == 0, "hits on its own blocks are not the prompt cache's merit"
    assert len(b.token_ids) == 12
    assert stats(driver).resumed_tokens_cached > 0


def test_recomputed_tokens_are_those_computed_more_than_once():
    driver = Driver(make_config(4, 14, max_num_batched_tokens=9, prefix_caching=False))
    driver.run(*(make_request(f"r{i}", [i] * 15, max_tokens=16) for i in range(5)))
    computed = driver.executor.computed
    assert stats(driver).num_preemptions > 2
    assert stats(driver).recomputed_tokens == len(computed) - len(set(computed))


def test_the_order_of_admission_outlives_the_rows():
    driver = Driver(make_config(4, 20))
    driver.add(make_request("gone", 1, max_tokens=1))
    driver.add(make_request("second", 1))
    driver.step()
    driver.add(make_request("third, in the first's row", 2))
    driver.add(make_request("gone as well", 3, max_tokens=1))
    driver.step()
    driver.step()
    assert driver.plans[-1].seq_ids.tolist() == [1, 2]
    assert driver.plans[-1].rows.tolist() == [1, 0]


# Requests that cannot go on


def test_a_prompt_that_no_pool_state_could_hold_is_refused_at_once():
    driver = Driver(make_config(4, 5))
    with pytest.raises(NeverFits, match="needs 6 blocks of 4 tokens and the pool has 5"):
        driver.add(make_request("huge", 21))
    assert not driver.scheduler.has_unfinished()
    driver.run(make_request("fits exactly", 20, max_tokens=1))
    assert driver.finished["fits exactly", 0].finish_reason == "length"


def test_groups_count_when_asking_whether_a_prompt_fits():
    with pytest.raises(NeverFits):
        Driver(make_config(4, 5), num_groups=3).add(make_request("a", 5))
    Driver(make_config(4, 6), num_groups=3).run(make_request("a", 5, max_tokens=1))


def test_a_lone_request_that_outgrows_the_pool_ends_and_the_others_go_on():
    driver = Driver(make_config(4, 5))
    driver.run(
        make_request("endless", 9, max_tokens=500),
        make_request("modest", [40] * 9, max_tokens=6),
        max_steps=200,
    )
    endless, modest = driver.finished["endless", 0], driver.finished["modest", 0]
    assert endless.finish_reason == "error"
    assert "outgrown the pool: the pool has 5 blocks of 4" in endless.error
    assert "num_blocks" in endless.error
    assert len(endless.token_ids) == 12, "20 tokens fit, one more was drawn"
    assert endless.num_preemptions == 0, "it must not preempt itself"
    assert (modest.finish_reason, modest.error) == ("length", "")


def test_two_that_would_each_fill_the_pool_take_turns():
    driver = Driver(make_config(4, 5))
    driver.run(*(make_request(name, 9, max_tokens=11) for name in "ab"), max_steps=100)
    assert {end.finish_reason for end in driver.finished.values()} == {"length"}


def test_the_end_of_the_models_length_ends_a_sequence():
    driver = Driver(make_config(4, 20, model={"max_model_len": 12}))
    end = driver.run(make_request("a", 9, max_tokens=None))["a", 0]
    assert (len(end.token_ids), end.finish_reason) == (3, "length")


# Ends


@pytest.mark.parametrize(
    ("sampling", "eos", "stop_reason"),
    [
        ({}, True, None),
        ({"stop_token_ids": "it"}, False, "it"),
        ({"ignore_eos": True}, True, "goes on"),
        ({"ignore_eos": True, "stop_token_ids": "it"}, True, "it"),
    ],
)
def test_a_stop_token_ends_a_sequence_and_is_named_unless_it_is_the_models(
    sampling, eos, stop_reason
):
    free = Driver(make_config()).run(make_request("a", 5))["a", 0].token_ids
    token = free[2]
    assert token not in free[:2]
    sampling = {k: (token,) if v == "it" else v for k, v in sampling.items()}
    config = make_config(model={"eos_token_ids": (token,) if eos else ()})
    end = Driver(config).run(make_request("a", 5, **sampling))["a", 0]
    if stop_reason == "goes on":
        assert (end.token_ids, end.finish_reason) == (free, "length")
    else:
        assert (end.token_ids, end.finish_reason) == (free[:3], "stop")
        assert end.stop_reason == (token if stop_reason else None)


def test_a_stop_string_ends_one_sequence_of_a_request():
    driver = Driver(make_config())
    first, second = driver.add(make_request("a", 5, n=2))
    driver.step()
    (end,) = driver.scheduler.stop(first, "END")
    assert (end.finish_reason, end.stop_reason, len(end.token_ids)) == ("stop", "END", 1)
    driver.run()
    assert list(driver.finished) == [("a", 1)]
    assert driver.finished["a", 1].seq_id == second


def test_all_that_best_of_draws_is_named_and_told_for_whoever_ranks_it():
    driver = Driver(make_config())
    ids = driver.add(make_request("a", 5, n=1, best_of=4, max_tokens=3))
    driver.run()
    assert [driver.finished["a", index].seq_id for index in range(4)] == ids
    assert all(end.cumulative_logprob == -3 for end in driver.finished.values())


@pytest.mark.parametrize("preempted", [False, True])
def test_a_sequence_can_be_stopped_while_its_next_token_is_computed_or_while_it_waits(preempted):
    driver = Driver(make_config(4, 6, prefix_caching=False))
    driver.add(make_request("first", 11, max_tokens=9))
    (seq_id,) = driver.add(make_request("second", 11, max_tokens=9))
    driver.step()
    ends = []
    if preempted:
        while not stats(driver).num_preemptions:
            driver.step()
        ends += driver.scheduler.stop(seq_id, "END")
    else:
        driver.step(between=lambda: ends.extend(driver.scheduler.stop(seq_id, "END")))
    known = driver.executor.known[seq_id][11:]
    assert [(end.token_ids, end.stop_reason) for end in ends] == [(known, "END")]
    driver.run()
    assert list(driver.finished) == [("first", 0)]
    assert stats(driver).blocks_held == 0


def test_a_chat_is_found_again_though_another_computed_its_prompt_at_the_same_time():
    driver = Driver(make_config(4, 22))
    prompt = [7] * 4 + [8] * 4 + [9] * 4 + [1]
    driver.add(make_request("a", prompt, max_tokens=1))
    driver.add(make_request("b", prompt, max_tokens=24, seed=5))
    for _ in range(8):
        driver.step()
    assert "b" in driver.scheduler.in_work, "it goes on when what the other held is reclaimed"
    driver.run(make_request("large", [i % VOCAB for i in range(50)], max_tokens=1))
    said = prompt + driver.finished["b", 0].token_ids
    driver.run(make_request("again", said, max_tokens=1))
    assert driver.finished["again", 0].num_cached_tokens >= len(said) // 4 * 4 - 4
