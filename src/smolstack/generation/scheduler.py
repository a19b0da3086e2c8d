"""The scheduler decides what the next step does, without computing anything.

Requests join between steps and leave when they are finished (continuous batching). A step contains
at most one bounded piece of work for new requests (a vision micro-batch, a prefill pass over prompt
chunks, or a scoring pass) and one decoded token for every request whose prompt has been read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from smolstack.errors import GenerationError, KVCacheError, QueueFullError
from smolstack.generation.costs import Costs
from smolstack.generation.image_queue import ImageQueue
from smolstack.generation.prefix_cache import (
    DEFAULT_PREFIX_BYTES,
    PrefixCache,
    common_prefix,
)
from smolstack.generation.request import Request
from smolstack.generation.step_plan import PrefillChunk, StepPlan

# Passes over more tokens are compute-bound; larger batches gain nothing.
_PASS = 256
_WORTH = 16  # minimum common prefix for which a request waits until another has read it
_VECTORS = 4  # prompts of equal length embedded together
_CHEAP = 0.75  # much cheaper: at most this share of another request's cost
_TURN = 0.5  # seconds that a request runs before it can be preempted
_LEFT = 16  # 1/_LEFT of the KV cache memory is reserved for small requests
_COSTLY = 0.005  # seconds outside the model per token from which answers take turns
_OWN = 0.05  # such seconds per step


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of concurrency, batch sizes and memory.

    Attributes:
        running: maximum number of running requests; each holds its KV cache.
        queued: maximum number of waiting requests; None: unlimited.
        tiles: tiles per vision micro-batch.
        prefill_tokens: prompt tokens per prefill pass; None: whole prompts, up to about a thousand
            tokens together.
        prefix_bytes: KV caches of finished requests kept for prompts with the same beginning.
        kv_cache_bytes: all KV caches, including kept ones; None: half of the memory that is free
            when the engine is made.
        interleave: run a decode step between pieces of new requests' work, which bounds the pauses
            of running answers; False reads all prompts first, which takes less time in total.
    """

    running: int = 16
    queued: int | None = 64
    tiles: int = 4
    prefill_tokens: int | None = 512
    prefix_bytes: int = DEFAULT_PREFIX_BYTES
    kv_cache_bytes: int | None = None
    interleave: bool = True

    def __post_init__(self) -> None:
        for name in ("running", "tiles", "prefill_tokens", "kv_cache_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise GenerationError(f"{name} is {value!r}, expected a whole number, 1 or more")
        for name in ("queued", "prefix_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise GenerationError(f"{name} is {value!r}, expected a whole number, 0 or more")


class Scheduler:
    """The requests of one engine, and the order in which they are processed.

    Args:
        kv_bytes: bytes of keys and values per token.
        kv_budget: bytes of all KV caches.
        costs: measured costs of work.

    Attributes:
        waiting, running: requests, in the order of their arrival.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        image_queue: ImageQueue,
        prefix_cache: PrefixCache,
        *,
        kv_bytes: int,
        kv_budget: int,
        costs: Costs,
    ) -> None:
        self.limits, self.image_queue, self.prefix_cache = limits, image_queue, prefix_cache
        self.kv_bytes, self.kv_budget, self.costs = kv_bytes, kv_budget, costs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def __len__(self) -> int:
        """Number of waiting and running requests."""
        return len(self.waiting) + len(self.running)

    @property
    def idle(self) -> bool:
        """Whether there are no waiting or running requests."""
        return not self.waiting and not self.running

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the KV caches that the running requests use or will use."""
        return sum(request.kv_tokens for request in self.running) * self.kv_bytes

    def check(self, request: Request) -> None:
        """Check that a request can run at all.

        Raises:
            KVCacheError: its KV cache alone exceeds the budget.
        """
        needed = request.kv_tokens * self.kv_bytes
        if needed > self.kv_budget:
            prompt = len(request.prompt.token_ids)
            raise KVCacheError(
                f"the prompt has {prompt} tokens and its answer up to "
                f"{request.kv_tokens - prompt}, which takes {needed:,} bytes of KV cache; "
                f"{self.kv_budget:,} are allowed"
            )

    def displaced(self, requests: Sequence[Request], coming: Sequence[Request]) -> list[Request]:
        """Return the waiting or arriving requests to displace for new ones: those with a higher
        rank, and those whose answers may take much longer; none if that makes no room. Thread-safe.
        """
        if self.limits.queued is None:
            return []
        waiting = [*self.waiting, *coming]
        aborted = sum(each.abort_error is not None for each in waiting)
        room = self.limits.running + self.limits.queued
        missing = len(self.running) + len(waiting) - aborted + len(requests) - room
        if missing <= 0:
            return []
        new = requests[0]
        most = self.costs.upper_bounds([new, *waiting])

        def worse(r: Request) -> bool:
            if most[new] <= _CHEAP * most[r]:
                return True
            # A cheaper prompt counts only if its answer cannot take much longer.
            cheaper = new.cost <= _CHEAP * r.cost and most[r] > _CHEAP * most[new]
            return r.rank > new.rank and (r.client != new.client or cheaper)

        candidates = [
            r for r in waiting if r.abort_error is None and r.client is not None and worse(r)
        ]
        if missing > len(candidates):
            return []
        return sorted(candidates, key=_rank, reverse=True)[:missing]

    def check_room(self, requests: int, coming: Sequence[Request] = ()) -> None:
        """Raise QueueFullError if the given number of requests, in addition to those arriving,
        exceeds the queue, or GenerationError if it can never fit. Thread-safe.
        """
        if self.limits.queued is None:
            return
        room = self.limits.running + self.limits.queued
        if requests > room:
            raise GenerationError(
                f"{requests} answers or vectors at once, at most {room} are accepted"
            )
        waiting = sum(each.abort_error is None for each in [*self.waiting, *coming])
        if waiting + len(self.running) + requests > room:
            raise QueueFullError(
                f"{len(self.running)} answers are running and {waiting} waiting, the limit is "
                f"{room}"
            )

    def admit(self, now: float) -> list[Request]:
        """Start waiting requests, by rank, while there are free slots and memory; return those
        started. If all slots are taken, a request may take that of one that it preempts.

        Args:
            now: the time, in seconds.
        """
        admitted: list[Request] = []
        preempted = [request for request in self.running if request.preempted]
        waiting = [request for request in self.waiting if not request.paused]
        if not preempted and not waiting:
            return []
        most: dict[Request, float] = {}  # seconds of work, if answers are as long as they may be
        short = False  # of memory: smaller requests do not overtake the one that waits for it
        for request in sorted([*preempted, *waiting], key=_rank):
            if short and not request.preempted:
                continue
            free = sum(not each.held for each in self.running) < self.limits.running
            given = None if free else self._preemptable(request, most, now)
            if not free and given is None:
                continue
            if not request.preempted:
                if not self._has_memory(request):
                    short = True  # but those that have their memory continue, and free it
                    continue
                self.waiting.remove(request)
                self.running.append(request)
                admitted.append(request)
            if given is not None:
                given.preempted = True
            request.preempted, request.turn_began = False, now
        return admitted

    def _preemptable(self, new: Request, most: dict[Request, float], now: float) -> Request | None:
        """Return the running request to preempt for a waiting one, which must be much cheaper, or
        of a client that has had less; None if there is none.
        """
        if new.preempted or new.client is None:
            return None
        if not most:
            most.update(self.costs.upper_bounds([*self.waiting, *self.running]))
        others = [
            r
            for r in self.running
            if not r.held
            and r.client is not None
            and now - r.turn_began >= _TURN
            and (most[new] <= _CHEAP * most[r] or (new.client != r.client and new.rank < r.rank))
        ]
        return max(others, key=_rank, default=None)

    def _has_memory(self, request: Request) -> bool:
        """Return whether a request's KV cache fits; kept caches are evicted if necessary."""
        needed = request.kv_tokens * self.kv_bytes
        left = self.kv_budget - self.reserved_bytes - needed
        kept = self.kv_budget // _LEFT
        if request.client is not None and self.running and needed > kept:
            left -= kept
        if left < 0:
            return False
        if self.prefix_cache.held_bytes > left:
            self.prefix_cache.shrink(left)
        return True

    def leave(self, request: Request) -> None:
        """Remove a request that is finished or aborted."""
        self.image_queue.leave(request)
        self.prefix_cache.drop(request.number)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> StepPlan:
        """Return the plan of the next step; empty if there is nothing to do."""
        plan = StepPlan()
        newcomers = [self._plan_prompts, self._plan_tiles]
        if not self.limits.interleave or self._tiles_first():
            newcomers.reverse()
        for part in newcomers:
            part(plan)
            if plan:
                break
        if self.limits.interleave or not plan:
            plan.decode = self._decoding()
        return plan

    def _at(self, stage: str) -> list[Request]:
        at = [r for r in self.running if r.stage == stage and not r.held]
        return sorted(at, key=_rank)

    def _tiles_first(self) -> bool:
        """Return whether some request's tiles are more urgent than all prompts."""
        urgent = self.image_queue.rank
        return urgent is not None and all(r.rank > urgent for r in self._at("prefill"))

    def _decoding(self) -> list[Request]:
        """Return the requests that get a token. Answers with slow grammars take turns, so that
        others do not wait for all of them.
        """
        rows = self._at("decode")
        costly = [r for r in rows if r.own_seconds > _COSTLY]
        if not self.limits.interleave or sum(r.own_seconds for r in costly) <= _OWN:
            return rows
        left, later = _OWN, set()
        for request in sorted(costly, key=lambda r: (r.turn, r.rank)):
            if left < _OWN and request.own_seconds > left:
                later.add(request)
            else:
                left -= request.own_seconds
        return [request for request in rows if request not in later]

    def _plan_tiles(self, plan: StepPlan) -> None:
        plan.tiles = self.image_queue.next_tiles(self.limits.tiles)

    def _plan_prompts(self, plan: StepPlan) -> None:
        """Plan a pass over prompts, choices, or prompts to embed, for the most urgent request."""
        ready = self._at("prefill")
        if not ready:
            return
        if ready[0].kind == "vectors":
            length = len(ready[0].prompt.token_ids)
            same = [r for r in ready if r.kind == "vectors" and len(r.prompt.token_ids) == length]
            plan.embed = same[:_VECTORS]
        elif ready[0].scoring is not None:
            plan.score = ready[0]
        else:
            self._plan_prefill(plan, [r for r in ready if r.kind == "answer" and r.scoring is None])

    def _plan_prefill(self, plan: StepPlan, ready: list[Request]) -> None:
        """Plan prompt chunks for one pass. A request with the same beginning as another one of the
        pass waits, and will find this beginning in the prefix cache.
        """
        limit = self.limits.prefill_tokens
        together = _PASS if self.limits.interleave else 4 * _PASS
        if limit is not None:
            together = min(together, limit)
        total = 0
        for request in ready:
            chunk = self._chunk(request, limit)
            if self._soon_known(plan, chunk):
                continue
            if plan.prefill and total + chunk.tokens > together:
                return
            plan.prefill.append(chunk)
            total += chunk.tokens

    def _chunk(self, request: Request, limit: int | None) -> PrefillChunk:
        prefix = None
        if request.cache is None:
            prefix = self.prefix_cache.match(request.keys)
            start = 0 if prefix is None else prefix.length
        else:
            start = request.cache.length
        left = len(request.keys) - start
        return PrefillChunk(request, start, left if limit is None else min(left, limit), prefix)

    @staticmethod
    def _soon_known(plan: StepPlan, chunk: PrefillChunk) -> bool:
        if chunk.request.cache is not None:
            return False
        keys = chunk.request.keys
        for other in plan.prefill:
            limit = min(len(other.request.keys), len(keys) - 1)
            if common_prefix(other.request.keys, keys, limit) - chunk.start >= _WORTH:
                return True
        return False


def _rank(request: Request) -> float:
    return request.rank
