"""What a search of a folder leaves out is counted and said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smolstack.errors import ImageError
from smolstack.processor.decoding import size_of
from smolstack.processor.folders import SkippedFiles, search


def test_what_is_passed_over_is_named_with_counts(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "a.PNG", "inner/c.heic", "notes.docx", "old.docx", "README", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "more").symlink_to(tmp_path / "inner")
    (tmp_path / "same.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    over = SkippedFiles()
    found = [
        str(Path(path).relative_to(tmp_path)) for path in search(tmp_path, {".png", ".heic"}, over)
    ]
    assert found == ["a.PNG", "b.png", "inner/c.heic", "same.png"]
    assert over.sentence(Path("scans")) == (
        "scans: passed over 3 files of other kinds (2 .docx, 1 without a suffix), "
        "2 links to nothing (gone.png, self.png), 1 link to a folder (more)"
    )


def test_files_that_belong_to_an_image_are_not_passed_over(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "b.png", "lone.txt"):
        (tmp_path / name).write_text("")
    over = SkippedFiles()
    assert len(list(search(tmp_path, {".png"}, over, beside=(".txt",)))) == 2
    assert over.suffixes == {".txt": 1}
    (tmp_path / "lone.txt").unlink()
    over = SkippedFiles()
    list(search(tmp_path, {".png"}, over, beside=(".txt",)))
    assert not over


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    over = SkippedFiles()
    assert list(search(tmp_path, {".png"}, over)) == []
    assert over.sentence(Path("scans")) == "scans: passed over 1 pipe or device (pipe.png)"
    with pytest.raises(ImageError, match="found a pipe or device, expected an im"):
        size_of(tmp_path / "pipe.png", 1000)
