"""Quantized weights are held once, whoever multiplies them, and nothing is lost by that."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import smolstack
from smolstack.backends.cpu.backend import CPU
from smolstack.backends.cpu.packed_weights import Arena, packed_size
from smolstack.checkpoint import packed_file
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.load import load_checkpoint, load_weights
from smolstack.checkpoint.packed_file import adopt_packed
from smolstack.checkpoint.source import Source, open_source
from smolstack.config.quantization import Format
from smolstack.errors import ConfigError
from smolstack.model.quantized import QuantizedLinear
from smolstack.model.vlm import VisionLanguageModel
from smolstack.native import library as native
from smolstack.quantization.calibration import multiplied_where_stored
from smolstack.quantization.rounding import (
    Factors,
    Rounding,
    round_weight,
    rounded_and_packed,
    rounded_words,
)
from smolstack.quantization.smoothing import channel_sizes

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")

FORMATS = (Format(8, 64), Format(8, 256), Format(8, 64, activation_bits=16), Format(4, 32))
SIZES = ((96, 192), (17, 64), (50, 200), (1, 1000), (33, 24))


def layer_of(form: Format, outputs: int, inputs: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    layer = QuantizedLinear.of(form, *round_weight(weight, form), torch.randn(outputs))
    layer.backend = CPU
    return layer


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_once_multiplied_a_layer_saves_what_it_was_made_of(
    form: Format, outputs: int, inputs: int
) -> None:
    layer = layer_of(form, outputs, inputs)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    floats = layer.dequantized()
    x = torch.randn(3, inputs)
    expected = layer(x)
    assert layer.weight_packed.is_meta, "the words are let go: the packed weights say the same"
    after = layer.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(layer.dequantized(), floats)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(layer.float().to("cpu")(x), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_other_weights_take_the_place_of_those_that_were_used(form: Format, assign: bool) -> None:
    first, second, x = layer_of(form, 40, 96), layer_of(form, 40, 96), torch.randn(2, 96)
    second.weight_packed += 1
    first(x)
    first.load_state_dict(second.state_dict(), assign=assign)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_weights_are_rounded_from_where_they_lie(
    dtype: torch.dtype, form: Format, outputs: int, inputs: int
) -> None:
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    factors = Factors(torch.rand(outputs) + 0.5, torch.rand(inputs) + 0.5)
    importance = torch.rand(inputs) + 0.1
    expected = rounded_words(factors.of(weight), form, importance)
    library = native.library()
    assert library is not None

    found = rounded_words(weight, form, importance, factors)
    packed = rounded_and_packed(
        library, Rounding(weight, form, importance, factors), arena_of(form, weight)
    )
    layer = QuantizedLinear.of_packed(packed, None)
    layer.backend = CPU
    assert torch.equal(found[0], expected[0])
    assert torch.equal(layer.state_dict()["weight_packed"], expected[0])
    assert torch.equal(layer.state_dict()["weight_scale"], expected[1])
    if expected[2] is not None:
        zeros = layer.zero_points()
        assert zeros is not None
        assert torch.equal(zeros, expected[2])


def arena_of(form: Format, weight: torch.Tensor) -> Arena:
    library = native.library()
    assert library is not None
    outputs, inputs = weight.shape
    return Arena(library, packed_size(library, form, inputs, outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_stored_weights_are_measured_and_multiplied_without_a_copy(
    dtype: torch.dtype, outputs: int, inputs: int, threads: int
) -> None:
    layer = nn.Linear(inputs, outputs).to(dtype)
    x = torch.randn(7, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), multiplied_where_stored({"": layer}, 7):
            found = layer(x)
        largest, squares = channel_sizes(layer.weight)
    finally:
        torch.set_num_threads(before)
    weight = layer.weight.detach().float()
    expected = nn.functional.linear(x, weight, layer.bias.detach().float())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(largest, weight.abs().amax(dim=0))
    torch.testing.assert_close(squares, weight.square().sum(dim=0))
    assert layer.weight.dtype == dtype


@pytest.fixture
def saved(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return smolstack.load(tiny_folder, dtype="int8").save(tmp_path / "int8")


def as_stored(folder: Path) -> tuple[VisionLanguageModel, Source]:
    """A model before its weights are packed."""
    source = open_source(ModelPath(folder))
    config = load_checkpoint(folder).config
    return load_weights(source, config, torch.float32, torch.device("cpu")), source


def test_a_second_start_maps_what_the_first_one_made(saved: Path) -> None:
    steps: list[tuple[str, int, int]] = []

    def opened() -> tuple[torch.Tensor, Path | None]:
        model, source = as_stored(saved)
        kept = adopt_packed(model, source, least=0, progress=lambda *a: steps.append(a))
        layer = model.get_submodule("decoder.layers.0.down")
        layer(torch.ones(1, model.config.text.intermediate_size))
        return model.state_dict()["decoder.layers.0.down.weight_packed"], kept

    expected = load_checkpoint(saved).model.state_dict()["decoder.layers.0.down.weight_packed"]
    first, made = opened()
    assert made is not None
    assert [done for _, done, _ in steps] == list(range(1, steps[0][2] + 1))
    steps.clear()
    second, mapped = opened()
    assert mapped == made
    assert steps == [], "nothing was laid out again"
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)

    made.write_bytes(b"cut short")
    again, _ = opened()
    assert torch.equal(again, expected)
    status = (saved / "model.safetensors").stat()
    os.utime(saved / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    _, other = opened()
    assert other != made, "a folder that was written again has packed weights of its own"


def test_what_cannot_be_kept_costs_nothing_but_time(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = as_stored(saved)
    monkeypatch.setenv(packed_file.SWITCH, "0")
    assert adopt_packed(model, source, least=0) is None
    monkeypatch.delenv(packed_file.SWITCH)
    model, source = as_stored(saved)
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    assert adopt_packed(model, source, least=0) is None
    assert torch.equal(
        model.state_dict()["head.weight_packed"],
        load_checkpoint(saved).model.state_dict()["head.weight_packed"],
    )


def test_loading_says_how_far_it_is(tiny_folder: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    smolstack.load(tiny_folder, dtype="int4", progress=lambda *step: steps.append(step))
    names = [name for name, _, _ in steps]
    assert names[0] == "vision.layers.0"
    assert names[-1] == "head"
    assert [done for _, done, _ in steps] == list(range(1, steps[-1][2] + 1))


def test_the_token_table_keeps_the_numbers_that_it_is_stored_in(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = smolstack.load(tiny_folder, dtype="bfloat16").save(tmp_path / "bfloat16")
    vlm = smolstack.load(folder, dtype="int8")
    again = smolstack.load(vlm.save(tmp_path / "int8"))
    for one in (vlm, again):
        assert one.model.decoder.embedding.weight.dtype == torch.bfloat16
        assert one.dtype == torch.float32
    batch = vlm.processor(["Hello"])
    assert torch.equal(vlm.model(batch), again.model(batch))


def test_images_of_a_quantized_model_are_kept_on_disk(
    saved: Path, tmp_path: Path, images: list[Image.Image]
) -> None:
    def tokens() -> torch.Tensor:
        vlm = smolstack.load(saved)
        vlm.image_cache.folder = tmp_path / "images"
        return vlm.encode(images[0]).tokens

    first, kept = tokens(), sorted((tmp_path / "images").glob("*.safetensors"))
    assert torch.equal(tokens(), first)
    assert sorted((tmp_path / "images").glob("*.safetensors")) == kept
    assert len(kept) == 1


def test_no_rows_need_no_weights() -> None:
    layer = layer_of(FORMATS[0], 17, 64)
    assert layer(torch.empty(0, 64)).shape == (0, 17)


def test_files_that_another_user_could_have_written_are_not_mapped(saved: Path) -> None:
    model, source = as_stored(saved)
    made = adopt_packed(model, source, least=0)
    assert made is not None
    made.write_bytes(bytes(made.stat().st_size))
    made.chmod(0o666)
    model, source = as_stored(saved)
    expected = model.state_dict()["head.weight_packed"].clone()
    adopt_packed(model, source, least=0)
    assert torch.equal(model.state_dict()["head.weight_packed"], expected)


def test_a_disk_that_fails_after_all_was_written_costs_no_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    model, source = as_stored(saved)
    expected = model.state_dict()["head.weight_packed"].clone()
    monkeypatch.setattr(os, "fsync", full)
    assert adopt_packed(model, source, least=0) is None
    assert torch.equal(model.state_dict()["head.weight_packed"], expected)


def test_memory_that_is_given_back_loses_nothing(tmp_path: Path) -> None:
    library = native.library()
    assert library is not None
    own = torch.arange(100_000)
    path = tmp_path / "numbers"
    own.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=100_000, dtype=torch.int64)
    changed = torch.from_file(str(path), shared=False, size=100_000, dtype=torch.int64)
    changed[50_000] = -1  # in the process's own copy of a page
    for tensor in (own, mapped, changed):
        assert int(tensor.sum()) > 0
        library.release_pages(tensor.data_ptr(), tensor.nbytes)
    assert torch.equal(own, torch.arange(100_000))
    assert torch.equal(mapped, own)
    assert int(changed[50_000]) == -1


def test_a_kept_file_that_was_damaged_is_made_anew(saved: Path) -> None:
    model, source = as_stored(saved)
    expected = model.state_dict()["head.weight_packed"].clone()
    made = adopt_packed(model, source, least=0)
    assert made is not None
    held = bytearray(made.read_bytes())
    held[len(held) // 2 :] = bytes(byte ^ 0x55 for byte in held[len(held) // 2 :])
    made.write_bytes(held)
    model, source = as_stored(saved)
    assert adopt_packed(model, source, least=0) == made
    assert torch.equal(model.state_dict()["head.weight_packed"], expected)


def test_what_stands_beside_integers_stays_float32(tiny_folder: Path) -> None:
    model = smolstack.load(tiny_folder, dtype="int8").model
    for change in (model.half, model.bfloat16, model.double):
        with pytest.raises(ConfigError, match="int8 and compute in float32"):
            change()
    assert model.float().to("cpu") is model


def test_weights_that_are_quantized_do_not_depend_on_threads(tiny_folder: Path) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(smolstack.load(tiny_folder, dtype="int4").model.state_dict())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
