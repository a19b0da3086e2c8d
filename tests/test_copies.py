"""Copies of a model and its processor: for another training, another process."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

import smolstack


def asked(vlm: smolstack.VLM, image: Image.Image) -> list[int]:
    return list(vlm.ask(image, "What does it say?", max_new_tokens=6).token_ids)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_deep_copy_answers_alike_with_weights_of_its_own(
    tiny_folder: Path, images: list[Image.Image], dtype: str
) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype, device="cpu")
    expected = asked(vlm, images[0])
    vlm.image_cache.max_bytes = 12345
    twin = copy.deepcopy(vlm)
    assert (twin.precision, twin.image_cache.max_bytes) == (vlm.precision, 12345)
    with torch.no_grad():
        vlm.model.decoder.norm.weight.zero_()
    assert asked(twin, images[0]) == expected


def test_a_deep_copy_of_the_network_trains_alone(
    tiny_folder: Path, images: list[Image.Image]
) -> None:
    vlm = smolstack.load(tiny_folder, dtype="float32", device="cpu")
    before = asked(vlm, images[0])
    twin = copy.deepcopy(vlm.model).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    twin(vlm.processor([(images[0], "What?")])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    optimizer.step()
    assert all(parameter.grad is None for parameter in vlm.model.parameters())
    assert asked(vlm, images[0]) == before


def test_a_processor_is_pickled_with_its_chat_template(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    tiny_vlm.processor.plain.mark("<image>")  # what is made on first use is left behind
    again = pickle.loads(pickle.dumps(tiny_vlm.processor))
    expected, found = (p([(images[1], "What?")]) for p in (tiny_vlm.processor, again))
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.tiles, expected.tiles)


def test_a_vlm_is_not_pickled(tiny_vlm: smolstack.VLM, tiny_folder: Path) -> None:
    with pytest.raises(TypeError, match=f"not pickled.*load.*{tiny_folder}"):
        pickle.dumps(tiny_vlm)
