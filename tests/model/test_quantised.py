"""int8 and int4: the arithmetic that is promised, with and without the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smolstack
from smolstack.errors import CheckpointError, ConfigError
from smolstack.model.quantised import QuantisedLinear
from smolstack.native import library as native

BITS = (8, 4)


def layer_of(bits: int) -> tuple[QuantisedLinear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(96, 192, generator=generator) / 14
    bias = torch.randn(96, generator=generator)
    return QuantisedLinear.from_float(weight, bias, bits), weight, bias


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_kernels_and_torch_give_the_same_numbers(bits: int, rows: int) -> None:
    layer, _, _ = layer_of(bits)
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(layer(x), layer._by_torch(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.12)])
def test_it_is_near_the_float_layer(bits: int, bound: float) -> None:
    layer, weight, bias = layer_of(bits)
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(1))
    expected = x @ weight.t() + bias
    error = (layer(x) - expected).square().mean().sqrt()
    assert error < bound * expected.std()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_its_neighbours(bits: int) -> None:
    layer, _, _ = layer_of(bits)
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(2))
    x[5] *= 1000
    assert torch.equal(layer(x)[3], layer(x[3:4])[0])


def test_four_bits_need_whole_groups() -> None:
    with pytest.raises(ConfigError, match="4-bit linear layer of 40 channels"):
        QuantisedLinear(40, 8, 4, bias=False)


def test_the_compiled_decoder_gives_the_logits_of_the_plain_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = []
    for kernels in (native.library(), None):
        monkeypatch.setattr(native, "library", lambda found=kernels: found)
        vlm = smolstack.load(tiny_folder, dtype="int8")
        batch = vlm.processor.batch(
            [vlm.processor.prepare("One."), vlm.processor.prepare("A longer prompt.")]
        )
        with torch.inference_mode():
            cache = vlm.model.new_cache(batch, 64)
            vlm.model.prefill(batch, cache)
            steps = [vlm.model.decode_one_token(torch.tensor([40, 50]), cache) for _ in range(4)]
        logits.append(torch.stack(steps))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_an_int8_answer_is_the_same_alone_and_in_a_batch(tiny_folder: Path) -> None:
    vlm = smolstack.load(tiny_folder, dtype="int8")
    prompts = ["What is this?", "Say something quite a bit longer, please."]
    together = [answer.text for answer in vlm.ask_many(prompts, max_new_tokens=6)]
    assert together == [vlm.ask(None, prompt, max_new_tokens=6).text for prompt in prompts]


def test_a_quantised_model_is_not_saved_as_if_it_were_whole(
    tiny_folder: Path, tmp_path: Path
) -> None:
    vlm = smolstack.load(tiny_folder, dtype="int8")
    with pytest.raises(CheckpointError, match="an int8 model cannot be saved"):
        vlm.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
