"""smolstack inspect: a checkpoint in numbers, from its files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolstack
from smolstack.checkpoint import weights

Run = Callable[..., Any]


def test_every_parameter_is_counted_once(
    run: Run, tiny_folder: Path, tiny_vlm: smolstack.VLM
) -> None:
    data = json.loads(run("inspect", tiny_folder, "--json").stdout)
    model = tiny_vlm.model
    parts = data["parameters"]
    assert parts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert parts["vision tower"] == sum(p.numel() for p in model.vision.parameters())
    assert parts["connector"] == model.connector.proj.weight.numel()
    assert parts["head"] == parts["token embedding"] == 904 * 48
    assert data["stored_as"] == {"float32": parts["total"]}
    assert data["bytes_on_disk"] == (tiny_folder / "model.safetensors").stat().st_size
    assert data["bytes_in_memory"]["bfloat16"] == 2 * parts["total"]
    # 2 (keys, values) · 2 layers · 2 heads · 8 numbers · 4 bytes
    assert data["cache_bytes_per_token"]["float32"] == 256


def test_it_shows_the_connector_s_shapes_and_the_tokens(run: Run, tiny_folder: Path) -> None:
    data = json.loads(run("inspect", tiny_folder, "--json").stdout)
    assert data["connector"] == {
        "grid": [4, 4],
        "scale": 2,
        "visual_grid": [2, 2],
        "in_features": 128,
        "out_features": 48,
        "tokens_per_tile": 4,
    }
    assert data["special_tokens"]["<image>"] == 861
    assert data["end_tokens"] == [{"id": 900, "token": "<end_of_utterance>"}]
    shown = run("inspect", tiny_folder).stdout
    assert "4x4 patches to 2x2 visual tokens (scale 2)" in shown
    assert "128 to 48" in shown
    assert "900 <end_of_utterance>" in shown


def test_a_shared_head_is_counted_once(run: Run, tied_folder: Path) -> None:
    assert json.loads(run("inspect", tied_folder, "--json").stdout)["parameters"]["head"] == 0
    assert "shares the token embedding" in run("inspect", tied_folder).stdout


def test_no_weight_is_read(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights.WeightFiles, "tensors", refuse)
    assert run("inspect", tiny_folder).exit_code == 0
    assert run("verify", tiny_folder).exit_code == 0


def test_what_cannot_be_read_is_refused(refuses: Run, spoilt: Path) -> None:
    (spoilt / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refuses("inspect", spoilt)
    assert "expected a checkpoint folder" in refuses("inspect", spoilt / "nothing")
