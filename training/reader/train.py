"""Train the bundled reader in stages, resumable at any moment.

1. ``name``: on tiles that show text, the tower learns to name the character under each patch and
   to say where the line's next character is. Next-token loss alone stays long on the plateau where
   only the length of an answer is learned.
2. ``spell``: without a tower, connector and decoder learn to answer from what patches say, as a
   good tower would: to point at the cell of each character and to say what that shows
   (``pointing.py``). The stage needs nothing from ``name``: the two can run side by side
   (``--stages``), each with its own state.
3. ``answer``: the decoder goes on from what the tower says of pictures with a question; the tower
   stays as it is, which makes a tile cost half as much.
4. ``whole``: everything together, naming kept as a second loss.

State is saved every minute; ``--resume`` goes on from it, also with other ``--steps``. The stages
are measured out for two processes (``together.py``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.reader import attention, shape, together
from training.reader.batches import DrawnBatches, ReaderBatch, normalised
from training.reader.losses import answer_logits, answering_loss, naming_loss, random_states
from training.reader.muon import Muon
from training.reader.places import PLACE, PLACE_STRENGTH, directions, places
from training.reader.stages import FOLDER, STAGES, Stage
from training.reader.start import fresh_model

SAVE_SECONDS = 60
HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()  # others emulate it, very slowly
WARM_UP, DECAY = 100, 0.85  # steps; the last share of a stage, over which the rate falls to 0
AVERAGED = 0.99  # how much of the average of all weights a step keeps


class Trainer:
    """Model, optimizers and the place in one stage.

    Args:
        begun: weights to begin from in place of fresh ones, as ``export.py --begun`` writes them;
            what an earlier stage trained in ``folder`` goes before them.
    """

    def __init__(self, folder: Path, stage: Stage, seed: int, begun: Path | None = None) -> None:
        self.folder, self.stage, self.seed = folder, stage, seed
        self.rank, self.processes = together.join()
        self.number = [known.name for known in STAGES].index(stage.name)
        self.model = fresh_model(seed)
        if begun is not None:
            self.model.load_state_dict(load_file(begun))
        for earlier in STAGES[: self.number]:
            self._take(earlier)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(_is_of(name, stage.part))
        width = shape.CONFIG.vision.hidden_size - PLACE
        self.codes = directions(width)
        self.places = PLACE_STRENGTH * places(shape.GRID)
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.optimizers = self._optimizers()
        self.step, self.seconds = 0, 0.0

    def _take(self, earlier: Stage) -> None:
        """The weights that an earlier stage trained."""
        path = self.folder / f"{earlier.name}.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        weights = state["average"]
        kept = {name: value for name, value in weights.items() if _is_of(name, earlier.part)}
        self.model.load_state_dict(kept, strict=False)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for everything else."""
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for in_tower, share in ((True, self.stage.tower), (False, 1.0)):
            trained = [
                (name, parameter)
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and name.startswith("vision.") == in_tower
            ]
            in_layers = [p for n, p in trained if p.dim() == 2 and ".layers." in n]
            tables = [p for n, p in trained if p.dim() > 1 and ".layers." not in n]
            rest = [p for _, p in trained if p.dim() < 2]
            if trained:
                matrices.append({"params": in_layers, "share": share})
                others.append({"params": tables, "weight_decay": 0.01, "share": share})
                others.append({"params": rest, "weight_decay": 0.0, "share": share})
        return [
            Muon(matrices, weight_decay=0.02),
            torch.optim.AdamW(others, betas=(0.9, 0.98)),
        ]

    @property
    def state_path(self) -> Path:
        return self.folder / f"{self.stage.name}.pt"

    def save(self) -> None:
        """Write the whole state beside its place, then rename it: never half a file."""
        state = {
            "stage": self.stage.name,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        if self.rank:
            return
        temporary = self.folder / f".{self.state_path.name}"
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)

    def resume(self) -> None:
        """Take up the saved state, if there is one."""
        if not self.state_path.is_file():
            return
        state = torch.load(self.state_path, weights_only=True)
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def step_on(self, workers: int) -> None:
        """One step, not saved."""
        self._train_on(next(self._batches(workers)))
        self.step += 1

    def run(self, workers: int) -> None:
        """What is left of the stage."""
        self.model.train()
        used = time.process_time()
        saved = time.monotonic()
        seen: list[dict[str, float]] = []
        for batch in self._batches(workers):
            seen.append(self._train_on(batch))
            self.step += 1
            if self.step % 20 == 0 or self.step == self.stage.steps:
                now = time.process_time()
                self.seconds, used = self.seconds + self.processes * (now - used), now
                self._log(seen)
                seen = []
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _train_on(self, batch: ReaderBatch) -> dict[str, float]:
        """One step; its losses and the shares that were right."""
        self._set_rate()
        losses, figures = self.losses(batch)
        total = torch.stack(
            [getattr(self.stage, name) * loss for name, loss in losses.items()]
        ).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        together.average_gradients(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"gradient norm is {norm} at {self.stage.name} {self.step}")
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            share = min(AVERAGED, (self.step + 1) / (self.step + 10))
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - share)
        return {f"loss_{name}": loss.item() for name, loss in losses.items()} | figures

    def _batches(self, workers: int) -> Iterator[ReaderBatch]:
        """What is left of the stage."""
        stage = self.stage
        data = DrawnBatches(
            stage.batch,
            stage.steps * self.processes,
            seed=self.seed * 10 + self.number + 1,
            crowd=stage.crowd,
            asked=stage.asked,
            drawn=stage.drawn,
            level=stage.level,
            full=stage.full,
        )
        first = self.step * self.processes + self.rank
        loader: DataLoader[ReaderBatch] = DataLoader(
            data,
            batch_size=None,
            sampler=range(first, len(data), self.processes),
            num_workers=workers,
            prefetch_factor=12 if workers else None,
        )
        yield from loader

    def _set_rate(self) -> None:
        """Warm-up, then even, then straight down to (nearly) nothing."""
        left = (self.stage.steps - self.step) / (DECAY * self.stage.steps)
        rate = self.stage.rate * min(1.0, (self.step + 1) / WARM_UP, max(0.02, left))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]

    def losses(self, batch: ReaderBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All losses, and the shares of what is right: patches, cells, characters, answers."""
        stage = self.stage
        losses: dict[str, Tensor] = {}
        figures: dict[str, float] = {}
        # In float32 torch's fused attention is the faster one.
        attending = attention.plain() if HAS_BFLOAT16 else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16), attending:
            if stage.drawn:
                states = self.model.vision(normalised(batch.tiles))
            else:
                generator = torch.Generator().manual_seed(self.step * self.processes + self.rank)
                states = random_states(batch, self.codes, self.places, generator)
            if stage.answering:
                logits = answer_logits(self.model, states, batch)
        if stage.naming:
            losses["naming"], of_patches = naming_loss(states.float(), batch, self.codes)
            figures |= of_patches
        if stage.answering:
            losses["answering"], of_answers = answering_loss(logits.float(), batch)
            figures |= of_answers
        return losses, figures

    def _log(self, seen: list[dict[str, float]]) -> None:
        if self.rank:
            return
        line: dict[str, Any] = {"stage": self.stage.name, "step": self.step}
        for name in sorted({name for figures in seen for name in figures}):
            values = [figures[name] for figures in seen if name in figures]
            line[name] = round(sum(values) / len(values), 4)
        line |= {"cpu_minutes": round(self.seconds / 60, 2), "at": time.strftime("%H:%M:%S")}
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def _is_of(name: str, part: str) -> bool:
    return name.startswith(tuple(part.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--resume", action="store_true", help="go on from the saved states")
    parser.add_argument(
        "--begun", type=Path, help="weights to begin from where the folder holds no earlier stage's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES))
    parser.add_argument("--steps", type=int, help="length of the stages run, instead of their own")
    options = parser.parse_args()
    if options.begun is not None and not options.begun.is_file():
        parser.error(f"there are no weights at {options.begun}")
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    for known in STAGES:
        if known.name in options.stages.split(","):
            stage = replace(known, steps=options.steps or known.steps)
            trainer = Trainer(options.folder, stage, options.seed, options.begun)
            if options.resume:
                trainer.resume()
            trainer.run(options.workers)
    together.leave()


if __name__ == "__main__":
    main()
