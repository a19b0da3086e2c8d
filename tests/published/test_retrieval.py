"""ColSmol as it is published, whole and as an adapter, against transformers' base model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.published import folders
from tests.published.checkpoints import COLSMOL_256M_BASE, COLSMOL_ADAPTER, RETRIEVAL_MODELS
from tests.published.forms import Published
from tests.published.test_parity import LOGITS, PIXELS, chat, image, theirs_of
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import smolstack
from smolstack.interop.reference import BASE_MODELS, RetrievalReference


def reference(folder: Path, state: dict[str, Tensor]) -> RetrievalReference:
    """ColIdefics3: the base model and a linear layer, with the weights of a state."""
    config = CONFIG_MAPPING["idefics3"].from_dict(json.loads((folder / "config.json").read_text()))
    model = BASE_MODELS["idefics3"](config).float()  # the config names another dtype
    state = {name: tensor.float() for name, tensor in state.items()}
    head = {name: state.pop(name) for name in ("linear.weight", "linear.bias")}
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return RetrievalReference(model, head).eval()


def assert_same(vlm: smolstack.VLM, folder: Path, state: dict[str, Tensor]) -> None:
    messages = chat(image())
    theirs = theirs_of(folder, "idefics3", messages, split=False)
    batch = vlm.processor([messages], split=False)
    assert batch.token_ids.tolist() == theirs["input_ids"].tolist()
    assert (batch.tiles - theirs["pixel_values"][0]).abs().max() <= PIXELS
    with torch.inference_mode():
        found = vlm.model.embed(batch)
        expected = reference(folder, state)(**theirs)
    assert found.shape[-1] == folders.EMBEDDING
    assert (found - expected).abs().max() <= LOGITS


@pytest.mark.parametrize("published", RETRIEVAL_MODELS, ids=lambda one: one.repository)
def test_whole_weights_give_the_same_embeddings(published: Published, tmp_path: Path) -> None:
    folder = folders.write(published, tmp_path / "model")
    vlm = smolstack.load(folder, dtype="float32")
    assert_same(vlm, folder, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("beside", [False, True])
def test_the_adapter_is_applied_to_its_base(beside: bool, tmp_path: Path) -> None:
    """The published form: an adapter with its config.json; at one revision with weights too."""
    base = folders.write(COLSMOL_256M_BASE, tmp_path / "base")
    folder = tmp_path / "colSmol-256M"
    folder.mkdir()
    folders.write_files(COLSMOL_256M_BASE, folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(COLSMOL_ADAPTER))
    state = load_file(base / "model.safetensors")
    if beside:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    targets = re.compile(str(COLSMOL_ADAPTER["target_modules"]))
    generator, adapter = torch.Generator().manual_seed(1), {}
    merged = dict(state)
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if name == layer or not targets.fullmatch(layer):
            continue
        down = torch.randn(32, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], 32, generator=generator) * 0.1
        adapter[f"base_model.model.{layer}.lora_A.weight"] = down
        adapter[f"base_model.model.{layer}.lora_B.weight"] = up
        merged[name] = weight.float() + up @ down  # alpha / r is 1
    assert len(adapter) == 2 * 7 * folders.LAYERS
    save_file(adapter, folder / "adapter_model.safetensors")
    vlm = smolstack.load(folder, base=base, dtype="float32")
    assert_same(vlm, folder, merged)
