"""What a search of a folder leaves out is counted and said."""

from __future__ import annotations

from pathlib import Path

from smolstack.processor.folders import SkippedFiles, search


def test_what_is_passed_over_is_named_with_counts(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "a.PNG", "inner/c.heic", "notes.docx", "old.docx", "README", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "more").symlink_to(tmp_path / "inner")
    (tmp_path / "same.png").symlink_to(tmp_path / "b.png")
    over = SkippedFiles()
    found = [
        str(Path(path).relative_to(tmp_path)) for path in search(tmp_path, {".png", ".heic"}, over)
    ]
    assert found == ["a.PNG", "b.png", "inner/c.heic", "same.png"]
    assert over.sentence(Path("scans")) == (
        "scans: passed over 3 files of other kinds (2 .docx, 1 without a suffix), "
        "1 link to nothing (gone.png), 1 link to a folder (more)"
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
