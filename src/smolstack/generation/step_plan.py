"""What the scheduler plans for one step, and the model runner executes."""

from __future__ import annotations

from dataclasses import dataclass, field

from smolstack.generation.prefix_cache import Prefix
from smolstack.generation.prepared_image import PendingTile
from smolstack.generation.request import Request


@dataclass
class PrefillChunk:
    """Prompt tokens of one request to be read.

    Attributes:
        start, tokens: range of the tokens.
        prefix: for the first chunk: the known prefix of the prompt.
    """

    request: Request
    start: int
    tokens: int
    prefix: Prefix | None = None


@dataclass
class StepPlan:
    """The work of one step.

    Attributes:
        tiles: a vision micro-batch.
        prefill: prompt chunks, read in one pass.
        score: a request for which a scoring pass is run.
        embed: requests of equal length whose vectors are computed.
        decode: requests that get one more token.
    """

    tiles: list[PendingTile] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    score: Request | None = None
    embed: list[Request] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tiles or self.prefill or self.score or self.embed or self.decode)

    @property
    def requests(self) -> list[Request]:
        """All participating requests, except those that wait for tiles."""
        some = [chunk.request for chunk in self.prefill]
        return [*some, *([self.score] if self.score else []), *self.embed, *self.decode]
