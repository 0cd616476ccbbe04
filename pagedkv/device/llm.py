"""Text in, text out: many prompts through one pool of blocks."""

import os
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import suppress
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm

from pagedkv.config import EngineConfig, ModelConfig, as_config, with_fields
from pagedkv.core.arrays import Int32
from pagedkv.core.plan import StepOutput, StepPlan, StepResult
from pagedkv.core.request import Request, SamplingParams
from pagedkv.device.assembly import assemble
from pagedkv.device.collector import OutputCollector
from pagedkv.device.executor import TorchExecutor
from pagedkv.device.inputs import (
    Message,
    Prompt,
    as_conversations,
    as_prompts,
    as_turns,
    check_scorable,
    check_stops,
    encode,
    per_prompt,
    unpacked,
)
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model
from pagedkv.device.outputs import RequestOutput, ScoreOutput
from pagedkv.errors import ConfigError, InvalidRequest, InvalidTransition
from pagedkv.eviction import Policy, format_policy

__all__ = ["LLM", "Prompt"]

_TEACHER_FORCED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)


class LLM:
    """A model served from a pool of KV blocks.

    For one thread at a time; and not for a child that was forked after it ran, where torch's own
    threads are gone and whoever waits for them waits for ever.

    Args:
        model: A known name, ``tiny-random``, a local directory, a GGUF file or a hub id; or what
            `load_model` gave, which several of these may share.
        dtype: Element type of model and cache: ``float32``, ``float16`` or ``bfloat16``; ``auto``
            is float32 on the CPU, and on CUDA what `load_model` says. A model that is loaded
            already keeps its own.
        device: Where it runs, ``cpu`` or ``cuda``; a model that is loaded already stays there.
        pack_weights: Have a model that is not loaded yet loaded with weights packed, ``lm_head`` or
            ``all``; see `load_model`.
        config: Pool and scheduler; its ``max_model_len`` is capped at the model's trained length.
        fields: Single fields of the config by name, such as ``num_blocks=512``; they win over
            ``config``. ``max_model_len`` given here may exceed the trained length of a model
            with rotary positions.

    Raises:
        ModelNotFound, CorruptModel, UnsupportedBackend: The model cannot be loaded or served.
        ConfigError: A value is out of range, or the pool is larger than the machine.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel = "smollm2-135m",
        *,
        dtype: str = "auto",
        device: str = "cpu",
        pack_weights: str = "none",
        config: EngineConfig | None = None,
        **fields: Any,
    ) -> None:
        asked = _asked(config, fields)
        if not isinstance(model, LoadedModel):
            model = load_model(model, dtype=dtype, device=device, pack_weights=pack_weights)
        elif pack_weights != "none":
            raise ConfigError(
                "the model is loaded already",
                where="pack_weights",
                remedy="ask load_model for it, or give the model's name",
            )
        self.model = model
        geometry = model.geometry
        length = fields.get("max_model_len") or min(
            asked.model.max_model_len, geometry.max_model_len
        )
        self.engine = assemble(model, asked, max_model_len=length)
        self.scheduler, executor = self.engine.scheduler, self.engine.executor
        assert isinstance(executor, TorchExecutor)
        self.store = executor.store
        self.config = self.scheduler.config
        self.engine.observers.append(self._collect)  # before any other
        self._collector = OutputCollector(self.model.tokenizer, geometry.eos_token_ids)
        self._num_requests = 0
        self._done: dict[str, RequestOutput] = {}  # finished, and not yet handed to who asked

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        priority: int | Many[int] | None = None,
        tenant: str | Many[str] | None = None,
        eviction: str | Policy | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Serve all prompts to their ends, batched continuously; outputs in the prompts' order.

        Args:
            prompts: One prompt or many.
            sampling_params: One for all, or one each; the defaults if omitted.
            priority: Lower is sooner, where the scheduler or the cache goes by priority; one for
                all, or one each; 0 if omitted.
            tenant: On whose account they run, where the scheduler shares fairly or holds quotas;
                one for all, or one each.
            eviction: What these requests may forget; the config's if omitted.
            use_tqdm: Show a progress bar on stderr.

        Raises:
            InvalidRequest, NeverFits: A prompt cannot be served; then none of them runs.
            PolicyError: The eviction policy cannot be read or cannot hold here.
        """
        order = self._add_all(
            as_prompts(prompts), sampling_params, priority, tenant, eviction, streams=False
        )
        done: dict[str, RequestOutput] = {}
        with tqdm(total=len(order), disable=not use_tqdm, unit="request") as bar:
            for _, finished in self._run(order):
                done.update((output.request_id, output) for output in finished)
                bar.update(len(finished))
        return [done[request_id] for request_id in order]

    def stream(
        self,
        prompts: Prompt | Many[Prompt],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        priority: int | Many[int] | None = None,
        tenant: str | Many[str] | None = None,
        eviction: str | Policy | None = None,
        whole: bool = False,
    ) -> Iterator[RequestOutput]:
        """Serve all prompts and yield each request whenever it has new tokens; see `generate`.

        An output holds everything generated so far; the last one of a request is ``finished``, and
        the only one where ``best_of`` or a beam search chooses. Closing early aborts what is left.

        Args:
            whole: Yield each request but once, when it has ended.

        Raises:
            InvalidRequest, NeverFits: A prompt cannot be served; then none of them runs.
        """
        order = self._add_all(
            as_prompts(prompts), sampling_params, priority, tenant, eviction, streams=not whole
        )
        outputs = self._stream(order, streams=not whole)
        next(outputs)  # a generator that never began would not notice being closed
        return outputs  # type: ignore[return-value]

    def _stream(self, order: list[str], *, streams: bool) -> Iterator[RequestOutput | None]:
        """Yield None once, queued but not begun, then outputs."""
        begun = False
        try:
            yield None
            begun = True
            for partial, finished in self._run(order, streams=streams):
                yield from partial
                yield from finished
        finally:
            if not begun:
                self._abandon(set(order))

    def score(
        self,
        token_ids: Many[int] | Many[Many[int]] | Int32,
        *,
        priority: int | Many[int] | None = None,
        tenant: str | Many[str] | None = None,
        eviction: str | Policy | None = None,
    ) -> list[ScoreOutput]:
        """Return the log-probabilities of given tokens, each given those before it.

        The tokens run as a prompt does: in steps of the scheduler, through the same attention, with
        rounds of eviction between the policy's chunks. ``chunk`` at the block size is closest to
        what generation does, which holds a round at every block.

        Args:
            token_ids: One sequence of at least two tokens, or many; they are batched.
            priority, tenant: As in `generate`.
            eviction: What may be forgotten; the config's if omitted.

        Returns:
            One output per sequence, in order.

        Raises:
            InvalidRequest, NeverFits: A sequence cannot be served; then none of them runs.
            PolicyError: The eviction policy cannot be read or cannot hold here.
            PagedKVError: A sequence ended with an error while it ran.

        Cost:
            A prefill and, at every token, the vocabulary; a step's logits are in memory at once.
        """
        many = as_prompts(token_ids)
        check_scorable(many)
        outputs = self.generate(
            many, _TEACHER_FORCED, priority=priority, tenant=tenant, eviction=eviction
        )
        return [ScoreOutput.of(output) for output in outputs]

    def abort(self, request_id: str) -> None:
        """End a request that `stream` is serving.

        In its last output a sequence that had ended before keeps its reason, and the others say
        ``abort``; under ``best_of`` all do, for which are the likeliest was not known yet.

        Raises:
            InvalidTransition: No such request is in work.
        """
        ends = self.scheduler.abort(request_id)
        finished = self._collector.finish(ends)
        if any(end.cumulative_logprob is not None for end in ends):
            finished = [_unchosen(output) for output in finished]
        self._done.update((each.request_id, each) for each in finished)

    def chat(
        self,
        messages: Many[Message] | Many[Many[Message]],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None,
        *,
        priority: int | Many[int] | None = None,
        tenant: str | Many[str] | None = None,
        eviction: str | Policy | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Like `generate`, on conversations put into words by the model's chat template.

        Args:
            messages: One conversation or many; a message has ``role`` and ``content``, which is
                text or a list of parts such as ``{"type": "text", "text": "hi"}``.
        """
        prompts = [self.chat_prompt(each) for each in as_conversations(messages)]
        return self.generate(
            prompts,
            sampling_params,
            priority=priority,
            tenant=tenant,
            eviction=eviction,
            use_tqdm=use_tqdm,
        )

    def chat_prompt(self, messages: Many[Message]) -> str:
        """Return a conversation in the model's chat template, ready for the answer.

        Raises:
            InvalidRequest: The model has no chat template, or it does not take the messages; or
                they are no messages of text.
        """
        turns = as_turns(messages)
        tokenizer = self.model.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidRequest(
                "the model has no chat template", where="messages", remedy="use generate()"
            )
        try:
            text: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception as fault:  # a template is the model's own program and may raise anything
            raise InvalidRequest(f"the chat template failed: {fault}", where="messages") from fault
        return text

    def _add_all(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Many[SamplingParams] | None,
        priority: int | Many[int] | None,
        tenant: str | Many[str] | None,
        eviction: str | Policy | None,
        *,
        streams: bool,
    ) -> list[str]:
        """Queue all prompts or, if one is refused, none; return their request ids."""
        count = len(prompts)
        requests = [
            self._request(prompt, sampling=one, priority=rank, tenant=payer, eviction=eviction)
            for prompt, one, rank, payer in zip(
                prompts,
                per_prompt("sampling_params", params, count),
                per_prompt("priority", priority, count),
                per_prompt("tenant", tenant, count),
                strict=True,
            )
        ]
        added: list[str] = []
        try:
            for request, text in requests:
                seq_ids = self.scheduler.add(request)
                added.append(request.request_id)
                self._collector.track(request, text, seq_ids, streams=streams)
        except BaseException:
            self._abandon(added)
            raise
        return added

    def _request(
        self, prompt: Prompt, *, sampling: SamplingParams, **fields: Any
    ) -> tuple[Request, str | None]:
        """Return a prompt as a request, with further fields of it, and its text if it is text."""
        request_id = str(self._num_requests)
        self._num_requests += 1
        where, tokenizer = f"request {request_id!r}", self.model.tokenizer
        content, salt = unpacked(prompt, where)
        text = content if isinstance(content, str) else None
        token_ids = encode(tokenizer, content, where) if isinstance(content, str) else content
        check_stops(sampling, where, has_text=tokenizer is not None)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            cache_salt=salt,
            **fields,
        )
        return request, text

    def _run(
        self, order: list[str], *, streams: bool = False
    ) -> Iterator[tuple[list[RequestOutput], list[RequestOutput]]]:
        """Step until the requests are done: per step, those that grew and those that ended."""
        left = set(order)
        try:
            while left:
                _, _, output = self.engine.step()
                finished = [self._done.pop(key) for key in list(self._done) if key in left]
                left.difference_update(done.request_id for done in finished)
                self._check_in_work(left)
                partial = self._collector.snapshots(output) if streams else []
                yield [each for each in partial if each.request_id in left], finished
        finally:
            self._abandon(left)

    def _collect(self, plan: StepPlan, result: StepResult, output: StepOutput) -> None:
        """Take in a step before any other observer is told of it, so that it may abort or raise."""
        ends = list(output.finished)
        ended = {end.seq_id for end in ends}
        for seq_id, string in self._collector.observe(plan, result, output):
            if seq_id not in ended:
                ends += self.scheduler.stop(seq_id, string)
        self._done.update((each.request_id, each) for each in self._collector.finish(ends))

    def _check_in_work(self, request_ids: set[str]) -> None:
        """Refuse to wait for what will never come.

        Raises:
            InvalidTransition: A request is neither in work nor done: it was ended at the scheduler
                itself, or an interrupt took its end away.
        """
        for request_id in sorted(request_ids - self.scheduler.in_work - self._done.keys()):
            raise InvalidTransition(
                "it was ended behind this LLM's back, and its output is lost",
                where=f"request {request_id!r}",
                remedy="use LLM.abort, not that of its scheduler",
            )

    def _abandon(self, request_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: end what runs, forget what is done.

        Whatever was interrupted before, each of them leaves nothing behind.
        """
        for request_id in sorted(request_ids):
            with suppress(InvalidTransition):  # it has ended already
                self.scheduler.abort(request_id)
            self._collector.forget(request_id)
            self._done.pop(request_id, None)


def _unchosen(output: RequestOutput) -> RequestOutput:
    """Return what was gathered of a request whose ``n`` likeliest will never be known."""
    outputs = [
        each if each.error else replace(each, finish_reason="abort", stop_reason=None)
        for each in output.outputs
    ]
    return replace(output, outputs=outputs)


def _asked(config: EngineConfig | None, fields: dict[str, Any]) -> EngineConfig:
    """Return the config with single fields put in; a model's facts are not for asking."""
    config = as_config(config)
    if isinstance(fields.get("eviction"), Policy):
        fields = fields | {"eviction": format_policy(fields["eviction"])}
    asked = with_fields(config, **fields)
    facts = set(ModelConfig.__struct_fields__) - {"max_model_len"}
    for name in sorted(facts & fields.keys()):
        raise ConfigError("comes from the model", where=f"model.{name}", remedy="leave it out")
    return asked
