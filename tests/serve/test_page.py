"""The page at /, in a real browser where one is installed."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.pdfs import document
from tests.serve.conftest import EXAMPLES, Process, serving
from tests.videos import film

playwright = pytest.importorskip("playwright.sync_api")
DROP = """(coded) => {
  const bytes = Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], "number.png", { type: "image/png" }));
  const options = { dataTransfer: carried, bubbles: true, cancelable: true };
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", options));
}"""
WATCH = """() => {
  window.pieces = [];
  new MutationObserver((changes) => {
    for (const change of changes)
      for (const node of change.addedNodes) if (node.data) pieces.push(node.data);
  }).observe(document.getElementById("answer"), { childList: true });
}"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: Any, server: Process, scheme: str = "light") -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": 1100, "height": 760}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    return page, problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_image_is_dropped_and_the_answer_streams(
    browser: Any, server: Process, says: str, scheme: str
) -> None:
    page, problems = opened(browser, server, scheme)
    page.wait_for_function("document.getElementById('model').textContent === 'smolstack-reader'")
    page.evaluate(DROP, base64.b64encode((EXAMPLES / "number.png").read_bytes()).decode())
    page.wait_for_selector("#tiles rect")
    assert "visual tokens" in page.text_content("#plan")
    page.evaluate(WATCH)
    page.fill("#question", "What does it say?")
    page.press("#question", "Enter")
    page.wait_for_selector("#numbers:not([hidden])")
    assert page.text_content("#answer") == says
    assert len(page.evaluate("pieces")) > 1
    assert "".join(page.evaluate("pieces")) == says
    assert "tokens" in page.text_content("#numbers")
    page.uncheck("#outlines")
    assert not page.is_visible("#tiles")
    page.check("#outlines")
    assert problems == []
    folder = os.environ.get("SMOLSTACK_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"serve-{scheme}.png"))
    page.close()


def test_what_is_wrong_is_said_on_the_page(browser: Any, server: Process, tmp_path: Path) -> None:
    page, _ = opened(browser, server)
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "number.png").read_bytes()[:100])
    page.set_input_files("#file", broken)
    page.wait_for_selector("#problem:not([hidden])")
    assert "cannot be read as an image" in page.text_content("#problem")
    page.close()


def test_the_page_asks_for_a_key_where_one_is_needed(browser: Any, tight: Process) -> None:
    page, _ = opened(browser, tight)
    page.wait_for_selector("#access[open]")
    assert "asks for an API key" in page.text_content("#problem")
    page.set_input_files("#file", EXAMPLES / "number.png")
    page.wait_for_selector("#shown[src]")
    page.fill("#key", "wrong")
    page.press("#key", "Tab")
    page.wait_for_function("document.getElementById('problem').textContent.includes('not know')")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
    page.wait_for_selector("#tiles rect")  # of the image that was chosen before
    assert not page.is_visible("#problem")
    page.close()


def test_messages_are_for_people(browser: Any, tiny_folder: Path, tmp_path: Path) -> None:
    with serving("--model", str(tiny_folder)) as server:
        page, _ = opened(browser, server)
        page.wait_for_function("document.getElementById('model').textContent === 'model'")
        (tmp_path / "notes.txt").write_text("no image")
        page.set_input_files("#file", tmp_path / "notes.txt")
        page.wait_for_selector("#problem:not([hidden])")
        assert "notes.txt is not an image, a PDF file or a video. Choose" in page.text_content(
            "#problem"
        )
    page.press("#question", "Enter")
    page.wait_for_function("document.getElementById('problem').textContent.includes('running?')")
    assert page.text_content("#problem") == "The server does not answer. Is it still running?"
    page.close()


def test_on_a_phone_no_word_stands_alone(browser: Any, server: Process) -> None:
    page, _ = opened(browser, server)
    page.set_viewport_size({"width": 320, "height": 640})
    tops = page.eval_on_selector_all(
        "form .together > *", "all => all.map(e => Math.round(e.getBoundingClientRect().top / 30))"
    )
    assert len(tops) == 3
    assert max(tops) - min(tops) <= 1
    page.close()


def test_a_page_of_a_document_is_chosen(browser: Any, server: Process, tmp_path: Path) -> None:
    page, problems = opened(browser, server)
    page.set_viewport_size({"width": 320, "height": 640})
    report = document(tmp_path / "report.pdf", [(100, 50), (60, 80)])
    page.set_input_files("#file", report)
    page.wait_for_selector("#pages:not([hidden])")
    assert page.text_content("#count") == "of 2"
    page.wait_for_function("document.getElementById('plan').textContent.includes('200 × 100')")
    page.fill("#page", "2")
    page.press("#page", "Tab")
    page.wait_for_function("document.getElementById('plan').textContent.includes('120 × 160')")
    assert page.get_attribute("#shown", "alt") == "Page 2 of report.pdf"
    assert page.evaluate("document.getElementById('shown').naturalHeight") == 160
    page.press("#question", "Enter")
    page.wait_for_selector("#numbers:not([hidden])")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 320
    page.set_input_files("#file", EXAMPLES / "number.png")
    page.wait_for_selector("#pages", state="hidden")
    assert problems == []
    page.close()


def test_a_video_is_shown_and_asked_about(browser: Any, server: Process, tmp_path: Path) -> None:
    page, problems = opened(browser, server)
    page.set_input_files("#file", film(tmp_path / "clip.mp4", frames=10, rate=5))
    page.wait_for_selector("#shown[alt='Frames of the video clip.mp4']")
    assert page.text_content("#plan").startswith("2 frames of 2.0 s, one tile each")
    page.press("#question", "Enter")
    page.wait_for_selector("#numbers:not([hidden])")
    assert problems == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_violates_accessibility(
    browser: Any, server: Process, scheme: str, tmp_path: Path
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, _ = opened(browser, server, scheme)
    page.set_input_files("#file", document(tmp_path / "report.pdf", [(100, 50), (60, 80)]))
    page.wait_for_selector("#pages:not([hidden])")
    found = axe.run(page)
    assert found.response["violations"] == []
    page.close()


def test_every_control_has_a_name(browser: Any, server: Process) -> None:
    page, _ = opened(browser, server)
    unnamed = page.eval_on_selector_all(
        "input, textarea, button, output",
        "all => all.filter(e => !e.labels?.length && !e.textContent.trim()"
        " && !e.getAttribute('aria-labelledby')).map(e => e.id)",
    )
    assert unnamed == []
    page.close()
