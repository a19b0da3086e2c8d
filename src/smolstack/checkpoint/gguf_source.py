"""Reads GGUF models as llama.cpp's converter writes them: text and vision in separate files.

Metadata is converted to the files of a checkpoint folder; tensors get their Hugging Face names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smolstack.checkpoint.entries import Stored
from smolstack.checkpoint.files import CheckpointFiles
from smolstack.checkpoint.gguf_blocks import to_floats
from smolstack.checkpoint.gguf_config import files_of, text_config
from smolstack.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from smolstack.checkpoint.gguf_tokenizer import Vocabulary, read_vocabulary
from smolstack.checkpoint.hub import GGUF, ModelPath
from smolstack.checkpoint.weights import Entry
from smolstack.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_TEXT, _VISION = "model.text_model", "model.vision_model"
_TABLE = (
    (r"token_embd", f"{_TEXT}.embed_tokens"),
    (r"output_norm", f"{_TEXT}.norm"),
    (r"output", "lm_head"),
    (r"blk\.(\d+)\.attn_norm", rf"{_TEXT}.layers.\1.input_layernorm"),
    (r"blk\.(\d+)\.ffn_norm", rf"{_TEXT}.layers.\1.post_attention_layernorm"),
    (r"blk\.(\d+)\.attn_([qkv])", rf"{_TEXT}.layers.\1.self_attn.\2_proj"),
    (r"blk\.(\d+)\.attn_output", rf"{_TEXT}.layers.\1.self_attn.o_proj"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)", rf"{_TEXT}.layers.\1.mlp.\2_proj"),
    (r"v\.patch_embd", f"{_VISION}.embeddings.patch_embedding"),
    (r"v\.position_embd", f"{_VISION}.embeddings.position_embedding"),
    (r"v\.post_ln", f"{_VISION}.post_layernorm"),
    (r"v\.blk\.(\d+)\.ln([12])", rf"{_VISION}.encoder.layers.\1.layer_norm\2"),
    (r"v\.blk\.(\d+)\.attn_([qkv])", rf"{_VISION}.encoder.layers.\1.self_attn.\2_proj"),
    (r"v\.blk\.(\d+)\.attn_out", rf"{_VISION}.encoder.layers.\1.self_attn.out_proj"),
    (r"v\.blk\.(\d+)\.ffn_up", rf"{_VISION}.encoder.layers.\1.mlp.fc1"),
    (r"v\.blk\.(\d+)\.ffn_down", rf"{_VISION}.encoder.layers.\1.mlp.fc2"),
    (r"mm\.model\.fc", "model.connector.modality_projection.proj"),
)
_DERIVED = ("rope_freqs.weight",)  # computed from the config (gguf_config.py compares them)
_TURNED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


@dataclass(frozen=True)
class _Held:
    """A tensor, its file, and the order of its rows (None: unchanged)."""

    file: GgufFile
    tensor: GgufTensor
    order: npt.NDArray[np.int64] | None = None

    def read(self) -> Tensor:
        rows, flat = self.file.rows(self.tensor), len(self.tensor.shape) == 1
        if self.order is not None and not flat:
            rows = rows[self.order]  # complete rows of blocks: nothing is dequantized
        floats = to_floats(rows, self.tensor.kind)
        if self.order is not None and flat:
            floats = floats[:, self.order]
        return floats.reshape(self.tensor.shape)


def open_gguf(where: ModelPath) -> tuple[CheckpointFiles, Stored]:
    """Open the files and weights of a GGUF model: its language model and its vision tower.

    Raises:
        CheckpointError: a file is missing, cannot be read, or belongs to another model.
    """
    if where.base is not None:
        raise CheckpointError(
            f"{where.path} is a GGUF file, but a base was given, which only adapters have: "
            f"{where.base}"
        )
    text = read_gguf(where.path)
    _check_role(text, "llama")
    if where.mmproj is None:
        raise CheckpointError(
            f"{where.path} contains only a language model; pass the GGUF file of its vision tower "
            f"as mmproj (--mmproj){_beside(where)}"
        )
    vision = read_gguf(where.mmproj)
    _check_role(vision, "clip")
    files = files_of(where, text, vision)
    held = _held(text, files.config["text_config"]) | _held(vision, None)
    return files, _stored(where.path.parent, held)


def _stored(folder: Path, held: Mapping[str, _Held]) -> Stored:
    entries = {
        name: Entry(
            one.file.path.name,
            one.tensor.shape,
            one.tensor.kind.dtype,
            "" if one.tensor.kind.dtype == one.tensor.kind.name else one.tensor.kind.name,
        )
        for name, one in held.items()
    }

    def read(names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        for name in held if names is None else names:
            yield name, held[name].read()

    return Stored(folder, entries, read)


def open_gguf_text(path: Path) -> tuple[GgufFile, Vocabulary, dict[str, Any], Stored]:
    """Open a language model's GGUF file alone: header, tokenizer, ``text_config`` and weights.

    Raises:
        CheckpointError: as :func:`open_gguf`.
    """
    text = read_gguf(path)
    _check_role(text, "llama")
    vocabulary = read_vocabulary(text)
    config = text_config(text, vocabulary)
    return text, vocabulary, config, _stored(path.parent, _held(text, config))


def _check_role(file: GgufFile, expected: str) -> None:
    """Check that the file contains the expected kind of model."""
    found = file.value("general.architecture", str)
    if found == expected:
        parts = file.value("split.count", int, 1)
        if parts > 1:
            raise CheckpointError(
                f"{file.path} is one of {parts} parts; merge them with llama-gguf-split --merge"
            )
        return
    if expected == "llama" and found == "clip":
        raise CheckpointError(
            f"{file.path} contains a vision tower; pass it as mmproj (--mmproj), and the language "
            "model's file as the model"
        )
    what = "a vision tower (clip)" if expected == "clip" else "a language model (llama)"
    raise CheckpointError(f"{file.path} holds {found!r:.40}, expected {what}")


def _beside(where: ModelPath) -> str:
    """List files next to a language model that may contain its vision tower."""
    names = sorted(
        path.name
        for path in where.path.parent.glob(f"*{GGUF}")
        if "mmproj" in path.name.lower() and path != where.path
    )
    return f"; the folder also contains {', '.join(names[:4])}" if names else ""


def _held(file: GgufFile, text: dict[str, Any] | None) -> dict[str, _Held]:
    """Return the tensors of a file by Hugging Face name."""
    swapped = _swapped(file)
    found: dict[str, _Held] = {}
    for name, tensor in file.tensors.items():
        if name in _DERIVED:
            continue
        ours = _hf_name(name)
        if swapped:
            ours = re.sub(r"\.mlp\.fc([12])\.", _other, ours)
        order = None
        turned = _TURNED.fullmatch(name)
        if turned is not None and text is not None:
            key = "num_attention_heads" if turned[1] == "q" else "num_key_value_heads"
            order = _halves(file, tensor, text[key])
        found[ours] = _Held(file, tensor, order)
    return found


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of a tensor; unknown names are returned unchanged."""
    module, _, kind = name.rpartition(".")
    for pattern, ours in _TABLE:
        match = re.fullmatch(pattern, module)
        if match is not None:
            return f"{match.expand(ours)}.{kind}"
    return name


def _halves(file: GgufFile, tensor: GgufTensor, heads: int) -> npt.NDArray[np.int64]:
    """Return the row order that converts queries or keys to Hugging Face's rotation.

    llama.cpp rotates adjacent pairs (2i, 2i + 1) of a head's K channels, Hugging Face pairs
    (i, i + K/2); llama.cpp's converter permutes the rows accordingly.
    """
    count = tensor.shape[0]
    if count % (2 * heads):
        raise CheckpointError(
            f"{file.path} has {tensor.name} as {list(tensor.shape)}, which {heads} heads of pairs "
            "of channels do not divide"
        )
    rows = np.arange(count, dtype=np.int64).reshape(heads, count // heads // 2, 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(-1))


def _swapped(file: GgufFile) -> bool:
    """Return whether the tower's up and down projections have each other's names, as early
    converters wrote them.
    """
    up = file.tensors.get("v.blk.0.ffn_up.weight")
    patches = file.tensors.get("v.patch_embd.weight")
    if up is None or patches is None or len(up.shape) != 2:
        return False
    hidden = patches.shape[0]
    return up.shape[0] == hidden != up.shape[1]


def _other(found: re.Match[str]) -> str:
    """Return the other one of fc1 and fc2."""
    return ".mlp.fc2." if found[1] == "1" else ".mlp.fc1."
