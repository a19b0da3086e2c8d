"""The server's limits and access settings, with their defaults."""

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
        name: name of the model in /v1/models; requests may use any name.
        api_keys: keys of which clients must send one as a bearer token; empty: no key is needed.
        hosts: accepted host names, in addition to IP addresses; ("*",): any. None: not checked,
            for servers with keys or on a Unix socket.
        origins: origins of other pages that may send requests ("https://example.org"); ("*",): any.
        body_bytes: maximum size of a request body, counted while it arrives.
        bodies_bytes: maximum size of all request bodies together, until their requests end.
        body_seconds: timeout for a request body.
        connections: maximum number of connections; None: 512, or as the limit of open files allows.
        header_seconds: timeout for a request's headers.
        image_pixels: maximum size of an image, checked before decoding.
        decode_bytes: memory for decoding images, for the whole process; images wait for each
            other, and one that alone needs more is refused.
        images: maximum number of images per request.
        prompt_tokens: maximum prompt length, including visual tokens; None: the model's context.
        new_tokens: maximum answer length, also if a request asks for more.
        grammar_bytes: maximum size of a request's schema, grammar, expression and choices
            together.
        special_tokens_in_text: whether the text of special tokens in messages is converted to
            these tokens, which lets authors of the text forge turns.
        answers: maximum number of answers per request (``n``).
        deadline: time limit of a request from the end of its body, in seconds, including
            downloads and waiting.
        drain: seconds for running requests to finish when the server is stopped.
        allow_remote_images: whether images are downloaded from public addresses.
        remote_bytes, remote_seconds: size and time limits of a download.
        image_cache_bytes: size of the image cache.
        scheduler: the engine's limits.
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
    grammar_bytes: int = 64 * 2**10
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
                    f"an API key of {len(key)} characters is empty, has surrounding spaces or is "
                    "not printable ASCII"
                )
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise GenerationError(
                    f"{origin!r} is not an origin, expected for example https://example.org, or *"
                )
        counts = "body_bytes image_pixels decode_bytes images new_tokens grammar_bytes answers"
        if self.connections is not None and self.connections < 1:
            raise GenerationError(f"connections is {self.connections}, expected 1 or more")
        if self.bodies_bytes * 3 < self.body_bytes * 4:
            raise GenerationError(
                f"the limit of {self.bodies_bytes:,} bytes for all bodies must exceed that of "
                f"{self.body_bytes:,} for one body by at least a third"
            )
        for name in counts.split():
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("body_seconds", "header_seconds", "deadline", "drain", "remote_seconds"):
            if getattr(self, name) <= 0:
                raise GenerationError(f"{name} is {getattr(self, name)}, expected a number above 0")
