"""Videos on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.videos import film

import smolstack

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "clip.mp4", frames=30, rate=5)


def test_the_answer_is_the_library_s(
    run: Run, clip: Path, tiny_folder: Path, tiny_vlm: smolstack.VLM
) -> None:
    options = ["--model", tiny_folder, "--max-new-tokens", 6]
    result = run("ask", clip, "What happens?", *options, "--json")
    told = json.loads(result.stdout)
    assert told["text"] == tiny_vlm.ask(clip, "What happens?", max_new_tokens=6).text
    (video,) = told["images"]
    assert video["video"] == str(clip)
    assert video["duration"] == 6.0
    assert len(video["seconds"]) == video["tiles"] == 6
    fewer = run("ask", clip, "?", *options, "--max-frames", 2, "--fps", 0.5, "--verbose")
    assert "clip.mp4: 2 frames of 6.0 s, one tile of 32x32 each, 8 visual tokens" in fewer.stderr


def test_a_conversation_about_it(run: Run, clip: Path, tiny_folder: Path) -> None:
    options = ["--model", tiny_folder, "--max-new-tokens", 4, "--verbose"]
    result = run("chat", clip, *options, input="What happens?\nAnd then?\n")
    assert result.exit_code == 0, result.stderr
    assert "6 frames of 6.0 s" in result.stderr
    asked = run("ask", clip, "What happens?", *options)
    assert result.stdout.splitlines()[0] == asked.stdout.splitlines()[0]


def test_a_file_that_is_no_video_is_refused(
    refuses: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("no video at all")
    told = refuses("ask", tmp_path / "text.mp4", "?", "--model", tiny_folder)
    assert "text.mp4 cannot be read as a video" in told
