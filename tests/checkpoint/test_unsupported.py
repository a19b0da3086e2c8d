"""Folders that are something else, or that leave out what the rest of them implies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.errors import CheckpointError, ConfigError
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.reference import load_processor

Config = dict[str, Any]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, change: Callable[[Config], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "smolvla", "n_obs_steps": 1}, "is SmolVLA"),
        (
            {"type": "smolvla", "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M"},
            r"made from \(HuggingFaceTB/SmolVLM2-500M\)",
        ),
        ({"vit_hidden_dim": 768, "lm_model_type": "x"}, "is a nanoVLM checkpoint"),
        ({"lm_hf_repo": "HuggingFaceTB/SmolLM2-135M"}, "is a nanoVLM checkpoint"),
    ],
)
def test_a_related_model_is_named_for_what_it_is(
    config: Config, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        smolstack.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes \(8 bits\)"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "awq", "bits": 4}, r"AWQ \(4 bits\)"),
        ({"quant_method": "gptq", "bits": 8}, r"GPTQ \(8 bits\)"),
        ({"quant_method": "intel/auto-round", "bits": 4}, r"auto-round \(4 bits\)"),
        ({"quant_method": "auto-round", "bits": 2}, r"auto-round \(2 bits\)"),
        ({"quant_method": "something new"}, "'something new'"),
    ],
)
@pytest.mark.parametrize("place", ["config", "text_config"])
def test_other_libraries_quantized_weights_are_named(
    settings: Config, name: str, place: str, folder: Path
) -> None:
    def change(data: Config) -> None:
        held = data if place == "config" else data["text_config"]
        held["quantization_config"] = settings
        data["_name_or_path"] = "somebody/original"

    edit(folder / "config.json", change)
    (folder / "tokenizer.json").unlink()  # whatever else is wrong is not what is said
    with pytest.raises(CheckpointError, match=f"quantized by {name}, .*somebody/original"):
        smolstack.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model-00001-of-00002.bin"])
def test_pickles_alone_are_what_is_said_first(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"pickle files .{name}.*save_pretrained"):
        smolstack.load(folder)


def test_a_trainer_s_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        smolstack.load(tmp_path)


def test_folders_of_gguf_files_and_of_graphs_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "vision_encoder.onnx").touch()
    with pytest.raises(CheckpointError, match=r"ONNX graphs \(vision_encoder.onnx\)"):
        smolstack.load(tmp_path)
    (tmp_path / "SmolVLM-Q8_0.gguf").touch()
    (tmp_path / "mmproj-SmolVLM-f16.gguf").touch()
    with pytest.raises(CheckpointError, match=r"SmolVLM-Q8_0.gguf.*--mmproj"):
        smolstack.load(tmp_path)


def test_a_base_model_without_its_head_is_loaded(folder: Path, tied_folder: Path) -> None:
    """``Idefics3Model`` saves its weights without ``model.``."""
    shutil.rmtree(folder)
    shutil.copytree(tied_folder, folder)
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (
        smolstack.load(place).ask("examples/number.png", "What?", max_new_tokens=5).token_ids
        for place in (folder, tied_folder)
    )
    assert ours == theirs


@pytest.fixture
def idefics3(tmp_path: Path) -> Path:
    """Idefics3-8B's files as they are on the hub: no max_image_size, no processor_config.json."""
    folder = new_checkpoint(miniature(PRESETS["idefics3-8b"]), tmp_path / "idefics3", seed=1)
    assert not (folder / "processor_config.json").exists()
    published = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1456},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(published))
    return folder


def test_idefics3_as_it_is_published_is_transformers_to_the_last_pixel(idefics3: Path) -> None:
    vlm = smolstack.load(idefics3)
    assert vlm.plan((1000, 700)).tiles == 13
    assert vlm.processor.settings.tile_edge == 364
    question = "What does it say?"
    ours = vlm.processor([("examples/number.png", question)])
    processor = load_processor(idefics3)
    theirs = processor(
        text=processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question}],
                }
            ],
            add_generation_prompt=True,
        ),
        images=[smolstack_image()],
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert ours.token_ids.tolist() == theirs["input_ids"].tolist()
    assert (ours.tiles - theirs["pixel_values"][0]).abs().max() < 1e-6


def smolstack_image() -> Any:
    from PIL import Image

    return Image.open("examples/number.png").convert("RGB")


def test_a_derived_key_is_said(idefics3: Path) -> None:
    from smolstack.checkpoint.verification.checkpoint import check_checkpoint

    files, *rest = check_checkpoint(idefics3)
    assert files.remarks == [
        "the image processor's settings have no max_image_size; it is 364, the tower's image_size "
        "and transformers' default"
    ]
    assert not [problem for check in (files, *rest) for problem in check.problems]


def test_a_guess_stays_an_error(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", lambda data: data.pop("max_image_size"))
    with pytest.raises(ConfigError, match="max_image_size is None"):
        smolstack.load(folder)


def test_a_scale_that_the_processor_implies_is_derived(folder: Path) -> None:
    edit(folder / "config.json", lambda data: data.pop("scale_factor"))
    assert smolstack.load(folder).config.scale == 2
    (folder / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="has no scale_factor"):
        smolstack.load(folder)


def test_an_image_token_that_is_not_the_library_s_default_is_asked_for(
    tiny_preset: Any, tmp_path: Path
) -> None:
    """An image token is derived only where the tokenizer's is the library's default."""
    folder = new_checkpoint(replace(tiny_preset), tmp_path / "model", seed=1)
    edit(folder / "config.json", lambda data: data.pop("image_token_id"))
    with pytest.raises(ConfigError, match="has no image_token_id"):
        smolstack.load(folder)
