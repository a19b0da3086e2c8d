"""Pages become a document: Markdown, HTML, docling's JSON, or the tags themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.pdfs import document

import smolstack
from smolstack.bulk import map_pictures
from smolstack.documents import QUESTION, convert
from smolstack.errors import BulkError

pytest.importorskip("docling_core")

FIRST = (
    "<doctag><section_header_level_1><loc_10><loc_10><loc_200><loc_30>Report"
    "</section_header_level_1>\n<text><loc_10><loc_40><loc_400><loc_60>The profit rose.</text>\n"
    "<otsl><loc_10><loc_80><loc_400><loc_200><ched>Year<ched>Profit<nl><fcel>2024<fcel>5<nl></otsl>"
    "\n</doctag>"
)
SECOND = (
    "<doctag><unordered_list><list_item><loc_1><loc_1><loc_2><loc_2>one</list_item>\n"
    "<list_item><loc_1><loc_1><loc_2><loc_2>two</list_item>\n</unordered_list></doctag>"
)


def answered(path: Path, *answers: str | None, pages: list[str] | None = None) -> Path:
    """The table of a bulk job that read some pages."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"page {number}",
            "path": None if pages is None else pages[number],
            "question": QUESTION,
            "answer": answer,
            "finish_reason": None if answer is None else "stop",
            "error": "no picture" if answer is None else None,
        }
        for number, answer in enumerate(answers)
    ]
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return answered(tmp_path / "pages.parquet", FIRST, SECOND)


def test_markdown_has_headings_tables_and_lists(table: Path, tmp_path: Path) -> None:
    done = convert(table, tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (
        "## Report\n\nThe profit rose.\n\n"
        "|   Year |   Profit |\n|--------|----------|\n|   2024 |        5 |\n\n"
        "- one\n- two\n"
    )
    assert (done.pages, done.unread, done.cut) == (2, (), ())


def test_html_and_json_are_docling_s(tmp_path: Path) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    pages = [f"{report}#page=1", f"{report}#page=2"]
    table = answered(tmp_path / "pages.parquet", FIRST, SECOND, pages=pages)
    convert(table, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<h2>Report</h2>" in html
    assert "<td>2024</td>" in html
    convert(table, tmp_path / "report.json")
    from docling_core.types.doc.document import DoclingDocument

    loaded = DoclingDocument.load_from_json(tmp_path / "report.json")
    assert loaded.name == "report"
    assert [text.text for text in loaded.texts] == ["Report", "The profit rose.", "one", "two"]
    size = loaded.pages[1].size
    assert (size.width, size.height) == (200, 100)  # pixels, as it was read
    box = loaded.texts[0].prov[0].bbox
    assert box.l == pytest.approx(10 / 500 * 200, abs=0.5)


def test_the_tags_themselves(table: Path, tmp_path: Path) -> None:
    convert(table, tmp_path / "report.doctags")
    tags = (tmp_path / "report.doctags").read_text()
    assert tags == f"{FIRST}\n<page_break>\n{SECOND}\n"


def test_pages_that_could_not_be_read_are_named_and_the_others_kept(tmp_path: Path) -> None:
    table = answered(tmp_path / "pages.parquet", FIRST, None, SECOND)
    done = convert(table, tmp_path / "report.md")
    assert [(page.name, page.error) for page in done.unread] == [("page 1", "no picture")]
    text = (tmp_path / "report.md").read_text()
    assert "Report" in text
    assert "- two" in text


@pytest.mark.parametrize(
    "answer", ["", "no tags at all", "<otsl><fcel>1<nl>", "<text><loc_9", "</"]
)
def test_whatever_a_model_writes_becomes_a_document(answer: str, tmp_path: Path) -> None:
    table = answered(tmp_path / "pages.parquet", answer, SECOND)
    for suffix in (".md", ".html", ".json"):
        convert(table, tmp_path / f"report{suffix}")
    assert "- one" in (tmp_path / "report.md").read_text()


def test_a_pdf_file_is_read_page_by_page(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    out = tmp_path / "report.doctags"
    done = convert(report, out, model=tiny_vlm, max_new_tokens=6)
    expected = [
        tiny_vlm.ask(
            f"{report}#page={number}",
            QUESTION,
            max_new_tokens=6,
            keep_special_tokens=True,
            stop_on_repetition=True,
        ).text
        for number in (1, 2)
    ]
    assert out.read_text("utf-8") == "\n<page_break>\n".join(expected) + "\n"
    assert [page.name for page in done.cut] == [f"{report}#page=1", f"{report}#page=2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.doctags", "report.pdf"]


def test_a_bulk_job_s_answers_need_no_model(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    table = tmp_path / "answers.parquet"
    map_pictures(
        report, QUESTION, out=table, model=tiny_vlm, max_new_tokens=4, keep_special_tokens=True
    )
    assert convert(table, tmp_path / "report.md").pages == 2
    assert table.exists()


def test_nothing_is_overwritten_unasked(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    out.write_text("mine")
    with pytest.raises(BulkError, match="exists already"):
        convert(table, out)
    assert out.read_text() == "mine"
    convert(table, out, restart=True)
    assert out.read_text().startswith("## Report")


def test_what_cannot_be_written_or_read_is_refused_at_once(
    table: Path, tiny_vlm: smolstack.VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BulkError, match=r"the suffix '.docx', expected one of .md"):
        convert(table, tmp_path / "report.docx")
    with pytest.raises(BulkError, match="does not exist"):
        convert(table, tmp_path / "gone" / "report.md")
    with pytest.raises(BulkError, match="found nothing, expected a folder"):
        convert(tmp_path / "gone.pdf", tmp_path / "report.md", model=tiny_vlm)
    with pytest.raises(BulkError, match=r"read by a document model .* found none"):
        convert(tmp_path / "gone.pdf", tmp_path / "report.md")
    answered(tmp_path / "report.md.pages.parquet", FIRST)
    with pytest.raises(BulkError, match="is left of an earlier conversion"):
        convert(document(tmp_path / "a.pdf", [(9, 9)]), tmp_path / "report.md", model=tiny_vlm)
    two = pq.read_table(table).to_pylist()
    two[1]["question"] = "And then?"
    pq.write_table(pa.Table.from_pylist(two), table)
    with pytest.raises(BulkError, match="answers to several questions"):
        convert(table, tmp_path / "report.md")
    monkeypatch.setitem(__import__("sys").modules, "docling_core", None)
    with pytest.raises(BulkError, match=r"docling-core \(pip install 'smolstack\[documents\]'\)"):
        convert(table, tmp_path / "report.md")
    assert not (tmp_path / "report.md").exists()


def test_the_json_is_one_object(table: Path, tmp_path: Path) -> None:
    convert(table, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["schema_name"] == "DoclingDocument"
