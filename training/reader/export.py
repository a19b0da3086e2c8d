"""Write what training has reached as a Hugging Face folder, in half precision."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from smolstack.checkpoint.save import save_checkpoint
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.files import side_files
from training.reader.plan import FOLDER

BUNDLED = Path("src/smolstack/reader")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    options = parser.parse_args()
    path = options.folder / "state.pt"
    if not path.is_file():
        parser.error(f"there is no {path}; run python -m training.reader.train first")
    state = torch.load(path, weights_only=True, map_location="cpu")
    model = VisionLanguageModel(shape.CONFIG)
    model.load_state_dict(state["average"])
    save_checkpoint(options.out, model.half(), side_files(), overwrite=True)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.2f} MB, step {state['step']}")


if __name__ == "__main__":
    main()
