"""``pagedkv generate``: prompts in, text out."""

import argparse
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from pagedkv.cli.flags import (
    add_engine_flags,
    add_sampling_flags,
    engine_config,
    given,
    make_llm,
    sampling_params,
)
from pagedkv.cli.prompts import Prompt, gather_prompts
from pagedkv.cli.turns import InTurn
from pagedkv.core.request import SamplingParams
from pagedkv.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from pagedkv.device.llm import LLM
    from pagedkv.device.outputs import CompletionOutput, RequestOutput

__all__ = ["add_parser", "run"]

# A sixteen-token answer, the library's default, looks like a broken one on a terminal.
MAX_TOKENS = 128
# All of C0 and C1 but tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_DESCRIPTION = """\
Generate text from prompts. All prompts are served at once, batched continuously, from one pool of
KV blocks; prompts that begin alike share blocks. Text goes to standard output, everything else to
standard error.
"""
_EPILOG = """\
examples:
  pagedkv generate --chat "Why is the sky blue?" --stream
  pagedkv generate --temperature 0 --max-tokens 32 "The capital of France is" "1, 2, 3,"
  pagedkv generate --model tiny-random --n 3 --seed 7 --json "Hello" | jq .outputs[].text
  pagedkv generate --prompts-file questions.jsonl --chat --json > answers.jsonl

A prompts file has one prompt a line: plain text, or JSON (in a .jsonl file always) with "prompt",
"prompt_token_ids" or "messages", and perhaps "cache_salt"; other keys are passed over. Without
prompts, all of standard input is one prompt.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb's parser."""
    parser = subparsers.add_parser(
        "generate",
        usage="pagedkv generate [flags] [PROMPT ...]",
        help="generate text from prompts",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to go on from")
    parser.add_argument("--prompts-file", metavar="FILE", help="read prompts from it; - is stdin")
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat template"
    )
    parser.add_argument(
        "--stream", action="store_true", help="print tokens as they come, prompt after prompt"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, or per token"
    )
    parser.add_argument(
        "--show-steps",
        action="store_true",
        help="show what each greedy step costs with the KV cache and without it",
    )
    add_sampling_flags(parser, max_tokens=MAX_TOKENS)
    add_engine_flags(parser, skip=("seed",))


def run(args: argparse.Namespace) -> int:
    """Serve the prompts; 1 if a request ended with an error."""
    prompts = gather_prompts(args.prompts, args.prompts_file, sys.stdin)
    params = sampling_params(args, max_tokens=MAX_TOKENS)
    config = engine_config(args)
    if args.show_steps:
        _check_steps(prompts, args)
    llm = make_llm(args, config)
    ready = [_for_llm(llm, prompt, chat=args.chat) for prompt in prompts]
    if args.show_steps:
        return _show_steps(llm, ready[0], given(args, "sampling"))
    if args.stream:
        return _stream(llm, ready, params, as_json=args.json)
    return _whole(llm, ready, params, as_json=args.json)


def _for_llm(llm: "LLM", prompt: Prompt, *, chat: bool) -> Any:
    """Return the prompt as `LLM.generate` takes it, templates applied."""
    if isinstance(prompt, str):
        return llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
    # A line of somebody's data may say more than is for the engine, which passes nothing over.
    known = {
        key: prompt[key] for key in ("prompt", "prompt_token_ids", "cache_salt") if key in prompt
    }
    if "messages" in prompt:
        return known | {"prompt": llm.chat_prompt(prompt["messages"])}
    if chat and "prompt" in prompt:
        return known | {"prompt": _for_llm(llm, prompt["prompt"], chat=True)}
    return known


# Whole outputs


def _whole(llm: "LLM", prompts: list[Any], params: SamplingParams, *, as_json: bool) -> int:
    """Print outputs in the prompts' order, as soon as they are there; if the rest is interrupted,
    then whatever is done.
    """
    from tqdm import tqdm

    def show(index: int, output: "RequestOutput") -> None:
        if as_json:
            _print_json(_as_dict(index, output))
        else:
            _print_text(index, output, alone=len(prompts) == 1)

    done, turns = [], InTurn(show)
    quiet = len(prompts) == 1 or sys.stdout.isatty() or not sys.stderr.isatty()
    with tqdm(total=len(prompts), disable=quiet, unit="request") as bar:
        try:
            for output in llm.stream(prompts, params, whole=True):
                done.append(output)
                turns.add(int(output.request_id), output)  # this LLM numbered nothing else
                bar.update()
        finally:
            turns.show_rest()
    return _report_failures(sorted(done, key=lambda output: int(output.request_id)))


def _print_json(value: dict[str, Any]) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def _as_dict(index: int, output: "RequestOutput") -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(output, str_keys=True)
    del value["request_id"], value["finished"]
    for one, completion in zip(value["outputs"], output.outputs, strict=True):
        one["cumulative_logprob"] = completion.cumulative_logprob
    return {"index": index, **value}


def _print_text(index: int, output: "RequestOutput", *, alone: bool) -> None:
    for completion in output.outputs:
        if not (alone and len(output.outputs) == 1):
            print(_heading(index, output, completion))
        _print_safely(completion.text + "\n")


def _print_safely(text: str) -> None:
    """Print what a model wrote; a terminal gets no control characters, which could steer it."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    print(text, end="", flush=True)


def _heading(index: int, output: "RequestOutput", completion: "CompletionOutput") -> str:
    """A line that says whose text follows."""
    of_many = f".{completion.index}" if len(output.outputs) > 1 else ""
    prompt = output.prompt if output.prompt is not None else f"{len(output.prompt_token_ids)} ids"
    shown = " ".join(prompt.split())
    return f"[{index}{of_many}] {shown if len(shown) <= 72 else shown[:71] + '…'}"


def _report_failures(outputs: Iterable["RequestOutput"]) -> int:
    errors = [one.error for output in outputs for one in output.outputs if one.error]
    for error in errors:
        print(f"pagedkv: error: {error}", file=sys.stderr)
    return 1 if errors else 0


# Streams


def _stream(llm: "LLM", prompts: list[Any], params: SamplingParams, *, as_json: bool) -> int:
    """Print text as it comes: as JSON for whoever has news, else one sequence after another.

    Every sequence advances all the time; text of those whose turn has not come is held back.
    """
    printer = _Printer(len(prompts), params.n)
    done = []
    for output in llm.stream(prompts, params):
        index = int(output.request_id)  # this LLM is new and has numbered nothing else
        if as_json:
            for line in printer.news(index, output):
                _print_json(line)
        else:
            printer.show(index, output)
        if output.finished:
            done.append(output)
    return _report_failures(done)


class _Printer:
    """Turns snapshots of outputs into what is new in them.

    Args:
        num_prompts: How many requests there are.
        n: How many sequences each has.
    """

    def __init__(self, num_prompts: int, n: int) -> None:
        self._n = n
        self._latest: list[RequestOutput | None] = [None] * num_prompts
        self._written = [0] * (num_prompts * n)
        self._ended = [False] * (num_prompts * n)
        self._turn = 0

    def _delta(self, index: int, completion: "CompletionOutput") -> str:
        place = index * self._n + completion.index
        start, self._written[place] = self._written[place], len(completion.text)
        return completion.text[start:]

    def news(self, index: int, output: "RequestOutput") -> Iterable[dict[str, Any]]:
        """Yield an object for each sequence that has new text or has just ended."""
        for completion in output.outputs:
            place = index * self._n + completion.index
            ends = completion.finish_reason is not None and not self._ended[place]
            delta = self._delta(index, completion)
            if delta or ends:
                self._ended[place] = completion.finish_reason is not None
                yield {
                    "index": index,
                    "output": completion.index,
                    "delta": delta,
                    "finish_reason": completion.finish_reason,
                }

    def show(self, index: int, output: "RequestOutput") -> None:
        """Print what is new of the sequence whose turn it is; pass the turn on when it ends."""
        self._latest[index] = output
        while self._turn < len(self._written):
            place, which = divmod(self._turn, self._n)
            latest = self._latest[place]
            if latest is None:
                return
            completion = latest.outputs[which]
            if len(self._written) > 1 and not self._written[self._turn]:
                self._head(place, latest, completion)
            _print_safely(self._delta(place, completion))
            if completion.finish_reason is None:
                return
            print(flush=True)
            self._turn += 1

    def _head(self, place: int, latest: "RequestOutput", completion: "CompletionOutput") -> None:
        """Print the heading, once: when there is text or it is known that there will be none."""
        if completion.text or completion.finish_reason is not None:
            print(_heading(place, latest, completion))


# Steps


def _check_steps(prompts: list[Prompt], args: argparse.Namespace) -> None:
    if len(prompts) != 1 or args.json or args.stream:
        raise ConfigError(
            "it shows one prompt, as text",
            where="--show-steps",
            remedy="give one prompt, no --json and no --stream",
        )


def _show_steps(llm: "LLM", prompt: Any, asked: dict[str, Any]) -> int:
    from pagedkv.cli.steps import show_steps

    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str):
        raise InvalidRequest("the prompt is not text", where="--show-steps", remedy="give text")
    options: dict[str, Any] = {}
    if asked.get("max_tokens"):
        options["max_tokens"] = asked["max_tokens"]
    if "stop" in asked:
        options["stop"] = tuple(asked["stop"])
    show_steps(llm, text, **options)
    return 0
