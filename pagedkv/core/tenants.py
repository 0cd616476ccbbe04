"""On whose account sequences run: who may send, how much they may hold, what they were served."""

from collections.abc import Collection

import numpy as np

from pagedkv.core.arrays import Int32, Int64, with_room
from pagedkv.errors import ConfigError, InvalidRequest

__all__ = ["NO_QUOTA", "Tenants"]

NO_QUOTA = 2**40
MOST_DIGITS = 18  # of a quota; a longer one is beyond every pool, and may not even be read


class Tenants:
    """Tenants by number, in the order they were named or first seen.

    Args:
        entries: ``name`` or ``name=blocks`` each; empty lets everybody in, without quotas.
        num_blocks: Blocks in the pool.

    Attributes:
        quota: [at least tenants] The most blocks that a tenant's running sequences may hold.
        limited: Whether any tenant has a quota.

    Raises:
        ConfigError: An entry cannot be read, names a tenant twice or a quota over the pool.
    """

    def __init__(self, entries: tuple[str, ...], num_blocks: int) -> None:
        self.closed = bool(entries)
        self._num_blocks = num_blocks
        self._ids: dict[str, int] = {}
        quotas: list[int] = []
        for entry in entries:
            name, _, quota = entry.partition("=")
            is_count = quota.isascii() and quota.isdigit() and len(quota) <= MOST_DIGITS
            if name in self._ids or ("=" in entry and not is_count):
                raise _fault(entry, "give each tenant once, as name or name=blocks")
            blocks = int(quota) if quota else NO_QUOTA
            if quota and not 1 <= blocks <= num_blocks:
                raise _fault(entry, f"give a quota from 1 to the pool's {num_blocks} blocks")
            self._ids[name] = len(quotas)
            quotas.append(blocks)
        self.quota: Int64 = np.array(quotas, np.int64)
        self._served: Int64 = np.zeros(len(quotas), np.int64)
        self.limited = min(quotas, default=NO_QUOTA) < NO_QUOTA

    @property
    def served(self) -> Int64:
        """[tenants] Tokens computed, first time only, plus tokens generated."""
        return self._served[: len(self._ids)]

    def check(self, name: str, request_id: str) -> None:
        """Refuse a tenant that is not listed, if there is a list.

        Raises:
            InvalidRequest: It is not.
        """
        if self.closed and name not in self._ids:
            raise InvalidRequest(
                f"tenant {name!r} is not one of this scheduler's",
                where=f"request {request_id!r}",
                remedy=f"give one of {', '.join(map(repr, self._ids))}, or list it in "
                "scheduler.tenants",
            )

    def quota_of(self, name: str) -> int:
        """Return the most blocks a tenant's running sequences may hold."""
        return int(self.quota[self._ids[name]]) if name in self._ids else NO_QUOTA

    def most_blocks(self, name: str) -> int:
        """Return the most blocks that a tenant's sequences could have: its quota's, or all."""
        return min(self.quota_of(name), self._num_blocks)

    def bound(self, name: str) -> tuple[str, str]:
        """Return in words what bounds that, and what to do about it."""
        if self.quota_of(name) < self._num_blocks:
            return f"tenant {name!r} may hold {self.quota_of(name)}", "raise its quota"
        return f"the pool has {self._num_blocks}", "raise cache.num_blocks"

    def welcome(self, name: str, at_work: Collection[int]) -> int:
        """Return a tenant's number when it sends a request.

        One that had nothing in work is lifted to what those that have were served on average:
        what was not asked for while idle is not saved up. Lifted to the least of them, as the
        virtual token counter has it, tenants that come and go could all start below one that
        stays, and starve it.

        Args:
            at_work: Numbers of the tenants with requests in work.
        """
        if name not in self._ids:
            number = self._ids[name] = len(self._ids)
            self.quota = with_room(self.quota, number + 1)
            self._served = with_room(self._served, number + 1)
            self.quota[number] = NO_QUOTA
        number = self._ids[name]
        if at_work and number not in at_work:
            mean = -(-int(self.served[list(at_work)].sum()) // len(at_work))
            self.served[number] = max(int(self.served[number]), mean)
        return number

    def charge(self, tenants: Int32, tokens: Int32 | int) -> None:
        """Count tokens served: [N] tenants, [N] tokens, or so many each. O(N)."""
        if len(self._ids) == 1:
            self._served[0] += tokens * len(tenants) if isinstance(tokens, int) else tokens.sum()
            return
        # Counted in the sums' own type: numpy adds any other far more slowly.
        np.add.at(self._served, tenants, np.asarray(tokens, np.int64))


def _fault(entry: str, remedy: str) -> ConfigError:
    return ConfigError(f"{entry!r}", where="scheduler.tenants", remedy=remedy)
