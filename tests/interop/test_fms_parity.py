"""In the Foundation Model Stack the family computes what smolstack and transformers compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import smolstack
from smolstack.checkpoint.new import side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.errors import ConfigError
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.weights import sharp_model
from smolstack.model.vlm import VisionLanguageModel
from smolstack.vlm import VLM

pytest.importorskip("fms")
pytest.importorskip("transformers")

import fms.models
from fms.utils import serialization
from tests.interop.fms_prompts import greedy, own_greedy, two_rows

import smolstack.interop.fms as bridge
from smolstack.interop.reference import model_inputs, share_model

BOUND = 1e-4
READER_IMAGE = Path(__file__).parent.parent.parent / "examples" / "number.png"
RETRIEVAL = tuple(name for name, p in PRESETS.items() if p.config.embedding_dim is not None)


def small_folder(name: str, folder: Path) -> Path:
    """A preset in miniature, with weights whose answers depend on the whole prompt."""
    preset = miniature(PRESETS[name])
    model = sharp_model(preset.config, seed=1)
    return save_checkpoint(folder, model, side_files(preset, preset.config))


def test_every_published_checkpoint_is_a_variant() -> None:
    assert fms.models.list_variants("idefics3") == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_variant_has_the_published_sizes(name: str) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        theirs = bridge.Idefics3(bridge.to_fms_config(config))
        theirs.post_init()
        ours = VisionLanguageModel(config)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert bridge.to_smolstack_config(theirs.get_config()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_is_read_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    config = bridge.to_fms_config(PRESETS[name].config)
    config.save(tmp_path / "config.json")
    loaded = bridge.Idefics3Config.load(tmp_path / "config.json")
    assert loaded == config
    assert bridge.to_smolstack_config(loaded) == PRESETS[name].config


def test_activations_may_have_fms_s_own_names() -> None:
    config = bridge.to_fms_config(PRESETS["smolvlm-256m"].config).updated(
        vision_config={"hidden_act": "gelu-tanh"}, text_config={"activation_fn": "swish"}
    )
    assert bridge.to_smolstack_config(config) == PRESETS["smolvlm-256m"].config
    odd = config.updated(text_config={"activation_fn": "mish"})
    with pytest.raises(ConfigError, match=r"hidden_act is 'mish'"):
        bridge.to_smolstack_config(odd)


@pytest.mark.parametrize("fused", [True, False])
def test_weights_of_the_other_fusion_are_loaded(fused: bool, tiny_vlm: VLM) -> None:
    saved = bridge.from_smolstack(tiny_vlm.model, fused_weights=not fused)
    loaded = bridge.Idefics3(bridge.to_fms_config(tiny_vlm.config), fused_weights=fused)
    loaded.load_state_dict(saved.state_dict())
    weights = bridge.hf_state_dict(saved)
    found = bridge.hf_state_dict(loaded)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    # The way that FMS itself loads its files.
    again = serialization.get_adapted(
        "idefics3", "fms", saved.state_dict(), {"model_config": loaded.get_config()}
    )
    assert set(again) == set(loaded.state_dict())


@pytest.mark.parametrize("name", PRESETS)
def test_a_folder_of_every_shape_gives_the_same_logits_and_tokens(
    name: str, tmp_path: Path
) -> None:
    folder = small_folder(name, tmp_path / "model")
    vlm = smolstack.load(folder)
    model = fms.models.get_model("hf_pretrained", model_path=str(folder)).eval()
    batch = two_rows(vlm)
    real = batch.attention_mask
    ids, extra = bridge.generation_inputs(batch)
    retrieval = name in RETRIEVAL
    with torch.inference_mode():
        found = model(ids, **extra)[real]
        ours = (vlm.model.embed(batch) if retrieval else vlm.model(batch))[real]
        theirs = share_model(vlm.model)(**model_inputs(batch))
        theirs = (theirs if retrieval else theirs.logits)[real]
    assert ours.std() > 0.1
    assert (found - ours).abs().max() < BOUND
    assert (found - theirs).abs().max() < BOUND
    if not retrieval:
        assert torch.equal(greedy(model, batch, 6), own_greedy(vlm.model, batch, 6))


def test_a_variant_reads_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = small_folder("smolvlm-500m", tmp_path / "model")
    vlm = smolstack.load(folder)
    sizes = vars(bridge.to_fms_config(vlm.config))
    model = fms.models.get_model(
        "idefics3", "smolvlm-500m", model_path=str(folder), source="hf", **sizes
    )
    batch = two_rows(vlm)
    assert torch.equal(greedy(model.eval(), batch, 4), own_greedy(vlm.model, batch, 4))


def test_the_bundled_reader_reads_the_same_in_fms() -> None:
    vlm = smolstack.load(dtype="float32")
    model = fms.models.get_model(
        "hf_pretrained", model_path=str(vlm.folder), data_type=torch.float32
    ).eval()
    prompt = vlm.processor.prepare((str(READER_IMAGE), "What does it say?"))
    batch = vlm.processor.batch([prompt])
    ids, extra = bridge.generation_inputs(batch)
    with torch.inference_mode():
        assert (model(ids, **extra) - vlm.model(batch)).abs().max() < BOUND
    written = greedy(model, batch, 32, eos_token_id=vlm.eos_token_ids[0])[0].tolist()
    text = vlm.processor.tokenizer.decode(written[:-1])
    assert written[-1] in vlm.eos_token_ids
    assert text.strip() == vlm.ask(str(READER_IMAGE), "What does it say?").text.strip()


@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_model_changes_sides_and_back_without_a_bit_lost(
    fused: bool, tiny_vlm: VLM
) -> None:
    model = bridge.from_smolstack(tiny_vlm.model, fused_weights=fused)
    batch = two_rows(tiny_vlm)
    ids, extra = bridge.generation_inputs(batch)
    with torch.inference_mode():
        difference = model(ids, **extra) - tiny_vlm.model(batch)
    assert difference[batch.attention_mask].abs().max() < BOUND
    back = bridge.to_smolstack(model)
    before, after = tiny_vlm.model.state_dict(), back.state_dict()
    assert back.config == tiny_vlm.config
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_fms_model_becomes_a_hugging_face_checkpoint(tied_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    vlm = smolstack.load(tied_folder)
    model = fms.models.get_model("hf_pretrained", model_path=str(tied_folder))
    stored = load_file(tied_folder / "model.safetensors")
    written = bridge.hf_state_dict(model)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)

    side = {p.name: p.read_bytes() for p in tied_folder.glob("*.json") if p.name != "config.json"}
    save_checkpoint(tmp_path / "again", bridge.to_smolstack(model), side)
    auto: Any = AutoModelForImageTextToText
    theirs = auto.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    batch = two_rows(vlm)
    with torch.inference_mode():
        difference = theirs(**model_inputs(batch)).logits - vlm.model(batch)
    assert difference[batch.attention_mask].abs().max() < BOUND


def test_an_fms_state_dict_loads_again_as_it_is(tiny_vlm: VLM, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = bridge.from_smolstack(tiny_vlm.model)
    save_file(model.state_dict(), tmp_path / "fms.safetensors")
    again = fms.models.get_model(
        "idefics3",
        "smolvlm-256m",
        model_path=str(tmp_path / "fms.safetensors"),
        **vars(bridge.to_fms_config(tiny_vlm.config)),
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_without_weights_a_variant_is_random_and_finite() -> None:
    small = {"nlayers": 1, "src_vocab_size": 49280}
    model = fms.models.get_model(
        "idefics3", "smolvlm-256m", text_config=small, vision_config={"nlayers": 1}
    )
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert model.connector.proj.weight.std() > 0


def test_gradients_reach_tower_connector_and_decoder(tiny_vlm: VLM) -> None:
    model = bridge.from_smolstack(tiny_vlm.model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ids, extra = bridge.generation_inputs(two_rows(tiny_vlm))
    model(ids, **extra).square().mean().backward()
    for part in (model.vision_tower, model.connector, model.language_model):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)
