"""A request and the state of its answer. It never calls the model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.generation.answer import Answer, Timings, TokenLogprob
from smolstack.generation.choices import Scoring
from smolstack.generation.options import ValidatedOptions
from smolstack.generation.output import Output
from smolstack.generation.prefix_cache import TokenKey, token_keys
from smolstack.generation.prepared_image import PreparedImage
from smolstack.model.kv_cache import KVCache
from smolstack.processor.processor import Prompt

Stage: TypeAlias = Literal["waiting", "images", "prefill", "decode", "finished"]
# The result: an answer, visual tokens, or the vectors of a retrieval model.
Kind: TypeAlias = Literal["answer", "visual tokens", "vectors"]
ImageState: TypeAlias = "VisualTokens | PreparedImage | Future[VisualTokens | PreparedImage]"


@dataclass(frozen=True)
class Update:
    """A change of one request.

    Attributes:
        piece: characters that became final.
        logprobs: of the tokens since the last update, if requested.
        answer: the complete answer, in the last update of a request that succeeded.
        vectors: (T, E), of a retrieval model's request that succeeded; it has no other update.
        error: the error, in the last update of a request that failed.
    """

    piece: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    answer: Answer | None = None
    vectors: Tensor | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether the request has ended."""
        return not (self.answer is None and self.vectors is None and self.error is None)


@dataclass
class Elapsed:
    """Seconds per stage of one request; shared passes count in full."""

    images: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    decode_steps: int = 0

    def timings(self) -> Timings:
        return Timings(self.images, self.vision, self.prefill, self.decode, self.decode_steps)


class Request:
    """One prompt, the kind of result, and the state of the work on it.

    Made by a :class:`RequestMaker` in any thread. Afterwards only the engine's core changes it,
    except for the flags.

    Args:
        prompt: rendered, planned, tokenized.
        kind: kind of the result.
        options, output, choices: of an answer.
        listener: called with every update in the thread that steps the core; it must return
            quickly.
        deadline: when it must be finished, on the core's clock.

    Attributes:
        number: set by the core.
        stage: its progress.
        images: the prompt's images, in order: visual tokens, or images that wait for encoding.
        paused: flag for any thread: no work is done on the request while it is set.
        cancelled: flag for any thread: the core removes the request before its next step.
        abort_error: for any thread to set: as ``cancelled``, and the listener gets this error.
        error: why it failed; answer, vectors: its result.
        cache, embeddings: of the prompt, once it is being read.
        computed_tokens: prompt tokens that were computed, not copied from the prefix cache.
        elapsed: seconds of work so far.
        client: its client, if clients share the engine; cost: expected seconds of work of it and
            the requests submitted with it; urgency, rank: priority, the lowest first (costs.py).
        grammar_bytes: size of its grammar (a schema or an expression).
        preempted: set by the scheduler while another request has its slot; turn_began: when it got
            the slot last, on the core's clock.
        own_seconds: seconds per token outside the model, such as those of its grammar.
        turn: number of the last step in which it got a token.
    """

    def __init__(
        self,
        prompt: Prompt,
        kind: Kind,
        *,
        options: ValidatedOptions | None = None,
        output: Output | None = None,
        choices: list[tuple[int, ...]] | None = None,
        listener: Callable[[Update], None] | None = None,
        deadline: float | None = None,
    ) -> None:
        self.prompt, self.kind, self.options = prompt, kind, options
        self.output, self.choices = output, choices
        self.listener, self.deadline = listener, deadline
        self.number, self.computed_tokens = -1, 0
        self.stage: Stage = "waiting"
        self.paused = self.cancelled = False
        self.abort_error: Exception | None = None
        self.images: list[ImageState] | None = None
        self.elapsed = Elapsed()
        self.keys: list[TokenKey] = []
        self.cache: KVCache | None = None
        self.embeddings: Tensor | None = None
        self.scoring: Scoring | None = None
        self.scores: list[float] | None = None
        self.answer: Answer | None = None
        self.vectors: Tensor | None = None
        self.error: Exception | None = None
        self.told_logprobs = 0
        self.client: str | None = None
        self.cost = self.urgency = self.rank = self.own_seconds = 0.0
        self.preempted, self.turn_began = False, 0.0
        self.grammar_bytes = self.turn = 0

    @property
    def held(self) -> bool:
        """Whether no work is done on it now: no thread waits for it, or another has its slot."""
        return self.paused or self.preempted

    @property
    def result_name(self) -> str:
        """What errors call its result."""
        return {"answer": "answer", "visual tokens": "encoding", "vectors": "embedding"}[self.kind]

    @property
    def finished(self) -> bool:
        return self.stage == "finished"

    @property
    def answered(self) -> Answer:
        """The answer of a finished request.

        Raises: the error that it ended with.
        """
        if self.error is not None:
            raise self.error
        assert self.answer is not None, "the request has not finished"
        return self.answer

    @property
    def kv_tokens(self) -> int:
        """Maximum number of tokens in its KV cache."""
        if self.kind != "answer":
            return 0
        assert self.output is not None
        return len(self.prompt.token_ids) + (0 if self.choices else self.output.limit)

    @property
    def visual(self) -> list[VisualTokens]:
        """The visual tokens of its images."""
        images = self.images or []
        return [image for image in images if isinstance(image, VisualTokens)]

    @property
    def encoded_prompt(self) -> Prompt:
        """Return the prompt with visual tokens in place of images."""
        return replace(self.prompt, images=tuple(self.visual))

    def images_ready(self) -> bool:
        """Whether all images are encoded."""
        return len(self.visual) == len(self.prompt.images)

    def make_keys(self, image_token_id: int) -> None:
        """Compute the keys for the prefix cache, once the images are encoded."""
        self.keys = token_keys(self.prompt.token_ids, image_token_id, self.visual)

    def tell(self, update: Update) -> None:
        if self.listener is not None:
            self.listener(update)

    def release(self) -> None:
        """Free large objects, and finish."""
        self.stage = "finished"
        for image in self.images or []:
            if isinstance(image, Future):
                image.cancel()
        if self.kind != "visual tokens":
            self.images = None
        self.cache = self.embeddings = self.scoring = None
