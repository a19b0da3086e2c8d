"""Prompts: the checkpoint's chat template, and placeholder expansion.

A placeholder is expanded as text and tokenized together with its surroundings. Ids are never
inserted directly, because some vocabularies have no tokens for the row and column markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import jinja2
import jinja2.exceptions
import jinja2.meta
import jinja2.sandbox
from jinja2.ext import Extension
from jinja2.parser import Parser

from smolstack.errors import PromptError
from smolstack.processor.geometry import TilePlan
from smolstack.processor.video import Frame, Video

Message: TypeAlias = "Mapping[str, Any]"
ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "path", "url", "bytes")
VIDEO_KEYS = ("video", "path")


@dataclass(frozen=True)
class Markers:
    """The marker texts for and around visual tokens."""

    image: str = "<image>"
    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"

    def expand(self, plan: TilePlan) -> str:
        """Return the text that replaces one placeholder.

        Each tile of the grid is preceded by its row and column marker, each row ends in a newline,
        and the whole image follows after a blank line; an unsplit image is the whole image alone.
        """
        tokens = self.image * plan.tokens_per_tile
        grid = "".join(
            "".join(
                f"{self.around}<row_{row}_col_{col}>{tokens}" for col in range(1, plan.cols + 1)
            )
            + "\n"
            for row in range(1, plan.rows + 1)
        )
        return f"{grid}{chr(10) if grid else ''}{self.around}{self.whole}{tokens}{self.around}"


def expand_placeholders(prompt: str, plans: Sequence[TilePlan], markers: Markers) -> str:
    """Expand every placeholder of a rendered prompt, in order.

    Raises:
        PromptError: the numbers of placeholders and images differ.
    """
    pieces = prompt.split(markers.image)
    if len(pieces) - 1 != len(plans):
        raise PromptError(
            f"the prompt has {len(pieces) - 1} {markers.image} placeholders for {len(plans)} images"
        )
    expanded = [pieces[0]]
    for plan, text in zip(plans, pieces[1:], strict=True):
        expanded += [markers.expand(plan), text]
    return "".join(expanded)


def user_message(images: int, text: str) -> dict[str, Any]:
    """Build one user message: its images first, then its text."""
    return {
        "role": "user",
        "content": [{"type": "image"}] * images + [{"type": "text", "text": text}],
    }


def split_messages(
    messages: Sequence[Message], read_video: Callable[[Any], Video] | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return a chat in the form that templates read, and its images in order.

    Content may be a string or a list of parts; a part is ``{"type": "text", "text": …}`` or
    ``{"type": "image", "image": …}`` (also under "path", "url" or "bytes").

    Args:
        read_video: opens the ``video`` (or ``path``) of a part ``{"type": "video"}``, which is
            replaced by its frames; None: video parts are not accepted.

    Raises:
        PromptError: names the invalid message and part.
    """
    if not messages:
        raise PromptError("the chat has no messages, expected at least one")
    plain, images = [], []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise PromptError(f"{where} is {message!r:.80}, expected a role of {list(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not content:
            raise PromptError(f"{where} has content {content!r:.80}, expected text or parts")
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                images.append(next((part[k] for k in IMAGE_KEYS if part.get(k) is not None), None))
                parts.append({"type": "image"})
            elif kind == "video" and read_video is not None:
                given = next((part[k] for k in VIDEO_KEYS if part.get(k) is not None), None)
                if given is None:
                    raise PromptError(f"{where} has a video part without {' or '.join(VIDEO_KEYS)}")
                video = read_video(given)
                images += [Frame(frame) for frame in video.frames]
                parts += video.parts()
            else:
                known = "text or image" if read_video is None else "text, image or video"
                raise PromptError(f"{where} has a part {part!r:.80}, expected {known}")
        plain.append({"role": message["role"], "content": parts})
    return plain, images


_LONGEST_RESULT = 1_000_000  # characters or items that an operator in a template makes


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which an operator does not make gigabytes of text either. Intercepted
    operators are not computed while a template is compiled."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, unless its result would be very long."""
        texts = [len(each) for each in (left, right) if isinstance(each, (str, list, tuple))]
        counts = [each for each in (left, right) if isinstance(each, int)]
        if operator == "*":
            long = max(texts, default=1) * max(counts, default=1) > _LONGEST_RESULT and bool(texts)
            long = long or any(abs(each) > 10**1000 for each in counts)
        elif operator == "**":
            long = any(abs(each) > 1000 for each in counts)
        else:
            long = isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{6,}|\*)", left) is not None
        if long:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too long")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A checkpoint's chat template, rendered in Jinja's sandbox.

    Attributes:
        knows_tools: whether it writes down the functions that may be called.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self.template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template is not valid Jinja: {error}") from error
        self.source, self.special_tokens = source, dict(special_tokens)
        self.knows_tools = "tools" in names

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        return ChatTemplate, (self.source, self.special_tokens)  # compiled templates do not pickle

    def render(
        self,
        messages: Sequence[Message],
        *,
        answer_next: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a chat, ending where the assistant's answer begins if ``answer_next``.

        ``tools``: functions that may be called, in OpenAI's form.
        """
        given = {} if tools is None else {"tools": list(tools)}
        try:
            return self.template.render(
                messages=list(messages),
                add_generation_prompt=answer_next,
                **given,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise PromptError(f"the chat template refused the messages: {error}") from error


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training; rendered here without effect."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
