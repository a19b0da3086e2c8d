"""Images that are none: one sentence that names the file and what was found."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def make(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("this is not an image\n" * 20)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        path.write_bytes(png_header(60000, 60000))
    elif kind == "truncated":
        path = folder / "truncated.jpg"
        Image.effect_noise((200, 100), 80).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("missing", "found no file, expected an image"),
        ("folder", "found a folder, expected an image"),
        ("text", "is not an image in a supported format"),
        ("empty", "is empty (0 bytes)"),
        ("truncated", "is damaged or truncated"),
        ("bomb", "is too large to decode"),
    ],
)
def test_what_is_no_image_is_refused_by_name(
    refuses: Run, tiny_folder: Path, tmp_path: Path, kind: str, found: str
) -> None:
    path = make(kind, tmp_path)
    told = refuses("ask", path, "What?", "--model", tiny_folder)
    assert path.name in told
    assert found in told


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "bomb"])
def test_plan_refuses_them_too(refuses: Run, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    path = make(kind, tmp_path)
    assert path.name in refuses("plan", path, "--model", tiny_folder)


def test_a_plan_of_a_damaged_image_leaves_no_drawing(
    refuses: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    path, out = make("truncated", tmp_path), tmp_path / "plan.png"
    assert "truncated" in refuses("plan", path, "--out", out, "--model", tiny_folder)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["truncated.jpg"]


def test_bytes_that_are_no_image_are_refused(refuses: Run, tiny_folder: Path) -> None:
    told = refuses("ask", "-", "What?", "--model", tiny_folder, input=b"not an image")
    assert "is not an image in a supported format" in told


def test_a_web_address_is_not_fetched(refuses: Run, tiny_folder: Path) -> None:
    told = refuses("ask", "https://example.org/a.png", "What?", "--model", tiny_folder)
    assert "https://example.org/a.png is a URL" in told


def test_control_characters_of_names_are_not_written_to_the_terminal(run: Run) -> None:
    """They could set the terminal's title, or hide the sentence."""
    told = run("ask", "a\x1b]0;title\x07\x9b.png", "What?").stderr
    assert told == "error: a\\x1b]0;title\\x07\\x9b.png: found no file, expected an image\n"
    told = run("ask", "a\udcff.png", "What?").stderr
    assert told == "error: a\\udcff.png: found no file, expected an image\n"
