"""Videos: which frames are looked at, when they were seen, and what the model reads about them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.videos import film

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.errors import ConfigError, PromptError, SmolstackError, VideoError
from smolstack.family import Preset
from smolstack.processor.video import Video, VideoSettings, is_video, number_in_words
from smolstack.processor.video_reading import pick_frames, read_video

GREY = np.full((20, 30, 3), 128, dtype=np.uint8)


@pytest.fixture(scope="module")
def smolvlm_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as SmolVLM2 would have it."""
    preset = replace(tiny_preset, config=replace(tiny_preset.config, model_type="smolvlm"))
    return new_checkpoint(preset, tmp_path_factory.mktemp("smolvlm") / "model", seed=3)


def test_a_short_video_is_seen_once_a_second() -> None:
    assert pick_frames(250, 25.0, 1.0, 64) == [0, 27, 55, 83, 110, 138, 166, 193, 221, 249]


def test_a_long_video_is_seen_evenly_without_its_first_and_last_second() -> None:
    assert pick_frames(3000, 10.0, 1.0, 4) == [10, 1003, 1996, 2990]


@given(
    st.integers(1, 5000),
    st.sampled_from([1.0, 10.0, 24.0, 25.0, 29.97, 60.0]),
    st.sampled_from([0.2, 1.0, 2.0]),
    st.integers(1, 80),
)
def test_frames_are_those_of_transformers(total: int, rate: float, fps: float, most: int) -> None:
    theirs = pytest.importorskip("transformers.models.smolvlm.video_processing_smolvlm")
    utils = pytest.importorskip("transformers.video_utils")
    metadata = utils.VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
    expected = theirs.SmolVLMVideoProcessor.sample_frames(
        SimpleNamespace(), metadata, num_frames=most, fps=fps
    )
    assert pick_frames(total, rate, fps, most) == expected.tolist()


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("mpeg4", ".mp4"), ("libx264", ".mov"), ("mpeg4", ".mkv"), ("mpeg4", ".avi")],
)
def test_frames_and_their_times_are_those_of_the_file(
    codec: str, suffix: str, tmp_path: Path
) -> None:
    """Whether or not the format says how many frames there are."""
    path = film(tmp_path / f"film{suffix}", frames=50, rate=10, codec=codec)
    video = read_video(path, fps=2)
    places = pick_frames(50, 10.0, 2.0, 64)
    assert video.duration == 5.0
    assert video.seconds == pytest.approx([place / 10 for place in places])
    grey = [float(np.mean(frame)) for frame in video.frames]  # type: ignore[arg-type]
    assert grey == pytest.approx([place * 255 / 49 for place in places], abs=3)
    assert len(read_video(path, fps=2, max_frames=3).frames) == 3


@pytest.mark.parametrize("kind", ["live", "raw", "3gp", "ts", "flv", "wmv"])
def test_a_video_is_measured_where_its_file_does_not_say(kind: str, tmp_path: Path) -> None:
    """A recording of a browser has no duration, and a raw stream no times either."""
    av = pytest.importorskip("av")
    codec = {"raw": "mpeg2video", "ts": "mpeg2video", "flv": "flv"}.get(kind, "mpeg4")
    suffix = {"live": ".webm.mkv", "raw": ".m2v"}.get(kind, f".{kind}")
    path = film(tmp_path / f"film{suffix}", frames=50, rate=25, codec=codec)
    if kind == "live":
        path = _streamed(av, path, tmp_path / "film.webm")
    assert is_video(path)
    video = read_video(path, fps=2)
    assert video.duration == pytest.approx(2, abs=0.05)
    assert len(video.frames) == 4
    assert video.seconds == pytest.approx([0, 0.64, 1.28, 1.96], abs=0.06)
    grey = [float(np.mean(frame)) for frame in video.frames]  # type: ignore[arg-type]
    assert grey == pytest.approx([second * 25 * 255 / 49 for second in video.seconds], abs=12)


def _streamed(av: Any, source: Path, path: Path) -> Path:
    """The same as it is written where one cannot go back: without a duration and an index."""

    class Pipe:
        def __init__(self) -> None:
            self.file = path.open("wb")

        def write(self, data: bytes) -> int:
            return self.file.write(data)

    pipe = Pipe()
    with av.open(str(source)) as before, av.open(pipe, "w", format="matroska") as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.size:
                packet.stream = stream
                after.mux(packet)
    pipe.file.close()
    with av.open(str(path)) as made:
        assert made.duration is None
    return path


def test_of_a_long_video_what_lies_between_is_not_decoded(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", frames=200, rate=2, keyframes=8)
    video = read_video(path, max_frames=5)
    places = pick_frames(200, 2.0, 1.0, 5)
    assert video.seconds == pytest.approx([place / 2 for place in places])
    grey = [float(np.mean(frame)) for frame in video.frames]  # type: ignore[arg-type]
    assert grey == pytest.approx([place * 255 / 199 for place in places], abs=3)


def test_a_frame_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", frames=3, rate=1, size=(64, 32), turned=90)
    (frame, *_) = read_video(path).frames
    assert isinstance(frame, np.ndarray)
    assert frame.shape == (64, 32, 3)


def test_it_is_told_in_the_words_of_transformers(smolvlm_folder: Path) -> None:
    reference = pytest.importorskip("smolstack.interop.reference")
    utils = pytest.importorskip("transformers.video_utils")
    theirs = reference.load_processor(smolvlm_folder, "smolvlm")
    seconds = [0.0, 1.0, 61.5]
    metadata = utils.VideoMetadata(
        total_num_frames=1000, fps=10.0, duration=100.0, frames_indices=[0, 10, 615]
    )
    frames = SimpleNamespace(shape=(1, 3, 3, 32, 32))
    inside = theirs.replace_video_token({"pixel_values": frames, "video_metadata": [metadata]}, 0)
    vlm = smolstack.load(smolvlm_folder)
    prompt = vlm.processor.prepare((Video([GREY] * 3, seconds, 100.0), "What happens?"))
    asked = f"<|im_start|>User: {inside}What happens?<end_of_utterance>\nAssistant:"
    assert prompt.text == asked
    assert list(prompt.token_ids) == theirs.tokenizer(asked)["input_ids"]


def test_the_words_are_these(tiny_vlm: smolstack.VLM) -> None:
    prompt = tiny_vlm.processor.prepare((Video([GREY] * 2, [0.0, 3.9], 3725.2), "What?"))
    image = "<fake_token_around_image><global-img><image><image><image><image>"
    frame = f"{image}<fake_token_around_image>"
    assert prompt.text.partition("User: ")[2].partition("What?")[0] == (
        "You are provided the following series of two frames from a 1:02:05 [H:MM:SS] video.\n\n"
        f"Frame from 00:00:{frame}\nFrame from 00:03:{frame}\n\n"
    )
    assert number_in_words(64) == "sixty-four"


def test_a_path_is_a_video_by_its_suffix() -> None:
    assert is_video("a.MP4")
    assert is_video(Path("a.webm"))
    assert is_video(Video([GREY], [0.0], 1.0))
    assert not is_video("a.png")
    assert not is_video(b"a.mp4")
    assert not is_video("mp4")


def test_a_checkpoint_says_how_many_frames_it_wants(tiny_folder: Path, tmp_path: Path) -> None:
    """In preprocessor_config.json, as SmolVLM2 does, or where newer transformers writes it."""
    film(tmp_path / "film.mp4", frames=40, rate=4, size=(96, 64))
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    usual = smolstack.load(folder).open_video(tmp_path / "film.mp4")
    assert len(usual.frames) == 10
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    sampling = {"fps": 2, "max_frames": 6, "video_size": {"longest_edge": 48}}
    settings["video_sampling"] = sampling
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    vlm = smolstack.load(folder)
    video = vlm.open_video(tmp_path / "film.mp4")
    assert len(video.frames) == 6
    assert all(np.shape(frame) == (32, 48, 3) for frame in video.frames)  # type: ignore[arg-type]
    assert len(vlm.open_video(tmp_path / "film.mp4", fps=0.5, max_frames=9).frames) == 5
    newer = {"fps": 3, "num_frames": 4}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(newer))
    videos = smolstack.load(folder).processor.videos
    assert (videos.fps, videos.max_frames, videos.longest_edge) == (3, 4, 48)
    assert videos.first_edge == 48
    assert videos.resized_by("size").first_edge == 128
    assert videos.resized_by("size").resized_by("video_size") == videos
    with pytest.raises(ConfigError, match=r"resize of videos is 'sise', expected one of"):
        videos.resized_by("sise")
    with pytest.raises(ConfigError, match="has no video_sampling beside a size"):
        VideoSettings().resized_by("size")


@pytest.mark.parametrize("settings", [{"fps": 0}, {"max_frames": 0}, {"fps": "1"}, {"fps": True}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="of videos is"):
        VideoSettings.from_hf({"video_sampling": settings})


def test_files_that_are_no_video_are_refused_by_name(tmp_path: Path) -> None:
    whole = film(tmp_path / "film.mp4", frames=5, rate=1)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.mp4").write_text("no video at all")
    for name in ("cut.mp4", "text.mp4"):
        with pytest.raises(VideoError, match=f"{name} cannot be read as a video"):
            read_video(tmp_path / name)
    with pytest.raises(VideoError, match=r"gone\.mp4 is missing"):
        read_video(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="is a folder"):
        read_video(tmp_path)
    with pytest.raises(ConfigError, match="max_frames of videos is 0"):
        read_video(whole, max_frames=0)


@pytest.mark.parametrize(
    ("frames", "seconds", "duration"),
    [([], [], 1.0), ([GREY], [0.0, 1.0], 1.0), ([GREY], [-1.0], 1.0), ([GREY], [0.0], -1.0)],
)
def test_frames_and_times_that_do_not_fit_are_refused(
    frames: list[Any], seconds: list[float], duration: float
) -> None:
    with pytest.raises(VideoError, match="a video has"):
        Video(frames, seconds, duration)


def test_without_the_packages_it_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "num2words", None)
    for ask in (lambda: read_video(tmp_path), lambda: Video([GREY], [0.0], 1.0).parts()):
        with pytest.raises(VideoError, match=r"pip install 'smolstack\[video\]'"):
            ask()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video"}, "message 0 has a video part without video or path"),
        ({"type": "video", "video": 3}, "found a int, expected a video"),
        ({"type": "video", "path": "gone.mp4"}, "gone.mp4 is missing"),
        ({"type": "audio"}, "expected text, image or video"),
    ],
)
def test_a_chat_with_a_malformed_video_is_refused(
    tiny_vlm: smolstack.VLM, part: dict[str, Any], message: str
) -> None:
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    with pytest.raises(SmolstackError, match=message) as raised:
        tiny_vlm.ask(messages=chat)
    assert isinstance(raised.value, (PromptError, VideoError))
