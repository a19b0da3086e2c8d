"""smolstack chat from a pipe: one question per line, images in any turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolstack
from smolstack.batch import VisualTokens

Run = Callable[..., Any]


@pytest.fixture
def talk(run: Run, tiny_folder: Path) -> Run:
    def invoke(*lines: str, images: tuple[Path, ...] = ()) -> Any:
        options = ["--model", tiny_folder, "--max-new-tokens", 4]
        return run("chat", *images, *options, input="\n".join(lines) + "\n")

    return invoke


def test_each_line_is_a_question_and_remembers_the_ones_before(
    talk: Run, tiny_vlm: smolstack.VLM, sign: Path
) -> None:
    result = talk("What is it?", "", "And now?", images=(sign,))
    first: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "image", "image": sign}, {"type": "text", "text": "What is it?"}],
    }
    one = tiny_vlm.ask(messages=[first], max_new_tokens=4).text
    turns: list[dict[str, Any]] = [
        first,
        {"role": "assistant", "content": one},
        {"role": "user", "content": "And now?"},
    ]
    two = tiny_vlm.ask(messages=turns, max_new_tokens=4).text
    assert result.exit_code == 0
    assert [line.strip() for line in result.stdout.split("\n") if line] == [one, two]


def test_an_image_may_come_in_any_turn_and_is_read_once(
    talk: Run, sign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    encode = smolstack.VLM.encode

    def counting(self: smolstack.VLM, image: Any, **options: Any) -> VisualTokens:
        read.append(str(image))
        return encode(self, image, **options)

    monkeypatch.setattr(smolstack.VLM, "encode", counting)
    spaced = tmp_path / "an image.png"
    shutil.copy(sign, spaced)
    result = talk("Hello.", f"/image {spaced}", "What is it?", "Sure?", "Quite?", images=(sign,))
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4
    assert read == [str(sign), str(spaced)]


def test_several_images_may_follow_one_image_command(talk: Run, sign: Path) -> None:
    assert talk(f"/image {sign} '{sign}'", "Compare them.").exit_code == 0


def test_reset_forgets_and_quit_ends(talk: Run, sign: Path) -> None:
    fresh = talk("Hello.").stdout
    result = talk("What is it?", "/reset", "Hello.", "/quit", "Never asked", images=(sign,))
    assert result.stdout.splitlines()[1:] == fresh.splitlines()


def test_nothing_but_answers_stands_on_stdout(talk: Run) -> None:
    result = talk("/help", "/quit")
    assert result.stdout == ""
    assert "/image FILE" in result.stderr


def test_no_questions_are_no_error(run: Run, tiny_folder: Path) -> None:
    result = run("chat", "--model", tiny_folder, input="")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/image nothing.png", "nothing.png: found no file"),
        ("/image", "/image needs a file"),
        ("/image 'half", "No closing quotation"),
        ("/dance", "/dance is not a command"),
        ("word " * 600, "model's context is 512"),
    ],
)
def test_a_script_ends_at_its_first_mistake(talk: Run, line: str, told: str) -> None:
    result = talk(line, "Never asked")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
