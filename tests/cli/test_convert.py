"""smolstack convert: a PDF file in, a document out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pdfs import document

Run = Callable[..., Any]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return document(tmp_path / "report.pdf", [(100, 50), (60, 80)])


def test_a_document_is_written_and_its_pages_counted(
    run: Run, report: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("docling_core")
    out = tmp_path / "report.md"
    options = ["--model", tiny_folder, "--max-new-tokens", 4]
    result = run("convert", report, "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}: 2 pages\n"
    assert f"{report}#page=1: its reading was cut off; what was read is kept" in result.stderr
    assert out.is_file()
    again = run("convert", report, "--out", out, *options)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_as_json_with_what_went_wrong(
    run: Run, report: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pdf").write_text("no document")
    out = tmp_path / "report.doctags"
    options = ["--model", tiny_folder, "--max-new-tokens", 4, "--json"]
    told = json.loads(run("convert", tmp_path, "--out", out, *options).stdout)
    assert told["pages"] == 3
    assert "cannot be read as a PDF file" in told["unread"]["bad.pdf"]
    assert told["cut"] == {f"report.pdf#page={number}": "length" for number in (1, 2)}


def test_a_suffix_that_is_no_format_is_refused(refuses: Run, report: Path, tmp_path: Path) -> None:
    assert "expected one of .md" in refuses("convert", report, "--out", tmp_path / "a.docx")
