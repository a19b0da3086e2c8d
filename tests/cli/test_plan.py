"""smolstack plan: tiles and tokens from integers alone, and their drawing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import smolstack

Run = Callable[..., Any]


def test_it_says_what_the_library_says(
    run: Run, tiny_folder: Path, tiny_vlm: smolstack.VLM, sign: Path
) -> None:
    plan = tiny_vlm.plan(sign, "What does it say?")
    arguments = ["--model", tiny_folder, "-q", "What does it say?"]
    (told,) = json.loads(run("plan", sign, *arguments, "--json").stdout)["images"]
    assert told["source"] == [100, 40]
    assert told["canvas"] == list(plan.canvas)
    assert (told["rows"], told["cols"]) == (plan.rows, plan.cols)
    assert told["visual_tokens"] == plan.visual_tokens
    assert told["prompt_tokens"] == plan.prompt_tokens
    assert told["share_of_context"] == plan.prompt_tokens / 512  # type: ignore[operator]
    assert told["pixels_read"] == plan.pixels_read
    assert told["boxes"] == [list(box) for box in plan.source_boxes()]
    shown = run("plan", sign, *arguments).stdout
    assert "100x40" in shown
    assert f"{plan.visual_tokens} (4 per tile)" in shown
    assert f"{plan.prompt_tokens} of 512 tokens" in shown


def test_it_reads_no_weights(run: Run, spoilt: Path, sign: Path) -> None:
    (spoilt / "model.safetensors").unlink()
    assert run("plan", sign, "--model", spoilt).exit_code == 0


def test_a_size_is_enough(run: Run, tiny_folder: Path, sign: Path) -> None:
    arguments = ["--model", tiny_folder, "--json"]
    size, file = (run("plan", what, *arguments).stdout for what in ("100x40", sign))
    assert size.replace("100x40", str(sign)) == file


def test_several_images_share_one_prompt(run: Run, tiny_folder: Path, sign: Path) -> None:
    arguments = ["--model", tiny_folder]
    table = run("plan", sign, "64x64", *arguments).stdout
    assert "64x64" in table
    assert "all in one prompt" in table
    data = json.loads(run("plan", sign, "64x64", *arguments, "--json").stdout)
    alone = [image["prompt_tokens"] for image in data["images"]]
    assert max(alone) < data["prompt_tokens"] < sum(alone)


def test_too_many_tokens_are_told(run: Run, tiny_folder: Path) -> None:
    assert "too many to ask" in run("plan", *["64x64"] * 5, "--model", tiny_folder).stdout


def test_no_split_is_one_tile(run: Run, tiny_folder: Path, sign: Path) -> None:
    arguments = ["--no-split", "--json", "--model", tiny_folder]
    assert json.loads(run("plan", sign, *arguments).stdout)["images"][0]["tiles"] == 1


def test_a_budget_and_small_images_cost_fewer_tokens(run: Run, tiny_folder: Path) -> None:
    def tokens(*arguments: object) -> int:
        result = run("plan", "60x60", "--json", "--model", tiny_folder, *arguments)
        return int(json.loads(result.stdout)["images"][0]["visual_tokens"])

    assert tokens() == 4 * 17
    assert tokens("--max-image-tokens", 40) <= 40
    assert tokens("--no-upscale") == 5 * 4


@pytest.mark.parametrize("what", ["wide", "tall", "dot", "sizes", "unsplit"])
def test_the_drawing_shows_every_tile(
    run: Run, tiny_folder: Path, tmp_path: Path, what: str
) -> None:
    sizes = {"wide": (900, 20), "tall": (20, 900), "dot": (1, 1)}
    source: Path | str = "1920x1080"
    if what in sizes:
        source = tmp_path / "image.png"
        Image.new("RGB", sizes[what], (200, 30, 30)).save(source)
    out = tmp_path / "plan.png"
    arguments = ["--no-split"] if what == "unsplit" else []
    result = run("plan", source, "--out", out, "--model", tiny_folder, *arguments)
    assert result.exit_code == 0, result.stderr
    with Image.open(out) as drawing:
        assert 300 < drawing.width < 2000
        assert 300 < drawing.height < 2000
        if what in sizes:  # the image fills its tiles: more red than paper and plates
            red = (np.asarray(drawing) == (200, 30, 30)).all(axis=-1)
            assert red.mean() > 0.25
    assert str(out) in result.stderr


def test_a_drawing_is_whole_or_absent(
    refuses: Run, tiny_folder: Path, sign: Path, tmp_path: Path
) -> None:
    arguments = ["plan", sign, "--model", tiny_folder, "--out"]
    assert "expected .png or .jpg" in refuses(*arguments, tmp_path / "plan.txt")
    assert "does not exist" in refuses(*arguments, tmp_path / "no" / "plan.png")
    assert "--out needs exactly one image" in refuses(*arguments, tmp_path / "plan.png", "10x10")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a read-only place")
def test_a_place_that_cannot_be_written_is_one_sentence(
    refuses: Run, tiny_folder: Path, sign: Path
) -> None:
    assert "/proc" in refuses("plan", sign, "--model", tiny_folder, "--out", "/proc/plan.png")


def test_a_size_without_pixels_is_refused(refuses: Run, tiny_folder: Path) -> None:
    assert "both sides must be positive" in refuses("plan", "0x40", "--model", tiny_folder)


def test_a_file_named_like_a_size_is_a_file(
    run: Run, tiny_folder: Path, sign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(sign, "10x10")
    result = run("plan", "10x10", "--json", "--model", tiny_folder)
    assert json.loads(result.stdout)["images"][0]["source"] == [100, 40]


def test_an_adapter_s_images_are_planned_as_its_base_s_even_without_its_weights(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    planned = run("plan", "640x640", "--model", str(tmp_path), "--json")
    (told,) = json.loads(planned.stdout)["images"]
    assert told["visual_tokens"] == 4 * 17
    refused = run("inspect", str(tmp_path))
    assert refused.exit_code == 2
    assert "has no adapter_model.safetensors" in refused.stderr


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    """So that it starts in half a second."""
    Image.new("RGB", (200, 100), "white").save(tmp_path / "page.png")
    program = (
        "import sys; from smolstack.cli.app import main\n"
        f"sys.argv = ['smolstack', 'plan', {str(tmp_path / 'page.png')!r}]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_a_video_is_named_as_one(refuses: Run, tiny_folder: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.webm"
    clip.write_bytes(b"\x1a\x45\xdf\xa3" * 9)
    expected = f"{clip} is a video, expected an image; ask and chat read videos"
    assert refuses("plan", clip, "--model", tiny_folder) == expected
