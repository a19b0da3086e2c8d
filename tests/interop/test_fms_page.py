"""docs/interop-fms.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fms")
pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent.parent
ELSEWHERE = "SmolVLM-256M-Instruct"  # a checkpoint that is not here


def test_the_python_of_the_page_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "interop-fms.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if ELSEWHERE not in block:
            exec(compile(block, "interop-fms.md", "exec"), names)
    assert len(blocks) > 3
    assert "4711" in capsys.readouterr().out
