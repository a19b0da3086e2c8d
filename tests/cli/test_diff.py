"""smolstack diff: which parts changed, and by how much."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smolstack
from smolstack.checkpoint.diff import diff_checkpoints

Run = Callable[..., Any]
PROJECTION = "model.connector.modality_projection.proj.weight"


def test_a_checkpoint_is_the_same_as_itself(run: Run, tiny_folder: Path) -> None:
    result = run("diff", tiny_folder, tiny_folder, "--exit-code")
    assert result.exit_code == 0
    assert "nothing differs" in result.stdout


def test_the_part_that_changed_is_named_with_its_size(
    run: Run, tiny_folder: Path, spoilt: Path
) -> None:
    weights = load_file(str(spoilt / "model.safetensors"))
    weights[PROJECTION] = weights[PROJECTION] * 1.25
    save_file(weights, str(spoilt / "model.safetensors"), {"format": "pt"})
    found = diff_checkpoints(tiny_folder, spoilt)
    (part,) = [part for part in found.parts if part.changed]
    assert part.name == "connector"
    assert part.relative == pytest.approx(0.25, rel=1e-5)
    assert [change.name for change in found.most_changed(5)] == [PROJECTION]
    result = run("diff", tiny_folder, spoilt)
    assert result.exit_code == 0
    assert "25%" in result.stdout
    assert PROJECTION in result.stdout
    assert run("diff", tiny_folder, spoilt, "--exit-code").exit_code == 1
    data = json.loads(run("diff", tiny_folder, spoilt, "--json").stdout)
    assert [tensor["name"] for tensor in data["tensors"]] == [PROJECTION]


def test_shapes_formats_names_and_settings_are_told(
    run: Run, tiny_folder: Path, spoilt: Path
) -> None:
    weights = load_file(str(spoilt / "model.safetensors"))
    weights["surplus"] = torch.zeros(2)
    weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()
    weights[PROJECTION] = torch.zeros(1, 2)
    save_file(weights, str(spoilt / "model.safetensors"), {"format": "pt"})
    config = json.loads((spoilt / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5.0
    (spoilt / "config.json").write_text(json.dumps(config))
    shown = run("diff", tiny_folder, spoilt).stdout
    assert "only in B: 1 tensor: surplus" in shown
    assert f"another shape: {PROJECTION}" in shown
    assert "another number format: 1 tensor F32 → BF16" in shown
    assert "config.json text_config.rope_parameters.rope_theta: 10000.0 → 5.0" in shown


def test_number_formats_alone_are_no_change_beyond_rounding(
    tiny_folder: Path, tmp_path: Path
) -> None:
    halved = smolstack.load(tiny_folder, dtype="bfloat16").save(tmp_path / "halved")
    found = diff_checkpoints(tiny_folder, halved)
    assert all(part.relative < 2**-8 for part in found.parts)
    assert len(found.formats) == len(found.tensors)


def test_what_transformers_saves_again_differs_in_nothing(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    old = Path(shutil.copytree(tiny_folder, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["text_config"]["rope_parameters"]  # as transformers 4 wrote it
    config["text_config"] |= {"rope_scaling": None, "_flash_attn_2_enabled": True}
    config |= {"pad_token_id": 5, "transformers_version": "4.46.0", "image_seq_len": 4}
    (old / "config.json").write_text(json.dumps(config))
    new = tmp_path / "new"
    transformers.AutoModelForImageTextToText.from_pretrained(old).save_pretrained(new)
    transformers.AutoProcessor.from_pretrained(old).save_pretrained(new)
    result = run("diff", old, new, "--exit-code")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.endswith("nothing differs\n")
    # What was changed on purpose is still told.
    processor = json.loads((new / "processor_config.json").read_text())
    processor["image_processor"]["size"]["longest_edge"] = 64
    (new / "processor_config.json").write_text(json.dumps(processor))
    tokenizer = json.loads((new / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][1:]
    (new / "tokenizer.json").write_text(json.dumps(tokenizer))
    (new / "chat_template.jinja").write_text("{{ messages }}")
    settings = diff_checkpoints(old, new).settings
    assert settings["preprocessor_config.json size.longest_edge"] == (128, 64)
    assert settings["chat template"][1] == "{{ messages }}"
    assert set(settings) == {
        "preprocessor_config.json size.longest_edge",
        "tokenizer.json added_tokens",
        "chat template",
    }


def test_what_is_no_checkpoint_is_refused(refuses: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert "expected a checkpoint folder" in refuses("diff", tiny_folder, tmp_path / "none")
