"""A video is asked about like an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.videos import film

import smolstack
import smolstack.errors
from smolstack.model.vlm import VisionLanguageModel

ASKED = "What happens?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "clip.mp4", frames=30, rate=5)


def test_a_path_an_opened_video_and_a_chat_give_one_answer(
    tiny_vlm: smolstack.VLM, clip: Path
) -> None:
    answer = tiny_vlm.ask(clip, ASKED, max_new_tokens=6)
    assert answer.usage.visual_tokens == 6 * 4  # six frames, one tile each
    video = tiny_vlm.open_video(clip)
    encoded = tiny_vlm.encode_video(video)
    parts = [{"type": "video", "path": str(clip)}, {"type": "text", "text": ASKED}]
    chat = [{"role": "user", "content": parts}]
    for other in (
        tiny_vlm.ask(video, ASKED, max_new_tokens=6),
        tiny_vlm.ask(encoded, ASKED, max_new_tokens=6),
        tiny_vlm.ask(messages=chat, max_new_tokens=6),
        tiny_vlm.ask_many([(clip, ASKED), ASKED], max_new_tokens=6)[0],
    ):
        assert other.token_ids == answer.token_ids
        assert other.usage.prompt_tokens == answer.usage.prompt_tokens


def test_frames_of_one_s_own(tiny_vlm: smolstack.VLM) -> None:
    frames = [Image.new("RGB", (64, 48), (value, 0, 0)) for value in (0, 100, 200)]
    video = smolstack.Video(frames, seconds=[0.0, 2.5, 5.0], duration=6.0)
    prompt = tiny_vlm.processor.prepare((video, ASKED))
    assert [prompt.text.count(f"Frame from 00:0{second}:") for second in (0, 2, 5)] == [1, 1, 1]
    assert tiny_vlm.ask(video, ASKED, max_new_tokens=2).usage.visual_tokens == 3 * 4


def test_images_may_stand_beside_it(
    tiny_vlm: smolstack.VLM, clip: Path, images: list[Image.Image]
) -> None:
    """Frames stay one tile each while the image is split."""
    prompt = tiny_vlm.processor.prepare(([images[0], clip, images[1]], ASKED))
    assert [plan.tiles for plan in prompt.plans][1:-1] == [1] * 6
    assert prompt.plans[0].tiles == tiny_vlm.plan(images[0]).tiles > 1
    assert tiny_vlm.ask([images[0], clip], ASKED, max_new_tokens=2).token_ids


def test_what_does_not_move_is_encoded_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = smolstack.load(tiny_folder)
    seen = []
    encode = VisionLanguageModel.encode_tiles

    def counted(self: VisionLanguageModel, tiles: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(len(tiles))
        return encode(self, tiles, **options)

    monkeypatch.setattr(VisionLanguageModel, "encode_tiles", counted)
    still, other = (np.full((48, 64, 3), value, dtype=np.uint8) for value in (10, 200))
    video = smolstack.Video([still, still, other, still], [0.0, 1.0, 2.0, 3.0], 4.0)
    vlm.ask(video, ASKED, max_new_tokens=1)
    assert seen == [2]
    vlm.ask(video, "And then?", max_new_tokens=1)
    assert seen == [2]


def test_a_video_that_does_not_fit_is_refused(tiny_vlm: smolstack.VLM) -> None:
    frames = [np.full((8, 8, 3), value, dtype=np.uint8) for value in range(200)]
    video = smolstack.Video(frames, [float(second) for second in range(200)], 200.0)
    with pytest.raises(smolstack.errors.ContextLengthError, match="context is 512"):
        tiny_vlm.ask(video, ASKED)
