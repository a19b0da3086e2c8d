"""Estimated costs and ranks of requests: cheap requests run before expensive ones, and clients with
little recent use before those with much.

A request's rank is its arrival time plus a multiple of the seconds of work that it is expected to
take. An expensive request therefore waits for cheap ones that arrive a little later, but not
indefinitely. Ranks only affect the order of work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from smolstack.batch import VisualTokens
from smolstack.processor.decoding_pace import weight

if TYPE_CHECKING:
    from smolstack.generation.request import Request

_PATIENCE = 4.0  # seconds that a request waits for cheaper ones, for each second of its work
_MOST_DEBT = 60.0  # seconds that a client waits for others
_HALF_LIFE = 30.0  # seconds after which half of what a client had is forgotten
_CLIENTS = 4096  # that are remembered
_PIXEL = 3e-8  # seconds to open a pixel of a JPEG image
SECONDS_PER_GRAMMAR_BYTE = 1e-5  # to compile a schema or a regular expression
_TOKENS = 256  # a limit is often higher than what comes
_NEW = 0.1  # share of a new measurement
# A pass over fewer units takes about as long as over these: its seconds are no measure of one unit.
_FULL = {"tile": 1, "token": 64, "row": 4}


class Costs:
    """Seconds per unit of work on this machine, as measured so far.

    Attributes:
        tile, token: seconds per tile in the vision tower, and per prompt token.
        row: seconds per answer in a batched decode step.
    """

    def __init__(self) -> None:
        self.tile, self.token, self.row = 0.02, 0.0005, 0.005

    def measured(self, part: str, count: int, seconds: float) -> None:
        """Record a measurement of a pass over ``count`` units of a part."""
        if count > 0:
            known = getattr(self, part)
            setattr(self, part, known + _NEW * (seconds / max(count, _FULL[part]) - known))

    def estimate(self, requests: Sequence[Request], *, longest: int = _TOKENS) -> float:
        """Estimate the seconds of work of requests; a prompt that several have is read once.

        Args:
            longest: tokens of an answer that are expected at most.
        """
        prompts = {id(request.prompt): request.prompt for request in requests}.values()
        fresh = [
            (plan, weight(image))
            for prompt in prompts
            for image, plan in zip(prompt.images, prompt.plans, strict=True)
            if not isinstance(image, VisualTokens)
        ]
        seconds = sum(len(prompt.token_ids) for prompt in prompts) * self.token
        seconds += sum(plan.source[0] * plan.source[1] * _PIXEL * slow for plan, slow in fresh)
        seconds += sum(plan.tiles * self.tile for plan, _ in fresh)
        for request in requests:
            if request.choices is not None:
                seconds += sum(map(len, request.choices)) * self.token
            elif request.output is not None:
                grammar = SECONDS_PER_GRAMMAR_BYTE * request.grammar_bytes
                seconds += min(request.output.limit, longest) * self.row + grammar
        return seconds

    def upper_bounds(self, requests: Iterable[Request]) -> dict[Request, float]:
        """Return the seconds of work of each request if its answer is as long as it may be."""
        return {request: self.estimate([request], longest=sys.maxsize) for request in requests}


class ClientUse:
    """Recent use of each client, in seconds of work; the caller provides the time."""

    def __init__(self) -> None:
        self._recent: dict[str, tuple[float, float]] = {}

    def recent(self, client: str, now: float) -> float:
        """Return a client's use, in which older work counts less."""
        seconds, then = self._recent.get(client, (0.0, now))
        return float(seconds * 0.5 ** ((now - then) / _HALF_LIFE))

    def charge(self, client: str, seconds: float, now: float) -> None:
        """Add seconds of work to a client's use."""
        self._recent[client] = (self.recent(client, now) + seconds, now)
        if len(self._recent) > _CLIENTS:
            least = min(self._recent, key=lambda each: self.recent(each, now))
            del self._recent[least]

    def rank(self, requests: Iterable[Request], now: float) -> None:
        """Set the ranks of all waiting and running requests, by each client's use relative to the
        least among them.
        """
        some = [request for request in requests if request.client is not None]
        clients = {request.client for request in some if request.client is not None}
        recent = {client: self.recent(client, now) for client in clients}
        least = min(recent.values(), default=0.0)
        for request in some:
            assert request.client is not None
            request.rank = request.urgency + min(_MOST_DEBT, recent[request.client] - least)


def urgency(arrival: float, seconds: float) -> float:
    """Return the rank of work that arrived at a time and takes some seconds, without its client's
    share.
    """
    return arrival + _PATIENCE * seconds
