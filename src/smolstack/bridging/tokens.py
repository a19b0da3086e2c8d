"""Adds image tokens to a tokenizer, with ids after all others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken

from smolstack.checkpoint.tower import TextSource
from smolstack.errors import CheckpointError, ConfigError
from smolstack.processor.prompt import Markers
from smolstack.processor.tokenizer import named_tokens

END = "<end_of_utterance>"
NAMES = {
    "image_token": Markers.image,
    "fake_image_token": Markers.around,
    "global_image_token": Markers.whole,
    "end_of_utterance_token": END,
}
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
# Keys removed from tokenizer_config.json, because tokenizer.json determines them.
_STALE = ("auto_map", "backend", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with image tokens.

    Attributes:
        tokenizer_json: contents of tokenizer.json.
        config: tokenizer_config.json, without a chat template.
        added: the added tokens, by id.
        size: rows of the token embedding: the text tower's, or more if the tokens need them.
        image_token_id, end_id, pad_id: of ``<image>``, ``<end_of_utterance>`` and padding.
        notes: disagreements of the tokenizer's files, one sentence each.
    """

    tokenizer_json: bytes
    config: dict[str, Any]
    added: dict[int, str]
    size: int
    image_token_id: int
    end_id: int
    pad_id: int
    notes: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> dict[str, str]:
        """Return the named tokens that chat templates may use."""
        return named_tokens(self.config)


def image_tokens(tiles: int) -> list[str]:
    """Return the tokens of prompts with images of up to ``tiles`` × ``tiles`` tiles."""
    along = range(1, tiles + 1) if tiles > 1 else ()
    grid = [f"<row_{row}_col_{col}>" for row in along for col in along]
    return [Markers.whole, *grid, Markers.around, Markers.image, END]


def add_image_tokens(text: TextSource, tiles: int, processor_class: str) -> Vocabulary:
    """Add image tokens for a grid of tiles to a language model's tokenizer.

    Raises:
        CheckpointError: tokenizer.json cannot be read.
        ConfigError: new ids cannot be added after the existing ones.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(text.tokenizer_json)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{text.where}: tokenizer.json cannot be read: {error}") from error
    before: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    wanted = image_tokens(tiles)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in wanted])
    after: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    taken = set(before.values())
    added = {after[token]: token for token in wanted if token not in before}
    if taken & set(added) or any(after[token] != number for token, number in before.items()):
        raise ConfigError(
            f"{text.where} has a tokenizer of {len(before)} tokens with ids up to {max(taken)}; "
            "expected ids without gaps, after which there is room for image tokens"
        )
    config = dict(text.tokenizer_config)
    names = _names(text, config, before)
    for key in _STALE:
        config.pop(key, None)
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # transformers 5 lists tokens there, transformers 4 names them
        config.setdefault("additional_special_tokens", extra)
        extra = None
    named = extra if isinstance(extra, Mapping) else {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        config["added_tokens_decoder"] = {**decoder, **_described(backend, added)}
    config.update(names)
    config.pop("chat_template", None)
    config.update(
        tokenizer_class="PreTrainedTokenizerFast",
        processor_class=processor_class,
        padding_side="left",
        extra_special_tokens={**named, **NAMES},
    )
    config.setdefault("model_max_length", text.config.max_positions)
    return Vocabulary(
        tokenizer_json=backend.to_str().encode(),
        config=config,
        added=added,
        size=max(text.config.vocab_size, max(after.values()) + 1),
        image_token_id=after[Markers.image],
        end_id=after[END],
        pad_id=after[names["pad_token"]],
        notes=_doubts(text, backend, names),
    )


def _names(text: TextSource, config: dict[str, Any], known: Mapping[str, int]) -> dict[str, str]:
    """Return the begin, end and padding tokens; without a padding token, the end token pads."""
    by_id = {number: token for token, number in known.items()}
    ids = {
        "bos_token": text.config.bos_token_id,
        "eos_token": next(iter(text.config.eos_token_ids), None),
        "pad_token": text.config.pad_token_id,
    }
    names = named_tokens(config)
    found = {
        name: names.get(name) or by_id.get(-1 if number is None else number)
        for name, number in ids.items()
    }
    found["pad_token"] = found["pad_token"] or found["eos_token"] or END
    unknown = [
        f"{name} {token!r}"
        for name, token in found.items()
        if token is not None and token != END and token not in known
    ]
    if unknown:
        raise ConfigError(
            f"{text.where}: tokenizer_config.json names {', '.join(unknown)}, which tokenizer.json "
            "does not hold"
        )
    return {name: token for name, token in found.items() if token is not None}


def _doubts(
    text: TextSource, backend: tokenizers.Tokenizer, names: Mapping[str, str]
) -> tuple[str, ...]:
    """Return differences between tokenizer_config.json and tokenizer.json in begin and end tokens.

    How transformers resolves them depends on its version and on the tokenizer's class. The bridged
    model follows tokenizer.json.
    """
    ids, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    notes = []
    for name, added in (("bos", ids[:1] != plain[:1]), ("eos", ids[-1:] != plain[-1:])):
        wanted = text.tokenizer_config.get(f"add_{name}_token")
        if wanted is not None and bool(wanted) != added and f"{name}_token" in names:
            notes.append(
                f"{text.where}: tokenizer_config.json has add_{name}_token {bool(wanted)}, and "
                f"tokenizer.json {'adds' if added else 'does not add'} one; the latter counts"
            )
    return tuple(notes)


def _described(backend: tokenizers.Tokenizer, added: Mapping[int, str]) -> dict[str, Any]:
    """Return new tokens in the format of tokenizer_config.json's added tokens."""
    tokens = json.loads(backend.to_str())["added_tokens"]
    return {
        str(token["id"]): {"content": token["content"], **{flag: token[flag] for flag in _FLAGS}}
        for token in tokens
        if token["id"] in added
    }
