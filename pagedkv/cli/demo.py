"""``pagedkv demo``: a few dozen users, one pool that is too small for all of them, a picture."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedkv.cli.dashboard import WIDTH, dashboard
from pagedkv.cli.machine import idle_cores, tell_of_compiling
from pagedkv.cli.users import User, make_users
from pagedkv.config import CacheConfig, EngineConfig, SchedulerConfig
from pagedkv.errors import ConfigError
from pagedkv.files import replacing

if TYPE_CHECKING:
    from pagedkv.cli.tour import Tour

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
A guided tour: a few dozen users ask a small model at once, but the pool of KV blocks has room for
only some of them. Watch them share blocks, wait, be preempted and come back, then look at the
picture of who held which block when. Everything runs on the CPU.
"""
_EPILOG = """\
examples:
  pagedkv demo                                first time: downloads a model of 93 MB
  pagedkv demo --model tiny-random            no download, random words, seconds; at first, while
                                              kernels compile, half a minute
  pagedkv demo --users 12 --num-blocks 40     fewer users, a smaller pool
  pagedkv demo --num-blocks 400               room for all: nobody waits
"""
# How much of what all users want to hold, taken together, the pool has room for.
_SCARCITY = 0.3
# The first block size that keeps the picture's rows countable is taken.
_BLOCK_SIZES = (16, 32, 64)
_MOST_BLOCKS = 160
_STEP_TOKENS = 256
_NUM_SHOWN = 5


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "demo", help="a guided tour on a small model", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="NAME",
        help="a name from `pagedkv models list`, tiny-random, a directory, a .gguf file or a hub "
        "id (default: %(default)s)",
    )
    numbers = (
        ("--users", 32, "how many ask (default: 32)"),
        ("--max-tokens", 80, "the longest answer, in tokens; most are shorter (default: 80)"),
        ("--seed", 0, "fixes who asks what and when (default: 0)"),
        (
            "--num-blocks",
            None,
            "blocks in the pool (default: under a third of what all users want)",
        ),
        ("--block-size", None, "tokens in a block (default: 16, more for very long prompts)"),
    )
    for flag, default, text in numbers:
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--output",
        default="pagedkv-demo",
        metavar="DIR",
        help="where the picture and the answers go (default: ./%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the users and show what happened; 1 if a request ended with an error."""
    _check(args)
    folder = _make_folder(args.output)
    users = make_users(args.users, seed=args.seed, longest=args.max_tokens)
    num_threads = idle_cores()  # before loading adds to the load
    print(f"Loading {args.model} ...", flush=True)
    import torch

    from pagedkv.cli.tour import Tour, encode
    from pagedkv.device.models import load_model

    torch.set_num_threads(min(num_threads, torch.get_num_threads()))
    tell_of_compiling()
    loaded = load_model(args.model)
    prompts = [encode(loaded, user.messages) for user in users]
    config = _config(args, users, prompts)
    tour = Tour(loaded, config, users, prompts)
    print(_welcome(users, prompts, tour.config), flush=True)
    with dashboard() as board:
        tour.run(board.update)
    _print_answers(tour)
    print(_summary(tour))
    _write_answers(folder / "answers.txt", tour)
    _draw(folder / "blocks.png", tour)
    _print_next(args, folder)
    return int(any(end.error for end in tour.ends))


# Setting the stage


def _check(args: argparse.Namespace) -> None:
    limits = (("users", 1), ("max_tokens", 3), ("seed", 0), ("num_blocks", 1), ("block_size", 1))
    for name, least in limits:
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(
                f"{value} is too small",
                where=f"--{name.replace('_', '-')}",
                remedy=f"give {least} or more",
            )


def _make_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(
            f"the directory {output!r} cannot be made: {fault.strerror}",
            where="--output",
            remedy="name one that can be written to",
        ) from None
    return folder


def _config(args: argparse.Namespace, users: list[User], prompts: list[list[int]]) -> EngineConfig:
    """Return a configuration whose pool is too small, unless its size was asked for."""
    sizes = _BLOCK_SIZES if args.block_size is None else [args.block_size]
    for block_size in sizes:
        num_blocks = args.num_blocks
        if num_blocks is None:
            num_blocks = _scarce(users, prompts, block_size)
        if num_blocks <= _MOST_BLOCKS:
            break
    return EngineConfig(
        cache=CacheConfig(block_size=block_size, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=_STEP_TOKENS),
    )


def _scarce(users: list[User], prompts: list[list[int]], block_size: int) -> int:
    """Return a number of blocks that serves each user, but by far not all of them at once."""
    shared = _common_prefix(prompts) // block_size if len(prompts) > 1 else 0
    own = [
        -(-(len(prompt) + user.max_tokens) // block_size) - shared
        for user, prompt in zip(users, prompts, strict=True)
    ]
    return shared + max(int(_SCARCITY * sum(own)), 2 * max(own))


def _welcome(users: list[User], prompts: list[list[int]], config: EngineConfig) -> str:
    cache = config.cache
    assert cache.num_blocks is not None
    wanted = sum(
        (len(prompt) + user.max_tokens) * user.n
        for user, prompt in zip(users, prompts, strict=True)
    )
    return (
        f"{len(users)} users come to ask, one after another. Their questions and answers are up to "
        f"{wanted:,} tokens;\nthe pool has room for {cache.num_blocks * cache.block_size:,}: "
        f"{cache.num_blocks} blocks of {cache.block_size} tokens.\n"
    )


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with in common."""
    length = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


# Telling what happened


def _print_answers(tour: "Tour") -> None:
    """Print a few answers to short questions, each question once, whole answers first."""
    print("\nSome of the answers\n")
    short = {user.question: user for user in tour.users if len(user.question) < WIDTH - 12}
    whole = {end.request_id for end in tour.ends if end.finish_reason == "stop"}
    chosen = sorted(short.values(), key=lambda user: user.name not in whole)[:_NUM_SHOWN]
    for user in sorted(chosen, key=lambda user: user.arrival):
        print(f"{user.name:>9}  {user.question}")
        for answer in tour.answers(user):
            text = " ".join(answer.split())
            indent = " " * 11
            print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent))
        print()


def _summary(tour: "Tour") -> str:
    stats, timeline, cache = tour.scheduler.stats(), tour.timeline(), tour.config.cache
    hits = stats.prompt_tokens_cached / max(1, stats.prompt_tokens)
    peak = int(timeline.num_held.max())
    unshared = int(timeline.num_entries.max())
    copies = int(timeline.num_copies.sum())
    came_back = stats.recomputed_tokens + stats.resumed_tokens_cached
    rows = (
        ("requests", f"{len(tour.users)}", f"{stats.num_finished} answers, {tour.seconds:.1f} s"),
        ("tokens in", f"{stats.prompt_tokens:,}", f"{hits:.0%} found in cached blocks"),
        ("tokens out", f"{stats.generation_tokens:,}",
         f"{stats.generation_tokens / tour.seconds:.1f} per second"),
        ("steps", f"{len(timeline.owner)}",
         f"at most {timeline.num_running.max()} sequences ran and {timeline.num_waiting.max()} "
         "requests waited"),
        ("peak blocks", f"{peak}", f"of {cache.num_blocks}; {unshared} if nothing were shared"),
        ("copies", f"{copies}", "shared blocks copied because one of their holders wrote to them"),
        ("preemptions", f"{stats.num_preemptions}",
         f"of {came_back:,} tokens, {stats.recomputed_tokens:,} were computed again, the rest was "
         "still cached"),
    )  # fmt: skip
    lines = ["Summary", ""]
    lines += [f"  {name:<12} {number:>7}   {words}".rstrip() for name, number, words in rows]
    return "\n".join(lines)


def _write_answers(path: Path, tour: "Tour") -> None:
    parts = []
    for user in tour.users:
        answers = "\n\n".join(answer.strip() for answer in tour.answers(user))
        parts.append(f"## {user.name}: {user.question}\n\n{answers}\n")
    with replacing(path) as out:
        out.write("\n".join(parts))


def _draw(path: Path, tour: "Tour") -> None:
    try:
        from pagedkv.cli.picture import draw_timeline
    except ModuleNotFoundError as fault:
        print(f"\nNo picture: it needs {fault.name}; pip install 'pagedkv[plot]'")
        return
    draw_timeline(
        tour.timeline(),
        path,
        title=f"{len(tour.users)} users, one pool: who held which block when",
        block_size=tour.config.cache.block_size,
        arrivals=tour.arrivals,
    )


def _print_next(args: argparse.Namespace, folder: Path) -> None:
    model = "" if args.model == "smollm2-135m" else f" --model {args.model}"
    picture = folder / "blocks.png"
    if picture.is_file():
        print(f"\nLook at {picture}: who held which block when.")
    print(f"All answers are in {folder / 'answers.txt'}.")
    print(f"""
Try next
  pagedkv demo{model} --num-blocks 400
      the same users with room for all: nobody waits, nobody is preempted
  pagedkv generate{model} --show-steps "Lionel Messi is a"
      what a KV cache saves, token by token
  pagedkv generate{model} --chat "Why is the sky blue?" --stream
      ask something yourself
  pagedkv bench throughput --help
      measure it""")
