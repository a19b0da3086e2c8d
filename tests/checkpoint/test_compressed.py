"""Checkpoints of integers: published ones are read as compressed-tensors reads them, saved ones
answer as before, damaged ones are told of in one sentence."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import smolstack
from smolstack.checkpoint import keys
from smolstack.checkpoint.diff import diff_checkpoints
from smolstack.checkpoint.inspect import inspect_checkpoint
from smolstack.checkpoint.new import new_checkpoint
from smolstack.checkpoint.verification.checkpoint import check_checkpoint
from smolstack.config import ModelConfig
from smolstack.config.quantization import INT8, Format
from smolstack.errors import CheckpointError, ConfigError
from smolstack.family import Preset
from smolstack.model.quantized import QuantizedLinear
from smolstack.quantization.quantize import formats_of, quantize_model

TEXT = ["<|im_start|>Two and two are four."]
GATE = "model.text_model.layers.1.mlp.gate_proj"
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def wide(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint whose decoder's rows are of whole groups of 128; the tower's are not."""
    config = replace(
        tiny_preset.config,
        vision=replace(tiny_preset.config.vision, hidden_size=24, intermediate_size=312),
        text=replace(
            tiny_preset.config.text,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            head_dim=32,
        ),
    )
    preset = replace(tiny_preset, config=config)
    return new_checkpoint(preset, tmp_path_factory.mktemp("wide") / "model", seed=9)


@pytest.fixture(scope="module")
def whole(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tower whose rows are whole groups of 256, as SmolVLM-256M's are."""
    place = tmp_path_factory.mktemp("whole") / "model"
    return new_checkpoint(replace(tiny_preset, config=_whole(tiny_preset)), place, seed=9)


@pytest.fixture(scope="module")
def ragged(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that end in shorter groups: 4,304 channels, as in SigLIP-so400m, and 288, 96 and 320."""
    config = replace(
        tiny_preset.config,
        vision=replace(tiny_preset.config.vision, hidden_size=288, intermediate_size=4304),
        text=replace(tiny_preset.config.text, hidden_size=96, intermediate_size=320, head_dim=16),
    )
    preset = replace(tiny_preset, config=config)
    return new_checkpoint(preset, tmp_path_factory.mktemp("ragged") / "model", seed=8)


def _whole(preset: Preset) -> ModelConfig:
    return replace(
        preset.config,
        vision=replace(preset.config.vision, hidden_size=256, intermediate_size=512),
        text=replace(
            preset.config.text, hidden_size=128, intermediate_size=256, num_heads=4, head_dim=32
        ),
    )


def _logits(vlm: smolstack.VLM) -> Tensor:
    if vlm.config.embedding_dim is not None:
        return torch.as_tensor(vlm.embed_queries(["Two and two?"])[0])
    with torch.inference_mode():
        logits: Tensor = vlm.model(vlm.processor(TEXT))
        return logits


def _rewritten(source: Path, place: Path, change: Change) -> Path:
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    return place


def _published(
    source: Path, place: Path, form: str, activations: Any = None, **weights: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose decoder compressed-tensors itself compressed, and what it makes of it."""
    settings = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    scheme = QuantizationScheme.model_validate({**settings, "format": form})
    compressor = BaseCompressor.get_value_from_registry(form)
    meant: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [n for n in tensors if "text_model.layers" in n and n.endswith("proj.weight")]:
            layer, weight = name.removesuffix(".weight"), tensors.pop(name).float()
            state = {"weight": weight, **_scales(weight, scheme.weights)}
            packed = compressor.compress(state, scheme)
            meant[name] = compressor.decompress(dict(packed), scheme)["weight"].float()
            tensors |= {f"{layer}.{end}": t.contiguous() for end, t in packed.items()}
        config["quantization_config"] = {
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
            "format": form,
            "ignore": ["lm_head", "re:.*vision_model.*", "re:.*connector.*"],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    return _rewritten(source, place, change), meant


def _scales(weight: Tensor, weights: Any) -> dict[str, Tensor]:
    """Scales and zero points from least and greatest weights, bfloat16 as published ones are."""
    size = weights.group_size if weights.strategy == "group" else weight.shape[1]
    groups = weight.view(weight.shape[0], -1, size)
    levels, half = 2**weights.num_bits - 1, 2 ** (weights.num_bits - 1)
    if weights.symmetric:
        return {"weight_scale": (groups.abs().amax(-1) * 2 / levels).bfloat16()}
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / levels).bfloat16()
    zero = (-half - low / scale.float()).round().clamp(-half, half - 1).to(torch.int8)
    return {"weight_scale": scale, "weight_zero_point": zero}


def _group(bits: int, size: int, *, symmetric: bool = True) -> dict[str, Any]:
    one = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return (
        {**one, "strategy": "group", "group_size": size} if size else {**one, "strategy": "channel"}
    )


PUBLISHED: dict[str, tuple[str, Any, dict[str, Any], Format | None]] = {
    "W4A16, groups of 128": ("pack-quantized", None, _group(4, 128), Format(4, 32)),
    "W4A16, groups of 64": ("pack-quantized", None, _group(4, 64), Format(4, 32)),
    "W4A16, groups of 32": ("pack-quantized", None, _group(4, 32), Format(4, 32)),
    "W4A16, channels": ("pack-quantized", None, _group(4, 0), Format(4, 32)),
    "W4A16, zero points": ("pack-quantized", None, _group(4, 64, symmetric=False), Format(4, 32)),
    "W8A16, groups": ("pack-quantized", None, _group(8, 64), Format(8, 64, 16)),
    "W8A16, channels": ("pack-quantized", None, _group(8, 0), Format(8, 256, 16)),
    "W8A16, zero points": ("pack-quantized", None, _group(8, 64, symmetric=False), None),
    "W8A8, channels": ("int-quantized", DYNAMIC, _group(8, 0), Format(8, 64)),
    "W8A8, groups": ("int-quantized", DYNAMIC, _group(8, 32), Format(8, 32)),
    "groups of 8": ("pack-quantized", None, _group(8, 8), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layers_are_what_compressed_tensors_makes_of_them(
    wide: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    form, activations, weights, expected = PUBLISHED[name]
    place, meant = _published(wide, tmp_path / "published", form, activations, **weights)
    with caplog.at_level(logging.WARNING):
        vlm = smolstack.load(place)
    gate = vlm.model.get_submodule("decoder.layers.1.gate")
    assert isinstance(gate, (QuantizedLinear, torch.nn.Linear))
    assert (gate.format if isinstance(gate, QuantizedLinear) else None) == expected
    weight = gate.dequantized() if isinstance(gate, QuantizedLinear) else gate.weight
    # compressed-tensors multiplies in the scales' bfloat16; integers that are kept lose nothing.
    assert torch.equal(weight.bfloat16(), meant[f"{GATE}.weight"].bfloat16())
    said = [r.message for r in caplog.records if "held as float weights" in r.message]
    assert len(said) == (expected is None)
    floats = smolstack.load(
        _rewritten(wide, tmp_path / "floats", lambda tensors, _: tensors.update(meant))
    )
    want, error = _logits(floats), 0.05 if weights["num_bits"] == 4 else 0.02
    assert float((_logits(vlm) - want).norm() / want.norm()) < error
    assert [p for check in check_checkpoint(place, values=True) for p in check.problems] == []
    assert torch.equal(_logits(smolstack.load(vlm.save(tmp_path / "again"))), _logits(vlm))


def _saved(folder: Path, scheme: str, place: Path) -> tuple[smolstack.VLM, Path]:
    if scheme != "mixed":
        vlm = smolstack.load(folder, dtype=scheme)
    else:
        vlm = smolstack.load(folder)
        formats = formats_of(vlm.model, "int4")
        formats["decoder.layers.0.down"] = INT8
        formats["decoder.layers.1.gate"] = Format(4, 64)
        formats["vision.layers.0.down"] = Format(8, 512)
        formats["decoder.layers.1.attention.query"] = Format(8, 32, activation_bits=16)
        quantize_model(vlm.model, formats)
    return vlm, vlm.save(place)


@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8", "int4", "mixed"])
@pytest.mark.parametrize("kind", ["wide", "ragged", "tied_folder", "retrieval_folder"])
def test_a_saved_model_answers_as_before_to_the_bit(
    request: pytest.FixtureRequest, tmp_path: Path, scheme: str, kind: str
) -> None:
    """Also of widths that groups do not divide, 24 and 312 among them."""
    vlm, place = _saved(request.getfixturevalue(kind), scheme, tmp_path / "saved")
    again = smolstack.load(place, dtype="auto" if scheme != "bfloat16" else scheme)
    assert dict(again.config.quantization or ()) == dict(vlm.model.config.quantization or ())
    assert torch.equal(_logits(again), _logits(vlm))
    assert [p for check in check_checkpoint(place, values=True) for p in check.problems] == []


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_without_kernels_too(wide: Path, tmp_path: Path, scheme: str) -> None:
    code = (
        "import sys, torch, smolstack\n"
        "a = smolstack.load(sys.argv[1], dtype=sys.argv[2])\n"
        "b = smolstack.load(a.save(sys.argv[3]))\n"
        f"x, y = (v.model(v.processor({TEXT!r})) for v in (a, b))\n"
        "assert torch.equal(x, y)\n"
    )
    arguments = [sys.executable, "-c", code, str(wide), scheme, str(tmp_path / "saved")]
    subprocess.run(arguments, check=True, env={**os.environ, "SMOLSTACK_NATIVE": "0"})


def test_inspect_and_diff_see_what_the_integers_stand_for(wide: Path, tmp_path: Path) -> None:
    _, place = _saved(wide, "int8", tmp_path / "int8")
    found, floats = inspect_checkpoint(place), inspect_checkpoint(wide)
    assert found.parameters == floats.parameters
    assert list(found.memory) == ["int8"]
    changes = diff_checkpoints(wide, place)
    assert (changes.only_a, changes.only_b, changes.reshaped) == ((), (), {})
    assert changes.formats[f"{GATE}.weight"] == "F32 → int8"


@pytest.mark.parametrize("scheme", ["int8", "int4", "mixed"])
def test_groups_are_written_as_others_need_them(ragged: Path, tmp_path: Path, scheme: str) -> None:
    """They divide the channels, and are of at most 128, which vLLM's kernels end at."""
    _, place = _saved(ragged, scheme, tmp_path / "saved")
    tensors = load_file(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    groups = {
        target: group["weights"].get("group_size")
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    down = "model.vision_model.encoder.layers.0.mlp.fc2"
    assert groups[down] == 16  # the largest that divides both 4,304 and 256
    assert list(tensors[f"{down}.weight_scale"].shape) == [288, 269]
    for name, group in groups.items():
        width = int(tensors[f"{name}.weight_shape"][1])
        assert group is None or (group <= 128 and width % group == 0), name


def test_groups_cut_short_are_read_as_they_were_written_before(
    ragged: Path, tmp_path: Path
) -> None:
    vlm, place = _saved(ragged, "int8", tmp_path / "saved")
    formats = dict(vlm.model.config.quantization or ())

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        stored = config["quantization_config"]
        sizes = stored["smolstack"].pop("groups")
        for name, group in stored["config_groups"].items():
            group["weights"].update(strategy="group", group_size=sizes[name])
        for ours in formats:
            theirs = keys.to_hf(f"{ours}.weight").removesuffix(".weight")
            layer = vlm.model.get_submodule(ours)
            assert isinstance(layer, QuantizedLinear)
            tensors[f"{theirs}.weight_scale"] = layer.tensors()[1].contiguous()

    again = smolstack.load(_rewritten(place, tmp_path / "before", change))
    assert dict(again.config.quantization or ()) == formats
    assert torch.equal(_logits(again), _logits(vlm))


def test_scales_that_differ_within_a_group_are_refused(ragged: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors["model.vision_model.encoder.layers.0.mlp.fc2.weight_scale"][0, 1] *= 2

    _, place = _saved(ragged, "int8", tmp_path / "saved")
    damaged = _rewritten(place, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=r"fc2 .*256"):
        smolstack.load(damaged)


@pytest.mark.parametrize("kind", ["whole", "ragged", "published 4 bits"])
def test_transformers_computes_the_dequantized_weights(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """Also of rows that groups of 64 and 256 do not divide, and of 4 bits that are symmetric."""
    from transformers import AutoModelForImageTextToText

    if kind == "published 4 bits":
        whole: Path = request.getfixturevalue("whole")
        four, _ = _published(whole, tmp_path / "four", "pack-quantized", None, **_group(4, 64))
        vlm = smolstack.load(four)
        place = vlm.save(tmp_path / "saved")
    else:
        vlm, place = _saved(request.getfixturevalue(kind), "int8", tmp_path / "saved")
    plain = vlm.model

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            layer = name.removesuffix(".weight_packed")
            own = plain.get_submodule(keys.from_hf(f"{layer}.weight").removesuffix(".weight"))
            assert isinstance(own, QuantizedLinear)
            for end in ("packed", "scale", "shape"):
                del tensors[f"{layer}.weight_{end}"]
            tensors[f"{layer}.weight"] = own.dequantized().contiguous()
        del config["quantization_config"]

    floats = _rewritten(place, tmp_path / "floats", change)
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    both = [
        AutoModelForImageTextToText.from_pretrained(one, dtype=torch.float32)(input_ids=ids).logits
        for one in (place, floats)
    ]
    assert torch.equal(*both)


def _tensor(end: str, change: Callable[[Tensor], Tensor] | None) -> Change:
    def damage(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        old = tensors.pop(f"{GATE}.{end}", torch.zeros(1))
        if change is not None:
            tensors[f"{GATE}.{end}"] = change(old).contiguous()

    return damage


def _config(**settings: Any) -> Change:
    return lambda _, config: config["quantization_config"].update(settings)


def _weights(**settings: Any) -> Change:
    def damage(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"].update(settings)

    return damage


def _own(**settings: Any) -> Change:
    return lambda _, config: config["quantization_config"]["smolstack"].update(settings)


def _groups(**settings: Any) -> Change:
    def damage(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"].pop("smolstack")
        for group in config["quantization_config"]["config_groups"].values():
            group.update(settings)

    return damage


DAMAGED: dict[str, tuple[Change, str]] = {
    "no scale": (_tensor("weight_scale", None), r"gate_proj lacks weight_scale, expected \[256, 4"),
    "no zero points": (_tensor("weight_zero_point", None), "gate_proj lacks weight_zero_point"),
    "no integers": (_tensor("weight_packed", None), "gate_proj lacks weight_packed"),
    "narrow": (_tensor("weight_packed", lambda t: t[:, :-1]), r"\[256, 15\], expected \[256, 16\]"),
    "long scale": (_tensor("weight_scale", lambda t: t.repeat(1, 2)), r"\[256, 8\], expected"),
    "integer scale": (_tensor("weight_scale", lambda t: t.int()), "stored as I32, expected F32"),
    "float integers": (_tensor("weight_packed", lambda t: t.float()), "stored as F32, expected"),
    "other shape": (
        _tensor("weight_shape", lambda t: t + 1),
        r"\[257, 129\], expected \[256, 128\]",
    ),
    "weight beside": (_tensor("weight", lambda _: torch.zeros(256, 128)), "extra tensor"),
    "order": (_tensor("weight_g_idx", lambda _: torch.zeros(128).int()), "g_idx is an extra"),
    "actorder": (_weights(actorder="group"), "actorder is 'group', expected null or 'weight'"),
    "99 bits": (_weights(num_bits=99), "99 bits, 'int', expected int of 4 or 8"),
    "FP8 type": (_weights(num_bits=8, type="float"), "8 bits, 'float', expected int of 4 or 8"),
    "FP8": (_config(format="float-quantized"), "format 'float-quantized', expected one of"),
    "cache": (_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is .*, expected null"),
    "no group size": (_weights(group_size=0), "group_size is 0, expected a positive integer"),
    "no groups": (_config(config_groups={}), "config_groups is {}, expected an object"),
    "a bad pattern": (_config(ignore=["re:(x"]), "not a regular expression"),
    "all ignored": (_config(ignore=["Linear"]), "expected a config group"),
    "static": (_groups(input_activations={"num_bits": 8}), "expected null, or int of 8 bits"),
    "own": (_config(smolstack=3), "smolstack is 3, expected activation_bits"),
    "own groups": (_own(groups={"group_0": 7}), "groups is .*, expected a multiple of 16"),
    "own groups apart": (_weights(group_size=24, strategy="group"), "24, expected a divisor of"),
}


@pytest.fixture(scope="module")
def nibbles(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(wide, "int4", tmp_path_factory.mktemp("nibbles") / "saved")[1]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_told_of_in_a_sentence(
    nibbles: Path, tmp_path: Path, name: str
) -> None:
    change, sentence = DAMAGED[name]
    place = _rewritten(nibbles, tmp_path / "damaged", change)
    with pytest.raises((CheckpointError, ConfigError), match=sentence):
        smolstack.load(place)
    assert any(check.problems for check in check_checkpoint(place, values=True))


def test_targets_by_name_pattern_and_class() -> None:
    from smolstack.checkpoint.schemes import read_schemes

    def group(target: str, size: int) -> dict[str, Any]:
        return {"targets": [target], "weights": _group(8, size)}

    groups = {"a": group("Linear", 32), "b": group("re:.*mlp.*", 64), "c": group(GATE, 128)}
    found = read_schemes(
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": groups,
                "ignore": ["lm_head"],
            }
        }
    )
    other = GATE.replace("gate", "up")
    names = (GATE, other, "model.text_model.layers.0.self_attn.q_proj", "lm_head")
    schemes = [found.of(name, "Linear") for name in names]
    assert [None if one is None else one.group for one in schemes] == [128, 64, 32, None]


def test_a_retrieval_model_keeps_its_vectors(tiny_preset: Preset, tmp_path: Path) -> None:
    preset = replace(tiny_preset, config=replace(_whole(tiny_preset), embedding_dim=128))
    folder = new_checkpoint(preset, tmp_path / "colsmol", seed=4)
    image = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8).numpy()
    floats, vlm = (smolstack.load(folder, dtype=d) for d in ("float32", "int8"))
    again = smolstack.load(vlm.save(tmp_path / "saved"))
    one, two, three = (
        torch.as_tensor(v.embed_pages([image])[0]).float() for v in (floats, vlm, again)
    )
    assert torch.equal(two, three)
    assert float(torch.cosine_similarity(one, two, dim=-1).min()) >= 0.999


def test_a_truncated_file_is_told_of(nibbles: Path, tmp_path: Path) -> None:
    place = shutil.copytree(nibbles, tmp_path / "short")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        smolstack.load(place)


def test_an_adapter_is_merged_before_its_model_is_quantized(whole: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "base_model_name_or_path": str(whole)}
    low, high = torch.randn(2, 128), torch.randn(256, 2)
    name = f"base_model.model.{GATE}"
    save_file(
        {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    vlm, place = _saved(adapter, "int8", tmp_path / "saved")
    assert not torch.equal(_logits(vlm), _logits(smolstack.load(whole, dtype="int8")))
    assert torch.equal(_logits(smolstack.load(place)), _logits(vlm))
    settings["base_model_name_or_path"] = str(place)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"int8.*float"):
        smolstack.load(adapter)
