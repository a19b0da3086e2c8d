"""The checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from smolstack.errors import CheckpointError

_LONG = 4096  # characters


class TextTokenizer:
    """A tokenizers.Tokenizer with the special tokens named in the checkpoint's config.

    Args:
        tokenizer_json: contents of tokenizer.json.
        config: tokenizer_config.json.
    """

    def __init__(self, tokenizer_json: bytes, config: Mapping[str, Any]) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        # A saved truncation or padding setting would silently cut or pad prompts.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = named_tokens(config)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids; ``special`` adds the tokens of the post-processor, such as BOS.

        If the text already starts with the BOS token, no special tokens are added.
        """
        bos = self.special_tokens.get("bos_token")
        if bos and text.startswith(bos):
            special = False
        if len(text) < _LONG:
            ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
            return ids
        # encode_batch, unlike encode, lets other threads run meanwhile.
        (found,) = self.backend.encode_batch([text], add_special_tokens=special)
        ids = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode token ids to text; special tokens are omitted unless ``skip_special`` is False."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, or None if it is not in the vocabulary."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """Return the token of an id, or None if it is not in the vocabulary."""
        found: str | None = self.backend.id_to_token(token_id)
        return found

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token; n characters need at least n / longest tokens."""
        return max(len(token) for token in self.backend.get_vocab(with_added_tokens=True))

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, including added ones."""
        count: int = self.backend.get_vocab_size(with_added_tokens=True)
        return count


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens of tokenizer_config.json, as used by chat templates ({{ bos_token }})."""
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
