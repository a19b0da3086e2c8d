"""The loss mask: only the assistant's text and the token that ends its turn
contribute to the loss.

Chat templates are arbitrary programs, so the answer's positions are determined by rendering: the
chat up to an answer is rendered as a prompt, as it will be when the model is used, and the complete
chat is rendered once. If the prompt's tokens are the beginning of the complete chat's tokens, the
answer's tokens follow them. If not, the template is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolstack.errors import DataError, SmolstackError
from smolstack.processor.geometry import TilePlan, Tiling
from smolstack.processor.inputs import ImageInput
from smolstack.processor.processor import Processor
from smolstack.processor.prompt import Message, expand_placeholders, split_messages
from smolstack.train.data import EMPTY_ANSWER_ADVICE, Example

IGNORED = -100


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenized example.

    Attributes:
        name: the example's name.
        token_ids: tokens of the whole chat, including image tokens.
        labels: the same ids where a token contributes to the loss, IGNORED elsewhere.
        images, plans: its images and their tile plans, in order.
    """

    name: str
    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[ImageInput, ...]
    plans: tuple[TilePlan, ...]

    @property
    def supervised(self) -> int:
        """Number of tokens that contribute to the loss. (The first token of a chat never does:
        nothing precedes it.)
        """
        return sum(label != IGNORED for label in self.labels)


class Supervisor:
    """Tokenizes examples and computes their loss masks.

    Args:
        processor: chat template, planner and tokenizer of the checkpoint.
        end_ids: tokens that end the assistant's turn.
        max_tokens: maximum length; 0: the model's context.
        tiling: how images are split into tiles.
    """

    def __init__(
        self,
        processor: Processor,
        end_ids: Sequence[int],
        max_tokens: int = 0,
        tiling: Tiling | None = None,
    ) -> None:
        self.processor, self.end_ids = processor, frozenset(end_ids)
        context = processor.config.text.max_positions
        self.limit = min(max_tokens or context, context)
        self.tiling: Tiling = tiling or {}

    def __call__(self, example: Example) -> TokenizedExample:
        """Return an example as tokens and labels.

        Raises:
            DataError: names the example: the chat is malformed or has no answer, it has more tokens
                than the limit, an image cannot be opened, or the template breaks the rule above.
        """
        try:
            return self._tokenized(example)
        except DataError:
            raise
        except SmolstackError as error:
            raise DataError(f"{example.name}: {error}") from error

    def _tokenized(self, example: Example) -> TokenizedExample:
        messages, images = split_messages(example.messages)
        self._check(example.name, messages, images)
        plans = tuple(self.processor.plan(image, **self.tiling) for image in images)
        whole = self._tokens(messages, plans, answer_next=False)
        labels = [IGNORED] * len(whole)
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._tokens(messages[:place], plans, answer_next=True)
                start, end = self._span(example.name, place, prompt, whole)
                labels[start:end] = whole[start:end]
        if len(whole) > self.limit:
            visual = sum(plan.visual_tokens for plan in plans)
            raise DataError(
                f"{example.name} has {len(whole)} tokens ({visual} of them visual), the limit is "
                f"{self.limit}; truncation would cut an image or an answer"
            )
        return TokenizedExample(example.name, tuple(whole), tuple(labels), tuple(images), plans)

    def _tokens(
        self, messages: Sequence[Message], plans: Sequence[TilePlan], *, answer_next: bool
    ) -> list[int]:
        images = sum(part["type"] == "image" for m in messages for part in m["content"])
        text = self.processor.render(messages, answer_next=answer_next)
        text = expand_placeholders(text, plans[:images], self.processor.markers)
        return self.processor.tokenizer.encode(text)

    def _span(self, name: str, place: int, prompt: list[int], whole: list[int]) -> tuple[int, int]:
        """Return the range of the answer after ``prompt`` in ``whole``, including its end token."""
        start = len(prompt)
        if whole[:start] != prompt:
            same = sum(1 for _ in _common(prompt, whole))
            around = self.processor.tokenizer.decode(prompt[same : same + 8], skip_special=False)
            raise DataError(
                f"{name}: the chat template renders a prompt that is not a prefix of the whole "
                f"chat: before the answer of message {place}, token {same} of the prompt "
                f"({around!r} …) differs, so the answer's tokens cannot be located"
            )
        ends = (i for i in range(start, len(whole)) if whole[i] in self.end_ids)
        end = next(ends, None)
        if end is None:
            wanted = [self.processor.tokenizer.token(i) for i in sorted(self.end_ids)]
            raise DataError(
                f"{name}: the chat template writes no end token (one of {wanted}) after the "
                f"answer of message {place}; the model would never learn to stop"
            )
        return start, end + 1

    def _check(
        self, name: str, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]
    ) -> None:
        answers = [m for m in messages if m["role"] == "assistant"]
        if not answers:
            raise DataError(f"{name} has no assistant message, so it has no loss")
        if messages[0]["role"] == "assistant":
            raise DataError(f"{name} begins with an assistant message, expected a user message")
        if any(image is None for image in images):
            raise DataError(f"{name} has an image part without an image")
        for message in answers:
            if any(part["type"] == "image" for part in message["content"]):
                raise DataError(f"{name} has an image in an assistant message")
        tokenizer = self.processor.tokenizer
        image = self.processor.markers.image
        ends = [t for t in map(tokenizer.token, self.end_ids) if t is not None]
        for place, message in enumerate(messages):
            text = "".join(part.get("text", "") for part in message["content"])
            if image in text:
                raise DataError(
                    f"{name} has {image} in the text of message {place}, expected an image "
                    'part instead: "content": [{"type": "image"}, {"type": "text", "text": …}]'
                )
            for token in ends:
                if token in text:
                    raise DataError(
                        f"{name} has the end-of-turn token {token} in its text; remove it, the "
                        "chat template adds it"
                    )
            if message["role"] == "assistant" and not text.strip():
                raise DataError(
                    f"{name} has an empty answer in message {place}; {EMPTY_ANSWER_ADVICE}"
                )


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return the common prefix of two token sequences."""
    shared = []
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared.append(one)
    return shared
