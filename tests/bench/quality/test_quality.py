"""smolstack bench quality --model: what is measured, kept, refused and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import smolstack
from smolstack.bench import plots
from smolstack.bench.peers.onnxruntime import OnnxRuntime
from smolstack.bench.peers.openvino import OpenVino
from smolstack.bench.quality import images, llama_cpp, running
from smolstack.bench.quality.ours import Ours
from smolstack.bench.quality.running import IMAGES, OUTLIERS, TEXT, Choice, run_quality
from smolstack.cli.app import app
from smolstack.errors import ConfigError, DataError

OWN = ["smolstack float32", "smolstack bfloat16", "smolstack int8", "smolstack int4"]
TYPES = ("F32", "Q8_0")  # each takes processes of its own
PEERS = [f"llama.cpp {kind}" for kind in TYPES] if not llama_cpp.missing() else []
TRANSFORMERS = "transformers bfloat16"
SEEING = [TRANSFORMERS, *(["onnxruntime int8"] if not OnnxRuntime.missing() else [])]
if not OpenVino.missing() and "bfloat16" in OpenVino.precisions():
    SEEING.append("openvino bfloat16")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SMOLSTACK_DEBUG", raising=False)
    monkeypatch.setattr(llama_cpp, "TYPES", TYPES)
    monkeypatch.setattr(images, "DRAWN", 1)
    monkeypatch.setattr(images, "ANSWER", 5)
    monkeypatch.setattr(running, "CONTEXT", 8)
    monkeypatch.setattr(running, "STEPS", 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox reads the sign, and the sign says 4711. " * 6)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", "quality", *(str(one) for one in arguments)])


def labels(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['by']} {row['precision']}" for row in rows]


def test_every_precision_and_peer_is_held_against_float32(
    tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    quantized = smolstack.load(tiny_folder, dtype="int8").save(tmp_path / "saved-int8")
    choice = Choice(tiny_folder, also=[quantized], text=text, parts=(TEXT,), rounds=1)
    record = run_quality(choice)
    rows = record.studies[TEXT]
    assert labels(rows) == [*OWN, "smolstack saved-int8", TRANSFORMERS, *PEERS]
    peer = rows[labels(rows).index(TRANSFORMERS)]
    own = {row["precision"]: row for row in rows if row is not peer}
    assert own["float32"]["KL to float32"] == 0
    assert own["float32"]["same likeliest token"] == 1
    assert 0 < own["int8"]["KL to float32"] < 0.05
    # What is quantized while loading and what was saved so are the same model.
    for name in ("KL to float32", "perplexity", "text tower, MB"):
        assert own["saved-int8"][name] == own["int8"][name]
    assert own["bfloat16"]["text tower, MB"] == own["float32"]["text tower, MB"] / 2
    assert 0 < peer["KL to float32"] < 0.05
    assert peer["text tower, MB"] == own["bfloat16"]["text tower, MB"]
    assert own["int4"]["text tower, MB"] < own["int8"]["text tower, MB"]
    assert all(row["seconds a token"] > 0 for row in rows)
    if PEERS:
        assert own["F32"]["KL to float32"] < 1e-4
        assert own["Q8_0"]["KL to float32"] < 0.05
    # The user's cache holds nothing of a measurement that is complete.
    assert not list((tmp_path / "cache").rglob("rows-*"))


def test_images_are_measured_by_visual_tokens_and_forced_answers(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (60, 40), (90 * index, 20, 200)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    parts = (IMAGES, OUTLIERS)
    choice = Choice(tiny_folder, ("int8",), images=folder, parts=parts, folder=tmp_path / "kept")
    found = run_quality(choice).studies
    for part in parts:
        exact, other, *theirs = found[part]
        assert labels(theirs) == SEEING
        assert all(0 < row["relative error of visual tokens"] < 1 for row in theirs)
        assert exact["images"] == other["images"] == 2
        assert exact["relative error of visual tokens"] < 1e-6
        assert exact["KL of forced answers"] < 1e-6
        assert 0 < other["relative error of visual tokens"] < 1
        assert other["answer tokens"] == 10
        assert other["KL of forced answers"] > 0
    plain, planted = (found[part][1]["relative error of visual tokens"] for part in parts)
    assert plain != planted


def test_images_are_drawn_where_none_are_given(tiny_folder: Path, tmp_path: Path) -> None:
    choice = Choice(tiny_folder, ("int8",), parts=(IMAGES,), folder=tmp_path / "kept")
    exact, *others = run_quality(choice).studies[IMAGES]
    assert exact["images"] == exact["tiles"] == 1  # one image, which is not cut
    assert labels(others) == ["smolstack int8", *SEEING]
    assert all(0 < row["relative error of visual tokens"] < 1 for row in others)


def test_a_measurement_that_was_stopped_goes_on(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(
        tiny_folder,
        text=text,
        parts=(TEXT,),
        rounds=0,
        only=["smolstack"],
        folder=tmp_path / "kept",
    )
    opened: list[str] = []
    stops = ["int8"]
    scores: Callable[..., Any] = Ours.scores

    def stopping(self: Ours, batch: Any) -> Any:
        opened.append(self.precision)
        if self.precision in stops:
            stops.remove(self.precision)
            raise KeyboardInterrupt
        return scores(self, batch)

    monkeypatch.setattr(Ours, "scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_quality(choice)
    first = list(opened)
    opened.clear()
    rows = run_quality(choice).studies[TEXT]
    assert labels(rows) == OWN
    assert first == ["float32", "bfloat16", "int8"]
    assert opened == ["int8", "int4"]  # neither the others nor float32's reading of the text
    # What is kept of a complete run are its rows, and what peers need.
    assert [path.name[:5] for path in (tmp_path / "kept").rglob("*.*")] == ["rows-"]
    opened.clear()
    assert run_quality(choice).studies[TEXT] == rows
    assert not opened
    # Another text is another measurement.
    text.write_text("Something else stands here.")
    run_quality(choice)
    assert opened[0] == "float32"


@pytest.mark.skipif(not PEERS, reason="llama-cpp-python compiles itself and is optional")
def test_a_peer_that_fails_is_named_and_takes_no_part(
    tiny_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "TYPES", ("NO_SUCH_TYPE",))
    said: list[str] = []
    choice = Choice(tiny_folder, ("float32",), text=text, parts=(TEXT,), rounds=1)
    rows = run_quality(choice, note=said.append).studies[TEXT]
    assert labels(rows) == ["smolstack float32", TRANSFORMERS]
    assert said[0].startswith("llama.cpp NO_SUCH_TYPE takes no part: ")


def test_the_command_prints_keeps_and_draws(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    saved, plot = tmp_path / "run.json", tmp_path / "quality.png"
    arguments = ("--model", tiny_folder, "--text", text, "--dtype", "int8", "--rounds", 1)
    result = run(*arguments, "--only", "smolstack", "--save", saved, "--plot", plot, "--markdown")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("**quality of text**\n\n| by | precision | tokens | KL to")
    assert "smolstack int8: text, 1 windows …" in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    data = json.loads(saved.read_text())
    assert list(data["studies"]) == ["quality of text"]
    again = CliRunner().invoke(app, ["bench", "--add", str(saved), "--plot", str(plot), "--json"])
    assert json.loads(again.stdout)["studies"] == data["studies"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--text", "x.txt"), "--text needs --model FOLDER"),
        (("--outliers",), "--outliers needs --model FOLDER"),
        (("decode", "--model", "x"), "--model applies to quality only, found ['quality', "),
        (("--model", "x", "--preset", "smolvlm-256m"), "--preset has no meaning beside --model"),
        (("--model", "nowhere"), "nowhere"),
    ],
)
def test_bad_options_are_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"error: {sentence}")


def test_what_cannot_be_compared_is_refused(
    tiny_folder: Path, retrieval_folder: Path, tmp_path: Path
) -> None:
    quantized = smolstack.load(tiny_folder, dtype="int8").save(tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"int8 .*float32"):
        run_quality(Choice(quantized))
    with pytest.raises(ConfigError, match="'int8'"):
        run_quality(Choice(tiny_folder, also=[quantized]))
    with pytest.raises(ConfigError, match=r"'gpt'"):
        run_quality(Choice(tiny_folder, only=["gpt"]))
    with pytest.raises(ConfigError, match="is a retrieval model"):
        run_quality(Choice(retrieval_folder))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="contains no image, expected files that end in"):
        run_quality(Choice(tiny_folder, images=empty))


def test_the_front_holds_what_nothing_else_beats() -> None:
    points = [(5.0, 0.1), (3.0, 0.2), (4.0, 0.3), (2.0, 0.6), (5.0, 0.05)]
    assert plots.pareto_front(points) == [(2.0, 0.6), (3.0, 0.2), (5.0, 0.05)]
