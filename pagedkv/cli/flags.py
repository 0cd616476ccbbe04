"""Flags made from the config structs: one name, one default and one help text for each field.

A field ``cache.block_size`` becomes ``--block-size``, its help the field's line in the struct's
docstring. Flags that were not given leave no trace in the namespace, so that environment, file and
defaults can speak: flag > environment > file > default.
"""

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from pagedkv.cli.machine import busy_cores, tell_of_compiling, tell_of_neighbours
from pagedkv.config import EngineConfig, load_config
from pagedkv.core.request import SamplingParams
from pagedkv.errors import ConfigError
from pagedkv.eviction import policy

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM

__all__ = [
    "add_config_flags",
    "add_engine_flags",
    "add_sampling_flags",
    "check_counts",
    "engine_config",
    "field_help",
    "given",
    "make_llm",
    "parse_size",
    "sampling_params",
]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")}
_UNITS |= {f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")}
# All other facts about the model, an engine reads from the model itself.
_MODEL_FLAGS = ("max_model_len",)
DTYPES = ("float32", "float16", "bfloat16")


def parse_size(text: str) -> int:
    """Return the bytes that ``8GiB``, ``500 MB`` or ``4096`` stand for.

    Raises:
        argparse.ArgumentTypeError: It is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 8GiB, 512MiB or bytes")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _biases(text: str) -> dict[int, float]:
    try:
        return msgspec.json.decode(text, type=dict[int, float])
    except (msgspec.DecodeError, UnicodeEncodeError):  # the latter: bytes that are no UTF-8
        raise argparse.ArgumentTypeError(
            f'{text!r} does not give numbers by token id, as {{"11": -5, "42": 2.5}} does'
        ) from None


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else parse(text)


def field_help(struct: type) -> dict[str, str]:
    """Return what a struct's docstring says about each field under ``Attributes:``."""
    _, _, section = (struct.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if found := re.match(r" {8}(\w+): (.*)", line):
            name = found[1]
            texts[name] = found[2]
        elif name and line.startswith(" " * 9):
            texts[name] += " " + line.strip()
        else:
            name = ""
    return {key: text.replace("`", "") for key, text in texts.items()}


def _add_field(group: Any, section: str, field: Any, help_text: str, default: Any) -> None:
    """Add one field's flag; its value goes to ``section.name`` and only if it was given."""
    flag = "--" + field.name.replace("_", "-")
    options: dict[str, Any] = {"dest": f"{section}.{field.name}", "default": argparse.SUPPRESS}
    options["help"] = _with_default(help_text, default)
    parts = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else [field.type]
    many = [part for part in parts if isinstance(part, msgspec.inspect.VarTupleType)]
    kind = many[0].item_type if many else parts[0]
    if many:
        options |= {
            "action": "append",
            "type": _parser_of(kind, field.name),
            "metavar": _word(kind),
        }
        options["help"] += " (may be given more than once)"
    elif isinstance(kind, msgspec.inspect.BoolType):
        words = [part for part in parts if isinstance(part, msgspec.inspect.LiteralType)]
        if words:  # on, off or a word
            options |= _switch_or_word([str(word) for word in words[0].values])
        else:
            options["action"] = argparse.BooleanOptionalAction
    elif isinstance(kind, msgspec.inspect.LiteralType):
        options["choices"] = list(kind.values)
    else:
        parse = _parser_of(kind, field.name)
        optional = any(isinstance(part, msgspec.inspect.NoneType) for part in parts)
        options["type"] = _or_none(parse) if optional else parse
        options["metavar"] = "SIZE" if field.name.endswith("_bytes") else _word(kind)
    group.add_argument(flag, **options)


def _switch_or_word(words: list[str]) -> dict[str, Any]:
    """Return the options of a flag that is on, off or one of the words."""
    known: dict[str, bool | str] = {"on": True, "off": False} | {word: word for word in words}

    def parse(text: str) -> bool | str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return known[text]

    return {"type": parse, "metavar": "|".join(known)}


def _with_default(text: str, default: Any) -> str:
    """Help text with its default behind it, the way argparse wants it escaped."""
    shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else default
    text = text.removesuffix(".")
    if shown is not None and shown != ():
        text += f" [default: {shown}]"
    return text.replace("%", "%%")


def _parser_of(kind: Any, name: str) -> Callable[[str], Any]:
    if name.endswith("_bytes"):
        return parse_size
    if isinstance(kind, msgspec.inspect.IntType):
        return _whole
    if isinstance(kind, msgspec.inspect.DictType):
        return _biases
    return _number if isinstance(kind, msgspec.inspect.FloatType) else str


def _word(kind: Any) -> str:
    if isinstance(kind, msgspec.inspect.IntType):
        return "N"
    if isinstance(kind, msgspec.inspect.DictType):
        return "JSON"
    return "X" if isinstance(kind, msgspec.inspect.FloatType) else "TEXT"


def _add_struct(
    group: Any, struct: type, section: str, skip: Collection[str], defaults: Mapping[str, Any]
) -> None:
    texts = field_help(struct)
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if field.name not in skip:
            default = defaults.get(field.name, field.default)
            _add_field(group, section, field, texts.get(field.name, ""), default)


def add_config_flags(
    parser: argparse.ArgumentParser, *, skip: Collection[str] = (), **defaults: Any
) -> None:
    """Add ``--config`` and a flag for every field of `EngineConfig`'s sections.

    Args:
        skip: Names of fields that the verb has a flag of its own for.
        defaults: What the verb takes instead of a field's own default, for the help text.
    """
    group = parser.add_argument_group(
        "engine", "Each wins over PAGEDKV_<SECTION>__<FIELD> variables, they over --config."
    )
    group.add_argument("--config", metavar="FILE", help="TOML or JSON file to read settings from")
    info = msgspec.inspect.type_info(EngineConfig)
    assert isinstance(info, msgspec.inspect.StructType)
    for section in info.fields:
        assert isinstance(section.type, msgspec.inspect.StructType)
        names = {field.name for field in section.type.fields}
        hidden = names.difference(_MODEL_FLAGS) if section.name == "model" else ()
        _add_struct(group, section.type.cls, section.name, {*skip, *hidden}, defaults)


def add_engine_flags(
    parser: argparse.ArgumentParser, *, skip: Collection[str] = (), **defaults: Any
) -> None:
    """Add ``--model``, ``--dtype``, ``--device``, ``--pack-weights``, then `add_config_flags`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="NAME",
        help="a name from `pagedkv models list`, tiny-random, a directory, a .gguf file or a hub "
        "id [default: %(default)s]",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="element type of model and cache; auto is float32 on the CPU, and on CUDA what the "
        "model's files hold, float16 for float32 [default: %(default)s]",
    )
    group.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where it runs, cpu or cuda [default: %(default)s]",
    )
    group.add_argument(
        "--pack-weights",
        default="none",
        choices=("none", "lm_head", "all"),
        help="keep the output embedding, or all weights, in the order that the CPU multiplies in: "
        "faster steps in float32; an embedding that is tied is kept twice [default: %(default)s]",
    )
    add_config_flags(parser, skip=skip, **defaults)


def add_sampling_flags(
    parser: argparse.ArgumentParser, *, skip: Collection[str] = (), **defaults: Any
) -> None:
    """Add a flag for every field of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    _add_struct(group, SamplingParams, SamplingParams.section, skip, defaults)


def given(args: argparse.Namespace, section: str = "") -> dict[str, Any]:
    """Return the flags of a section that were given, by field; of all, by dotted name."""
    values = {name: value for name, value in vars(args).items() if "." in name}
    if not section:
        return {name: value for name, value in values.items() if not name.startswith("sampling.")}
    head = f"{section}."
    return {name.removeprefix(head): v for name, v in values.items() if name.startswith(head)}


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Merge flags, environment and file, and read the eviction policy to see that it can be.

    Raises:
        ConfigError: Naming the file, the field and what would be accepted.
    """
    config = load_config(args.config, overrides=given(args))
    policy(config.cache.eviction)
    return config


def sampling_params(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """Make `SamplingParams` of the flags that were given, over the verb's own defaults.

    Raises:
        InvalidRequest: A value is out of range.
    """
    return SamplingParams(**(defaults | given(args, SamplingParams.section)))


def make_llm(args: argparse.Namespace, config: EngineConfig) -> "LLM":
    """Load the model and make its pool; torch is imported here and not before.

    Raises:
        ModelNotFound, CorruptModel, UnsupportedBackend, ConfigError: As `LLM`.
    """
    busy = busy_cores()  # before loading adds to it
    from pagedkv.device.llm import LLM

    if args.device == "cpu":
        tell_of_neighbours(busy)
        tell_of_compiling()
    # Asked for by flag, the length may exceed what the model was trained on.
    longer = given(args, "model").get("max_model_len")
    return LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        pack_weights=args.pack_weights,
        config=config,
        max_model_len=longer,
    )


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Refuse a flag's number that is smaller than it may be; flags that are not there are fine.

    Raises:
        ConfigError: It names the flag.
    """
    for name, smallest in least.items():
        value = getattr(args, name, None)
        if value is not None and value < smallest:
            raise ConfigError(
                f"it is {value}",
                where=f"--{name.replace('_', '-')}",
                remedy=f"give at least {smallest}",
            )
