"""GGUF files of a checkpoint as llama.cpp's converter writes them, without llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file


def write_gguf(
    folder: Path, out: Path, kind: str = "F32", *, pre: str = "gpt-2"
) -> tuple[Path, Path]:
    """The language model's file and the vision tower's; matrices of the former in ``kind``."""
    out.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    text, tower = out / "model.gguf", out / "mmproj.gguf"
    _write_text(folder, text, config, weights, kind, pre)
    _write_tower(folder, tower, config, weights)
    return text, tower


def _write_text(
    folder: Path, path: Path, config: dict[str, Any], weights: dict[str, Any], kind: str, pre: str
) -> None:
    own = config["text_config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(own["num_hidden_layers"])
    writer.add_context_length(own["max_position_embeddings"])
    writer.add_embedding_length(own["hidden_size"])
    writer.add_feed_forward_length(own["intermediate_size"])
    writer.add_head_count(own["num_attention_heads"])
    writer.add_head_count_kv(own["num_key_value_heads"])
    writer.add_key_length(own["head_dim"])
    writer.add_rope_freq_base(own["rope_theta"])
    writer.add_rope_dimension_count(own["head_dim"])
    writer.add_layer_norm_rms_eps(own["rms_norm_eps"])
    writer.add_vocab_size(own["vocab_size"])
    add_tokenizer(writer, folder, own, pre)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, own["num_hidden_layers"])
    for name, tensor in weights.items():
        if "vision_model" in name or "connector" in name:
            continue
        theirs = table.get_name(name.replace("text_model.", ""), try_suffixes=(".weight", ".bias"))
        data = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = own["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = data.reshape(heads, 2, -1, data.shape[1])
            data = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))
        add_tensor(writer, theirs, data, kind if data.ndim == 2 else "F32")
    _finish(writer)


def add_tokenizer(writer: Any, folder: Path, own: dict[str, Any], pre: str) -> None:
    """Tokens, merges, types, ends and the chat template."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(tokenizer["model"]["vocab"])
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocabulary |= {text: token["id"] for text, token in added.items()}
    tokens = [text for text, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if text in added else 1 for text in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(own["bos_token_id"])
    writer.add_eos_token_id(own["eos_token_id"])
    writer.add_pad_token_id(own["pad_token_id"])
    writer.add_add_bos_token("TemplateProcessing" in str(tokenizer.get("post_processor")))
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _write_tower(folder: Path, path: Path, config: dict[str, Any], weights: dict[str, Any]) -> None:
    own = config["vision_config"]
    image = json.loads((folder / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(own["image_size"])
    writer.add_vision_patch_size(own["patch_size"])
    writer.add_vision_embedding_length(own["hidden_size"])
    writer.add_vision_feed_forward_length(own["intermediate_size"])
    writer.add_vision_block_count(own["num_hidden_layers"])
    writer.add_vision_head_count(own["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(own["layer_norm_eps"])
    writer.add_vision_image_mean(image["image_mean"])
    writer.add_vision_image_std(image["image_std"])
    writer.add_vision_projector_scale_factor(config["scale_factor"])
    writer.add_vision_preproc_image_size(image["size"]["longest_edge"])
    writer.add_vision_use_gelu(True)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, own["num_hidden_layers"])
    for name, tensor in weights.items():
        if "vision_model" in name or "connector" in name:
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            kind = "F16" if name.endswith("fc1.weight") else "F32"
            add_tensor(writer, theirs, tensor.float().numpy(), kind)
    _finish(writer)


def add_tensor(writer: Any, name: str | None, data: Any, kind: str) -> None:
    found = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, data.astype(np.float16 if kind == "F16" else np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(data, found), raw_dtype=found)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
