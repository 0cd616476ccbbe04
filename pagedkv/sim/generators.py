"""Workloads made up to order: arrivals, lengths, and who shares what; seeded, a stream per user."""

import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pagedkv.core.arrays import Float64, Int64
from pagedkv.errors import ConfigError
from pagedkv.sim.content import Content, stream_id, text
from pagedkv.sim.ranges import check
from pagedkv.sim.workload import SimRequest, Workload

__all__ = ["GENERATORS", "Lengths", "gaps", "random_requests", "sessions", "tenants", "tool_agent"]

SYSTEM, PROMPT, OUTPUT, SESSION = 11, 12, 13, 14
_LAWS = ("fixed", "uniform", "lognormal", "zipf")


class Lengths:
    """A law of lengths around a mean.

    Args:
        mean: The mean, in tokens.
        law: ``fixed``; ``uniform`` within ``spread`` of it, up and down; ``lognormal`` with
            ``spread`` as the coefficient of variation; ``zipf`` with exponent ``1 + spread``.
        spread: How wide.
        most: Longer ones are cut to this.
    """

    def __init__(
        self, mean: float, law: str = "fixed", spread: float = 0.0, most: int = 131_072
    ) -> None:
        check("lengths", mean=mean, spread=spread, most=most)
        if law not in _LAWS:
            raise ConfigError(
                f"there is no law {law!r}", where="lengths.law", remedy=f"give {', '.join(_LAWS)}"
            )
        if mean > most:
            raise ConfigError(
                f"mean is {mean}", where="lengths.mean", remedy=f"give at most {most}"
            )
        if (law == "zipf" and spread == 0) or (law == "uniform" and spread > 1):
            raise ConfigError(
                f"spread {spread} makes no {law} law",
                where="lengths.spread",
                remedy="give zipf more than 0, uniform at most 1",
            )
        self._mean, self._law, self._spread, self._most = mean, law, spread, most

    def draw(self, rng: np.random.Generator, count: int) -> Int64:
        """Return lengths of at least 1: [count]."""
        mean, spread = self._mean, self._spread
        if self._law == "uniform":
            drawn = rng.uniform(mean * (1 - spread), mean * (1 + spread), count)
        elif self._law == "lognormal":
            sigma = np.sqrt(np.log1p(spread**2))
            drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        elif self._law == "zipf":
            ranks = np.arange(1, 1025, dtype=np.float64)
            weights = ranks ** -(1 + spread)
            weights /= weights.sum()
            drawn = rng.choice(ranks, count, p=weights) * (mean / (ranks @ weights))
        else:
            drawn = np.full(count, float(mean))
        return np.clip(np.rint(drawn), 1, self._most).astype(np.int64)


def gaps(rng: np.random.Generator, rate: float, burstiness: float, count: int) -> Float64:
    """Return seconds between arrivals: Gamma of shape ``burstiness``, as vLLM draws them.

    1 is a Poisson process, less is burstier, inf is a steady beat; rate inf is all at once.
    """
    if np.isinf(rate):
        return np.zeros(count)
    if np.isinf(burstiness):
        return np.full(count, 1 / rate)
    return rng.gamma(burstiness, 1 / (rate * burstiness), count)


def _key(seed: int, user: int, number: int) -> int:
    return (seed * 1_000_003 + user) * 10_000_019 + number


def _stream(namespace: int, key: int) -> int:
    return stream_id(namespace, key)


def random_requests(
    *,
    num_prompts: int,
    rate: float = 1.0,
    burstiness: float = 1.0,
    input_len: Lengths,
    output_len: Lengths,
    prefix_len: int = 0,
    num_prefixes: int = 1,
    tenant: str = "",
    user: int = 0,
    seed: int = 0,
) -> Workload:
    """Independent requests; with ``prefix_len``, each begins with one of some shared prefixes."""
    check(
        "workload",
        num_prompts=num_prompts,
        rate=rate,
        burstiness=burstiness,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        seed=seed,
    )

    def source() -> Iterator[SimRequest]:
        rng = np.random.default_rng([seed, user])
        now = 0.0
        for first in range(0, num_prompts, 1024):  # as much at a time as numpy likes
            count = min(1024, num_prompts - first)
            times = now + np.cumsum(gaps(rng, rate, burstiness, count))
            now = float(times[-1])
            inputs, outputs = input_len.draw(rng, count), output_len.draw(rng, count)
            which = rng.integers(num_prefixes, size=count)
            for i in range(count):
                key = _key(seed, user, first + i)
                prompt = text(_stream(PROMPT, key), int(inputs[i]))
                if prefix_len:
                    shared = _key(seed, user, int(which[i]))
                    prompt = text(_stream(SYSTEM, shared), prefix_len) + prompt
                yield SimRequest(
                    arrival=float(times[i]),
                    prompt=prompt,
                    output_len=int(outputs[i]),
                    output_stream=_stream(OUTPUT, key),
                    tenant=tenant,
                )

    return Workload("random", source)


def tenants(
    *, num_tenants: int = 8, skew: float = 1.0, rate: float = 1.0, num_prompts: int, **options: Any
) -> Workload:
    """Several tenants with a system prompt each; tenant ``k`` asks ``(k + 1) ** -skew`` as often.

    Each has random streams of its own: what one asks does not depend on how many others there are.
    """
    check("workload", num_tenants=num_tenants, skew=skew, rate=rate, num_prompts=num_prompts)
    shares = np.arange(1, num_tenants + 1, dtype=np.float64) ** -skew
    shares /= shares.sum()
    options.setdefault("prefix_len", 256)
    parts = [
        random_requests(
            num_prompts=num_prompts,
            rate=rate * share,
            tenant=f"tenant-{user}",
            user=user,
            **options,
        )
        for user, share in enumerate(shares.tolist())
    ]

    def source() -> Iterator[SimRequest]:
        merged = heapq.merge(*parts, key=lambda request: request.arrival)
        return itertools.islice(merged, num_prompts)

    return Workload("tenants", source)


def sessions(
    *,
    num_prompts: int,
    rate: float = 1.0,
    burstiness: float = 1.0,
    turns: float = 4.18,
    think: float = 60.0,
    input_len: Lengths,
    output_len: Lengths,
    prefix_len: int = 256,
    seed: int = 0,
) -> Workload:
    """Conversations behind one system prompt: each turn resends all before it, then asks on.

    The user thinks an exponential time after every answer (closed loop), and a conversation has a
    geometric number of turns.

    Args:
        num_prompts: Requests in all; ``rate`` is of conversations.
        turns: Mean turns of a conversation.
        think: Mean seconds of thinking.
    """
    check(
        "workload",
        num_prompts=num_prompts,
        rate=rate,
        burstiness=burstiness,
        turns=turns,
        think=think,
        prefix_len=prefix_len,
        seed=seed,
    )

    def source() -> Iterator[SimRequest]:
        starts = np.random.default_rng([seed, 0])
        now, made = 0.0, 0
        for user in itertools.count(1):
            if made >= num_prompts:
                return
            now += float(gaps(starts, rate, burstiness, 1)[0])
            rng = np.random.default_rng([seed, user])
            count = min(int(rng.geometric(1 / turns)), num_prompts - made)
            made += count
            yield _conversation(rng, user, count, now)

    def _conversation(rng: np.random.Generator, user: int, count: int, start: float) -> SimRequest:
        inputs, outputs = input_len.draw(rng, count), output_len.draw(rng, count)
        pauses = rng.exponential(think, count)
        history: Content | None = text(_stream(SYSTEM, seed), prefix_len) if prefix_len else None
        turns_made: list[SimRequest] = []
        for turn in range(count):
            key = _key(seed, user, turn)
            asked = text(_stream(PROMPT, key), int(inputs[turn]))
            prompt = asked if history is None else history + asked
            answer = _stream(OUTPUT, key)
            request = SimRequest(
                arrival=start,
                prompt=prompt,
                output_len=int(outputs[turn]),
                output_stream=answer,
                session=f"session-{user}",
                think=float(pauses[turn]),
            )
            if turns_made:
                turns_made[-1].then = request
            turns_made.append(request)
            history = prompt + text(answer, int(outputs[turn]))
        return turns_made[0]

    return Workload("sessions", source, closed_loop=True)


def tool_agent(
    *, num_prompts: int, rate: float = 6.67, burstiness: float = 1.0, seed: int = 0
) -> Workload:
    """Requests like Mooncake's tool-agent trace: a few hot system prompts, short answers.

    Fitted to published statistics of a trace that is not shipped: prompts of 8,596 tokens and
    answers of 182 on average (median 30), 6.67 requests per second, three hot prefixes of 5, 12
    and 5 blocks of 512 tokens with 46, 15 and 39 % of requests, and an ideal hit ratio of 0.553 by
    blocks. Some requests are an agent's next call: they go on from an earlier one, 700 requests
    before on average.
    """
    check("workload", num_prompts=num_prompts, rate=rate, burstiness=burstiness, seed=seed)
    hot = np.array([5, 12, 5]) * 512
    shares = np.array([0.463, 0.147, 0.390])

    def source() -> Iterator[SimRequest]:
        rng = np.random.default_rng([seed, 0])
        now = 0.0
        past: list[tuple[int, Content]] = []
        for number in range(num_prompts):
            now += float(gaps(rng, rate, burstiness, 1)[0])
            back = int(rng.exponential(700))
            if rng.random() < 0.33 and back < len(past):
                kind, base = past.pop(len(past) - 1 - back)
            else:
                kind = int(rng.choice(3, p=shares))
                base = text(_stream(SYSTEM, kind), int(hot[kind]))
            fresh = 1 + int(rng.lognormal(7.86, 0.9))
            prompt = base + text(_stream(PROMPT, _key(seed, kind, number)), fresh)
            past.append((kind, prompt))
            del past[:-8192]
            yield SimRequest(
                arrival=now,
                prompt=prompt,
                output_len=max(1, int(rng.lognormal(np.log(30), 1.9))),
                output_stream=_stream(OUTPUT, _key(seed, kind, number)),
                tenant=f"tool-{kind}",
            )

    return Workload("tool-agent", source)


GENERATORS = {
    "random": random_requests,
    "tenants": tenants,
    "sessions": sessions,
    "tool-agent": tool_agent,
}
"""Per name, what makes the workload."""
