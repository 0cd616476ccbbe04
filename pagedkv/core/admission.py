"""Who may enter: what can never fit is refused, what does not fit now waits."""

from pagedkv.config import EngineConfig
from pagedkv.core.arrays import Int32
from pagedkv.core.manager import BlockManager
from pagedkv.core.request import UNBOUNDED, Request, Sequence
from pagedkv.errors import InvalidRequest, NeverFits
from pagedkv.eviction import Policy

__all__ = ["Admission"]


class Admission:
    """The rules of admission over one pool; reads the state and changes nothing."""

    def __init__(self, config: EngineConfig, manager: BlockManager) -> None:
        self._config = config
        self._manager = manager

    def max_len(self, request: Request, policy: Policy) -> int:
        """Return the most tokens a request's sequences may know.

        A stream whose cache is bounded and whose positions close up may go on past the model's
        length, if it says how far.
        """
        endless = policy.most_tokens is not None and policy.positions == "cache"
        limited = request.sampling.max_tokens is not None
        return UNBOUNDED if endless and limited else self._config.model.max_model_len

    def check(self, request: Request, num_prompt: int, max_blocks: int) -> None:
        """Refuse a request that an empty pool could not serve.

        Args:
            max_blocks: The most blocks per table that its policy lets it hold.

        Raises:
            InvalidRequest: ``n`` is more than ever run at once.
            NeverFits: The pool is too small for the prompt and one token.
        """
        where = f"request {request.request_id!r}"
        rows = self._config.scheduler.max_num_seqs
        if request.sampling.n > rows:
            raise InvalidRequest(
                f"n is {request.sampling.n} and {rows} sequences run at once",
                where=where,
                remedy="lower n or raise scheduler.max_num_seqs",
            )
        need = self._blocks(num_prompt + 1, max_blocks)
        if need > self._manager.pool.num_blocks:
            raise NeverFits(
                f"the prompt needs {need} blocks of {self._manager.block_size} tokens and the "
                f"pool has {self._manager.pool.num_blocks}",
                where=where,
                remedy="shorten the prompt or raise cache.num_blocks",
            )

    def has_outgrown(self, seq: Sequence) -> bool:
        """Return whether a waiting sequence has come to need more than the whole pool."""
        need = self._blocks(len(seq.token_ids), seq.max_blocks)
        return need > self._manager.pool.num_blocks

    def can_admit(self, seq: Sequence, hits: Int32) -> bool:
        """Return whether all known tokens fit beside what running sequences still need."""
        pool, table = self._manager.pool, self._manager.table
        idle = not len(table.running)
        watermark = 0 if idle else int(self._config.scheduler.watermark * pool.num_blocks)
        need = self._manager.missing_blocks(seq, hits) + self._manager.pledged_blocks()
        fits = need + watermark <= pool.num_available
        return fits and len(seq.group) <= len(table.free_rows)

    def _blocks(self, num_tokens: int, max_blocks: int) -> int:
        per_table = min(-(-num_tokens // self._manager.block_size), max_blocks)
        return per_table * self._manager.num_groups
