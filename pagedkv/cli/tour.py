"""The demo's serving loop: an engine put together by hand, and users who come one by one."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from pagedkv.cli.dashboard import Progress
from pagedkv.cli.users import User
from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Int32
from pagedkv.core.request import FinishedSequence, Request, SamplingParams
from pagedkv.device.assembly import assemble
from pagedkv.device.loaded import LoadedModel
from pagedkv.errors import InvalidRequest
from pagedkv.timeline import CACHED, FREE, Timeline, TimelineRecorder

__all__ = ["Tour", "encode"]

NOISE = "(noise: the words of a model with random weights)"


def _is_noise(text: str) -> bool:
    """Whether a text is mostly bytes that are no characters."""
    strange = sum(not letter.isprintable() or letter == "\ufffd" for letter in text)
    return strange > len(text) / 4


def encode(loaded: LoadedModel, messages: list[dict[str, Any]]) -> list[int]:
    """Return a conversation as token ids: in the model's chat template, or plainly without one.

    Raises:
        InvalidRequest: The model has no tokenizer.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InvalidRequest(
            "the model has no tokenizer",
            where=loaded.name,
            remedy="use smollm2-135m or tiny-random",
        )
    ids: list[int] = tokenizer(_text(tokenizer, messages))["input_ids"]
    return ids


def _text(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    if tokenizer.chat_template:
        # A template is a program of its own, and some refuse system messages.
        with suppress(Exception):
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return text
    return "\n\n".join(message["content"] for message in messages) + "\n\nAnswer:"


class Tour:
    """Serves users that arrive at given steps, and records who holds which block.

    Args:
        config: Pool and limits; the pool's size must be given.
        users: In order of arrival.
        prompts: Their prompts' token ids.

    Attributes:
        arrivals: User name to the step before which the question came in.
        ends: The sequences that have ended, in order.
        seconds: How long `run` took.
    """

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, users: list[User], prompts: list[list[int]]
    ) -> None:
        self._engine = assemble(loaded, config)
        self.scheduler = self._engine.scheduler
        self.config = self.scheduler.config
        self.users = users
        self.arrivals = {user.name: user.arrival for user in users}
        self.ends: list[FinishedSequence] = []
        self.seconds = 0.0
        self._prompts = prompts
        self._tokenizer = loaded.tokenizer
        self._recorder = TimelineRecorder(self.scheduler, time.monotonic)
        self._engine.observers.append(self._recorder)

    def run(self, show: Callable[[Progress], None]) -> None:
        """Serve everybody to the end.

        Args:
            show: Is told of the state after every step.

        Raises:
            NeverFits: A prompt alone is larger than the pool.
        """
        start = time.monotonic()
        come = 0
        step = 0
        while come < len(self.users) or self.scheduler.has_unfinished():
            while come < len(self.users) and self.users[come].arrival <= step:
                self._add(come)
                come += 1
            _, _, output = self._engine.step()
            self.ends += output.finished
            self.seconds = time.monotonic() - start
            show(self._progress())
            step += 1
        show(self._progress())

    def _add(self, index: int) -> None:
        user = self.users[index]
        # One answer is the likeliest one; several would all be the same.
        params = SamplingParams(
            temperature=0.0 if user.n == 1 else 0.8,
            max_tokens=user.max_tokens,
            n=user.n,
            seed=index,
        )
        request = Request(
            request_id=user.name, prompt_token_ids=self._prompts[index], sampling=params
        )
        self.scheduler.add(request)

    def _progress(self) -> Progress:
        unfinished = sum(user.n for user in self.users) - len(self.ends)
        return Progress(
            stats=self.scheduler.stats(),
            owner=self._owners(),
            num_done=self._num_done() if unfinished else len(self.users),
            num_users=len(self.users),
            elapsed=self.seconds,
            latest=self._latest(),
        )

    def _num_done(self) -> int:
        ended = [end.request_id for end in self.ends]
        return sum(ended.count(user.name) == user.n for user in self.users)

    def _owners(self) -> Int32:
        """Return the recorder's latest owners with sequences replaced by users: [N].

        Once everybody has left, nobody holds anything.
        """
        manager = self.scheduler.manager
        if not self.scheduler.has_unfinished():
            every = np.arange(manager.pool.num_blocks, dtype=np.int32)
            return np.where(manager.index.findable(every), CACHED, FREE).astype(np.int32)
        owner = self._recorder.latest
        place = {user.name: i for i, user in enumerate(self.users)}
        seen = self._recorder.request_of
        lookup = np.zeros(max(seen, default=0) + 1, np.int32)
        for seq_id, name in seen.items():
            lookup[seq_id] = place[name]
        return np.where(owner >= 0, lookup[np.maximum(owner, 0)], owner)

    def _latest(self) -> str:
        if not self.ends:
            return ""
        end = self.ends[-1]
        return f"{end.request_id} got: {' '.join(self._text(end).split())}"

    def _text(self, end: FinishedSequence) -> str:
        text: str = self._tokenizer.decode(end.token_ids, skip_special_tokens=True)
        return NOISE if _is_noise(text) else text

    def answers(self, user: User) -> list[str]:
        """Return the texts that a user got; an error's words where one was met.

        A text that ends because it reached its length has three dots behind it.
        """
        ends = sorted(
            (end for end in self.ends if end.request_id == user.name), key=lambda end: end.index
        )
        dots = [" ..." if end.finish_reason == "length" else "" for end in ends]
        texts = [self._text(end).strip() + more for end, more in zip(ends, dots, strict=True)]
        return [end.error or text for end, text in zip(ends, texts, strict=True)]

    def timeline(self) -> Timeline:
        """Return who held which block when, up to now."""
        return self._recorder.timeline()
