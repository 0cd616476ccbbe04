"""``pagedkv config``: what the engine would be configured with, and what can be configured."""

import argparse
import json
import os
import sys
from typing import Any

import msgspec

from pagedkv.cli.flags import add_config_flags, engine_config, given
from pagedkv.config import ENV_PREFIX, EngineConfig, config_schema

__all__ = ["add_parser", "run", "to_toml"]

_DESCRIPTION = """\
Show the configuration that flags, environment, file and defaults come to, or the JSON Schema of
all that can be configured. What `show` prints is a valid --config file.
"""
_EPILOG = """\
examples:
  pagedkv config show
  pagedkv config show --config serving.toml --num-blocks 4096
  PAGEDKV_CACHE__BLOCK_SIZE=32 pagedkv config show
  pagedkv config schema > schema.json
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser and those of its two actions."""
    parser = subparsers.add_parser(
        "config", help="show or check a configuration", description=_DESCRIPTION, epilog=_EPILOG
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="print the resolved configuration as TOML, with where each value came from",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_config_flags(show)
    actions.add_parser(
        "schema",
        help="print the JSON Schema of the configuration",
        description="Print the JSON Schema of a configuration file, for editors and checkers.",
        epilog=_EPILOG,
    )


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    if args.action == "schema":
        print(json.dumps(config_schema(), indent=2))
        return 0
    config = engine_config(args)
    sys.stdout.write(to_toml(config, _origins(config, args)))
    return 0


def _origins(config: EngineConfig, args: argparse.Namespace) -> dict[str, str]:
    """Say for every value that is not its default who set it, by dotted name."""
    flags = given(args)
    variables = {name.lower(): name for name in os.environ if name.startswith(ENV_PREFIX)}
    origins = {}
    for section, values in msgspec.structs.asdict(config).items():
        for name, value in msgspec.structs.asdict(values).items():
            variable = f"{ENV_PREFIX}{section}__{name}".lower()
            dotted = f"{section}.{name}"
            if dotted in flags:
                origins[dotted] = "--" + name.replace("_", "-")
            elif variable in variables:
                origins[dotted] = variables[variable]
            elif value != getattr(type(values)(), name):
                origins[dotted] = args.config
    return origins


def to_toml(config: EngineConfig, origins: dict[str, str]) -> str:
    """Return a configuration as TOML that `load_config` reads back to the same.

    Args:
        origins: By dotted name, what to note behind a value.
    """
    lines = []
    for section, values in msgspec.structs.asdict(config).items():
        lines.append(f"[{section}]")
        for name, value in msgspec.structs.asdict(values).items():
            # TOML has no null: what is not set stays a comment.
            text = f"# {name} is not set" if value is None else f"{name} = {_value(value)}"
            note = origins.get(f"{section}.{name}")
            lines.append(text if note is None else f"{text}  # {note}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _value(value: Any) -> str:
    # What config fields hold, JSON writes the way TOML does.
    return json.dumps(list(value) if isinstance(value, tuple) else value)
