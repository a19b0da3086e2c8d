"""Pages become a document: Markdown, HTML, docling's JSON, or the tags themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pdfs import document, locked

import smolstack
from smolstack.bulk import map_images
from smolstack.documents import QUESTION, Page, convert
from smolstack.documents.doctags import CELLS, CONTAINERS, LEAVES
from smolstack.documents.pages import build_document
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
            "error": "no image" if answer is None else None,
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
    assert [(page.name, page.error) for page in done.unread] == [("page 1", "no image")]
    text = (tmp_path / "report.md").read_text()
    assert "Report" in text
    assert "- two" in text


def shown(tmp_path: Path, *answers: str | None, pages: list[str] | None = None) -> str:
    """The Markdown of some answers; HTML and JSON are made of them too."""
    table = answered(tmp_path / "pages.parquet", *answers, pages=pages)
    for suffix in (".html", ".json", ".md"):
        convert(table, tmp_path / f"report{suffix}", restart=True)
    return (tmp_path / "report.md").read_text()


def remarks(tmp_path: Path, suffix: str) -> list[tuple[str, str]]:
    done = convert(tmp_path / "pages.parquet", tmp_path / f"report{suffix}", restart=True)
    return [(remark.name, remark.text) for remark in done.remarks]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "<otsl><fcel>1<nl>",
        "<text><loc_9",
        "</",
        "<doctag>",
        "<document_index><loc_1><loc_1><loc_9><loc_9></document_index>",
    ],
)
def test_whatever_a_model_writes_becomes_a_document(answer: str, tmp_path: Path) -> None:
    assert "- one" in shown(tmp_path, answer, SECOND)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "<doctag><otsl><loc_1><loc_1><loc_9><loc_9><ched>Item<ched>Price<nl>"
            "<fcel>Tea<fcel>2<nl><fcel>Milk<fcel>3<nl><fcel>Bre",
            "| Item   |   Price |\n|--------|---------|\n| Tea    |       2 |\n"
            "| Milk   |       3 |\n| Bre    |         |\n",
        ),
        (
            "<unordered_list><list_item>one</list_item>\n<list_item>two</list_item>\n<list_item>thr",
            "- one\n- two\n- thr\n",
        ),
        ("<text>First.</text><text>Second and and", "First.\n\nSecond and and\n"),
        ("<text>First.<text>Second.</text>", "First.\n\nSecond.\n"),
        ("<ordered_list><list_item>one<text>After.</text>", "1. one\n\nAfter.\n"),
        ("<section_header_level_1>A<otsl><fcel>1<nl></otsl>", "## A\n\n| 1   |\n|-----|\n"),
    ],
)
def test_what_was_read_of_an_element_that_was_cut_off_is_kept(
    answer: str, expected: str, tmp_path: Path
) -> None:
    assert shown(tmp_path, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<text>p < 0.05 and q > 0.1 hold</text>", "p &lt; 0.05 and q &gt; 0.1 hold\n"),
        ("<code>if a<b and c>d: x</code>", "```\nif a<b and c>d: x\n```\n"),
        ("<code><_C++_>vector<int> v; // <title>T</title></code>",
         "```\nvector<int> v; // <title>T</title>\n```\n"),
        ("<otsl><ched>a<b<ched>c<nl><fcel><5<fcel>>6<nl></otsl>",
         "| a<b   | c   |\n|-------|-----|\n| <5    | >6  |\n"),
        ("<text>an <other> <b>word</b></text>", "an &lt;other&gt; &lt;b&gt;word&lt;/b&gt;\n"),
    ],
)  # fmt: skip
def test_angle_brackets_that_open_no_tag_are_text(
    answer: str, expected: str, tmp_path: Path
) -> None:
    assert shown(tmp_path, f"<doctag>{answer}</doctag><end_of_utterance>") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<text>a<formula>b</formula>c</text>", "abc\n"),
        ("<text>a</text> stray <text>b</text>", "a\n\nstray\n\nb\n"),
        ("<list_item>alone</list_item>", "- alone\n"),
        ("<unordered_list><list_item>a<unordered_list><list_item>b</list_item></unordered_list>"
         "</list_item><list_item>c</list_item></unordered_list>", "- a\n- b\n- c\n"),
        ("<otsl><fcel>1<fcel>2<nl><nl><fcel><ucel><nl></otsl>",
         "| 1   |   2 |\n|-----|-----|\n|     |   2 |\n"),
        ("<paragraph>p</paragraph><fcel>1<nl>", "p\n\n| 1   |\n|-----|\n"),
    ],
)  # fmt: skip
def test_elements_where_they_cannot_stand_keep_their_words(
    answer: str, expected: str, tmp_path: Path
) -> None:
    assert shown(tmp_path, answer) == expected


GOOD = "<doctag><text><loc_10><loc_10><loc_200><loc_60>Good page.</text></doctag>"


@pytest.mark.parametrize(
    ("box", "boxes"),
    [
        ("<loc_400><loc_400><loc_100><loc_100>", "1 box is"),
        ("<loc_100><loc_100><loc_100><loc_100>", "1 box is"),
        ("<loc_100><loc_100><loc_900><loc_200>", "1 box is"),
        ("<loc_100><loc_100>", "1 box is"),
        ("<loc_100><loc_100><loc_101><loc_200>", "1 box is"),  # less than a pixel wide
    ],
)
def test_a_bad_box_goes_and_the_text_of_all_pages_stays(
    box: str, boxes: str, tmp_path: Path
) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50)] * 3)
    bad = f"<doctag><picture>{box}<caption>A cat.</caption></picture><text>t</text></doctag>"
    pages = [f"{report}#page={number}" for number in (1, 2, 3)]
    assert shown(tmp_path, GOOD, bad, GOOD, pages=pages).count("Good page.") == 2
    for suffix in (".html", ".json"):
        text = (tmp_path / f"report{suffix}").read_text()
        assert text.count("A cat.") >= 1
        assert text.count("Good page.") >= 2
        assert remarks(tmp_path, suffix) == [
            ("page 1", f"{boxes} empty, inverted or off the page, and left out")
        ]


def test_an_image_tag_without_an_image_leaves_the_text(tmp_path: Path) -> None:
    image = "<doctag><picture><loc_10><loc_10><loc_20><loc_20></picture><text>t</text></doctag>"
    gone = [str(tmp_path / "gone.png"), str(tmp_path / "gone too.png")]
    assert "t\n" in shown(tmp_path, image, GOOD, pages=gone)
    assert "found no file" in remarks(tmp_path, ".html")[0][1].lower()
    shown(tmp_path, image, GOOD)
    assert remarks(tmp_path, ".json") == [
        ("page 0", "its image came as bytes: its figures are left out")
    ]


def test_whatever_docling_raises_about_a_page_ends_that_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docling_core.types.doc.document import DoclingDocument

    real = DoclingDocument.load_from_doctags

    def fragile(tagged: Any, **named: Any) -> DoclingDocument:
        if any("<formula>" in page.tokens for page in tagged.pages):
            raise RecursionError("too deep")
        return real(tagged, **named)

    monkeypatch.setattr(DoclingDocument, "load_from_doctags", fragile)
    text = shown(tmp_path, GOOD, "<text>a<b</text><formula>c</formula>", GOOD)
    assert text == "Good page.\n\na&lt;b\n\nc\n\nGood page.\n"
    assert remarks(tmp_path, ".json") == [
        ("page 1", "docling-core cannot take it (RecursionError: too deep): only its text is kept")
    ]


def test_a_page_without_elements_is_named_and_no_page_with_any_is_an_error(
    tmp_path: Path,
) -> None:
    assert shown(tmp_path, GOOD, "Just words.", GOOD) == "Good page.\n\nGood page.\n"
    said = ("page 1", "its answer holds no element of a document, and is left out")
    assert remarks(tmp_path, ".md") == [said]
    table = answered(tmp_path / "pages.parquet", "Just words.", "<doctag></doctag>", None)
    for suffix in (".md", ".html", ".json", ".doctags"):
        with pytest.raises(BulkError, match=r"no answer contains document elements: "
                           r"page 0, page 1; expected DocTags.* found 'Just words\.'"):  # fmt: skip
            convert(table, tmp_path / f"none{suffix}")
        assert not (tmp_path / f"none{suffix}").exists()
    table = answered(tmp_path / "pages.parquet", None, None)
    with pytest.raises(BulkError, match=r"page 0, page 1; .*: no"):
        convert(table, tmp_path / "none.md")


TOKENS = st.sampled_from(
    [
        *(f"<{close}{name}>" for close in ("", "/") for name in sorted(CONTAINERS | LEAVES)),
        *(f"<{name}>" for name in sorted(CELLS)),
        *("<loc_0><loc_0><loc_500><loc_500>", "<loc_9><loc_9><loc_9><loc_9>", "<loc_7>"),
        *("<_Python_>", "<bar_chart>", "<key_1>", "</key_1>", "<link_1>", "</doctag>"),
        *("<", "> ", "\n", "<b>", "</"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS | st.just("word"), min_size=1, max_size=25))
def test_no_order_of_tags_loses_a_word_or_stops_docling(parts: list[str]) -> None:
    words = [f"w{place}w" for place, part in enumerate(parts) if part == "word"]
    left = iter(words)
    answer = "".join(next(left) if part == "word" else part for part in parts)
    page = Page("p", None, answer, "stop", None)
    made = {suffix: build_document("d", [page], suffix, None) for suffix in (".json", ".html")}
    if made[".json"].elements:
        assert [word for word in words if word not in made[".json"].text] == []
    assert not [remark for remark in made[".html"].remarks if "docling" in remark.text]


def test_a_pdf_file_is_read_page_by_page(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    out = tmp_path / "report.doctags"
    # Random weights write no DocTags: the answers are kept beside, for whoever wants to see them.
    with pytest.raises(BulkError, match=r"report\.pdf#page=1, .*report\.doctags\.pages\.parquet"):
        convert(report, out, model=tiny_vlm, max_new_tokens=6)
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
    rows = pq.read_table(f"{out}.pages.parquet").to_pylist()
    assert [row["answer"] for row in rows] == expected
    left = ["report.doctags.pages.parquet", "report.pdf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_a_file_that_cannot_be_opened_leaves_nothing_behind(
    tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    path = locked(tmp_path / "locked.pdf", b"sesame")
    with pytest.raises(BulkError, match=r"no page could be read: .*is locked"):
        convert(path, tmp_path / "out.doctags", model=tiny_vlm)
    assert [left.name for left in tmp_path.iterdir()] == ["locked.pdf"]


def test_a_bulk_job_s_answers_need_no_model(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    table = tmp_path / "answers.parquet"
    map_images(
        report, QUESTION, out=table, model=tiny_vlm, max_new_tokens=4, keep_special_tokens=True
    )
    rows = pq.read_table(table)
    rows = rows.set_column(
        rows.schema.get_field_index("answer"), "answer", pa.array([FIRST, SECOND])
    )
    pq.write_table(rows, table)
    done = convert(table, tmp_path / "report.md")
    assert [page.name for page in done.cut] == [f"{report}#page=1", f"{report}#page=2"]
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
    with pytest.raises(BulkError, match=r"--model"):
        convert(tmp_path / "gone.pdf", tmp_path / "report.md")
    answered(tmp_path / "report.md.pages.parquet", FIRST)
    with pytest.raises(BulkError, match="earlier conversion"):
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


def test_a_table_without_the_columns_of_a_bulk_job_is_refused(table: Path, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(table).drop(["error", "path"]), table)
    with pytest.raises(BulkError, match="has no column path or error; expected a table of smolst"):
        convert(table, tmp_path / "report.md")
