"""How much a sequence can come to hold, may adopt, and needs to come back."""

from collections.abc import Sequence as Many

from pagedkv.config import ModelConfig
from pagedkv.core.request import UNBOUNDED, Request, Sequence
from pagedkv.eviction import Policy, lookback

__all__ = ["foreseeable", "least_again", "most_again", "most_blocks", "usable_prefix"]


def most_blocks(policy: Policy, block_size: int, windows: Many[int]) -> int:
    """Return the most blocks per table that the policy lets a sequence hold at once."""
    if policy.most_tokens is None:
        return UNBOUNDED
    most = max(policy.most_tokens, *windows)
    chunk = policy.cadence(block_size).chunk // block_size
    if _is_plain(policy) and not any(windows):
        # A round leaves the cap or what is protected; the next comes a chunk, or a block, later.
        recent = policy.recent or int((most - policy.sinks) * policy.recent_share)
        protected = -(-policy.sinks // block_size) - (-recent // block_size)
        return max(-(-most // block_size), protected) + chunk
    # The cap, the chunk in flight, and a block each that sinks, window and tail round up to.
    return -(-most // block_size) + chunk + 3


def _is_plain(policy: Policy) -> bool:
    """Whether every round of a policy cuts every table down to the same number of blocks."""
    gradual = policy.lowest is not None or policy.adaptive is not None
    return policy.unit == "block" and policy.spread == "uniform" and not gradual


def most_again(seq: Sequence, num_groups: int, block_size: int) -> int:
    """Return the most blocks, over all tables, that a preempted sequence needs again to go on.

    Up to the end of its prompt that is what it may have held there at first. After that, what it
    held when it was preempted and one more per table: what it forgot it will have forgotten again,
    and what slid out of its windows will have slid, for it takes no larger steps
    (`Retention.limit`). `UNBOUNDED` and more if that is not known.
    """
    prompt = _prompt_blocks(seq, num_groups, block_size)
    return max(seq.held + num_groups * len(seq.group), prompt)


def least_again(seq: Sequence, num_groups: int, block_size: int) -> int:
    """Return with how many blocks, over all tables, a preempted sequence can go on if it is alone.

    It had got as far with no more: whatever it holds on its way, it held then.
    """
    return max(seq.next_held, _prompt_blocks(seq, num_groups, block_size))


def _prompt_blocks(seq: Sequence, num_groups: int, block_size: int) -> int:
    """Return the most blocks, over all tables, that a sequence holds for its prompt."""
    return num_groups * min(-(-seq.num_prompt // block_size), seq.max_blocks)


def usable_prefix(policy: Policy, block_size: int) -> int:
    """Return how many tokens a sequence may take from the prefix cache.

    A cached prefix was made without eviction and is scored by nobody, so only as much of it
    is safe as leaves the first round of eviction and all that it looks back on to be computed.
    """
    if not policy.evicts:
        return UNBOUNDED
    looks_back = lookback(policy, block_size)
    least = policy.most_tokens if policy.adaptive is None else policy.adaptive[0]
    # A threshold evicts before the cap is reached, a pyramid's last layer as well.
    early = policy.threshold is not None or policy.spread == "pyramid"
    if looks_back is None or least is None or early or policy.scorer().static:
        return 0
    return max(0, least - looks_back)


def foreseeable(request: Request, policy: Policy, model: ModelConfig) -> bool:
    """Return whether a request surely ends by its length, whatever is drawn, and forgets nothing.

    So does one of a single sequence that no token and no text can stop, and of which nothing but
    tokens is reported.
    """
    sampling = request.sampling
    stops = sampling.stop_token_ids or sampling.stop
    return (
        (sampling.ignore_eos or not model.eos_token_ids)
        and not (stops or policy.evicts or sampling.width > 1)
        and sampling.beam_width is None
        and sampling.logprobs is None
        and sampling.prompt_logprobs is None
    )
