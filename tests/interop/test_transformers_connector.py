"""smolstack's connector in a loaded transformers model: same results, fewer traps."""

from __future__ import annotations

import pytest
import torch
from tests.interop.conftest import Folder

from smolstack.errors import ConfigError
from smolstack.model.connector import Idefics3Connector

pytest.importorskip("transformers")

from smolstack.interop.transformers import replace_connector

Inputs = dict[str, torch.Tensor]


def test_answers_and_names_stay_as_they_are(folder: Folder, prompts: Inputs) -> None:
    model = folder.theirs()
    logits, names = model(**prompts).logits, list(model.state_dict())
    weight = model.model.connector.modality_projection.proj.weight
    assert replace_connector(model) is model
    assert torch.equal(model(**prompts).logits, logits)
    assert list(model.state_dict()) == names
    assert model.model.connector.modality_projection.proj.weight is weight
    assert isinstance(model.model.connector.bridge, Idefics3Connector)


def test_oblong_tiles_are_folded_as_they_lie(folder: Folder) -> None:
    pixels = torch.randn(1, 2, 3, 16, 32, generator=torch.Generator().manual_seed(2))
    model, network = folder.theirs(), folder.vlm().model
    expected = network.encode_tiles(pixels[0]).flatten(0, 1)
    scrambled = True
    try:
        plain = model.model.get_image_features(pixels).pooler_output[0]
        scrambled = not torch.allclose(plain, expected, atol=1e-4)
    except RuntimeError:
        pass  # a grid whose patches form no square does not even fit
    assert scrambled
    mended = replace_connector(model).model.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(mended, expected, atol=1e-4, rtol=0)


def test_an_adapter_on_the_projection_is_used(folder: Folder, prompts: Inputs) -> None:
    model = replace_connector(folder.theirs())
    plain = model(**prompts).logits
    projection = model.model.connector.modality_projection.proj
    doubled = torch.nn.Linear(projection.in_features, projection.out_features, bias=False)
    doubled.weight = torch.nn.Parameter(projection.weight.detach() * 2)
    model.model.connector.modality_projection.proj = doubled
    assert not torch.allclose(model(**prompts).logits, plain, atol=1e-3)


def test_it_is_replaced_once_and_trains(folder: Folder, prompts: Inputs) -> None:
    model = replace_connector(replace_connector(folder.theirs()))
    model(**prompts).logits.sum().backward()
    assert model.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no connector"):
        replace_connector(torch.nn.Linear(2, 2))
