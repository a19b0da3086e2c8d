"""Tokenizes the text of special tokens in messages as plain characters.

A tokenizer converts the text ``<|im_start|>`` to the special token wherever it occurs, so the
author of a message could forge a turn. Here, the texts of messages are marked before the chat
template is applied. A second tokenizer, whose special tokens have names that cannot occur in a
text, then converts only the special tokens written by the template.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from smolstack.errors import CheckpointError, PromptError
from smolstack.processor.tokenizer import TextTokenizer

# Noncharacters, which valid text does not contain.
_NAME, _BREAK = "\ufdd0", "\ufdd1"


class LiteralText:
    """Marks texts, and tokenizes prompts that contain marked texts.

    Args:
        tokenizer: the checkpoint's tokenizer.
        markers: image markers, in addition to the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, markers: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().values()
        known = {token.content for token in added}
        controls = {token.content for token in added if token.special}
        controls |= known.intersection(markers)
        self.controls = sorted({*controls, *markers}, key=len, reverse=True)
        names = "|".join(map(re.escape, self.controls))
        self._begins, self._whole = re.compile(f"(?={names})"), re.compile(names)
        self._known = controls
        self._parts = {name[:end] for name in self.controls for end in range(1, len(name))}
        self._longest = len(self.controls[0])
        self._markers = tuple(markers)
        self._lock = threading.Lock()
        self._renamed: tokenizers.Tokenizer | None = None

    def __reduce__(self) -> tuple[type[LiteralText], tuple[TextTokenizer, tuple[str, ...]]]:
        return LiteralText, (self.tokenizer, self._markers)  # locks are not pickled

    def mark_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in whose texts the special tokens are marked as text.

        Roles and types of parts are not changed, because they are not the author's. Fields of the
        same names at deeper levels, such as in a call's arguments, are.

        Raises:
            PromptError: a text contains one of the characters used as marks.
        """
        made = []
        for message in messages:
            marked = self._marked_but(message, "role")
            if isinstance(parts := message.get("content"), (list, tuple)):
                marked["content"] = [
                    self._marked_but(part, "type") if isinstance(part, Mapping) else self.mark(part)
                    for part in parts
                ]
            made.append(marked)
        return made

    def _marked_but(self, value: Mapping[str, Any], name: str) -> dict[str, Any]:
        made: dict[str, Any] = self.mark(value)
        return {**made, name: value[name]} if isinstance(value.get(name), str) else made

    def mark(self, value: Any) -> Any:
        """Mark the special tokens in a text, or in all texts inside an object, as text.

        Raises:
            PromptError: a text contains the character used as a mark.
        """
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(each) for each in value]
        return value

    def _marked(self, text: str) -> str:
        for mark in (_NAME, _BREAK):
            if mark in text:
                raise PromptError(
                    f"a text contains the noncharacter U+{ord(mark):04X}, expected characters"
                )
        # A mark goes after the first character, also if the token only forms with what follows.
        places = {found.start() + 1 for found in self._begins.finditer(text)}
        for length in range(1, min(self._longest, len(text)) + 1):
            if text[-length:] in self._parts:
                places.add(len(text) - length + 1)
        pieces, begin = [], 0
        for place in sorted(places):
            pieces.append(text[begin:place])
            begin = place
        return _BREAK.join([*pieces, text[begin:]])

    def shown(self, text: str) -> str:
        """Return a text without marks."""
        return text.replace(_BREAK, "")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt that contains marked texts."""
        if _BREAK not in text and self.tokenizer.backend.normalizer is None:
            return self.tokenizer.encode(text)  # contains no special token
        bos = self.tokenizer.special_tokens.get("bos_token")
        special = not (bos and text.startswith(bos))
        named = self._whole.sub(self._name, text).replace(_BREAK, "")
        (found,) = self._backend().encode_batch([named], add_special_tokens=special)
        ids: list[int] = found.ids
        return ids

    def _name(self, found: re.Match[str]) -> str:
        return _NAME + found[0] if found[0] in self._known else found[0]

    def _backend(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._renamed is None:
                self._renamed = _renamed(self.tokenizer.backend, self._known)
            return self._renamed


def _renamed(backend: tokenizers.Tokenizer, names: set[str]) -> tokenizers.Tokenizer:
    """Return the tokenizer with a mark before the names of its special tokens.

    Raises:
        CheckpointError: the special tokens cannot be renamed.
    """
    data = json.loads(backend.to_str())
    model = data["model"]
    for token in data["added_tokens"]:
        if token["content"] in names:
            token["content"] = _NAME + token["content"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {_NAME + t if t in names else t: number for t, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[_NAME + t if t in names else t, score] for t, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = _NAME + model["unk_token"]
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.no_truncation()
    made.no_padding()
    for name in names:
        if made.encode(_NAME + name, add_special_tokens=False).ids != [backend.token_to_id(name)]:
            raise CheckpointError(
                f"tokenizer.json has the token {name!r}, which cannot be told apart from the same "
                "characters in a text; expected an added token (or special_tokens_in_text)"
            )
    return made
