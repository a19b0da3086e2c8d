"""Connect two unrelated frozen towers by training only the connector between them.

The vision tower is the bundled reader's. The text tower is a small decoder with another width,
depth, tokenizer and chat template, which has never been trained on images. The connector learns to
map the vision tower's outputs to the decoder's embeddings.

    python examples/bridge_two_towers            # all steps, seeded; writes bridge/

The result is an ordinary checkpoint:

    smolstack ask bridge/test/00001.png "Which number is it?" --model bridge/run/model --no-split
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from images import draw_folder
from text_tower import QUESTION, train_text_tower

import smolstack
from smolstack.train import Recipe, bridge_towers, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("bridge"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-steps", type=int, default=2500)
    parser.add_argument("--connector-steps", type=int, default=1500)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder: Path = options.folder

    # 1. A text tower that reads numbers laid out in its own embeddings. It is frozen afterwards.
    text = folder / "text-tower"
    if not (text / "config.json").is_file():
        reader = smolstack.load()
        train_text_tower(
            text,
            reader.config.vision,
            reader.config.scale,
            reader.processor.settings,
            steps=options.text_steps,
            seed=options.seed,
        )

    # 2. Both towers, with a randomly initialized connector.
    bridged = bridge_towers(None, text, folder / "bridged", seed=options.seed, overwrite=True)

    # 3. Training and test images.
    for name, count in (("train", options.images), ("test", 200)):
        draw_folder(folder / name, count, seed=options.seed * 2 + (name == "test"))

    # 4. Train the connector only. The vision tower runs once per image; its outputs are cached.
    recipe = Recipe.from_dict(
        {
            "model": str(bridged),
            "output": str(folder / "run"),
            "seed": options.seed,
            "data": {
                "train": str(folder / "train"),
                "evaluation": str(folder / "test"),
                "question": QUESTION,
                "split": False,
            },
            "evaluation": {"every": 250, "answers": 200, "max_new_tokens": 8},
            "stages": [
                {
                    "train": "connector",
                    "steps": options.connector_steps,
                    "batch": 32,
                    "micro_batch": 32,
                    "learning_rate": 3e-3,
                    "warmup": 50,
                    "weight_decay": 0.0,
                }
            ],
        }
    )
    trained = train(recipe, overwrite=True)
    evaluated = trained.evaluated
    assert evaluated is not None
    share = f"{evaluated.exact:.1%} of {len(evaluated.answered)}"
    print(f"{share} numbers read exactly, from {trained.model}")


if __name__ == "__main__":
    main()
