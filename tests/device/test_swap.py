"""Blocks that were in host memory come back bit for bit."""

import torch

from pagedkv import LLM, SamplingParams


def test_answers_are_the_same_with_preemption_by_swapping_as_without_any():
    prompts = [[i + 3] * 20 for i in range(5)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    fields = {"block_size": 4, "enable_prefix_caching": False}
    roomy = LLM("tiny-random", num_blocks=400, **fields)
    tight = LLM("tiny-random", num_blocks=26, num_cpu_blocks=60, swap_cost=0.0, **fields)
    expected = [output.token_ids for output in roomy.generate(prompts, params)]
    outputs = tight.generate(prompts, params)
    stats = tight.scheduler.stats()
    assert stats.num_swapped_out == stats.num_swapped_in > 0
    assert stats.recomputed_tokens == 0
    assert [output.token_ids for output in outputs] == expected
    assert sum(each.num_swaps for output in outputs for each in output.outputs) > 0


def test_a_block_is_copied_in_every_layer_and_back_to_another_place():
    store = LLM("tiny-random", num_blocks=6, num_cpu_blocks=3, block_size=4).store
    for tensor in (store.keys, store.values):
        tensor.normal_()
    keys, values = store.keys[:, [1, 4]].clone(), store.values[:, [1, 4]].clone()
    store.swap_out(torch.tensor([1, 4]), torch.tensor([2, 0]))
    store.keys.zero_()
    store.values.zero_()
    store.swap_in(torch.tensor([2, 0]), torch.tensor([5, 3]))
    assert torch.equal(store.keys[:, [5, 3]], keys)
    assert torch.equal(store.values[:, [5, 3]], values)
    assert not store.keys[:, :3].any()
