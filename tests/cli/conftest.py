"""The command line as a user meets it: arguments in; stdout, stderr and an exit code out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from PIL import Image
from typer.testing import CliRunner

from smolstack.cli.app import app

Run: TypeAlias = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("ask", path, "What?", input=…)`` → a result with exit_code, stdout and stderr."""
    monkeypatch.delenv("SMOLSTACK_DEBUG", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: object, input: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return invoke


@pytest.fixture
def refuses(run: Run) -> Run:
    """Run something that must fail: exit code 2 and one sentence, which is returned."""

    def invoke(*arguments: object, input: str | bytes | None = None) -> str:
        result = run(*arguments, input=input)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines: list[str] = result.stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        return lines[0].removeprefix("error: ")

    return invoke


@pytest.fixture(scope="session")
def sign(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> Path:
    """An image file of 100x40 pixels."""
    path = tmp_path_factory.mktemp("images") / "sign.png"
    images[0].save(path)
    return path


@pytest.fixture
def spoilt(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))
