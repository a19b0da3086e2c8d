"""Writes the decoder of a checkpoint as a GGUF file, in llama.cpp's number formats.

Matrices, including head and token embedding, are quantized by the package ``gguf``. No vocabulary
is written, because token ids are given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from smolstack.checkpoint.save import hf_state_dict
from smolstack.config import TextConfig
from smolstack.vlm import load

FORMATS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_ENDINGS = (".weight", ".bias")


def write_decoder(folder: Path, path: Path, precision: str) -> Path:
    """Write the decoder of a checkpoint folder.

    Args:
        precision: one of FORMATS.
    """
    import gguf

    model = load(folder, dtype="float32").model
    text = model.config.text
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, text)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text.num_layers)
    wanted = gguf.GGMLQuantizationType[FORMATS[precision]]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for name, tensor in hf_state_dict(model).items():
        if "vision_model" in name or "connector" in name:
            continue
        known = str(table.get_name(name.replace("text_model.", ""), try_suffixes=_ENDINGS))
        array = tensor.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = text.num_heads if "q_proj" in name else text.num_kv_heads
            array = rotation_order(array, heads)
        if array.ndim == 1:
            writer.add_tensor(known, array.astype(np.float32))
        else:
            # Rows that are not a multiple of the block size stay in 16 bits, as in llama.cpp's
            # quantizer.
            fits = array.shape[1] % block == 0
            kind = wanted if fits else gguf.GGMLQuantizationType.F16
            writer.add_tensor(known, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: Any, text: TextConfig) -> None:
    writer.add_block_count(text.num_layers)
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope.theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("none")


def rotation_order(weight: Any, heads: int) -> Any:
    """Return rows in llama.cpp's rotation order: pairs (2i, 2i + 1), not (i, i + K/2)."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
