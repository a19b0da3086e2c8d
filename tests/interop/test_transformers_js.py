"""transformers.js, unmodified and untold, answers with an exported folder.

Needs node, and a folder where ``npm install @huggingface/transformers`` was run, named by the
variable SMOLSTACK_TRANSFORMERS_JS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import smolstack
from smolstack.interop.onnx import export

PACKAGES = os.environ.get("SMOLSTACK_TRANSFORMERS_JS", "")
pytestmark = pytest.mark.skipif(
    not PACKAGES or shutil.which("node") is None,
    reason="node and SMOLSTACK_TRANSFORMERS_JS=FOLDER are needed",
)
SIGN = Path(__file__).parents[2] / "examples" / "number.png"
PROGRAM = """
import { AutoProcessor, AutoModelForVision2Seq, RawImage, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const processor = await AutoProcessor.from_pretrained("exported");
const model = await AutoModelForVision2Seq.from_pretrained("exported");
const content = [{ type: "image" }, { type: "text", text: "What does it say?" }];
const chat = [{ role: "user", content }];
const text = processor.apply_chat_template(chat, { add_generation_prompt: true });
const inputs = await processor(text, [await RawImage.read(process.argv[3])]);
const ids = await model.generate({ ...inputs, max_new_tokens: 32 });
const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(JSON.stringify(processor.batch_decode(answer, { skip_special_tokens: true })));
"""


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_it_takes_the_graphs_that_there_are_and_answers_alike(dtype: str, tmp_path: Path) -> None:
    export(None, tmp_path / "exported", dtypes=[dtype])
    program = Path(PACKAGES) / f"answer-{os.getpid()}.mjs"
    program.write_text(PROGRAM)
    try:
        done = subprocess.run(
            ["node", str(program), str(tmp_path), str(SIGN)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    finally:
        program.unlink()
    (answer,) = json.loads(done.stdout)
    assert answer.strip() == smolstack.load().ask(SIGN, "What does it say?").text
