"""Train the bundled reader in stages, resumable at any moment.

1. ``name``: on pictures full of digits, the tower learns to name the character under each patch,
   through a linear head that is thrown away afterwards. Next-token loss alone stays long on the
   plateau where only the length of an answer is learned.
2. ``bridge``: with the tower frozen, connector and decoder learn to answer.
3. ``whole``: everything together, patch naming kept as a small second loss.
4. ``mixed``: the same on pictures with a question and pictures full of digits side by side, which
   makes a digit's name sure and the answer with it.

Drawing costs a third of what a step does, so half of the steps show a recent batch again, in
other light. State is saved every minute; ``--resume`` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.batches import (
    BACKGROUND,
    IGNORED,
    PATCH_CLASSES,
    DrawnBatches,
    ReaderBatch,
    normalised,
    relit,
)
from training.reader.start import fresh_model

SAVE_SECONDS = 60
REPLAYED = 0.5  # the share of steps on recent batches
RECENT = 150  # batches that may come again
BACKGROUND_WEIGHT = 0.1
STATE = "state.pt"


@dataclass(frozen=True)
class Stage:
    """One stage: how long, how fast, and what is trained."""

    name: str
    steps: int
    batch: int  # tiles of pictures with a question
    crowd: int  # tiles full of digits
    rate: float
    naming: float  # weight of the patch-naming loss
    answering: float  # weight of the next-token loss
    tower_frozen: bool = False


STAGES = (
    Stage("name", steps=1460, batch=0, crowd=32, rate=1.4e-3, naming=1.0, answering=0.0),
    Stage(
        "bridge", 700, batch=32, crowd=0, rate=1e-3, naming=0.0, answering=1.0, tower_frozen=True
    ),
    Stage("whole", steps=1260, batch=32, crowd=0, rate=1e-3, naming=0.3, answering=1.0),
    Stage("mixed", steps=1300, batch=20, crowd=20, rate=9e-4, naming=0.6, answering=1.0),
)


class Trainer:
    """Model, naming head, optimizer and the place in the schedule."""

    def __init__(self, folder: Path, stages: tuple[Stage, ...], seed: int) -> None:
        self.folder, self.stages, self.seed = folder, stages, seed
        self.model = fresh_model(seed)
        self.namer = nn.Linear(shape.CONFIG.vision.hidden_size, PATCH_CLASSES)
        self.stage, self.step = 0, 0
        self.seconds = 0.0
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.AdamW:
        parts = [*self.model.named_parameters(), *self.namer.named_parameters()]
        matrices = [p for name, p in parts if p.dim() > 1 and "embedding" not in name]
        rest = [p for name, p in parts if p.dim() < 2 or "embedding" in name]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": 0.02},
            {"params": rest, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))

    def save(self) -> None:
        """Write the whole state beside its place, then rename it: never half a file."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "namer": self.namer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / f".{STATE}"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / STATE)

    def resume(self) -> None:
        """Take up the saved state, if there is one."""
        if not (self.folder / STATE).is_file():
            return
        state = torch.load(self.folder / STATE, weights_only=True)
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.namer.load_state_dict(state["namer"])
        self.optimizer.load_state_dict(state["optimizer"])

    def run(self, workers: int) -> None:
        """All stages from where the state stands."""
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage], workers)
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self._optimizer()
            self.save()

    def _run_stage(self, stage: Stage, workers: int) -> None:
        self.model.train()
        for name, parameter in self.model.named_parameters():
            frozen = stage.tower_frozen and name.startswith("vision.")
            parameter.requires_grad_(not frozen)
        saved = logged = time.monotonic()
        for batch in self._batches(stage, workers):
            self._set_rate(stage)
            losses, accuracy = self._losses(batch, stage)
            total = stage.naming * losses["naming"] + stage.answering * losses["answering"]
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if not math.isfinite(float(norm)):
                raise FloatingPointError(f"gradient norm is {norm} at {stage.name} {self.step}")
            self.optimizer.step()
            self.step += 1
            now = time.monotonic()
            if self.step % 20 == 0 or self.step == stage.steps:
                took = (now - logged) / 20
                self.seconds += now - logged
                logged = now
                self._log(stage, {k: float(v) for k, v in losses.items()}, accuracy, took)
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = now

    def _batches(self, stage: Stage, workers: int) -> Iterator[ReaderBatch]:
        """What is left of the stage: fresh batches, and recent ones again in other light."""
        data = DrawnBatches(
            stage.batch,
            stage.steps,
            seed=self.seed * 10 + self.stage + 1,
            crowd=stage.crowd,
        )
        loader: DataLoader[ReaderBatch] = DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, stage.steps),
            num_workers=workers,
            prefetch_factor=16 if workers else None,
        )
        fresh = iter(loader)
        rng = random.Random(f"replay {self.seed} {self.stage} {self.step}")
        recent: list[ReaderBatch] = []
        for _ in range(self.step, stage.steps):
            if len(recent) > RECENT // 4 and rng.random() < REPLAYED:
                yield relit(rng.choice(recent), rng)
                continue
            if len(recent) == RECENT:
                recent.pop(rng.randrange(RECENT // 2))
            recent.append(next(fresh))
            yield recent[-1]

    def _set_rate(self, stage: Stage) -> None:
        """Warm-up over 80 steps, then a cosine down to a twentieth."""
        progress = self.step / stage.steps
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate * min(1.0, (self.step + 1) / 80) * cosine

    def _losses(
        self, batch: ReaderBatch, stage: Stage
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Both losses, and the share of character patches and of whole answers that are right."""
        with torch.set_grad_enabled(not stage.tower_frozen):
            states = self.model.vision(normalised(batch.tiles))
        zero = torch.zeros(())
        losses, accuracy = {"naming": zero, "answering": zero}, {}
        if stage.naming:
            scores = self.namer(states)
            losses["naming"] = naming_loss(scores, batch.patch_labels)
            characters = batch.patch_labels > BACKGROUND
            right = scores.argmax(-1) == batch.patch_labels
            accuracy["patches"] = float(right[characters].float().mean())
        if stage.answering:
            logits = answer_logits(self.model, states, batch)
            losses["answering"] = functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
            )
            right = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORED)
            accuracy["answers"] = float(right.all(dim=1).float().mean())
        return losses, accuracy

    def _log(
        self, stage: Stage, losses: dict[str, float], accuracy: dict[str, float], took: float
    ) -> None:
        line = {
            "stage": stage.name,
            "step": self.step,
            **{f"loss_{name}": round(value, 4) for name, value in losses.items() if value},
            **{name: round(value, 4) for name, value in accuracy.items()},
            "seconds_per_step": round(took, 3),
            "minutes": round(self.seconds / 60, 2),
        }
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def naming_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over patches, (B, H·W, classes) and (B, H·W), background weighted down."""
    weight = torch.ones(PATCH_CLASSES)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    return functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight=weight)


def answer_logits(model: VisionLanguageModel, states: Tensor, batch: ReaderBatch) -> Tensor:
    """Logits where answer tokens are predicted: patch states (B·n + X, H·W, C) → (B, A, V)."""
    visual = model.connector(states[: batch.picture_tiles], (shape.GRID, shape.GRID))
    embeddings = model.decoder.embedding(batch.token_ids)
    places = (batch.token_ids[0] == shape.IDS[shape.IMAGE]).nonzero().flatten()
    visual = visual.reshape(len(batch.token_ids), len(places), -1)
    embeddings = embeddings.index_copy(1, places, visual)
    return model.logits(model.decoder(embeddings)[:, batch.start :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/reader"))
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.folder, STAGES, options.seed)
    if options.resume:
        trainer.resume()
    trainer.run(options.workers)


if __name__ == "__main__":
    main()
