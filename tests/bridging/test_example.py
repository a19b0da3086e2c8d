"""The example that bridges to a language model that speaks: a few steps of it, and going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bridging.conftest import MakeText

ROOT = Path(__file__).parent.parent.parent


def test_the_example_runs_and_goes_on_where_it_stopped(make_text: MakeText, tmp_path: Path) -> None:
    folder = tmp_path / "bridge"
    sizes = "--images 6 --test-images 6 --chats 3 --test-chats 2 --connector-steps 2 --lora-steps 1"
    command = [sys.executable, "examples/bridge_to_smollm2", "--folder", str(folder), "--text"]
    command += [str(make_text()), *sizes.split(), "--batch", "2", "--threads", "1"]

    def run() -> str:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    first = run()
    assert "| | before | connector | lora |" in first
    report = json.loads((folder / "report-connector.json").read_text())
    assert abs(report["kl"]) < 1e-6  # the connector plays no part in answers to text alone
    assert set(report["kinds"]) <= {
        "number",
        "two numbers",
        "word",
        "price or not",
        "receipt",
        "label",
    }
    images = sorted((folder / "train").glob("*.png"))
    drawn = [path.read_bytes() for path in images]
    images[2].unlink()
    for name in ("report-lora.json", "chats.jsonl"):
        (folder / name).unlink()
    assert run().splitlines()[-9:] == first.splitlines()[-9:]
    assert [path.read_bytes() for path in images] == drawn
