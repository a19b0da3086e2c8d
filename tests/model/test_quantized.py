"""int8 and int4: the arithmetic that is promised, with and without the compiled kernels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import smolstack
from smolstack.backends.cpu.backend import CPU
from smolstack.config.quantization import INT4, Format
from smolstack.errors import CheckpointError, ConfigError
from smolstack.model.kv_cache import KVCache
from smolstack.model.quantized import QuantizedLinear
from smolstack.native import library as native
from smolstack.quantization.rounding import round_weight, rounded_words

FORMATS = (
    Format(8, 64),
    Format(8, 256),
    Format(8, 64, activation_bits=16),
    Format(8, 16),
    Format(4, 32),
    Format(4, 128),
)


def weights(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / 14
    return weight, torch.randn(outputs, generator=generator)


def layer_of(form: Format, outputs: int = 96, inputs: int = 192) -> QuantizedLinear:
    weight, bias = weights(outputs, inputs)
    layer = QuantizedLinear.of(form, *round_weight(weight, form), bias)
    layer.backend = CPU
    return layer


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 192), (17, 64), (50, 200), (1, 1000)])
def test_kernels_and_torch_give_the_same_numbers(
    form: Format, rows: int, outputs: int, inputs: int
) -> None:
    layer = layer_of(form, outputs, inputs)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(layer(x), layer._by_torch(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("form", "bound"),
    [(FORMATS[0], 0.01), (FORMATS[2], 0.007), (FORMATS[3], 0.008), (FORMATS[4], 0.085)],
    ids=str,
)
def test_it_is_near_the_float_layer(form: Format, bound: float) -> None:
    weight, bias = weights(96, 192)
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.t()
    error = layer_of(form)(x) - bias - exact
    assert error.norm() < bound * exact.norm()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(form: Format) -> None:
    layer = layer_of(form)
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(2))
    x[5] *= 1000
    assert torch.equal(layer(x)[3], layer(x[3:4])[0])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_weights_come_back_from_words_as_they_were_rounded(form: Format) -> None:
    weight, _ = weights(50, 200)
    numbers, scale, zeros = round_weight(weight, form)
    layer = QuantizedLinear.of(form, numbers, scale, zeros, None)
    layer.backend = CPU
    assert torch.equal(layer.numbers(), numbers.short())
    found = layer.zero_points()
    assert (found is None) == (zeros is None)
    if zeros is not None and found is not None:
        assert torch.equal(found, zeros)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 256), (17, 200), (3, 72)])
def test_the_kernels_round_as_torch_does(form: Format, outputs: int, inputs: int) -> None:
    weight, _ = weights(outputs, inputs)
    importance = torch.rand(inputs, generator=torch.Generator().manual_seed(3))
    words, scale, zeros = rounded_words(weight, form, importance)
    numbers, expected_scale, expected_zeros = round_weight(weight, form, importance)
    found = QuantizedLinear.of_words(form, inputs, (words, scale, zeros), None)
    assert torch.equal(found.numbers(), numbers.short())
    assert torch.equal(scale, expected_scale)
    if zeros is not None and expected_zeros is not None:
        assert torch.equal(zeros, expected_zeros)


def test_four_bits_need_channels_by_eight() -> None:
    with pytest.raises(ConfigError, match="44 input channels"):
        QuantizedLinear(44, 8, INT4, bias=False)


@pytest.mark.parametrize(
    ("bits", "group", "activation_bits"),
    [(5, 32, 8), (8, 40, 8), (8, 0, 8), (8, 512, 16), (4, 32, 12)],
)
def test_formats_that_no_kernel_reads_are_refused(
    bits: int, group: int, activation_bits: int
) -> None:
    with pytest.raises(ConfigError):
        Format(bits, group, activation_bits)


def near(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    """Whether the difference is below a share of the values, by root mean square."""
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return bool(difference < share * expected.float().square().mean().sqrt())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_compiled_decoder_gives_the_logits_of_the_plain_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    prompts = [vlm.processor.prepare("One."), vlm.processor.prepare("A longer prompt.")]
    batch = vlm.processor.batch(prompts)
    logits = []
    for kernels in (native.library(), None):
        monkeypatch.setattr(native, "library", lambda found=kernels: found)
        model = copy.deepcopy(vlm.model)
        with torch.inference_mode():
            cache = model.new_cache(batch, 64)
            steps = [model.prefill(batch, cache)]
            steps += [model.decode_one_token(torch.tensor([40, 50]), cache) for _ in range(4)]
        logits.append(torch.stack(steps))
    found, expected = logits
    assert near(found, expected, 1e-5 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_compiled_tower_gives_the_states_of_the_plain_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    side = vlm.config.vision.image_size
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(3, 3, side, side, generator=generator).to(vlm.dtype) * 2 - 1
    states = []
    for kernels in (native.library(), None):
        monkeypatch.setattr(native, "library", lambda found=kernels: found)
        with torch.inference_mode():
            states.append(copy.deepcopy(vlm.model.vision)(tiles))
    found, expected = states
    assert near(found, expected, 1e-5 if dtype == "float32" else 0.03)


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits from the kernels; torch sums by the shape of what it is given."""
    if native.library() is not None:
        return torch.equal(found, expected)
    return near(found, expected, 0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_prompt_read_in_pieces_or_beside_others_gives_the_same(
    tiny_folder: Path, dtype: str
) -> None:
    model = smolstack.load(tiny_folder, dtype=dtype).model
    width = model.config.text.hidden_size
    embeddings = torch.randn(1, 21, width, generator=torch.Generator().manual_seed(0))
    embeddings = embeddings.to(model.dtype)
    with torch.inference_mode():
        whole = KVCache(model.config.text, 1, 40, dtype=model.cache_dtype)
        expected = model.prefill_embeddings(embeddings, whole)
        pieces = KVCache(model.config.text, 1, 40, dtype=model.cache_dtype)
        for start, end in ((0, 8), (8, 9), (9, 21)):
            found = model.prefill_embeddings(embeddings[:, start:end], pieces)
        assert alike(found, expected)
        beside = KVCache(
            model.config.text,
            2,
            40,
            padding=torch.tensor([0, 5]),
            dtype=model.cache_dtype,
        )
        padded = torch.zeros(2, 26, width, dtype=model.dtype)
        padded[0], padded[1, 5:] = torch.ones(26, width), embeddings[0]
        assert alike(model.prefill_embeddings(padded, beside)[1:], expected)
        alone = model.decode_one_token(torch.tensor([7]), whole)
        assert alike(model.decode_one_token(torch.tensor([9, 7]), beside)[1:], alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_change_are_read_anew(tiny_folder: Path, dtype: str) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    side = vlm.config.vision.image_size
    tile = torch.full((1, 3, side, side), 0.5, dtype=vlm.dtype)
    with torch.no_grad():
        before = vlm.model.vision(tile)
        first: Any = vlm.model.vision.layers[0]
        first.mlp_norm.weight.mul_(2)
        assert not torch.equal(vlm.model.vision(tile), before)


def test_an_int8_answer_is_the_same_alone_and_in_a_batch(tiny_folder: Path) -> None:
    vlm = smolstack.load(tiny_folder, dtype="int8")
    prompts = ["What is this?", "Say something quite a bit longer, please."]
    together = [answer.text for answer in vlm.ask_many(prompts, max_new_tokens=6)]
    assert together == [vlm.ask(None, prompt, max_new_tokens=6).text for prompt in prompts]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_model_is_saved_and_answers_as_before(
    tiny_folder: Path, tmp_path: Path, dtype: str
) -> None:
    vlm = smolstack.load(tiny_folder, dtype=dtype)
    asked = vlm.ask(None, "What is this?", max_new_tokens=8)
    saved = vlm.save(tmp_path / "saved")
    again = smolstack.load(saved)
    assert again.model.scheme == dtype
    assert again.precision.startswith(f"{dtype}, ")
    assert again.ask(None, "What is this?", max_new_tokens=8).token_ids == asked.token_ids
    state = again.model.state_dict()
    assert all(torch.equal(state[name], kept) for name, kept in vlm.model.state_dict().items())
    smaller = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert smaller < sum(path.stat().st_size for path in tiny_folder.glob("*.safetensors"))


def test_stored_integers_are_not_loaded_as_something_else(
    tiny_folder: Path, tmp_path: Path
) -> None:
    saved = smolstack.load(tiny_folder, dtype="int8").save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"int8 .*float32"):
        smolstack.load(saved, dtype="float32")
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    config["quantization_config"]["quant_method"] = "gptq"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by GPTQ"):
        smolstack.load(saved)
