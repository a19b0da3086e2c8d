"""Converts nanoVLM checkpoints, which are the same models under other names.

nanoVLM keeps a flat config.json (``vit_…``, ``lm_…``, ``mp_…``) and one weight file, and takes its
tokenizer from another repository, to which it adds ``vlm_extra_tokens`` after the last id. Its
tower joins query, key and value in one matrix; its pixel shuffle orders features as this family's
does: (dy·s + dx)·C + c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.checkpoint.files import read_json
from smolstack.checkpoint.nanovlm_files import extra_tokens, side_files, tokenizer_json
from smolstack.checkpoint.save import save_checkpoint
from smolstack.checkpoint.unsupported import peek
from smolstack.checkpoint.weights import read_entries, read_tensors
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.config.reading import Reader
from smolstack.errors import CheckpointError, ConfigError
from smolstack.processor.tokenizer import named_tokens

if TYPE_CHECKING:
    from torch import Tensor

# Options of nanoVLM that this family supports with these values only.
_FIXED: Mapping[str, Any] = {"vit_cls_flag": False, "lm_attn_scaling": 1.0}
# Keys that do not change what a trained model computes.
_IGNORED = (
    "extra_token_amount",
    "hf_repo_name",
    "lm_base_vocab_size",
    "lm_dropout",
    "lm_eos_token_id",
    "lm_max_length",
    "lm_model_type",
    "lm_use_tokens",
    "max_img_size",
    "resize_to_max_side_len",
    "vit_dropout",
    "vit_model_type",
    "vlm_checkpoint_path",
    "vlm_load_backbone_weights",
)
_READ = (
    "lm_chat_template",
    "lm_hidden_dim",
    "lm_inter_dim",
    "lm_max_position_embeddings",
    "lm_n_blocks",
    "lm_n_heads",
    "lm_n_kv_heads",
    "lm_re_base",
    "lm_rms_eps",
    "lm_tie_weights",
    "lm_tokenizer",
    "lm_vocab_size",
    "mp_image_token_length",
    "mp_pixel_shuffle_factor",
    "vit_hidden_dim",
    "vit_img_size",
    "vit_inter_dim",
    "vit_ln_eps",
    "vit_n_blocks",
    "vit_n_heads",
    "vit_patch_size",
    "vlm_extra_tokens",
)
_NAMES = {
    "vision_encoder.patch_embedding.conv": "vision.patch_embedding",
    "vision_encoder.layer_norm": "vision.norm",
    "MP.proj": "connector.proj",
    "decoder.token_embedding": "decoder.embedding",
    "decoder.norm": "decoder.norm",
    "decoder.head": "head",
}
_VISION_LAYER = {
    "ln1": "attention_norm",
    "ln2": "mlp_norm",
    "attn.out_proj": "attention.out",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
_TEXT_LAYER = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn.q_proj": "attention.query",
    "attn.k_proj": "attention.key",
    "attn.v_proj": "attention.value",
    "attn.out_proj": "attention.out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_POSITIONS = "vision_encoder.patch_embedding.position_embedding"
_JOINED = "attn.qkv_proj"
_COMPUTED = "decoder.rotary_embd.inv_freq"  # a buffer that follows from lm_re_base


def tokenizer_of(folder: Path) -> str:
    """Return the folder or hub id of the tokenizer that a nanoVLM checkpoint names."""
    return Reader(f"{folder / 'config.json'}", read_json(folder / "config.json"), {}).string(
        "lm_tokenizer"
    )


def convert_nanovlm(
    folder: Path, tokenizer: Path, out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a nanoVLM checkpoint as a Hugging Face folder of this family.

    Args:
        folder: with nanoVLM's config.json and model.safetensors.
        tokenizer: a folder with the tokenizer.json that ``lm_tokenizer`` names, without the tokens
            of ``vlm_extra_tokens``.
        out: must not exist or be empty, unless ``overwrite``.

    Raises:
        ConfigError, CheckpointError: naming the key or tensor; nothing is written.
    """
    import torch

    from smolstack.model.vlm import VisionLanguageModel

    raw = read_json(folder / "config.json")
    extra = extra_tokens(folder, raw)
    words, image_token_id = tokenizer_json(tokenizer, raw, extra)
    config = read_config(folder, raw, image_token_id)
    state = dict(_weights(folder, config))
    if config.tied:
        tensors = [state.pop("head.weight", None), state.get("decoder.embedding.weight")]
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) == 2 and not torch.equal(*found):
            raise CheckpointError(
                f"{folder} has lm_tie_weights true, but decoder.head.weight differs from "
                "decoder.token_embedding.weight"
            )
        if found:  # safetensors stores shared tensors once, under either name
            state["decoder.embedding.weight"] = found[0]
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    _check(folder, state, model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    ending = named_tokens(peek(tokenizer / "tokenizer_config.json")).get("eos_token")
    side = side_files(raw, config, extra, words, ending)
    return save_checkpoint(out, model.eval(), side, overwrite=overwrite)


def read_config(folder: Path, raw: Mapping[str, Any], image_token_id: int) -> ModelConfig:
    """Read the sizes of both towers from nanoVLM's config.json."""
    where = f"{folder / 'config.json'}"
    for key, known in _FIXED.items():
        if raw.get(key, known) != known:
            raise ConfigError(f"{where} has {key} {raw[key]!r}; only {known!r} is supported")
    unknown = sorted(
        key
        for key, value in raw.items()
        if value and key not in (*_FIXED, *_IGNORED, *_READ) and not key.startswith("freeze_")
    )
    if unknown:
        raise ConfigError(
            f"{where} has {unknown[0]} {raw[unknown[0]]!r:.60}, a key that nanoVLM does not "
            "have; its effect on the model cannot be converted"
        )
    get = Reader(where, raw, {"lm_tie_weights": True})
    hidden, heads = get.integer("lm_hidden_dim"), get.integer("lm_n_heads")
    if heads < 1 or hidden % heads:
        raise ConfigError(
            f"{where} has lm_hidden_dim {hidden}, not a multiple of lm_n_heads {heads}"
        )
    config = ModelConfig(
        VisionConfig(
            hidden_size=get.integer("vit_hidden_dim"),
            intermediate_size=get.integer("vit_inter_dim"),
            num_layers=get.integer("vit_n_blocks"),
            num_heads=get.integer("vit_n_heads"),
            image_size=get.integer("vit_img_size"),
            patch_size=get.integer("vit_patch_size"),
            layer_norm_eps=get.number("vit_ln_eps"),
        ),
        TextConfig(
            rope=RopeConfig(get.number("lm_re_base")),
            vocab_size=get.integer("lm_vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.integer("lm_inter_dim"),
            num_layers=get.integer("lm_n_blocks"),
            num_heads=heads,
            num_kv_heads=get.integer("lm_n_kv_heads"),
            head_dim=hidden // heads,
            max_positions=get.integer("lm_max_position_embeddings"),
            rms_norm_eps=get.number("lm_rms_eps"),
        ),
        scale=get.integer("mp_pixel_shuffle_factor"),
        image_token_id=image_token_id,
        tied=bool(get.value("lm_tie_weights")),
    )
    told = raw.get("mp_image_token_length", config.tokens_per_tile)
    if told != config.tokens_per_tile:
        raise ConfigError(
            f"{where} has mp_image_token_length {told!r}, but its other keys give "
            f"{config.tokens_per_tile} visual tokens per image"
        )
    return config


def _weights(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    width = config.vision.hidden_size
    for name, tensor in read_tensors(folder, read_entries(folder)):
        path, _, kind = name.rpartition(".")
        part, _, rest = path.partition(".blocks.")
        index, _, layer = rest.partition(".")
        if name == _COMPUTED:
            continue
        if name == _POSITIONS:
            yield "vision.position_embedding.weight", tensor.reshape(-1, tensor.shape[-1])
        elif path in _NAMES:
            yield f"{_NAMES[path]}.{kind}", tensor
        elif part == "vision_encoder" and layer == _JOINED and tensor.shape[0] == 3 * width:
            pieces = tensor.chunk(3)
            for own, piece in zip(("query", "key", "value"), pieces, strict=True):
                yield f"vision.layers.{index}.attention.{own}.{kind}", piece.contiguous()
        elif part == "vision_encoder" and layer in _VISION_LAYER:
            yield f"vision.layers.{index}.{_VISION_LAYER[layer]}.{kind}", tensor
        elif part == "decoder" and layer in _TEXT_LAYER:
            yield f"decoder.layers.{index}.{_TEXT_LAYER[layer]}.{kind}", tensor
        else:
            raise CheckpointError(
                f"{folder} has {name} {list(tensor.shape)}, which is not a weight of nanoVLM"
            )


def _check(folder: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not expected" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{folder} does not fit its config.json: {'; '.join(wrong[:3])}{more}"
        )
