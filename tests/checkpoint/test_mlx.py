"""Folders that mlx-vlm converted: its names, its convolution, its quantized groups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import smolstack
from smolstack.checkpoint.inspect import inspect_checkpoint
from smolstack.checkpoint.mlx import to_floats
from smolstack.checkpoint.verification.checkpoint import check_checkpoint
from smolstack.errors import CheckpointError

# mx.quantize(mx.array([[k * 0.25 - 3 for k in range(32)]]), group_size=32, bits=4) of mlx 0.32.4,
# and what mx.dequantize makes of it again.
WORDS, SCALE, BIAS = [0xBCCDDEEF, 0x88999AAB, 0x44556677, 0x00112233], -0.5277778, 4.75
FLOATS = [
    -3.16667,
    -2.63889,
    -2.63889,
    -2.11111,
    -2.11111,
    -1.58333,
    -1.58333,
    -1.05556,
    -1.05556,
    -0.52778,
    -0.52778,
    0.0,
    0.0,
    0.0,
    0.52778,
    0.52778,
    1.05556,
    1.05556,
    1.58333,
    1.58333,
    2.11111,
    2.11111,
    2.63889,
    2.63889,
    3.16667,
    3.16667,
    3.69444,
    3.69444,
    4.22222,
    4.22222,
    4.75,
    4.75,
]


def mlx_name(name: str) -> str:
    """What mlx-vlm calls a Hugging Face weight."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("text_model.", "language_model.", 1)


def quantized(weight: torch.Tensor, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Affine groups packed into uint32, the lowest bits first."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp(min=1e-6) / (2**bits - 1)
    q = ((groups - low[..., None]) / scales[..., None]).round().to(torch.int64)
    stream = q.reshape(rows, -1).numpy().astype(np.uint8)[..., None]
    packed = np.packbits(
        np.unpackbits(stream, axis=2, bitorder="little")[..., :bits].reshape(rows, -1),
        axis=1,
        bitorder="little",
    )
    words = torch.from_numpy(packed.view(np.uint32).astype(np.int64)).to(torch.uint32)
    return {"weight": words, "scales": scales.bfloat16(), "biases": low.bfloat16()}


def converted(folder: Path, out: Path, bits: int | None, group: int) -> dict[str, torch.Tensor]:
    """Write a folder as mlx-vlm does; the floats that its language model then has."""
    shutil.copytree(folder, out)
    theirs: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        floats[name] = weight
        layer = mlx_name(name).removesuffix(".weight")
        if weight.dim() == 4:
            theirs[mlx_name(name)] = weight.permute(0, 2, 3, 1).contiguous()
        elif bits and weight.dim() == 2 and "vision" not in name and weight.shape[1] % group == 0:
            parts = quantized(weight, bits, group)
            theirs |= {f"{layer}.{kind}": part for kind, part in parts.items()}
            floats[name] = to_floats(parts["weight"], parts["scales"], parts["biases"], bits)
        else:
            theirs[mlx_name(name)] = weight
    save_file(theirs, out / "model.safetensors", metadata={"format": "mlx"})
    config = json.loads((out / "config.json").read_text())
    if bits:
        settings = {"group_size": group, "bits": bits}
        config |= {"quantization": settings, "quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config))
    return floats


@pytest.mark.parametrize(
    ("bits", "group"), [(None, 16), (4, 16), (8, 16), (6, 16), (3, 32), (4, 32), (8, 64)]
)
def test_a_conversion_opens_with_the_weights_that_mlx_computes_with(
    bits: int | None, group: int, tiny_folder: Path, tmp_path: Path
) -> None:
    floats = converted(tiny_folder, tmp_path / "mlx", bits, group)
    vlm = smolstack.load(tmp_path / "mlx", dtype="float32")
    again = load_file(vlm.save(tmp_path / "saved") / "model.safetensors")
    assert set(again) == set(floats)
    assert all(torch.equal(again[name], floats[name].float()) for name in floats)
    assert "quantization" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert vlm.ask("examples/number.png", "What?", max_new_tokens=3).usage.completion_tokens == 3


def test_four_bits_are_those_of_mlx_itself() -> None:
    packed = torch.tensor([WORDS], dtype=torch.int64).to(torch.uint32)
    found = to_floats(packed, torch.tensor([[SCALE]]), torch.tensor([[BIAS]]), 4)
    assert (found[0] - torch.tensor(FLOATS)).abs().max() < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_are_those_of_mlx_itself(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = np.random.default_rng(bits).normal(size=(6, 128)).astype(np.float32)
    packed, scales, biases = mx.quantize(mx.array(weight), group_size=group, bits=bits)
    expected = np.array(mx.dequantize(packed, scales, biases, group_size=group, bits=bits))
    words = torch.from_numpy(np.array(packed).astype(np.int64)).to(torch.uint32)
    scale, bias = (torch.from_numpy(np.array(part)) for part in (scales, biases))
    assert np.abs(to_floats(words, scale, bias, bits).numpy() - expected).max() < 1e-6


def test_layers_may_have_bits_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    floats = converted(tiny_folder, tmp_path / "mlx", 4, 16)
    head = load_file(tiny_folder / "model.safetensors")["lm_head.weight"]
    weights = load_file(tmp_path / "mlx" / "model.safetensors")
    parts = quantized(head, 8, 16)
    weights |= {f"language_model.lm_head.{kind}": part for kind, part in parts.items()}
    save_file(weights, tmp_path / "mlx" / "model.safetensors")

    def change(config: dict[str, Any]) -> None:
        own = {"group_size": 16, "bits": 8}
        config["quantization"] |= {"language_model.lm_head": own, "vision_model": False}

    edit(tmp_path / "mlx", change)
    vlm = smolstack.load(tmp_path / "mlx", dtype="float32")
    again = load_file(vlm.save(tmp_path / "saved") / "model.safetensors")
    norm = "model.text_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again[norm], floats[norm].float())
    assert (again["lm_head.weight"] - head).abs().max() < 0.02


def test_verify_and_inspect_read_it(tiny_folder: Path, tmp_path: Path) -> None:
    converted(tiny_folder, tmp_path / "mlx", 4, 16)
    checks = check_checkpoint(tmp_path / "mlx", values=True)
    assert not [problem for check in checks for problem in check.problems]
    found = inspect_checkpoint(tmp_path / "mlx")
    assert found.kind == "MLX"
    assert found.stored["MLX 4 bits"] > 100_000
    assert found.total_parameters == inspect_checkpoint(tiny_folder).total_parameters


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "in mode 'mxfp4', expected 'affine'"),
        ({"group_size": 16, "bits": 7}, "bits 7 for it, expected whole numbers"),
        ({"bits": 4}, "group_size None"),
        ({"group_size": 24, "bits": 4}, "not a weight of 4 bits in groups of 24"),
        ({"group_size": 16, "bits": 8}, "not a weight of 8 bits in groups of 16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    settings: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    converted(tiny_folder, tmp_path / "mlx", 4, 16)
    edit(tmp_path / "mlx", lambda config: config.update(quantization=settings))
    with pytest.raises(CheckpointError, match=message):
        smolstack.load(tmp_path / "mlx")
