"""What the server accepts and how it is protected; every limit has a default."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from smolstack.errors import GenerationError
from smolstack.generation.image_cache import DEFAULT_IMAGE_BYTES
from smolstack.generation.scheduler import SchedulerLimits

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+")


@dataclass(frozen=True)
class ServerSettings:
    """Limits of one server.

    Attributes:
        name: what /v1/models calls the checkpoint; answers are given under any name.
        api_keys: of which clients must send one as a bearer token; none lets everybody in.
        hosts: names by which the server may be asked for, beside addresses; ("*",) is any. None
            is not looked at: a key, or a socket that is no network's, keeps strangers out.
        origins: of pages elsewhere that may ask ("https://example.org"); ("*",) is any.
        body_bytes: largest request body, counted while it arrives.
        bodies_bytes: the bodies of all requests together, from their arrival to the end of their
            requests.
        body_seconds: how long a request body may take to arrive.
        connections: open at a time; None is as many as the limit of open files allows, at most 512.
        header_seconds: how long a request's headers may take to arrive.
        image_pixels: largest image, checked before it is decoded.
        decode_bytes: memory that images may take together while they are decoded; one that takes
            more by itself is refused, others wait. It is the whole process's.
        images: most images of one request.
        prompt_tokens: longest prompt, visual tokens included; None is the model's context.
        new_tokens: longest answer, whatever a request asks for.
        form_bytes: of a request's schema, expression and choices together.
        special_tokens_in_text: whether control tokens that a message's text spells become these
            tokens, so that whoever writes a text can forge turns.
        answers: most answers of one request (``n``).
        deadline: seconds that a request may take once its body is here, fetching its images
            and waiting included.
        drain: seconds that requests at work get to finish when the server is told to stop.
        allow_remote_images: whether images are fetched from public addresses.
        remote_bytes, remote_seconds: limits of one fetched image.
        image_cache_bytes: visual tokens of images kept for later requests.
        scheduler: how much is done at a time.
    """

    name: str = "smolstack"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    body_bytes: int = 32 * 2**20
    bodies_bytes: int = 256 * 2**20
    body_seconds: float = 60.0
    connections: int | None = None
    header_seconds: float = 10.0
    image_pixels: int = 40_000_000
    decode_bytes: int = 2**30
    images: int = 16
    prompt_tokens: int | None = None
    new_tokens: int = 2048
    form_bytes: int = 64 * 2**10
    special_tokens_in_text: bool = False
    answers: int = 8
    deadline: float = 300.0
    drain: float = 30.0
    allow_remote_images: bool = False
    remote_bytes: int = 16 * 2**20
    remote_seconds: float = 10.0
    image_cache_bytes: int = DEFAULT_IMAGE_BYTES
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or key != key.strip() or not key.isascii() or not key.isprintable():
                raise GenerationError(
                    f"an API key of {len(key)} characters is empty, has spaces around it or is not "
                    "ASCII, expected plain characters"
                )
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise GenerationError(
                    f"the origin {origin!r} is none, expected one like https://example.org or *"
                )
        counts = "body_bytes image_pixels decode_bytes images new_tokens form_bytes answers"
        if self.connections is not None and self.connections < 1:
            raise GenerationError(f"connections is {self.connections}, expected 1 or more")
        if self.bodies_bytes * 3 < self.body_bytes * 4:
            raise GenerationError(
                f"the bodies of all requests may take {self.bodies_bytes:,} bytes, expected a "
                f"third more than the {self.body_bytes:,} of one"
            )
        for name in counts.split():
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("body_seconds", "header_seconds", "deadline", "drain", "remote_seconds"):
            if getattr(self, name) <= 0:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected above 0")
