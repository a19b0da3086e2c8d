"""Changing sides copies no weight, and both sides give the same answers."""

from __future__ import annotations

import pytest
import torch
from tests.interop.conftest import Folder, random_image

from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.vlm import VLM

pytest.importorskip("transformers")

from smolstack.interop.reference import load_processor
from smolstack.interop.transformers import from_transformers, to_transformers

Inputs = dict[str, torch.Tensor]
BOUND = 1e-4


def places(model: torch.nn.Module) -> set[int]:
    """Where a model's weights lie in memory."""
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_to_transformers_shares_every_weight(folder: Folder, prompts: Inputs) -> None:
    vlm = folder.vlm()
    theirs = to_transformers(vlm)
    assert places(theirs) == places(vlm.model)
    real = prompts["attention_mask"].bool()
    expected = folder.theirs()(**prompts).logits[real]
    assert (theirs(**prompts).logits[real] - expected).abs().max() < BOUND


def test_from_transformers_shares_every_weight(folder: Folder) -> None:
    theirs = folder.theirs()
    network = from_transformers(theirs)
    assert isinstance(network, VisionLanguageModel)
    assert places(network) == places(theirs)
    with torch.no_grad():
        theirs.model.connector.modality_projection.proj.weight.zero_()
    assert not network.connector.proj.weight.any()


def test_with_a_processor_it_answers_and_saves(
    folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = load_processor(folder.path, folder.model_type)
    vlm = from_transformers(folder.theirs(), processor)
    assert isinstance(vlm, VLM)
    image = random_image(80, 40)
    expected = folder.vlm().ask(image, "Read it.", max_new_tokens=8)
    assert vlm.ask(image, "Read it.", max_new_tokens=8).text == expected.text
    saved = vlm.save(tmp_path_factory.mktemp("saved") / "model")
    again = Folder(saved, folder.model_type).vlm().ask(image, "Read it.", max_new_tokens=8)
    assert again.text == expected.text


def test_there_and_back(folder: Folder, prompts: Inputs) -> None:
    vlm = folder.vlm()
    again = from_transformers(to_transformers(vlm))
    assert again.config == vlm.model.config
    assert places(again) == places(vlm.model)


def test_adapters_must_be_merged_first(folder: Folder) -> None:
    model = folder.theirs()
    model.model.text_model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(ConfigError, match=r"lora_A"):
        from_transformers(model)
