"""Builds a tokenizer from a GGUF file's metadata: byte-level BPE, as the models of the family
use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from smolstack.checkpoint.gguf_file import GgufFile
from smolstack.errors import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How text is split into words before BPE merges.

    Attributes:
        build: makes the pre-tokenizer of the tokenizers library.
        whole: whether a word that is a token is used directly, without merges.
        begins: whether a beginning-of-text token is prepended if the file does not say.
    """

    build: Callable[[], Any]
    whole: bool = False
    begins: bool = False


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level()])


def _llama3() -> Any:
    words = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, letters])


# Keys are llama.cpp's names (llama-vocab.cpp).
_PRE = {
    "gpt-2": _Pre(_byte_level),
    "granite-docling": _Pre(_byte_level),
    "smollm": _Pre(_single_digits),
    "llama-bpe": _Pre(_llama3, whole=True, begins=True),
    "llama3": _Pre(_llama3, whole=True, begins=True),
    "llama-v3": _Pre(_llama3, whole=True, begins=True),
}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class Vocabulary:
    """A file's tokenizer: tokenizer.json, tokenizer_config.json, and the tokens by id."""

    tokenizer_json: bytes
    config: dict[str, Any]
    tokens: list[str]

    def id_of(self, token: str) -> int | None:
        """Return a token's id, or None."""
        return self.tokens.index(token) if token in self.tokens else None


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Read the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the tokenizer's type is not supported, or its data is inconsistent.
    """
    model, pre = (file.value(f"tokenizer.ggml.{key}", str) for key in ("model", "pre"))
    if model != "gpt2" or pre not in _PRE:
        raise CheckpointError(
            f"{file.path} has a tokenizer {model!r:.40} with pre-tokenizer {pre!r:.40}, expected "
            f"'gpt2' (byte-level BPE) with one of {sorted(_PRE)}"
        )
    tokens = file.value("tokenizer.ggml.tokens", list)
    merges = file.value("tokenizer.ggml.merges", list, [])
    kinds = file.value("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if not all(isinstance(text, str) for text in (*tokens, *merges)) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, {len(merges)} merges and {len(kinds)} token "
            "types, expected texts, and a type for each token"
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, of which {len(tokens) - len(vocabulary)} are "
            "the same as others"
        )
    chosen = _PRE[pre]
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=chosen.whole)
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{file.path} has an invalid tokenizer: {error}") from error
    tokenizer.pre_tokenizer, tokenizer.decoder = chosen.build(), decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [text for text, found in zip(tokens, kinds, strict=True) if found == kind and text]
        added = [AddedToken(text, normalized=False, special=special) for text in texts]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    config = _config(file, tokens)
    if file.value("tokenizer.ggml.add_bos_token", bool, chosen.begins) and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary[bos])],
        )
    return Vocabulary(tokenizer.to_str().encode(), config, tokens)


def _config(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    """Return tokenizer_config.json: the tokens with a special role."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    for role, name in _ROLES.items():
        key = f"tokenizer.ggml.{role}_token_id"
        number = file.value(key, int, None)
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise CheckpointError(f"{file.path} has {key} {number}, but only {len(tokens)} tokens")
        config[name] = tokens[number]
    return config
