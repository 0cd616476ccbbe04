"""What can be configured: frozen structs, checked at construction and at decoding alike.

Values merge in one order, later wins: defaults < file (TOML or JSON) < environment < overrides.
An environment variable names its field by section: ``PAGEDKV_CACHE__BLOCK_SIZE=32``; a list is
written as in JSON.
"""

import functools
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, Struct

from pagedkv.environment import OTHER_VARIABLES, audit_enabled
from pagedkv.errors import ConfigError, PagedKVError, closest, shown

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "SchedulerConfig",
    "as_config",
    "check_environment",
    "config_schema",
    "load_config",
    "with_fields",
]

LARGEST_INT32 = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=LARGEST_INT32)]
LARGEST_INT64 = 2**63 - 1  # more cannot be written down in a log
Positive = Annotated[int, Meta(ge=1, le=LARGEST_INT64)]
Natural = Annotated[int, Meta(ge=0, le=LARGEST_INT64)]
TokenId = Annotated[int, Meta(ge=0, lt=LARGEST_INT32)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
ENV_PREFIX = "PAGEDKV_"


@functools.cache
def _field_types(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return each field's annotation and default."""
    hints = get_type_hints(cls, include_extras=True)
    fields = msgspec.structs.fields(cls)
    return {field.name: (hints[field.name], field.default) for field in fields}


class Checked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A struct whose constructor enforces what its annotations say.

    msgspec checks ``Meta`` bounds only when it decodes; this closes the gap, so that
    ``CacheConfig(block_size=0)`` fails exactly as the same line in a file does. What decoding would
    convert (a list to a tuple, a mapping to a section) the constructor converts as well.
    """

    section: ClassVar[str] = ""
    error: ClassVar[type[PagedKVError]] = ConfigError

    def __post_init__(self) -> None:
        for name, (hint, default) in _field_types(type(self)).items():
            value = getattr(self, name)
            if value is default:
                continue
            value = value.item() if isinstance(value, np.generic) else value
            where = f"{self.section}.{name}" if self.section else name
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"{name} is {value}", where=where, remedy="give a finite number")
            try:
                msgspec.structs.force_setattr(self, name, msgspec.convert(value, hint))
            except (OverflowError, msgspec.ValidationError) as fault:
                expected = str(fault).split(" - at ")[0].split(", got ")[0]
                if get_origin(hint) is Literal:
                    expected = " or ".join(map(repr, get_args(hint)))
                expected = "less" if isinstance(fault, OverflowError) else expected
                what, remedy = f"{name} is {shown(value)}", expected.removeprefix("Expected ")
                raise self.error(what, where=where, remedy=f"give {remedy}") from None


class ModelConfig(Checked, frozen=True, kw_only=True):
    """The facts about a model that block management needs; no weights, no torch.

    Attributes:
        max_model_len: The most tokens, prompt and output together, a sequence may have.
        vocab_size: Token ids must lie below it.
        eos_token_ids: Ids that end a sequence unless it asks to ignore them.
        num_layers: Layers that keep keys and values.
        num_kv_heads: Key and value heads of one layer.
        sliding_window: Per layer, the tokens a query sees back; 0 sees all. Empty: all zero.
        rope: Whether positions enter by rotating queries and keys.
    """

    section: ClassVar[str] = "model"

    max_model_len: Count = 8192
    vocab_size: Count = LARGEST_INT32
    eos_token_ids: tuple[TokenId, ...] = ()
    num_layers: Count = 1
    num_kv_heads: Count = 1
    sliding_window: tuple[Natural, ...] = ()
    rope: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sliding_window and len(self.sliding_window) != self.num_layers:
            raise ConfigError(
                f"{len(self.sliding_window)} windows for {self.num_layers} layers",
                where="model.sliding_window",
                remedy="give one per layer or none",
            )


class CacheConfig(Checked, frozen=True, kw_only=True):
    """The pool of KV blocks.

    Attributes:
        block_size: Tokens in one block.
        num_blocks: Blocks in the pool; None takes what ``kv_cache_memory_bytes`` holds.
        kv_cache_memory_bytes: The pool's size in bytes, where a model says how large a block is.
            If nothing is given, `pagedkv.LLM` takes 1 GiB at most and a bare scheduler 1,024
            blocks.
        kv_cache_memory_fraction: The pool's size as a fraction of the memory that is free on the
            model's device once the model is loaded.
        kv_cache_dtype: What keys and values are stored as: as the model computes (``auto``),
            ``float16``, ``bfloat16``, ``int8`` with a scale for each token and head, or on CUDA
            ``int4`` with a scale and a shift.
        granularity: What decides on eviction together and shares a block table: a whole
            ``sequence``, each ``layer``, or each KV ``head`` of each layer.
        eviction: The policy of requests that bring none: a preset or an expression.
        reclaim: Which cached blocks are reused first: least recently used (``lru``), first freed
            first (``fifo``), least often found (``lfu``), never found before found once
            (``slru``), or by the ``priority`` of the requests that used them.
        enable_prefix_caching: Keep the blocks of finished sequences for prompts that begin alike.
        num_cpu_blocks: Blocks in host memory that preempted sequences can be swapped to.
        enable_kv_cache_events: Record what becomes findable and what is reclaimed.
    """

    section: ClassVar[str] = "cache"

    block_size: Annotated[int, Meta(ge=1, le=256)] = 16
    num_blocks: Count | None = None
    kv_cache_memory_bytes: Positive | None = None
    kv_cache_memory_fraction: Annotated[float, Meta(gt=0, le=1)] | None = None
    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "int8", "int4"] = "auto"
    granularity: Literal["sequence", "layer", "head"] = "sequence"
    eviction: str = "full"
    reclaim: Literal["lru", "fifo", "lfu", "slru", "priority"] = "lru"
    enable_prefix_caching: bool = True
    num_cpu_blocks: Annotated[int, Meta(ge=0, le=LARGEST_INT32)] = 0
    enable_kv_cache_events: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("num_blocks", "kv_cache_memory_bytes", "kv_cache_memory_fraction")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} are {'both' if len(given) == 2 else 'all'} given",
                where="cache",
                remedy="give one of them",
            )


class SchedulerConfig(Checked, frozen=True, kw_only=True):
    """Who runs, and how much of it, in one step.

    Attributes:
        max_num_seqs: The most sequences that run at once.
        max_num_batched_tokens: The most tokens computed in one step, over all sequences.
        long_prefill_token_threshold: The most prompt tokens one sequence computes in a step in
            which others could compute as well; 0 leaves the budget to whoever comes first.
        scheduling_policy: Who is next: first come first served (``fcfs``), the lowest ``priority``,
            the longest cached prefix (``lpm``), or the tenant served least so far (``fair``).
        ageing_steps: Steps of waiting that are worth one level of priority, or one block of prefix.
        max_skips: How many later requests may pass one that lacks blocks or rows.
        tenants: Who may send requests, each as ``name`` or ``name=blocks``, the most blocks that
            its running sequences may hold; none lets everybody.
        admission: What a request must leave free to enter: all that running ones could ever need
            (``guaranteed``), a part of it that adapts (``optimistic``), or just what they need for
            the tokens they know (``greedy``).
        watermark: The fraction of the pool that admission leaves free for growth.
        swap_cost: What moving one block to host memory and back costs, in tokens computed.
        seed: Where the seeds of requests that bring none are drawn from.
    """

    section: ClassVar[str] = "scheduler"

    max_num_seqs: Annotated[int, Meta(ge=1, le=2**18)] = 128
    max_num_batched_tokens: Count = 2048
    long_prefill_token_threshold: Natural = 0
    scheduling_policy: Literal["fcfs", "priority", "lpm", "fair"] = "fcfs"
    ageing_steps: Annotated[int, Meta(ge=1, le=LARGEST_INT32)] = 256
    max_skips: Annotated[int, Meta(ge=0, le=LARGEST_INT32)] = 0
    tenants: tuple[str, ...] = ()
    admission: Literal["guaranteed", "optimistic", "greedy"] = "greedy"
    watermark: Fraction = 0.0
    swap_cost: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    seed: Natural = 0


class EngineConfig(Checked, frozen=True, kw_only=True):
    """Everything that decides how a scheduler behaves: model facts, the pool, the step."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()


def load_config(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> EngineConfig:
    """Merge a file or mapping, the environment and overrides into one checked configuration.

    Args:
        source: A ``.toml`` or ``.json`` path, a nested mapping, or nothing.
        overrides: Dotted names to values, such as ``{"cache.block_size": 32}``.
        env: The environment; ``os.environ`` if omitted.
        defaults: Dotted names to values that stand where nothing else says.

    Raises:
        ConfigError: Naming the file and line, or the field, and what would be accepted.
    """
    where = str(source) if isinstance(source, str | Path) else ""
    tree = _read(Path(source)) if isinstance(source, str | Path) else _copy(source)
    origin: dict[str, str] = {}  # dotted name -> the variable that set it last, "" for an override
    for variable, dotted, text in _variables(os.environ if env is None else env):
        section, _, field = dotted.partition(".")
        _put(tree, section, field, _list_or_text(text))
        origin[dotted] = variable
    for dotted, value in (overrides or {}).items():
        section, _, field = dotted.partition(".")
        _put(tree, section, field, value)
        origin[dotted] = ""
    for dotted, value in (defaults or {}).items():
        section, _, field = dotted.partition(".")
        if field not in (tree.get(section) or {}):
            _put(tree, section, field, value)
    try:
        return msgspec.convert(tree, EngineConfig, strict=False)
    except msgspec.ValidationError as fault:
        what, _, path = str(fault).partition(" - at ")
        field = path.strip("`").removeprefix("$.").removeprefix("$")
        section, _, setting = field.partition(".")
        settings = tree.get(section)
        if isinstance(settings, dict) and setting in settings:
            what = f"{what}; it is {shown(settings[setting])}"
        name, remedy = field, "see `pagedkv config schema`"
        if "unknown field" in what:
            unknown = what.split("`")[1]
            name = ".".join(filter(None, (field, unknown)))
            remedy = _nearest(unknown, _fields_of(field) or [*_sections(), *_settings()]) or remedy
        at = " ".join(filter(None, (origin.get(name, where), field))) or "config"
        raise ConfigError(what, where=at, remedy=remedy) from None
    except ConfigError as fault:
        at = " ".join(filter(None, (origin.get(fault.where, where), fault.where)))
        raise ConfigError(fault.what, where=at, remedy=fault.remedy) from None


def check_environment() -> None:
    """Refuse variables that begin as ours do and mean nothing, or nothing that they may.

    Raises:
        ConfigError: It names the first of them.
    """
    audit_enabled()
    for _ in _variables(os.environ):
        pass


def _variables(env: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (variable, dotted field, text) of those that name a field.

    Raises:
        ConfigError: A variable begins as ours do and means nothing.
    """
    known = {ENV_PREFIX + dotted.replace(".", "__").upper(): dotted for dotted in _settings()}
    for name, text in sorted(env.items()):
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES:
            continue
        if name.upper() not in known:
            raise ConfigError(
                "no setting has this name",
                where=name,
                remedy=_nearest(name, [*known, *OTHER_VARIABLES])
                or f"write {ENV_PREFIX}<SECTION>__<FIELD>; see `pagedkv config schema`",
            )
        yield name, known[name.upper()], text


def _sections() -> dict[str, type[Checked]]:
    return {cls.section: cls for cls in (ModelConfig, CacheConfig, SchedulerConfig)}


def _fields_of(section: str) -> list[str]:
    """Return the fields of a section; nothing if there is no such section."""
    sections = _sections()
    return list(sections[section].__struct_fields__) if section in sections else []


def _settings() -> list[str]:
    """Return every field as ``section.field``."""
    return [f"{section}.{field}" for section in _sections() for field in _fields_of(section)]


def _nearest(name: str, known: list[str]) -> str:
    """Return a question after the known name that is most like this one, or nothing."""
    near = closest(name, known)
    return f"did you mean {near}?" if near else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            f"cannot be read: {fault}", where=str(path), remedy="give a readable text file"
        ) from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as fault:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(
            f"not valid {kind}: {fault}", where=str(path), remedy="mend the file"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            "the top level is not a table", where=str(path), remedy="give sections such as [cache]"
        )
    return _copy(tree)


def _list_or_text(text: str) -> Any:
    """Return a variable's text, read as JSON if it is a list."""
    try:
        return json.loads(text) if text.startswith("[") else text
    except (ValueError, RecursionError):
        return text


def _copy(tree: object) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"a source is {tree!r}", where="config", remedy="give a path or a mapping of sections"
        )
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _put(tree: dict[str, Any], section: str, field: str, value: Any) -> None:
    inner = tree.setdefault(section, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{section} is {inner!r}", where=section, remedy="give a table of fields")
    inner[field] = value


def as_config(config: object) -> EngineConfig:
    """Return what was handed in, the defaults for None; anything else is a ConfigError."""
    if not isinstance(config, EngineConfig | None):
        what = f"config is {shown(config)}"
        raise ConfigError(what, where="config", remedy="give an EngineConfig")
    return config or EngineConfig()


def with_fields(config: EngineConfig, **fields: Any) -> EngineConfig:
    """Return ``config`` with fields replaced by name, whatever section they stand in.

    A field given as None keeps its value.

    Raises:
        ConfigError: No section has such a field, or a value is not accepted.
    """
    sections: dict[str, dict[str, Any]] = {}
    known = {name: section for section, _, name in (each.partition(".") for each in _settings())}
    for name, value in fields.items():
        if name not in known:
            hint = _nearest(name, list(known)) or "see `pagedkv config schema`"
            raise ConfigError("there is no such field", where=name, remedy=hint)
        if value is not None:
            sections.setdefault(known[name], {})[name] = value
    changed = {
        section: msgspec.structs.replace(getattr(config, section), **values)
        for section, values in sections.items()
    }
    return msgspec.structs.replace(config, **changed)


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of `EngineConfig`."""
    return msgspec.json.schema(EngineConfig)
