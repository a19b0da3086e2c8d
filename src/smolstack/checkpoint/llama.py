"""Opens a plain Llama as a text tower: a LlamaForCausalLM folder, or a GGUF file of architecture
llama.

SmolLM2, Llama 3 and TinyLlama are such models, and so are the decoders of this family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolstack.checkpoint import keys
from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import chat_template_of, read_json
from smolstack.checkpoint.gguf_config import end_ids
from smolstack.checkpoint.gguf_source import open_gguf_text
from smolstack.checkpoint.source import chosen
from smolstack.checkpoint.tower import TextSource, matching, refuse_other_weights, without
from smolstack.checkpoint.unsupported import refuse_other_kinds
from smolstack.checkpoint.weights import Entry, read_entries, read_tensors
from smolstack.config import TextConfig
from smolstack.errors import CheckpointError
from smolstack.model.decoder import Decoder
from smolstack.model.layers import TokenEmbedding

MODEL_TYPE = "llama"
_PREFIX, _TABLE, _HEAD = "model.", "embed_tokens.weight", "lm_head.weight"
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # computed from the config; stored in old files
# Defaults of transformers 5.24's LlamaConfig for keys that change results: files that are older
# than these keys imply these values.
_IMPLIED = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}


def open_llama(folder: Path) -> TextSource:
    """Open the text tower in a LlamaForCausalLM folder; weights stay on disk.

    Raises:
        CheckpointError, ConfigError: naming file, key, what was found and what was expected.
    """
    refuse_other_kinds(folder)
    data = read_json(folder / "config.json")
    refuse_other_weights(folder, data)
    data, notes = _with_implied(folder, data)
    config = TextConfig.from_hf(data, str(folder / "config.json"))
    entries = read_entries(folder)
    bare = _TABLE in entries
    prefix = "" if bare else _PREFIX
    tied = _tied(folder, data, entries, prefix + _TABLE)
    twice = tied and _HEAD in entries
    stored = Stored(folder, entries, lambda names: read_tensors(folder, chosen(entries, names)))
    kept = without(stored, lambda name: bool(_BUFFER.fullmatch(name)) or (twice and name == _HEAD))

    def theirs(name: str) -> str:
        return keys.to_hf(name).replace("model.text_model.", prefix, 1)

    read, dtype = matching(folder, _expected(config, tied), kept, theirs)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; transformers' "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
        )
    tokenizer_config = {**_map_of_tokens(folder), **_optional(folder / "tokenizer_config.json")}
    return TextSource(
        where=folder,
        config=config,
        tied=tied,
        weights=read,
        dtype=dtype,
        tokenizer_json=(folder / "tokenizer.json").read_bytes(),
        tokenizer_config=tokenizer_config,
        chat_template=chat_template_of(lambda name: folder / name, {}, tokenizer_config),
        generation=_optional(folder / "generation_config.json"),
        notes=tuple(notes),
    )


def open_llama_gguf(path: Path) -> TextSource:
    """Open the text tower in a GGUF file of architecture llama; blocks are dequantized to float32
    when read.

    Raises:
        CheckpointError: the file cannot be read, has another architecture, or its tokenizer is not
            byte-level BPE.
    """
    file, vocabulary, data, stored = open_gguf_text(path)
    config = TextConfig.from_hf(data, str(path))
    tied = _HEAD not in stored.entries
    read, dtype = matching(path, _expected(config, tied), stored, keys.to_hf)
    kinds = sorted({entry.stored for entry in stored.entries.values() if entry.stored})
    note = f"{path} contains {', '.join(kinds)} blocks, which are dequantized to floats"
    return TextSource(
        where=path,
        config=config,
        tied=tied,
        weights=read,
        dtype=dtype,
        tokenizer_json=vocabulary.tokenizer_json,
        tokenizer_config=vocabulary.config,
        chat_template=file.value("tokenizer.chat_template", str, None),
        generation={"eos_token_id": end_ids(file, vocabulary)},
        notes=(note,) if kinds else (),
    )


def _expected(config: TextConfig, tied: bool) -> dict[str, Tensor]:
    with torch.device("meta"):
        decoder = Decoder(config)
        head = TokenEmbedding(config.vocab_size, config.hidden_size)
    found = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    return found if tied else {**found, "head.weight": head.weight}


def _with_implied(folder: Path, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return config.json with the values that LlamaConfig fills in, and notes."""
    found, notes = dict(data), []
    inner = found.get("rope_parameters") or found.get("rope_scaling")
    inside = isinstance(inner, Mapping) and "rope_theta" in inner
    for key, value in _IMPLIED.items():
        if found.get(key) is None and not (key == "rope_theta" and inside):
            found[key] = value
            notes.append(f"{folder}: config.json has no {key}; it is {value:g}, LlamaConfig's")
    return found, notes


def _tied(folder: Path, data: Mapping[str, Any], entries: Mapping[str, Entry], table: str) -> bool:
    """Return whether the head is tied to the token embedding; flag and weights must agree."""
    flag = data.get("tie_word_embeddings") is True  # LlamaConfig's default is False
    if _HEAD not in entries:
        if not flag:
            raise CheckpointError(
                f"{folder} has no {_HEAD}, and its config.json does not say tie_word_embeddings; "
                "expected a LlamaForCausalLM with a language head"
            )
        return True
    if not flag or table not in entries:
        return False
    both = {name: entries[name] for name in (_HEAD, table)}
    held = dict(read_tensors(folder, both))
    return held[_HEAD].shape == held[table].shape and torch.equal(held[_HEAD], held[table])


def _map_of_tokens(folder: Path) -> dict[str, Any]:
    """Return the named tokens of older folders, which tokenizer_config.json may omit."""
    found = _optional(folder / "special_tokens_map.json")
    return {name: token for name, token in found.items() if name.endswith("_token")}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
