"""Flags, environment, file and defaults, in that order."""

import argparse

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from pagedkv.cli.config import to_toml
from pagedkv.cli.flags import (
    add_engine_flags,
    add_sampling_flags,
    engine_config,
    given,
    parse_size,
    sampling_params,
)
from pagedkv.config import CacheConfig, EngineConfig, SchedulerConfig, load_config


def parse(*args):
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    add_engine_flags(parser, skip=("seed",))
    return parser.parse_args(args)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("1KiB", 1024),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 2 MB ", 2 * 10**6),
        ("1.5KiB", 1536),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 GiBs", "1e9", "8G", "1,5GB", "nan", "0x10"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


def test_a_flag_wins_over_environment_file_and_default(monkeypatch, tmp_path):
    path = tmp_path / "engine.toml"
    path.write_text("[cache]\nblock_size = 8\n[scheduler]\nmax_num_seqs = 8\nwatermark = 0.25\n")
    monkeypatch.setenv("PAGEDKV_CACHE__BLOCK_SIZE", "32")
    monkeypatch.setenv("PAGEDKV_SCHEDULER__MAX_NUM_SEQS", "32")
    config = engine_config(parse("--config", str(path), "--block-size", "64"))
    assert config.cache.block_size == 64
    assert config.scheduler.max_num_seqs == 32
    assert config.scheduler.watermark == 0.25
    assert config.scheduler.max_num_batched_tokens == SchedulerConfig().max_num_batched_tokens


def test_a_flag_that_was_not_given_leaves_no_trace():
    assert given(parse()) == {}
    assert sampling_params(parse()) == sampling_params(parse(), temperature=1.0)


def test_booleans_have_two_flags():
    assert given(parse("--enable-prefix-caching"), "cache") == {"enable_prefix_caching": True}
    assert given(parse("--no-enable-prefix-caching"), "cache") == {"enable_prefix_caching": False}


def test_sampling_flags_take_lists_and_none():
    args = parse("--stop", "a", "--stop", "b,c", "--stop-token-ids", "3", "--max-tokens", "None")
    params = sampling_params(args, max_tokens=5)
    assert params.stop == ("a", "b,c")
    assert params.stop_token_ids == (3,)
    assert params.max_tokens is None


def test_a_size_is_taken_in_words():
    config = engine_config(parse("--kv-cache-memory-bytes", "512MiB"))
    assert config.cache.kv_cache_memory_bytes == 512 * 2**20


@drawn(
    block_size=st.integers(1, 256),
    num_blocks=st.none() | st.integers(1, 2**31),
    caching=st.booleans(),
    watermark=st.floats(0, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_is_shown_can_be_read_back(
    tmp_path_factory, block_size, num_blocks, caching, watermark, seed
):
    config = EngineConfig(
        cache=CacheConfig(
            block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=caching
        ),
        scheduler=SchedulerConfig(watermark=watermark, seed=seed),
    )
    path = tmp_path_factory.mktemp("config") / "shown.toml"
    path.write_text(to_toml(config, {"cache.block_size": "a note"}))
    assert load_config(path, env={}) == config
