"""One step as data: what to run, and what came of it.

A plan is made by the scheduler, carried out by an executor and given back to the scheduler with
its result. It holds arrays and nothing that points into the scheduler, so it can be kept.
"""

from typing import Protocol

from msgspec import Struct

from pagedkv.core.arrays import Bool, Float32, Int32, Int64, UInt64
from pagedkv.core.request import FinishedSequence

__all__ = [
    "Adjustments",
    "Executor",
    "Observation",
    "Observed",
    "Penalties",
    "PromptLogprobs",
    "PromptTargets",
    "SamplingBatch",
    "StepOutput",
    "StepPlan",
    "StepResult",
]


class Adjustments(Struct, frozen=True, kw_only=True, eq=False):
    """What becomes of logits before any penalty, as flat pairs of a sample and a token.

    Attributes:
        kept_sample: [A] Index into the step's samples: those that may draw few tokens only.
        kept_token: [A] A token that this sample may draw.
        sample: [K] Index into the step's samples; a pair that stands twice counts twice.
        token: [K] A token that this sample weighs otherwise.
        bias: [K] Added to the token's logit; minus infinity forbids it.
    """

    kept_sample: Int32
    kept_token: Int32
    sample: Int32
    token: Int32
    bias: Float32


class Penalties(Struct, frozen=True, kw_only=True, eq=False):
    """The tokens that penalised samples have already seen, as flat pairs.

    Attributes:
        sample: [P] Index into the step's samples.
        token: [P] A token that this sample's sequence holds; repeats stand repeated.
        generated: [P] Whether it was generated rather than given in the prompt.
    """

    sample: Int32
    token: Int32
    generated: Bool


class SamplingBatch(Struct, frozen=True, kw_only=True, eq=False):
    """The sampling parameters of the S sequences that draw a token in a step, as columns.

    Attributes:
        seed: [S] uint64; with `position`, all the randomness a draw may use.
        position: [S] How many tokens the sequence generated before this one.
        num_logprobs: [S] Alternatives to report; -1 reports nothing.
        most_logprobs: The largest of these; -1 if nobody wants any log-probability.
        penalties: What repetition, presence and frequency penalties need; None if none is set.
        adjustments: What is allowed, biased or forbidden; None if nothing is.
    """

    temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32
    seed: UInt64
    position: Int32
    num_logprobs: Int32
    most_logprobs: int
    repetition_penalty: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    penalties: Penalties | None
    adjustments: Adjustments | None


class Observation(Struct, frozen=True, kw_only=True, eq=False):
    """What the M sequences of one policy are to be told about their blocks, or their tokens.

    Attributes:
        unit: ``block``: an entry is a block of the table; ``token``: it is a slot of those blocks.
        width: E, the entries per table to tell of.
        kind: A name of `pagedkv.eviction.OBSERVATIONS`.
        gqa: How it is reduced over query heads: ``sum``, ``mean`` or ``max``.
        members: [M] Indices into the plan's sequences.
        first_query: [M] The first of each one's tokens in this step that observes.
    """

    unit: str
    width: int
    kind: str
    gqa: str
    members: Int32
    first_query: Int32


class Observed(Struct, frozen=True, kw_only=True, eq=False):
    """What an `Observation` saw.

    Attributes:
        values: [G, M, E] What its kind names, per entry; 0 where nothing was seen.
        mass: [G, M, E] The attention mass of the step's last token, mean over heads and layers.
    """

    values: Float32
    mass: Float32


class PromptTargets(Struct, frozen=True, kw_only=True, eq=False):
    """The P prompt tokens of a step that want log-probabilities.

    Attributes:
        index: [P] Index into the packed tokens of the token before each.
        seq_ids: [P] Their sequences.
        place: [P] Where they stand in their prompts.
        token_ids: [P] The tokens.
        num_logprobs: [P] Alternatives to report.
    """

    index: Int32
    seq_ids: Int64
    place: Int32
    token_ids: Int32
    num_logprobs: Int32


class PromptLogprobs(Struct, frozen=True, kw_only=True, eq=False):
    """The answer to `PromptTargets`.

    Attributes:
        logprobs: [P] Each token's log-probability given those before it.
        top_ids: [P, K] The likeliest tokens at its place, K the most that any asked for.
        top_logprobs: [P, K] Their log-probabilities.
    """

    logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32


class StepPlan(Struct, frozen=True, kw_only=True, eq=False):
    """What one step does: B sequences compute T tokens, S of them draw a token.

    G is the number of groups (block tables per sequence); W is the widest block table in the step,
    or up to an eighth more (`arrays.plan_width`).

    Attributes:
        step: Counts the scheduler's plans from 0.
        moves: [M, 2] Slots to copy, source to target, before anything else is read or written;
            every source is read before any target is written.
        swap_out: [O, 2] Blocks to copy to host memory next: pool to host. Others may be given
            the same blocks in this very step.
        swap_in: [I, 2] Blocks to copy back after that: host to pool.
        copies: [C, 2] Blocks to copy, source to target, before tokens are written.
        rows: [B] The table row of each sequence, in batch order.
        seq_ids: [B] The sequence in that row.
        query_start: [B + 1] Where each sequence's tokens begin in the packed arrays.
        token_ids: [T] Tokens to run, packed sequence after sequence.
        positions: [T] Their positions in their sequences.
        slot_mapping: [G, T] The pool slot each token's key and value are written to.
        block_table: [G, B, W] Block ids; entries past a sequence's blocks are 0 and unused.
        num_resident: [G, B] Tokens resident once this step's are written.
        turns: [G, B, W] Positions by which queries are turned before they meet a block; None if
            no block needs it.
        observations: What the executor is to tell eviction policies, one per policy.
        sample_index: [S] Index into the packed tokens whose logits are drawn from.
        sample_rows: [S] The table row that takes the drawn token.
        sampling: Parameters of the S draws.
        prompt_targets: Prompt tokens that want log-probabilities; None if none does.
    """

    step: int
    moves: Int64
    swap_out: Int32
    swap_in: Int32
    copies: Int32
    rows: Int32
    seq_ids: Int64
    query_start: Int32
    token_ids: Int32
    positions: Int32
    slot_mapping: Int64
    block_table: Int32
    num_resident: Int32
    turns: Int32 | None
    observations: list[Observation]
    sample_index: Int32
    sample_rows: Int32
    sampling: SamplingBatch
    prompt_targets: PromptTargets | None = None

    @property
    def num_tokens(self) -> int:
        """T, the tokens this step computes."""
        return len(self.token_ids)


class StepResult(Struct, frozen=True, kw_only=True, eq=False):
    """What came of a plan.

    Attributes:
        token_ids: [S] The token drawn for each sample.
        observed: The plan's observations, answered in order.
        logprobs: [S] Its log-probability, where any sample asked.
        top_ids: [S, K] The likeliest tokens, K the most any sample asked for.
        top_logprobs: [S, K] Their log-probabilities.
        prompt_logprobs: The answer to the plan's prompt targets.
    """

    token_ids: Int32
    observed: list[Observed] = []
    logprobs: Float32 | None = None
    top_ids: Int32 | None = None
    top_logprobs: Float32 | None = None
    prompt_logprobs: PromptLogprobs | None = None


class StepOutput(Struct, frozen=True, kw_only=True, eq=False):
    """What a committed step gave to the users.

    Attributes:
        rows: [S] The table rows that took a token, in the plan's order.
        seq_ids: [S] Their sequences.
        token_ids: [S] The tokens.
        sample: [S] Index of each among the plan's samples.
        finished: The sequences that ended since the step before, in order.
    """

    rows: Int32
    seq_ids: Int64
    token_ids: Int32
    sample: Int64
    finished: list[FinishedSequence]


class Executor(Protocol):
    """Carries out plans; knows nothing of policy."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: moves, copies, then writes and attention, then draws. Blocks until done."""
        ...
