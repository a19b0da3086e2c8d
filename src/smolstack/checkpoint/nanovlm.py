"""nanoVLM checkpoints as folders of this family: the same model under other names.

nanoVLM keeps a flat config.json (``vit_…``, ``lm_…``, ``mp_…``) and one weight file, and takes its
tokenizer from another repository, to which it adds ``vlm_extra_tokens`` after the last id. Its
tower joins query, key and value in one matrix; its pixel shuffle orders features as this family's
does: (dy·s + dx)·C + c.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolstack.checkpoint.files import read_json
from smolstack.checkpoint.save import save_checkpoint, to_json
from smolstack.checkpoint.unsupported import peek
from smolstack.checkpoint.weights import read_entries, read_tensors
from smolstack.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from smolstack.config.reading import Reader
from smolstack.errors import CheckpointError, ConfigError
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tokenizer import named_tokens

if TYPE_CHECKING:
    from torch import Tensor

# Values that its code knows, and of which only these are computed as this family's models do it.
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
_ENDS = ("<|im_end|>", "<|endoftext|>")  # of SmolLM2's chat models and bases
_POSITIONS = "vision_encoder.patch_embedding.position_embedding"
_JOINED = "attn.qkv_proj"
_COMPUTED = "decoder.rotary_embd.inv_freq"  # a buffer that follows from lm_re_base


def tokenizer_of(folder: Path) -> str:
    """The folder or hub id of the tokenizer that a nanoVLM checkpoint names."""
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
    extra = _extra_tokens(folder, raw)
    words, image_token_id = _tokenizer(tokenizer, raw, extra)
    config = read_config(folder, raw, image_token_id)
    state = dict(_weights(folder, config))
    if config.tied:
        tensors = [state.pop("head.weight", None), state.get("decoder.embedding.weight")]
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) == 2 and not torch.equal(*found):
            raise CheckpointError(
                f"{folder} has lm_tie_weights true, and decoder.head.weight differs from "
                "decoder.token_embedding.weight"
            )
        if found:  # safetensors stores shared tensors once, under either name
            state["decoder.embedding.weight"] = found[0]
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    _check(folder, state, model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    ending = named_tokens(peek(tokenizer / "tokenizer_config.json")).get("eos_token")
    side = _side_files(raw, config, extra, words, ending)
    return save_checkpoint(out, model.eval(), side, overwrite=overwrite)


def read_config(folder: Path, raw: Mapping[str, Any], image_token_id: int) -> ModelConfig:
    """The sizes of both towers, from nanoVLM's keys."""
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
            f"{where} has {unknown[0]} {raw[unknown[0]]!r:.60}, which nanoVLM itself does not "
            "know; what it changes in the model cannot be converted"
        )
    get = Reader(where, raw, {"lm_tie_weights": True})
    hidden, heads = get.integer("lm_hidden_dim"), get.integer("lm_n_heads")
    if heads < 1 or hidden % heads:
        raise ConfigError(f"{where} has lm_hidden_dim {hidden}, no multiple of lm_n_heads {heads}")
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
            f"{where} has mp_image_token_length {told!r}, its other keys make "
            f"{config.tokens_per_tile} visual tokens of an image"
        )
    return config


def _extra_tokens(folder: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    extra = raw.get("vlm_extra_tokens")
    if not isinstance(extra, Mapping) or not isinstance(extra.get("image_token"), str):
        raise ConfigError(
            f"{folder / 'config.json'} has no image_token in vlm_extra_tokens; models of nanoVLM's "
            "first version, which put an image before the prompt without tokens for it, are not "
            "converted"
        )
    return {str(name): str(token) for name, token in extra.items()}


def _tokenizer(folder: Path, raw: Mapping[str, Any], extra: Mapping[str, str]) -> tuple[bytes, int]:
    """tokenizer.json with nanoVLM's tokens after its last id, and the image token's id."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, expected the tokenizer that the checkpoint names "
            f"(lm_tokenizer {raw.get('lm_tokenizer')!r})"
        )
    try:
        words = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    words.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in extra.values()]
    )
    size, rows = words.get_vocab_size(with_added_tokens=True), raw.get("lm_vocab_size")
    if size != rows:
        raise CheckpointError(
            f"{path} and the tokens of vlm_extra_tokens are {size} tokens, the model has "
            f"lm_vocab_size {rows!r}"
        )
    image = words.token_to_id(extra["image_token"])
    assert image is not None  # it was just added
    text: str = words.to_str()
    return text.encode(), image


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
                f"{folder} holds {name} {list(tensor.shape)}, which is no weight of nanoVLM's"
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


def _side_files(
    raw: Mapping[str, Any],
    config: ModelConfig,
    extra: Mapping[str, str],
    words: bytes,
    ending: str | None,
) -> dict[str, bytes]:
    """The processor's files. Pixels are divided by 255 and not normalized further.

    Images are shown whole, at the tower's size: that is the one prompt that both layouts share.
    nanoVLM puts the whole image before its tiles, this family after them.

    Args:
        ending: the token that ends an answer, if the tokenizer's own config names it.
    """
    settings = ImageSettings(
        longest_edge=config.vision.image_size,
        tile_edge=config.vision.image_size,
        split=False,
        resample=3,
        mean=None,
        std=None,
    )
    ids = {token["content"]: token["id"] for token in json.loads(words)["added_tokens"]}
    end = next((token for token in (ending, *_ENDS) if token in ids), None)
    named = {
        "image_token": extra["image_token"],
        "fake_image_token": "",  # none stands around its images
        "global_image_token": extra.get("global_image_token", ""),
    }
    template = raw.get("lm_chat_template")
    files: dict[str, Any] = {
        "preprocessor_config.json": settings.to_hf(),
        "processor_config.json": {
            "processor_class": "Idefics3Processor",
            "image_seq_len": config.tokens_per_tile,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Idefics3Processor",
            "model_max_length": config.text.max_positions,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            **({} if end is None else {"eos_token": end, "pad_token": end}),
            "extra_special_tokens": {**extra, **named},
        },
    }
    if end is not None:
        files["generation_config.json"] = {"eos_token_id": ids[end], "pad_token_id": ids[end]}
    made = {name: to_json(data).encode() for name, data in files.items()}
    if isinstance(template, str):
        made["chat_template.jinja"] = _with_parts(template, extra["image_token"]).encode()
    return {**made, "tokenizer.json": words}


def _with_parts(template: str, image_token: str) -> str:
    """nanoVLM's template, for messages whose content is a list of parts as well as a string."""
    return (
        "{%- macro words(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
        "{%- for part in content -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        f"{{%- else -%}}{{{{- '{image_token}' -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}"
        "{%- endmacro -%}"
    ) + template.replace("message['content']", "words(message['content'])")
