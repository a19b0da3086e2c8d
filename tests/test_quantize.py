"""``smolstack quantize`` and ``smolstack.quantize``, on a model in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.cli.app import app
from smolstack.config.quantization import INT4, INT8, INT8_FINE, Format
from smolstack.errors import ConfigError, DataError
from smolstack.family import Preset
from smolstack.quantization.budget import average_bits, choose_formats
from smolstack.quantization.gptq import round_fitted
from smolstack.quantization.rounding import round_weight
from smolstack.quantization_job.results import Quantized

TEXT = "The ferry leaves at nine and comes back at noon, unless the wind has turned by then. " * 12


@pytest.fixture(scope="session")
def even_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a decoder whose sizes groups of 32 divide."""
    text = replace(
        tiny_preset.config.text, hidden_size=64, num_heads=8, num_kv_heads=2, intermediate_size=96
    )
    preset = replace(tiny_preset, config=replace(tiny_preset.config, text=text))
    return new_checkpoint(preset, tmp_path_factory.mktemp("even") / "model", seed=5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def images(tmp_path: Path, images: list[Image.Image]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def chats(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": f"{i} and {i}?"},
                {"role": "assistant", "content": f"{2 * i}"},
            ]
        }
        for i in range(9)
    ]
    shown = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "noise"}]}
    rows.append(
        {"messages": [{"role": "user", "content": shown}, said], "images": ["images/0.png"]}
    )
    rows.append({"image": "images/1.png"})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def quantize(*arguments: Any, **options: Any) -> Quantized:
    return smolstack.quantize(*arguments, tokens=options.pop("tokens", 400), **options)


def logits(vlm: smolstack.VLM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = vlm.model(vlm.processor(["What does it say?"]))[0]
    return found


@pytest.mark.parametrize("bits", [8, 4, 6.5])
def test_a_text_calibrates_a_model_that_is_then_loaded(
    even_folder: Path, text: Path, tmp_path: Path, bits: float
) -> None:
    done = quantize(even_folder, tmp_path / "out", bits=bits, calibrate=text)
    assert done.divergence is not None
    assert done.divergence < (0.001 if bits == 8 else 0.1)
    assert done.tokens > 100
    assert done.held_out > 20
    assert [block.name for block in done.blocks] == [
        "vision.layers.0", "vision.layers.1", "connector",
        "decoder.layers.0", "decoder.layers.1", "head",
    ]  # fmt: skip
    assert all(0 < block.error < 0.5 for block in done.blocks)
    loaded = smolstack.load(tmp_path / "out")
    assert loaded.model.scheme == {8.0: "int8", 4.0: "int4"}.get(bits, "mixed")
    expected = logits(smolstack.load(even_folder))
    assert (logits(loaded) - expected).norm() / expected.norm() < (0.05 if bits == 8 else 0.4)
    assert not list(tmp_path.glob(".out*"))


def test_bits_between_are_a_budget_that_is_kept(
    even_folder: Path, text: Path, tmp_path: Path
) -> None:
    small = quantize(even_folder, tmp_path / "small", bits=6.6, calibrate=text)
    large = quantize(even_folder, tmp_path / "large", bits=7.8, calibrate=text)
    assert small.bits <= 6.6 < large.bits <= 7.8
    assert small.text_bytes < large.text_bytes
    assert small.divergence is not None
    assert large.divergence is not None
    assert large.divergence < small.divergence


@pytest.mark.parametrize("data", ["images", "chats", None])
def test_images_chats_and_nothing_calibrate_too(
    even_folder: Path, images: Path, chats: Path, tmp_path: Path, data: str | None
) -> None:
    given = {"images": images, "chats": chats, None: None}[data]
    stages: list[str] = []
    done = quantize(
        even_folder,
        tmp_path / "out",
        bits=4,
        calibrate=given,
        question="What is this?",
        on_progress=lambda stage, done, count: stages.append(stage),
    )
    assert done.tokens > 50
    assert done.divergence is not None
    assert done.divergence < 0.1
    assert "answering about images" in stages
    assert ("writing texts" in stages) == (data != "chats")
    assert smolstack.load(tmp_path / "out").ask(images / "0.png", "Hi", max_new_tokens=2)


def test_a_stop_anywhere_loses_nothing_and_the_bits_are_the_same(
    even_folder: Path, text: Path, tmp_path: Path
) -> None:
    quantize(even_folder, tmp_path / "whole", bits=6.5, calibrate=text)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    done: list[str] = []

    def stop_at(name: str) -> Callable[[str, int, int], None]:
        def tell(stage: str, _: int, __: int) -> None:
            done.append(stage)
            if stage == name:
                raise KeyboardInterrupt

        return tell

    places = ["reading the calibration data", "weighing formats", "quantizing vision.layers.1"]
    places += ["quantizing decoder.layers.0", "measuring the quantized model"]
    for place in places:
        with pytest.raises(KeyboardInterrupt):
            quantize(
                even_folder, tmp_path / "out", bits=6.5, calibrate=text, on_progress=stop_at(place)
            )
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.quantizing").is_dir()
    before = sorted((tmp_path / ".out.quantizing").glob("decoder*.safetensors"))
    times = [path.stat().st_mtime_ns for path in before]
    assert len(before) == 2
    with pytest.raises(ConfigError, match="differs in bits"):
        quantize(even_folder, tmp_path / "out", bits=7, calibrate=text)
    assert times == [path.stat().st_mtime_ns for path in before]
    quantize(even_folder, tmp_path / "out", bits=6.5, calibrate=text)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    assert not (tmp_path / ".out.quantizing").exists()


def test_data_that_changed_meanwhile_are_refused(
    even_folder: Path, text: Path, tmp_path: Path
) -> None:
    def stop(stage: str, _: int, __: int) -> None:
        if stage == "quantizing connector":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(even_folder, tmp_path / "out", bits=4, calibrate=text, on_progress=stop)
    text.write_text(TEXT.replace("ferry", "train"))
    with pytest.raises(ConfigError, match="different data"):
        quantize(even_folder, tmp_path / "out", bits=4, calibrate=text)
    quantize(even_folder, tmp_path / "out", bits=4, calibrate=text, restart=True)


def test_tied_and_retrieval_checkpoints(
    tied_folder: Path, retrieval_folder: Path, text: Path, tmp_path: Path
) -> None:
    done = quantize(tied_folder, tmp_path / "tied", bits=4, calibrate=text)
    assert done.blocks[-1].name == "head"
    assert smolstack.load(tmp_path / "tied").ask(text="Hi", max_new_tokens=1)
    found = quantize(retrieval_folder, tmp_path / "retrieval", bits=8)
    assert found.divergence is None
    assert smolstack.load(tmp_path / "retrieval").embed_queries(["ferry"])[0].shape[1] == 16
    with pytest.raises(ConfigError, match=r"bits is 6 and .* retrieval"):
        quantize(retrieval_folder, tmp_path / "between", bits=6)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_shows_what_each_layer_got_and_lost(
    even_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    arguments = ("quantize", even_folder, tmp_path / "out", "--bits", "6.5", "--calibrate", text)
    result = invoke(*arguments, "--tokens", 400)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert "decoder.layers.1" in result.stdout
    assert "bits a weight" in result.stdout
    assert "KL divergence" in result.stdout
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "(--overwrite) replaces it" in again.stderr
    replaced = invoke(*arguments, "--tokens", 400, "--overwrite", "--json")
    assert replaced.exit_code == 0, replaced.stderr
    assert json.loads(replaced.stdout)["bits"] <= 6.5


def test_what_cannot_be_quantized_is_refused_in_a_sentence(
    even_folder: Path, text: Path, tmp_path: Path
) -> None:
    quantize(even_folder, tmp_path / "int8", bits=8, calibrate=text)
    for arguments, words in [
        ((tmp_path / "int8", tmp_path / "out"), "int8 weights"),
        ((even_folder, tmp_path / "out", "--calibrate", tmp_path / "none"), "does not exist"),
        ((even_folder, tmp_path / "out", "--bits", "4.1"), "4.1 bits per weight"),
        ((even_folder, even_folder, "--overwrite"), "is the checkpoint to be quantized"),
    ]:
        result = invoke("quantize", *arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        quantize(even_folder, tmp_path / "out", calibrate=tmp_path / "empty")
    (tmp_path / "one.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')


def test_a_budget_goes_where_it_saves_most() -> None:
    shapes = {"a": (64, 64), "b": (64, 64), "head": (64, 64)}
    costs = {
        "a": {INT4: 1.0, INT8: 0.1},
        "b": {INT4: 3.0, INT8: 0.1},
        "head": {INT4: 0.2, INT8_FINE: 0.1},
    }
    assert choose_formats(costs, shapes, 8.25) == {"a": INT8, "b": INT8, "head": INT8_FINE}
    assert choose_formats(costs, shapes, 6) == {"a": INT4, "b": INT8, "head": INT4}
    assert average_bits({"a": INT4, "b": INT8}, shapes) == pytest.approx((4.625 + 8.25) / 2)
    with pytest.raises(ConfigError, match=r"the smallest formats take 4\.62"):
        choose_formats(costs, shapes, 4.5)


def test_fitted_weights_keep_what_a_layer_puts_out() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 96, generator=generator)
    x = torch.randn(2000, 16, generator=generator) @ mixed
    x += 0.3 * torch.randn(2000, 96, generator=generator)
    weight = torch.randn(40, 96, generator=generator)
    products = x.t() @ x / len(x)
    form = Format(4, 32)

    def lost(numbers: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None) -> float:
        assert zeros is not None
        spread = [t.float().repeat_interleave(32, dim=1) for t in (scale, zeros)]
        made = (numbers.float() - spread[1]) * spread[0]
        return float((x @ (made - weight).t()).square().mean())

    nearest = lost(*round_weight(weight, form, products.diagonal()))
    fitted = round_fitted(weight, form, products)
    assert fitted[0].dtype == torch.uint8
    assert lost(*fitted) < 0.5 * nearest
    assert lost(*round_fitted(weight, form, products, shrinkage=1.0)) == pytest.approx(
        nearest, rel=0.02
    )
