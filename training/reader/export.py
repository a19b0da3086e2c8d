"""Write a training state: as a Hugging Face folder, or its weights alone to begin again from."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from smolstack.checkpoint.save import save_checkpoint
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.files import side_files
from training.reader.stages import FOLDER, STAGES

BUNDLED = Path("src/smolstack/reader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--stage", default=STAGES[-1].name, help="whose state is written")
    parser.add_argument(
        "--begun", action="store_true", help="write weights in float16 to the file --out instead"
    )
    options = parser.parse_args()
    path = options.folder / f"{options.stage}.pt"
    if not path.is_file():
        parser.error(f"there is no {path}; run python -m training.reader.train first")
    state = torch.load(path, weights_only=True)
    if options.begun:
        weights = {name: weight.half() for name, weight in state["average"].items()}
        about = {"stage": state["stage"], "step": str(state["step"])}
        save_file(weights, options.out, metadata=about)
        size = options.out.stat().st_size
    else:
        model = VisionLanguageModel(shape.CONFIG)
        model.load_state_dict(state["average"])
        save_checkpoint(options.out, model, side_files(), overwrite=True)
        size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.2f} MB, stage {state['stage']}, step {state['step']}")


if __name__ == "__main__":
    main()
