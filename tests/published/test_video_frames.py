"""Frames of videos are resized as transformers 4.50 did, or as transformers 5 does, to the pixel.

transformers' video processor needs torchvision, which resizes by Lanczos from 0.27 on, as Pillow
does, and bicubically before. Its sizes are taken from its own function, its pixels from Pillow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.videos import film
from transformers.models.smolvlm.video_processing_smolvlm import get_resize_output_image_size

import smolstack
from smolstack.processor.video import Frame

SAMPLING = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}}


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a size of 128, a video_size of 64 and tiles of 32."""
    folder = tmp_path_factory.mktemp("videos") / "model"
    shutil.copytree(tiny_folder, folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_sampling": SAMPLING}))
    return folder


def their_pixels(frame: Image.Image, edge: int, tile: int) -> torch.Tensor:
    """(3, tile, tile) as its resize and its normalization compute them."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    height, width = get_resize_output_image_size(pixels, edge)
    small = frame.resize((width, height), Image.Resampling.LANCZOS)
    small = small.resize((tile, tile), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float()
    return (values / 255 - 0.5) / 0.5


@pytest.mark.parametrize(("key", "edge"), [("video_size", 64), ("size", 128)])
@pytest.mark.parametrize("size", [(160, 90), (90, 161), (48, 48), (40, 30), (300, 7)])
def test_frames_are_theirs_to_the_pixel(
    key: str, edge: int, size: tuple[int, int], model: Path
) -> None:
    vlm = smolstack.load(model)
    vlm.processor.videos = vlm.processor.videos.resized_by(key)
    noise = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    frame = Image.fromarray(noise)
    ours = vlm.processor.pixels(frame, vlm.processor.plan(Frame(frame)))
    assert ours.shape == (1, 3, 32, 32)
    assert (ours[0] - their_pixels(frame, edge, 32)).abs().max() <= 1e-6


def test_the_command_line_takes_either(
    model: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    clip = film(tmp_path / "clip.mp4", frames=6, rate=2)
    options = ["--model", model, "--max-new-tokens", 4]
    for key in ("video_size", "size"):
        vlm = smolstack.load(model)
        vlm.processor.videos = vlm.processor.videos.resized_by(key)
        answer = vlm.ask(clip, "What happens?", max_new_tokens=4)
        told = run("ask", clip, "What happens?", *options, "--video-resize", key, "--json")
        assert json.loads(told.stdout)["text"] == answer.text
        said = run("chat", clip, *options, "--video-resize", key, input="What happens?\n")
        assert said.stdout.strip() == answer.text.strip()


def test_size_needs_a_checkpoint_that_has_both(
    tiny_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    clip = film(tmp_path / "clip.mp4", frames=2, rate=1)
    told = run("ask", clip, "?", "--model", tiny_folder, "--video-resize", "size")
    assert told.exit_code == 2
    assert "has no video_sampling beside a size" in " ".join(told.stderr.split())
