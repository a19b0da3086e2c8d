"""nanoVLM checkpoints convert: same prompt and same logits as its recipe computes, in miniature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.published import folders
from tests.published.forms import Vocabulary
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import smolstack
from smolstack.cli.app import app
from smolstack.errors import CheckpointError
from smolstack.interop.reference import load_model

State = dict[str, Tensor]
WORDS = Vocabulary(600, {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}, digits=True)
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXTRA = {
    "image_token": "<|image|>",
    "global_image_token": "<|global_image|>",
    **{f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 9) for c in range(1, 9)},
}
# Its own keys; sizes in miniature.
CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 48,
    "vit_inter_dim": 192,
    "vit_patch_size": 16,
    "vit_img_size": 64,
    "vit_n_heads": 12,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-06,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip2-base-patch16-512",
    "lm_hidden_dim": 120,
    "lm_inter_dim": 200,
    "lm_rms_eps": 1e-05,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_base_vocab_size": 600,
    "extra_token_amount": 66,
    "lm_vocab_size": 666,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_dropout": 0.0,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 4096,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_chat_template": TEMPLATE,
    "mp_pixel_shuffle_factor": 2,
    "mp_image_token_length": 4,
    "max_img_size": 2048,
    "resize_to_max_side_len": True,
    "vlm_extra_tokens": EXTRA,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints",
    "hf_repo_name": "nanoVLM",
}


def random_state(config: dict[str, Any]) -> State:
    """Weights by nanoVLM's names, as its save_model writes them: tied ones once."""
    vision, text = config["vit_hidden_dim"], config["lm_hidden_dim"]
    heads, patch = config["lm_n_kv_heads"] * text // config["lm_n_heads"], config["vit_patch_size"]
    patches = (config["vit_img_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (vision, 3, patch, patch),
        "vision_encoder.patch_embedding.conv.bias": (vision,),
        "vision_encoder.patch_embedding.position_embedding": (1, patches, vision),
        "vision_encoder.layer_norm.weight": (vision,),
        "vision_encoder.layer_norm.bias": (vision,),
        "MP.proj.weight": (text, vision * config["mp_pixel_shuffle_factor"] ** 2),
        "decoder.norm.weight": (text,),
        "decoder.head.weight": (config["lm_vocab_size"], text),
    }
    for number in range(config["vit_n_blocks"]):
        block, wide = f"vision_encoder.blocks.{number}", config["vit_inter_dim"]
        for name, out, width in (
            ("attn.qkv_proj", 3 * vision, vision),
            ("attn.out_proj", vision, vision),
            ("mlp.fc1", wide, vision),
            ("mlp.fc2", vision, wide),
        ):
            shapes |= {f"{block}.{name}.weight": (out, width), f"{block}.{name}.bias": (out,)}
        for norm in ("ln1", "ln2"):
            shapes |= {f"{block}.{norm}.{kind}": (vision,) for kind in ("weight", "bias")}
    for number in range(config["lm_n_blocks"]):
        block, wide = f"decoder.blocks.{number}", config["lm_inter_dim"]
        shapes |= {f"{block}.{norm}.weight": (text,) for norm in ("norm1", "norm2")}
        shapes |= {
            f"{block}.attn.q_proj.weight": (text, text),
            f"{block}.attn.k_proj.weight": (heads, text),
            f"{block}.attn.v_proj.weight": (heads, text),
            f"{block}.attn.out_proj.weight": (text, text),
            f"{block}.mlp.gate_proj.weight": (wide, text),
            f"{block}.mlp.up_proj.weight": (wide, text),
            f"{block}.mlp.down_proj.weight": (text, wide),
        }
    if not config["lm_tie_weights"]:
        shapes["decoder.token_embedding.weight"] = shapes["decoder.head.weight"]
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = any(part in name for part in (".ln", ".norm", "layer_norm"))
        if is_norm and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif len(shape) != 3:
            noise *= 0.1 if len(shape) == 1 else noise[0].numel() ** -0.5
        state[name] = noise
    size = text // config["lm_n_heads"]
    powers = torch.arange(0, size, 2).float() / size
    state["decoder.rotary_embd.inv_freq"] = 1 / config["lm_re_base"] ** powers
    return state


def recipe(state: State, config: dict[str, Any], ids: Tensor, tiles: Tensor, image: int) -> Tensor:
    """Logits (T, V) of one prompt, computed from nanoVLM's description and its names."""
    text = _text(state, config)
    embedded = text[ids].clone()
    embedded[ids == image] = _project(state, config, _tower(state, config, tiles)).flatten(0, 1)
    return _decode(state, config, embedded) @ state["decoder.head.weight"].T


def _text(state: State, config: dict[str, Any]) -> Tensor:
    tied = config["lm_tie_weights"]
    return state["decoder.head.weight" if tied else "decoder.token_embedding.weight"]


def _tower(state: State, config: dict[str, Any], tiles: Tensor) -> Tensor:
    def take(name: str) -> tuple[Tensor, Tensor]:
        return state[f"vision_encoder.{name}.weight"], state[f"vision_encoder.{name}.bias"]

    def normed(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], *take(name), config["vit_ln_eps"])

    heads = config["vit_n_heads"]
    x = functional.conv2d(tiles, *take("patch_embedding.conv"), stride=config["vit_patch_size"])
    x = x.flatten(2).mT + state["vision_encoder.patch_embedding.position_embedding"]
    for number in range(config["vit_n_blocks"]):
        joined = functional.linear(
            normed(x, f"blocks.{number}.ln1"), *take(f"blocks.{number}.attn.qkv_proj")
        )
        query, key, value = (
            part.view(*part.shape[:-1], heads, -1).transpose(1, 2)
            for part in joined.chunk(3, dim=-1)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        seen = (weights @ value).transpose(1, 2).flatten(2)
        x = x + functional.linear(seen, *take(f"blocks.{number}.attn.out_proj"))
        wide = functional.linear(
            normed(x, f"blocks.{number}.ln2"), *take(f"blocks.{number}.mlp.fc1")
        )
        x = x + functional.linear(
            functional.gelu(wide, approximate="tanh"), *take(f"blocks.{number}.mlp.fc2")
        )
    return normed(x, "layer_norm")


def _project(state: State, config: dict[str, Any], patches: Tensor) -> Tensor:
    """Each block of patches becomes one vector, row by row, and is projected."""
    factor, side = config["mp_pixel_shuffle_factor"], math.isqrt(patches.shape[1])
    blocks = [
        torch.cat(
            [
                patches[:, (row + down) * side + col + right]
                for down in range(factor)
                for right in range(factor)
            ],
            dim=-1,
        )
        for row in range(0, side, factor)
        for col in range(0, side, factor)
    ]
    return torch.stack(blocks, dim=1) @ state["MP.proj.weight"].T


def _decode(state: State, config: dict[str, Any], x: Tensor) -> Tensor:
    heads, kv_heads, length = config["lm_n_heads"], config["lm_n_kv_heads"], len(x)
    angles = torch.arange(length)[:, None] * state["decoder.rotary_embd.inv_freq"]
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    future = torch.full((length, length), -torch.inf).triu(1)

    def normed(x: Tensor, name: str) -> Tensor:
        scale: Tensor = (x.square().mean(-1, keepdim=True) + config["lm_rms_eps"]).rsqrt()
        return x * scale * state[f"decoder.{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    for number in range(config["lm_n_blocks"]):

        def through(x: Tensor, name: str, number: int = number) -> Tensor:
            return x @ state[f"decoder.blocks.{number}.{name}.weight"].T

        y = normed(x, f"blocks.{number}.norm1")
        query, key, value = (
            through(y, f"attn.{name}_proj").view(length, count, -1).transpose(0, 1)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        query, key = turned(query), turned(key).repeat_interleave(heads // kv_heads, dim=0)
        weights = (query @ key.mT / math.sqrt(query.shape[-1]) + future).softmax(-1)
        seen = weights @ value.repeat_interleave(heads // kv_heads, dim=0)
        x = x + through(seen.transpose(0, 1).flatten(1), "attn.out_proj")
        y = normed(x, f"blocks.{number}.norm2")
        gated = functional.silu(through(y, "mlp.gate_proj")) * through(y, "mlp.up_proj")
        x = x + through(gated, "mlp.down_proj")
    return normed(x, "norm")


def write(folder: Path, config: dict[str, Any]) -> tuple[Path, Path, State]:
    """A nanoVLM checkpoint, its tokenizer's folder, and its weights."""
    words = folder / "words"
    words.mkdir(parents=True)
    (words / "tokenizer.json").write_bytes(folders.tokenizer_json(WORDS))
    model, state = folder / "nanovlm", random_state(config)
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    save_file(state, model / "model.safetensors", {"format": "pt"})
    return model, words, state


def converted(model: Path, words: Path, out: Path) -> Path:
    done = CliRunner().invoke(
        app, ["convert-checkpoint", str(model), str(out), "--tokenizer", str(words)]
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_its_recipe(tied: bool, tmp_path: Path) -> None:
    config = {**CONFIG, "lm_tie_weights": tied}
    model, words, state = write(tmp_path, config)
    out = converted(model, words, tmp_path / "out")
    vlm = smolstack.load(out)
    assert vlm.config.tied is tied

    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    batch = vlm.processor([(image, "What is it?")])
    prompt = f"<|im_start|>user\n<|global_image|>{'<|image|>' * 4}What is it?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    assert batch.token_ids[0].tolist() == vlm.processor.tokenizer.encode(prompt)
    assert vlm.config.image_token_id == 600
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(batch.tiles[0], pixels, atol=1e-6)

    with torch.inference_mode():
        expected = recipe(state, config, batch.token_ids[0], batch.tiles, 600)
        logits = vlm.model(batch)[0]
        theirs = load_model(out)(input_ids=batch.token_ids, pixel_values=batch.tiles[None]).logits[
            0
        ]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-4
    assert (theirs - expected).abs().max() <= 1e-4


def test_an_answer_ends_at_the_tokenizer_s_own_end(tmp_path: Path) -> None:
    model, words, _ = write(tmp_path, CONFIG)
    (words / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    vlm = smolstack.load(converted(model, words, tmp_path / "out"))
    assert vlm.eos_token_ids == (0,)
    assert vlm.ask(Image.new("RGB", (90, 40)), "What?", max_new_tokens=3).usage.visual_tokens == 4


def test_it_is_said_what_it_is_and_what_to_do(tmp_path: Path) -> None:
    model, _, _ = write(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"nanoVLM checkpoint.*convert-checkpoint"):
        smolstack.load(model)


BAD: dict[str, tuple[dict[str, object], str]] = {
    "a class token": ({"vit_cls_flag": True}, "vit_cls_flag True; only False"),
    "a key of a fork": ({"momh_enabled": True}, "momh_enabled True"),
    "no image token": ({"vlm_extra_tokens": {}}, "first version"),
    "another vocabulary": ({"lm_vocab_size": 700}, "666 tokens"),
    "another count": ({"mp_image_token_length": 64}, "mp_image_token_length 64"),
    "other widths": ({"lm_inter_dim": 100}, "does not fit its config.json"),
    "a missing key": ({"lm_re_base": None}, "lm_re_base"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, reason = BAD[case]
    model, words, _ = write(tmp_path, CONFIG)
    (model / "config.json").write_text(json.dumps({**CONFIG, **change}))
    done = CliRunner().invoke(
        app, ["convert-checkpoint", str(model), str(tmp_path / "out"), "--tokenizer", str(words)]
    )
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    model, words, _ = write(tmp_path, CONFIG)
    path = model / "model.safetensors"
    save_file({**load_file(path), "decoder.extra.weight": torch.ones(2, 2)}, path)
    done = CliRunner().invoke(
        app, ["convert-checkpoint", str(model), str(tmp_path / "out"), "--tokenizer", str(words)]
    )
    assert done.exit_code == 2
    assert "decoder.extra.weight" in done.output


def test_other_checkpoints_are_written_as_they_are_stored(
    tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert-checkpoint", str(tiny_folder), str(out)])
    assert done.exit_code == 0, done.output
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, tiny_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
