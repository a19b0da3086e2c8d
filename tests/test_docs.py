"""What the documents show works: their Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/shapes.md", "docs/forward.md", "docs/bulk.md", "docs/serving.md"]
# Blocks that need the network or a checkpoint that is not here.
ELSEWHERE = ("HuggingFaceTB/", "127.0.0.1:8000")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        if not any(mark in block for mark in ELSEWHERE):
            exec(compile(block, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize(
    "page",
    [p.relative_to(ROOT) for p in ROOT.glob("*.md")]
    + [p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md")],
    ids=str,
)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_files_that_the_glossary_names_exist() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text()
    named = re.findall(r"`([a-z_]+/[a-z_*]+\.(?:py|c))`", page)
    assert len(named) > 40
    assert [name for name in named if not list((ROOT / "src/smolstack").glob(name))] == []
