"""Workloads made up to order: arrivals, lengths, and who shares what.

Seeded: each user has random streams of its own, one for every thing that is drawn, so that runs
that differ in one thing (a rate, a law of lengths, the number of requests) are alike in all others.
"""

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


def _draws(seed: int, user: int, count: int) -> list[np.random.Generator]:
    """Return a user's random streams: what is drawn from one does not move the others."""
    return [np.random.default_rng(s) for s in np.random.SeedSequence([seed, user]).spawn(count)]


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
        arrivals, inputs, outputs, prefixes = _draws(seed, user, 4)
        now = 0.0
        for first in range(0, num_prompts, 1024):  # as much at a time as numpy likes
            count = min(1024, num_prompts - first)
            times = now + np.cumsum(gaps(arrivals, rate, burstiness, count))
            now = float(times[-1])
            asked, answered = input_len.draw(inputs, count), output_len.draw(outputs, count)
            which = prefixes.integers(num_prefixes, size=count)
            for i in range(count):
                key = _key(seed, user, first + i)
                prompt = text(_stream(PROMPT, key), int(asked[i]))
                if prefix_len:
                    shared = _key(seed, user, int(which[i]))
                    prompt = text(_stream(SYSTEM, shared), prefix_len) + prompt
                yield SimRequest(
                    arrival=float(times[i]),
                    prompt=prompt,
                    output_len=int(answered[i]),
                    output_stream=_stream(OUTPUT, key),
                    tenant=tenant,
                )

    return Workload("random", source)


def tenants(
    *, num_tenants: int = 8, skew: float = 1.0, rate: float = 1.0, num_prompts: int, **options: Any
) -> Workload:
    """Several tenants with a system prompt each; tenant ``k`` asks ``(k + 1) ** -skew`` as often.

    Each has random streams of its own: what one asks, and the pattern in which it asks, do not
    depend on how many others there are. ``rate`` is of all together, so that with more tenants
    each asks more slowly.
    """
    check("workload", num_tenants=num_tenants, skew=skew, rate=rate, num_prompts=num_prompts)
    shares = np.arange(1, num_tenants + 1, dtype=np.float64) ** -skew
    shares /= shares.sum()
    options.setdefault("prefix_len", 256)
    parts = [
        random_requests(
            num_prompts=num_prompts,
            rate=share,
            tenant=f"tenant-{user}",
            user=user,
            **options,
        )
        for user, share in enumerate(shares.tolist())
    ]

    def source() -> Iterator[SimRequest]:
        merged = heapq.merge(*parts, key=lambda request: request.arrival)
        for request in itertools.islice(merged, num_prompts):
            request.arrival /= rate  # merged before, so that all at once are still of all tenants
            yield request

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
        (starts,) = _draws(seed, 0, 1)
        now, made = 0.0, 0
        for user in itertools.count(1):
            if made >= num_prompts:
                return
            now += float(gaps(starts, rate, burstiness, 1)[0])
            turning, asking, answering, thinking = _draws(seed, user, 4)
            count = min(int(turning.geometric(1 / turns)), num_prompts - made)
            made += count
            yield _conversation(
                text(_stream(SYSTEM, seed), prefix_len) if prefix_len else None,
                input_len.draw(asking, count),
                output_len.draw(answering, count),
                thinking.exponential(think, count),
                (seed, user),
                now,
            )

    return Workload("sessions", source, closed_loop=True)


def _conversation(
    system: Content | None,
    inputs: Int64,
    outputs: Int64,
    pauses: Float64,
    who: tuple[int, int],
    start: float,
) -> SimRequest:
    """Return one conversation's first turn: the others follow it. All arrays are [turns]."""
    history = system
    made: list[SimRequest] = []
    for turn in range(len(inputs)):
        key = _key(*who, turn)
        asked = text(_stream(PROMPT, key), int(inputs[turn]))
        prompt = asked if history is None else history + asked
        answer = _stream(OUTPUT, key)
        request = SimRequest(
            arrival=start,
            prompt=prompt,
            output_len=int(outputs[turn]),
            output_stream=answer,
            session=f"session-{who[1]}",
            think=float(pauses[turn]),
        )
        if made:
            made[-1].then = request
        made.append(request)
        history = prompt + text(answer, int(outputs[turn]))
    return made[0]


def tool_agent(
    *, num_prompts: int, rate: float = 6.67, burstiness: float = 1.0, seed: int = 0
) -> Workload:
    """Requests like Mooncake's tool-agent trace: a few hot system prompts, short answers.

    Fitted to published statistics of a trace that is not shipped, of 23,608 requests: prompts of
    8,596 tokens and answers of 182 on average (median 30), three hot prefixes of 5, 12 and 5
    blocks of 512 tokens with 46, 15 and 39 % of requests, and hit ratios by blocks of an unbounded
    cache (0.553) and of LRU. Some requests are an agent's next call: they go on from an earlier
    one, 1,100 requests before on average. ``benchmarks/simulation.py agent`` shows both sides.

    Args:
        rate: Requests per second; the trace's own if omitted.
    """
    check("workload", num_prompts=num_prompts, rate=rate, burstiness=burstiness, seed=seed)
    hot = np.array([5, 12, 5]) * 512
    shares = np.array([0.463, 0.147, 0.390])

    def source() -> Iterator[SimRequest]:
        arrivals, agents, inputs, outputs = _draws(seed, 0, 4)
        now = 0.0
        past: list[tuple[int, Content]] = []
        for number in range(num_prompts):
            now += float(gaps(arrivals, rate, burstiness, 1)[0])
            back = int(agents.gamma(2, 550))
            if agents.random() < 0.378 and back < len(past):
                kind, base = past.pop(len(past) - 1 - back)
            else:
                kind = int(agents.choice(3, p=shares))
                base = text(_stream(SYSTEM, kind), int(hot[kind]))
            fresh = 1 + int(inputs.lognormal(7.775, 0.9))
            prompt = base + text(_stream(PROMPT, _key(seed, kind, number)), fresh)
            past.append((kind, prompt))
            del past[:-8192]
            yield SimRequest(
                arrival=now,
                prompt=prompt,
                output_len=max(1, int(outputs.lognormal(np.log(30), 1.9))),
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
