"""The engine's core: schedule, execute, update.

Each step asks the scheduler for a plan, lets the runner execute it, and passes the outputs to the
requests: tokens are sampled, grammars and stop conditions checked, text is detokenized, and
complete answers are finished. An answer does not depend on the other requests in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from time import perf_counter
from typing import TypeVar

from torch import Tensor

from smolstack.errors import DeadlineError, GenerationError
from smolstack.generation.answer import TokenLogprob
from smolstack.generation.choices import SCORED_TOKENS, Scoring, pick
from smolstack.generation.costs import ClientUse, Costs
from smolstack.generation.image_cache import ImageCache
from smolstack.generation.image_queue import ImageQueue
from smolstack.generation.image_stage import ImageStage
from smolstack.generation.kv_budget import default_kv_bytes
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.output import make_answer
from smolstack.generation.prefix_cache import PrefixCache
from smolstack.generation.request import Request, Update
from smolstack.generation.request_maker import RequestMaker
from smolstack.generation.runner import ModelRunner, Outcome, StepOutputs
from smolstack.generation.scheduler import Scheduler, SchedulerLimits
from smolstack.generation.step_plan import StepPlan
from smolstack.model.vlm import VisionLanguageModel
from smolstack.model.weight_changes import WeightsVersion
from smolstack.processor.processor import Processor, Prompt

T = TypeVar("T")


class EngineCore:
    """Processes many requests concurrently. Requests may be made, and their images opened, in
    any thread; everything else is not thread-safe (see engine.py and inline.py).

    Args:
        image_cache: default: a new one.
        limits: limits of concurrency, batch sizes and memory.
        workers: threads that open and preprocess images; None: done inside :meth:`step`.
        clock: returns seconds, for deadlines.
        wake: called, from any thread, when a worker has finished.

    Attributes:
        scheduler: waiting and running requests.
        image_queue: tiles that wait for the vision tower; ``image_queue.cache`` is the image cache.
        image_stage: opens images, and collects their visual tokens.
        prefix_cache: KV caches of prompt prefixes.
        costs, client_use: measured costs of work, and each client's recent share.
        decode_steps, generated_tokens, prefill_tokens: counters.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        limits: SchedulerLimits | None = None,
        *,
        image_cache: ImageCache | None = None,
        workers: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        limits = limits or SchedulerLimits()
        self.model, self.processor = model, processor
        self.clock = clock
        self.image_queue = ImageQueue(
            processor, ImageCache(model) if image_cache is None else image_cache
        )
        self.image_stage = ImageStage(self.image_queue, workers, wake)
        self.prefix_cache = PrefixCache(limits.prefix_bytes)
        self.runner = ModelRunner(model, processor, self.prefix_cache)
        self.costs, self.client_use = Costs(), ClientUse()
        self.scheduler = Scheduler(
            limits,
            self.image_queue,
            self.prefix_cache,
            kv_bytes=model.kv_bytes_per_token,
            kv_budget=limits.kv_cache_bytes or default_kv_bytes(model.device),
            costs=self.costs,
        )
        self.decode_steps = self.generated_tokens = self.prefill_tokens = 0
        self._weights, self._known_weights = WeightsVersion(model.decoder), 0
        self.maker = RequestMaker(model, processor, self.scheduler.check)
        self._next_number = 0

    # Requests

    def requests(
        self,
        prompts: Sequence[Prompt],
        options: ValidatedOptions | Sequence[ValidatedOptions],
        *,
        deadline: float | None = None,
    ) -> list[Request]:
        """Make requests for answers; see :meth:`RequestMaker.requests`."""
        return self.maker.requests(prompts, options, deadline=deadline)

    def open_images(self, requests: Sequence[Request]) -> None:
        """Open and preprocess images before the requests are queued; see
        :meth:`ImageStage.open`.
        """
        self.image_stage.open(requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            GenerationError: it was queued before.
        """
        if request.number >= 0:
            raise GenerationError("the request was submitted before, expected a new one")
        request.number, self._next_number = self._next_number, self._next_number + 1
        self.scheduler.waiting.append(request)
        if request.images is not None:
            # Images that are already opened can be encoded while the request waits.
            try:
                self.image_stage.want(request)
            except Exception as error:
                self._fail(request, error)

    def clear_caches(self) -> None:
        """Clear the image cache in memory and the prefix cache."""
        self.image_queue.cache.clear()
        self.prefix_cache.clear()

    # Steps

    @property
    def idle(self) -> bool:
        """Whether there are no waiting or running requests."""
        return self.scheduler.idle

    def step(self) -> bool:
        """Run one step; return False if there was nothing to do."""
        before = len(self.scheduler)
        self.remove_ended()
        self.client_use.rank([*self.scheduler.waiting, *self.scheduler.running], self.clock())
        self._admit()
        self._collect()
        plan = self.scheduler.schedule()
        if not plan:
            return len(self.scheduler) < before
        try:
            self.update(plan, self.runner.execute(plan))
        except BaseException:
            for request in plan.requests:  # their KV cache and output may be inconsistent
                what = request.result_name
                self._fail(request, GenerationError(f"the work on the {what} was interrupted"))
            raise
        return True

    def remove_ended(self) -> None:
        """Remove requests that were cancelled or aborted, or have passed their deadline."""
        now = self.clock()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.cancelled:
                self._leave(request)
            elif request.abort_error is not None:
                self._fail(request, request.abort_error)
            elif request.deadline is not None and now >= request.deadline:
                what = request.result_name
                error = DeadlineError(f"the deadline passed before the {what} was complete")
                self._fail(request, error)

    def _admit(self) -> None:
        number = self._weights.current()
        if number != self._known_weights:  # results computed with other weights are invalid
            self._known_weights = number
            self.prefix_cache.clear()
        for request in self.scheduler.admit(self.clock()):
            self.image_stage.begin(request)

    def _collect(self) -> None:
        """Take the images that workers have opened."""
        for request, error in self.image_stage.collect(self.scheduler.running).items():
            self._fail(request, error)
        for request in list(self.scheduler.running):
            self._when_ready(request)

    def _when_ready(self, request: Request) -> None:
        """Continue with the prompt once all images are encoded."""
        if request.stage != "images" or not request.images_ready():
            return
        if request.kind == "visual tokens":
            self._leave(request)
            return
        request.make_keys(self.model.config.image_token_id)
        request.stage = "prefill"

    # Outputs

    def update(self, plan: StepPlan, outputs: StepOutputs) -> None:
        """Pass a step's outputs to its requests."""
        if plan.tiles:
            self.costs.measured("tile", len(plan.tiles), outputs.tiles.seconds)
            self._take_tiles(plan, outputs.tiles)
        if plan.prefill:
            read = sum(chunk.tokens for chunk in plan.prefill)
            self.costs.measured("token", read, outputs.prefill[0].seconds)
        for chunk, outcome in zip(plan.prefill, outputs.prefill, strict=True):
            chunk.request.elapsed.prefill += outcome.seconds
            chunk.request.computed_tokens += chunk.tokens
            self.prefill_tokens += chunk.tokens
            self._guarded(chunk.request, outcome, self._take_prefill)
        if plan.score is not None:
            plan.score.elapsed.prefill += outputs.score.seconds
            self._guarded(plan.score, outputs.score, self._take_scores)
        self._take_vectors(plan, outputs.embed)
        self._take_decoded(plan, outputs.decode)

    def _take_tiles(self, plan: StepPlan, outcome: Outcome[Tensor]) -> None:
        waiting = self.image_queue.waiting_for(plan.tiles)
        for request in waiting:
            request.elapsed.vision += outcome.seconds
        if outcome.value is None:
            assert outcome.error is not None
            for request in waiting:
                self._fail(request, outcome.error)
            return
        for request in self.image_stage.take(plan.tiles, outcome.value):
            self._when_ready(request)

    def _take_prefill(self, request: Request, logits: Tensor) -> None:
        """Continue after a prompt chunk: with the next chunk, scoring, or the first token."""
        assert request.cache is not None
        assert request.output is not None
        if request.cache.length < len(request.keys):
            return
        request.embeddings = None
        if request.choices is None:
            request.stage = "decode"
            self._take_token(request, logits)
            return
        tokens = self.scheduler.limits.prefill_tokens or SCORED_TOKENS
        held = request.cache.held_bytes
        request.scoring = Scoring(request.choices, logits, held, tokens)
        if request.scoring.complete:
            self._choose(request)

    def _take_scores(self, request: Request, sums: dict[int, float]) -> None:
        assert request.scoring is not None
        request.scoring.add(sums)
        if request.scoring.complete:
            self._choose(request)

    def _choose(self, request: Request) -> None:
        assert request.scoring is not None
        assert request.output is not None
        assert request.choices is not None
        assert request.options is not None
        request.scores = request.scoring.totals
        chosen = request.choices[pick(request.scores, request.options.sampling)]
        self._say(request, request.output.take_all(chosen))

    def _take_vectors(self, plan: StepPlan, outcome: Outcome[Tensor]) -> None:
        for row, request in enumerate(plan.embed):
            request.elapsed.prefill += outcome.seconds
            if outcome.value is None:
                assert outcome.error is not None
                self._fail(request, outcome.error)
                continue
            request.vectors = outcome.value[row].clone()
            self._leave(request)
            request.tell(Update(vectors=request.vectors))

    def _take_decoded(self, plan: StepPlan, outcome: Outcome[Tensor]) -> None:
        if not plan.decode:
            return
        self.decode_steps += 1
        self.costs.measured("row", len(plan.decode), outcome.seconds)
        rows = [None] * len(plan.decode) if outcome.value is None else outcome.value.unbind()
        for request, logits in zip(plan.decode, rows, strict=True):
            request.elapsed.decode += outcome.seconds
            request.elapsed.decode_steps += 1
            if logits is None:
                assert outcome.error is not None
                self._fail(request, outcome.error)
                continue
            try:
                self._take_token(request, logits)
            except Exception as error:  # e.g. an error of its grammar; it ends only this request
                self._fail(request, error)

    def _take_token(self, request: Request, logits: Tensor) -> None:
        assert request.output is not None
        began = perf_counter()
        piece = request.output.take(logits)
        request.own_seconds += (perf_counter() - began - request.own_seconds) / 2
        request.turn = self.decode_steps
        self._say(request, piece)

    def _say(self, request: Request, piece: str) -> None:
        """Report final text; a complete answer finishes its request."""
        output = request.output
        assert output is not None
        logprobs: tuple[TokenLogprob, ...] = ()
        if output.top_logprobs is not None:
            logprobs = tuple(output.logprobs[request.told_logprobs :])
            request.told_logprobs += len(logprobs)
        answer = None
        if output.finish_reason is not None:
            assert request.options is not None
            timings = request.elapsed.timings()
            answer = make_answer(
                request.prompt,
                output,
                timings,
                request.options,
                request.scores,
                computed_tokens=request.computed_tokens,
            )
            request.answer = answer
            self.generated_tokens += len(output.token_ids)
            self.prefix_cache.finish(request.number, [] if request.choices else output.token_ids)
            self._leave(request)
        if request.listener is not None and (piece or logprobs or answer is not None):
            request.tell(Update(piece, logprobs, answer))

    def _guarded(
        self, request: Request, outcome: Outcome[T], work: Callable[[Request, T], None]
    ) -> None:
        """Process one request's outcome; an error ends only this request."""
        if outcome.value is None:
            assert outcome.error is not None
            self._fail(request, outcome.error)
            return
        try:
            work(request, outcome.value)
        except Exception as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        if request.finished:
            return
        request.error = error
        self._leave(request)
        request.tell(Update(error=error))

    def _leave(self, request: Request) -> None:
        self.scheduler.leave(request)
        request.release()
