"""Configuration from files, the environment and code: one result, or an error that says where."""

import json

import msgspec
import numpy as np
import pytest

from pagedkv import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    Scheduler,
    SchedulerConfig,
    load_config,
)
from pagedkv.config import config_schema, with_fields
from pagedkv.environment import audit_enabled
from pagedkv.errors import closest


def fault_of(call, *args, **kwargs):
    """The error's text, after checking that it has all its parts."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert caught.value.where
    assert caught.value.remedy
    return str(caught.value)


def test_the_defaults_serve():
    config = load_config(env={})
    assert config == EngineConfig()
    Scheduler(config)


# Constructors


WRONG_VALUES = [
    (CacheConfig, "block_size", 0),
    (CacheConfig, "block_size", 257),
    (CacheConfig, "block_size", 16.5),
    (CacheConfig, "block_size", "16"),
    (CacheConfig, "block_size", True),
    (CacheConfig, "block_size", None),
    (CacheConfig, "num_blocks", 0),
    (CacheConfig, "num_blocks", -1),
    (CacheConfig, "num_blocks", 2**31),
    (CacheConfig, "kv_cache_memory_bytes", 0),
    (CacheConfig, "enable_prefix_caching", "yes"),
    (CacheConfig, "enable_prefix_caching", 1),
    (SchedulerConfig, "max_num_seqs", 0),
    (SchedulerConfig, "max_num_batched_tokens", 0),
    (SchedulerConfig, "long_prefill_token_threshold", -1),
    (SchedulerConfig, "watermark", 1.0),
    (SchedulerConfig, "watermark", -0.1),
    (SchedulerConfig, "watermark", float("nan")),
    (SchedulerConfig, "watermark", float("inf")),
    (SchedulerConfig, "seed", -1),
    (ModelConfig, "max_model_len", 0),
    (ModelConfig, "max_model_len", 2**31),
    (ModelConfig, "vocab_size", 2**40),
    (ModelConfig, "eos_token_ids", (-1,)),
    (ModelConfig, "eos_token_ids", (2**40,)),
    (ModelConfig, "eos_token_ids", 5),
    (EngineConfig, "cache", {"block_size": 0}),
    (EngineConfig, "cache", {"block_sise": 4}),
    (EngineConfig, "cache", 4),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG_VALUES, ids=repr)
def test_a_constructor_refuses_what_a_file_may_not_say(kind, field, value):
    with pytest.raises(ConfigError) as caught:
        kind(**{field: value})
    fault = caught.value
    assert fault.where == (f"{kind.section}.{field}" if kind.section else field)
    assert repr(value) in fault.what or str(value) in fault.what
    assert fault.remedy.startswith("give ")
    assert "got" not in fault.remedy


def test_a_constructor_converts_what_decoding_would():
    assert ModelConfig(eos_token_ids=[2, 3]).eos_token_ids == (2, 3)
    assert EngineConfig(cache={"block_size": 4}).cache == CacheConfig(block_size=4)
    assert isinstance(SchedulerConfig(watermark=0).watermark, float)


def test_a_constructor_refuses_unknown_fields():
    with pytest.raises(TypeError, match="block_sise"):
        CacheConfig(block_sise=16)


def test_the_pools_size_is_given_in_one_way():
    message = fault_of(CacheConfig, num_blocks=4, kv_cache_memory_bytes=2**20)
    assert "num_blocks and kv_cache_memory_bytes" in message


@pytest.mark.parametrize("size", [1, 256, np.int64(16)])
def test_block_sizes_from_1_to_256_are_accepted(size):
    assert CacheConfig(block_size=size).block_size == int(size)


def test_configurations_do_not_change():
    with pytest.raises(AttributeError):
        CacheConfig().block_size = 4


# Files


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


TOML = "[cache]\nblock_size = 4\n[scheduler]\nwatermark = 0.1\n"
TREE = {"cache": {"block_size": 4}, "scheduler": {"watermark": 0.1}}


def test_toml_json_and_a_mapping_say_the_same(write):
    expected = EngineConfig(
        cache=CacheConfig(block_size=4), scheduler=SchedulerConfig(watermark=0.1)
    )
    assert load_config(write("a.toml", TOML), env={}) == expected
    assert load_config(str(write("a.json", json.dumps(TREE))), env={}) == expected
    assert load_config(TREE, env={}) == expected
    assert load_config({"cache": CacheConfig(block_size=4)}, env={}).cache == expected.cache


def test_what_was_loaded_from_a_mapping_does_not_change_it():
    tree = {"cache": {"block_size": 4}}
    load_config(tree, overrides={"cache.block_size": 8}, env={})
    assert tree == {"cache": {"block_size": 4}}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.toml", "[cache]\nblock_size = \n", "line 2"),
        ("a.toml", "[cache\n", "line 1"),
        ("a.json", '{"cache":\n {"block_size": }}', "line 2"),
        ("a.json", '{"cache": {}}\n\n}', "line 3"),
        ("a.json", '{"cache": ', "line 1"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(write, name, text, line):
    message = fault_of(load_config, write(name, text), env={})
    assert name in message
    assert line in message


@pytest.mark.parametrize(
    ("text", "field", "word"),
    [
        ("[cache]\nblock_size = 0\n", "cache.block_size", ">= 1"),
        ("[cache]\nblock_size = 257\n", "cache.block_size", "<= 256"),
        ("[cache]\nblock_size = 'many'\n", "cache.block_size", "int"),
        ("[cache]\nblock_size = true\n", "cache.block_size", "int"),
        ("[cache]\nblock_size = 2.5\n", "cache.block_size", "int"),
        ("[cache]\nblock_sise = 2\n", "cache", "block_sise"),
        ("[cash]\nblock_size = 2\n", "", "cash"),
        ("block_size = 2\n", "", "block_size"),
        ("cache = 2\n", "cache", "object"),
        ("[scheduler]\nwatermark = nan\n", "scheduler.watermark", ""),
        ("[cache]\nnum_blocks = 4\nkv_cache_memory_bytes = 4\n", "cache", "both given"),
    ],
)
def test_a_wrong_value_in_a_file_is_named_with_the_file(write, text, field, word):
    message = fault_of(load_config, write("mine.toml", text), env={})
    assert "mine.toml" in message
    assert field in message
    assert word in message


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    assert "cannot be read" in fault_of(load_config, tmp_path / name, env={})


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xff\xfe")
    assert "a.toml" in fault_of(load_config, path, env={})


def test_a_json_file_must_hold_sections(write):
    assert "not a table" in fault_of(load_config, write("a.json", "[1, 2]"), env={})


@pytest.mark.parametrize("source", [5, [1], [], b"a.toml", EngineConfig], ids=repr)
def test_a_source_of_another_kind_is_refused(source):
    assert "source" in fault_of(load_config, source, env={})


@pytest.mark.parametrize("tree", [{5: {}}, {"cache": {5: 4}}, {"cache": [4]}], ids=repr)
def test_a_mapping_of_another_shape_is_refused(tree):
    fault_of(load_config, tree, env={})


# The environment and overrides


def test_later_sources_win():
    env = {"PAGEDKV_CACHE__BLOCK_SIZE": "8", "PAGEDKV_CACHE__NUM_BLOCKS": "7", "PATH": "x__y"}
    tree = {"cache": {"block_size": 4, "num_blocks": 5}, "scheduler": {"max_num_seqs": 3}}
    config = load_config(tree, overrides={"cache.block_size": 16}, env=env)
    assert (config.cache.block_size, config.cache.num_blocks) == (16, 7)
    assert config.scheduler.max_num_seqs == 3


@pytest.mark.parametrize(
    ("name", "text", "field"),
    [
        ("PAGEDKV_CACHE__BLOCK_SIZE", "many", "cache.block_size"),
        ("PAGEDKV_CACHE__BLOCK_SIZE", "0", "cache.block_size"),
        ("PAGEDKV_CACHE__BLOCK_SIZE", "", "cache.block_size"),
    ],
)
def test_a_wrong_variable_is_refused_by_field(name, text, field):
    assert field in fault_of(load_config, env={name: text})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PAGEDKV_CACHE_BLOCK_SIZE", "PAGEDKV_CACHE__BLOCK_SIZE"),
        ("PAGEDKV_BLOCK_SIZE", "PAGEDKV_CACHE__BLOCK_SIZE"),
        ("PAGEDKV_ADUIT", "PAGEDKV_AUDIT"),
        ("PAGEDKV_CACHE__BLOCK_SISE", "PAGEDKV_CACHE__BLOCK_SIZE"),
        ("PAGEDKV_CASH__BLOCK_SIZE", "PAGEDKV_CACHE__BLOCK_SIZE"),
    ],
)
def test_a_variable_that_names_nothing_is_refused_with_the_nearest_name(name, meant):
    told = fault_of(load_config, env={name: "32"})
    assert told.startswith(name)
    assert f"did you mean {meant}?" in told


@pytest.mark.parametrize("name", ["PAGEDKV_FOO__BAR", "PAGEDKV_CACHE__", "PAGEDKV___X"])
def test_a_variable_like_no_other_is_refused_by_its_name(name):
    assert fault_of(load_config, env={name: "1"}).startswith(f"{name}: ")


def test_an_error_blames_the_source_that_set_the_value(write):
    good = write("a.toml", "[cache]\nblock_size = 16\n")
    env = {"PAGEDKV_CACHE__BLOCK_SIZE": "abc"}
    assert fault_of(load_config, good, env=env).startswith("PAGEDKV_CACHE__BLOCK_SIZE")
    told = fault_of(load_config, good, env={}, overrides={"cache.num_blocks": 0})
    assert told.startswith("cache.num_blocks")
    misspelt = write("b.toml", "[cache]\nblok_size = 16\n")
    told = fault_of(load_config, misspelt, env={})
    assert told.startswith(str(misspelt))
    assert "did you mean block_size?" in told


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cach.block_size", "cache"), ("cache.block_sise", "block_size"), ("block_size", "cache.")],
)
def test_a_misspelt_override_is_refused_with_the_nearest_name(name, meant):
    told = fault_of(load_config, overrides={name: 4}, env={})
    assert f"did you mean {meant}" in told


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_file_nested_too_deeply_is_refused(write, suffix):
    text = "[" * 200_000 if suffix == "json" else "a = " + "[" * 200_000
    assert "not valid" in fault_of(load_config, write(f"deep.{suffix}", text), env={})


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False)]
)
def test_a_variable_says_yes_or_no(text, value):
    config = load_config(env={"PAGEDKV_CACHE__ENABLE_PREFIX_CACHING": text})
    assert config.cache.enable_prefix_caching is value


def test_a_variable_can_hold_a_list():
    config = load_config(env={"PAGEDKV_MODEL__EOS_TOKEN_IDS": "[2, 3]"})
    assert config.model.eos_token_ids == (2, 3)


def test_variables_for_others_are_left_alone():
    assert load_config(env={"PAGEDKV_AUDIT": "1", "PAGEDKV": "x"}) == EngineConfig()


@pytest.mark.parametrize("name", ["cache", "cache.", ".block_size", "block_size", "a.b.c", ""])
def test_an_override_names_a_section_and_a_field(name):
    fault_of(load_config, overrides={name: 4}, env={})


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch):
    monkeypatch.setenv("PAGEDKV_CACHE__BLOCK_SIZE", "32")
    assert load_config().cache.block_size == 32
    assert load_config(env={}).cache.block_size == 16


@pytest.mark.parametrize(("value", "answer"), [("1", True), ("0", False), ("", False)])
def test_the_audit_is_switched_by_a_variable(value, answer):
    assert audit_enabled({"PAGEDKV_AUDIT": value}) is answer
    assert audit_enabled({}) is False


def test_the_audit_variable_takes_nothing_else():
    assert "PAGEDKV_AUDIT" in fault_of(audit_enabled, {"PAGEDKV_AUDIT": "yes"})


# By field name


def test_fields_are_replaced_by_name_and_none_keeps():
    config = with_fields(EngineConfig(), block_size=4, max_num_seqs=2, watermark=None)
    assert (config.cache.block_size, config.scheduler.max_num_seqs) == (4, 2)
    assert config.scheduler.watermark == 0.0


def test_a_misspelt_field_is_refused_with_the_nearest_name():
    assert "did you mean block_size?" in fault_of(with_fields, EngineConfig(), block_sise=4)
    assert "config schema" in fault_of(with_fields, EngineConfig(), zzz=4)


def test_a_field_replaced_by_name_is_checked():
    assert "cache.block_size" in fault_of(with_fields, EngineConfig(), block_size=0)


# The schema


def test_the_schema_tells_the_bounds_and_round_trips():
    schema = config_schema()
    json.dumps(schema)
    block_size = schema["$defs"]["CacheConfig"]["properties"]["block_size"]
    assert (block_size["minimum"], block_size["maximum"]) == (1, 256)
    config = load_config(TREE, env={})
    assert load_config(msgspec.to_builtins(config), env={}) == config


def test_every_field_is_described():
    for kind in (ModelConfig, CacheConfig, SchedulerConfig):
        for name in kind.__struct_fields__:
            assert f"{name}:" in kind.__doc__, f"{kind.__name__}.{name} is not described"


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("gpu_memory_utilization", ["num_blocks", "kv_cache_memory_fraction"], True),
        ("--num-gpu-blocks-override", ["--num-cpu-blocks", "--num-blocks"], True),
        ("swap_space", ["swap_cost", "num_cpu_blocks"], True),
        ("compression_ratio", ["recent", "ratio"], True),
        ("page_size", ["seed"], False),  # there is no such setting here
        ("blok_size", ["seed", "block_size"], True),
    ],
)
def test_what_other_engines_call_our_settings_is_known(name, known, meant):
    assert closest(name, known) == (known[-1] if meant else "")
