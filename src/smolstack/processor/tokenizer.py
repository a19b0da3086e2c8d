"""The checkpoint's tokenizer, and text from a stream of tokens without half characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from smolstack.errors import CheckpointError

_LONG = 4096  # characters


class TextTokenizer:
    """A tokenizers.Tokenizer with the special tokens that its checkpoint's config names.

    Args:
        tokenizer_json: contents of tokenizer.json.
        config: tokenizer_config.json.
    """

    def __init__(self, tokenizer_json: bytes, config: Mapping[str, Any]) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        # A saved truncation or padding would cut or widen prompts silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = named_tokens(config)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the tokenizer's post-processor adds (a BOS, say).

        A prompt that starts with the BOS token already gets no second one.
        """
        bos = self.special_tokens.get("bos_token")
        if bos and text.startswith(bos):
            special = False
        if len(text) < _LONG:
            ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
            return ids
        # A batch of one lets other threads go on meanwhile, which encode does not.
        (found,) = self.backend.encode_batch([text], add_special_tokens=special)
        ids = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens are left out unless ``skip_special`` is False."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None when the vocabulary does not hold it."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """The token of an id, or None when the vocabulary does not hold it."""
        found: str | None = self.backend.id_to_token(token_id)
        return found

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text of n characters has at least n / longest."""
        return max(len(token) for token in self.backend.get_vocab(with_added_tokens=True))

    @property
    def size(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        count: int = self.backend.get_vocab_size(with_added_tokens=True)
        return count


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named tokens of tokenizer_config.json, as chat templates may use them ({{ bos_token }})."""
    named = dict(config)
    for holder in ("extra_special_tokens", "model_specific_special_tokens"):
        extra = config.get(holder)
        if isinstance(extra, Mapping):
            named.update(extra)
    tokens = {}
    for name, value in named.items():
        if not name.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens
