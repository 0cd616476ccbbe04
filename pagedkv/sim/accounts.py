"""What tenants asked for and got, and what they cost each other: one account each."""

from typing import Any

import numpy as np

from pagedkv.core.arrays import Float64, Int64, with_room
from pagedkv.core.request import FinishedSequence
from pagedkv.sim.sketch import Distribution
from pagedkv.sim.workload import SimRequest

__all__ = ["Account", "Accounts", "jain_index"]


def jain_index(shares: Float64) -> float:
    """Return how equal shares are: 1 if all are, 1/n if one has everything (Jain et al. 1984)."""
    squares = float((shares * shares).sum())
    return float(shares.sum()) ** 2 / (len(shares) * squares) if squares else 1.0


class Account:
    """What one tenant asked for and got."""

    def __init__(self) -> None:
        self.asked = 0
        self.requests = 0
        self.good = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.ttft = Distribution()
        self.e2el = Distribution()
        self.speed = 0.0
        self.block_seconds = 0.0
        self.most_blocks = 0


class Accounts:
    """The tenants' accounts, by name and in order of appearance.

    Attributes:
        number: Each tenant's place in that order.
    """

    def __init__(self) -> None:
        self.of: dict[str, Account] = {}
        self.number: dict[str, int] = {}
        self._evictions: Int64 = np.zeros((0, 0), np.int64)

    def __len__(self) -> int:
        return len(self.of)

    @property
    def evictions(self) -> Int64:
        """[by, from] Blocks of one tenant that another's sequences took."""
        return self._evictions[: len(self.of), : len(self.of)]

    def ask(self, tenant: str, times: int = 1) -> None:
        """Count what a tenant wants served; one that has no account gets one."""
        if tenant not in self.of:
            self.number[tenant] = len(self.number)
            self.of[tenant] = Account()
            self._evictions = with_room(self._evictions, len(self.of))
        self.of[tenant].asked += times

    def finish(
        self, request: SimRequest, ended: FinishedSequence, ttft: float, e2el: float, *, good: bool
    ) -> None:
        """Book a request that was served to its end."""
        account = self.of[request.tenant]
        account.requests += 1
        account.good += good
        account.input_tokens += len(request.prompt)
        account.output_tokens += len(ended.token_ids)
        account.cached_tokens += ended.num_cached_tokens
        account.preemptions += ended.num_preemptions
        account.ttft.add(ttft)
        account.e2el.add(e2el)
        account.speed += len(ended.token_ids) / max(e2el, 1e-9)

    def merge(self, other: "Accounts") -> None:
        """Add the accounts of another engine."""
        for name in other.of:
            self.ask(name, times=0)
        at = np.array([self.number[name] for name in other.of], np.int64)
        self._evictions[np.ix_(at, at)] += other.evictions
        for name, theirs in other.of.items():
            mine = self.of[name]
            for field, value in vars(theirs).items():
                if isinstance(value, Distribution):
                    getattr(mine, field).merge(value)
                else:
                    setattr(mine, field, getattr(mine, field) + value)

    def table(self, duration: float) -> dict[str, dict[str, Any]]:
        """Return every tenant's account, in order of appearance.

        Args:
            duration: Seconds that means over time are taken of.
        """
        caused = self.evictions.sum(axis=1) - np.diagonal(self.evictions)
        suffered = self.evictions.sum(axis=0) - np.diagonal(self.evictions)
        return {
            name: {
                "requests": account.requests,
                "failed_requests": account.asked - account.requests,
                "good_requests": account.good,
                "input_tokens": account.input_tokens,
                "output_tokens": account.output_tokens,
                "prefix_cache_hit_rate": account.cached_tokens / max(1, account.input_tokens),
                "mean_ttft_ms": ttft["mean_ttft_ms"],
                "p99_ttft_ms": ttft["p99_ttft_ms"],
                "mean_e2el_ms": account.e2el.summary("e2el_ms", (), 1000.0)["mean_e2el_ms"],
                "preemptions": account.preemptions,
                "mean_blocks_held": account.block_seconds / max(duration, 1e-9),
                "most_blocks_held": account.most_blocks,
                "evictions_caused_to_others": int(caused[self.number[name]]),
                "evictions_suffered_from_others": int(suffered[self.number[name]]),
                "mean_tokens_per_second": account.speed / max(1, account.requests),
            }
            for name, account in self.of.items()
            for ttft in [account.ttft.summary("ttft_ms", (99.0,), 1000.0)]
        }

    def fairness(self) -> dict[str, float]:
        """Return Jain's index over all that asked, of tokens served and of the speed they saw.

        Whoever got nothing has a share of nothing.
        """
        every = self.of.values()
        tokens = np.array([a.input_tokens + a.output_tokens for a in every], np.float64)
        speed = np.array([a.speed / max(1, a.requests) for a in every], np.float64)
        return {"jain_index_tokens": jain_index(tokens), "jain_index_speed": jain_index(speed)}
