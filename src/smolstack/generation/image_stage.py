"""The image stage: opens and preprocesses images, queues their tiles, and collects visual
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from time import perf_counter
from typing import TypeVar

from torch import Tensor

from smolstack.batch import VisualTokens
from smolstack.errors import ImageError
from smolstack.generation.image_queue import ImageQueue
from smolstack.generation.pools import RankedPool
from smolstack.generation.prepared_image import PendingTile, PreparedImage
from smolstack.generation.request import ImageState, Request
from smolstack.processor.decoding_pace import weight
from smolstack.processor.geometry import TilePlan
from smolstack.processor.tiles import ImageSource

T = TypeVar("T")
_HEAVY = 8_000_000  # pixels of a JPEG image that takes long to open; fewer of a slower format


class ImageStage:
    """Processes the images of requests up to visual tokens.

    Args:
        queue: the queue of tiles.
        workers: threads that open and preprocess images; None: done immediately.
        wake: called, from any thread, when a worker has finished.
    """

    def __init__(
        self, queue: ImageQueue, workers: Executor | None, wake: Callable[[], None]
    ) -> None:
        self.queue, self.workers, self.wake = queue, workers, wake

    def open(self, requests: Sequence[Request]) -> None:
        """Open and preprocess the images of requests that have not started, in this thread.
        Thread-safe.

        An image used by several requests is opened once.

        Raises:
            ImageError: an image cannot be decoded.
        """
        known: dict[bytes, ImageState] = {}
        for request in requests:
            began = perf_counter()
            request.images = []
            pairs = zip(request.prompt.images, request.prompt.plans, strict=True)
            for place, (image, plan) in enumerate(pairs):
                if isinstance(image, VisualTokens):
                    request.images.append(image)
                    continue
                key = self.queue.key(image, plan)
                if key not in known:
                    work = partial(self.queue.prepare, image, plan, key)
                    known[key] = _named(request, place, work)
                request.images.append(known[key])
            request.elapsed.images += perf_counter() - began

    def begin(self, request: Request) -> None:
        """Start opening a request's images in the workers, unless already done."""
        request.stage = "images"
        if request.images is not None:
            return
        request.images = []
        pairs = zip(request.prompt.images, request.prompt.plans, strict=True)
        for place, (image, plan) in enumerate(pairs):
            if isinstance(image, VisualTokens):
                request.images.append(image)
                continue
            work = partial(_named, request, place, partial(self._prepared, request, image, plan))
            if self.workers is None:
                future = _done(work)
            else:
                future = self._submitted(work, request, image, plan)
                future.add_done_callback(lambda _: self.wake())
            request.images.append(future)

    def _submitted(
        self,
        work: Callable[[], VisualTokens | PreparedImage],
        request: Request,
        image: ImageSource,
        plan: TilePlan,
    ) -> Future[VisualTokens | PreparedImage]:
        assert self.workers is not None
        if not isinstance(self.workers, RankedPool):
            return self.workers.submit(work)
        heavy = plan.source[0] * plan.source[1] * weight(image) > _HEAVY
        return self.workers.rank(work, request.rank, heavy=heavy)

    def _prepared(
        self, request: Request, image: ImageSource, plan: TilePlan
    ) -> VisualTokens | PreparedImage:
        began = perf_counter()
        made = self.queue.prepare(image, plan)
        request.elapsed.images += perf_counter() - began
        return made

    def collect(self, requests: Iterable[Request]) -> dict[Request, Exception]:
        """Take the images that workers have opened; return the requests with errors."""
        failed: dict[Request, Exception] = {}
        for request in requests:
            if request.stage != "images" or not request.images:
                continue
            try:
                for place, image in enumerate(request.images):
                    if isinstance(image, Future) and image.done():
                        request.images[place] = image.result()
                        self.want(request)
            except Exception as error:
                failed[request] = error
        return failed

    def want(self, request: Request) -> None:
        """Let a request wait for those of its images that are opened but not encoded."""
        assert request.images is not None
        for place, image in enumerate(request.images):
            if isinstance(image, PreparedImage):
                known = _named(request, place, partial(self.queue.add, image, request))
                if known is not None:
                    request.images[place] = known

    def take(self, tiles: Sequence[PendingTile], visual: Tensor) -> list[Request]:
        """Store the visual tokens of a micro-batch; return the requests with a newly encoded
        image.
        """
        found = []
        for key, (tokens, requests) in self.queue.complete(tiles, visual).items():
            for request in requests:
                assert request.images is not None
                for place, image in enumerate(request.images):
                    if isinstance(image, PreparedImage) and image.key == key:
                        request.images[place] = tokens
                found.append(request)
        return found


def _named(request: Request, place: int, work: Callable[[], T]) -> T:
    """Return the result of work on one of a request's images; an error names the image as the
    prompt does."""
    names = request.prompt.image_names
    try:
        return work()
    except ImageError as error:
        if not names:
            raise
        named = ImageError(str(error), name=names[place])
    raise named


def _done(
    work: Callable[[], VisualTokens | PreparedImage],
) -> Future[VisualTokens | PreparedImage]:
    future: Future[VisualTokens | PreparedImage] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
