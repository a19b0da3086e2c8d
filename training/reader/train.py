"""Train the bundled reader, resumable at any moment.

Tower and decoder are trained side by side, by two losses: the tower learns to name the character
under each patch and to say where the line's next one is, the decoder to answer, by next tokens.
Next-token loss alone stays long on the plateau where only the length of an answer is learned. So
the decoder at first does not see what the tower says, but what a good tower would say of the same
images (``random_states``), and learns what to do with it: to point at the cell of each character
and to say what that shows (``pointing.py``). Then the two are joined.

It needs a GPU and some cores that draw. On processors alone it is the same, but takes days: there
start one process for each core, with smaller batches (``together.py``). State is saved every
minute; ``--resume`` goes on from it.
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
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smolstack.checkpoint.load import load_checkpoint
from training.reader import attention, fonts, shape, together
from training.reader.batches import ReaderBatch, Room, normalized
from training.reader.drawn import DrawnBatches
from training.reader.losses import answer_logits, answering_loss, naming_loss, on, random_states
from training.reader.muon import Muon
from training.reader.places import PLACE, PLACE_STRENGTH, directions, places
from training.reader.plan import FOLDER, Plan
from training.reader.start import fresh_model

SAVE_SECONDS = 60
WARM_UP, DECAY = 200, 0.8  # steps; the last share of a run, over which the rate falls to 0
AVERAGED = 0.998  # how much of the average of all weights a step keeps
SHARES = {"patches", "next", "characters", "cells", "answers"}
# Tokens of a batch on a GPU: alike every time, so that its memory is shared out once.
ROOM = Room(rows=48, length=960, answers=2048, goals=64)


class Trainer:
    """Model, optimizers and the place in a run.

    Args:
        begun: a checkpoint folder to begin from in place of fresh weights.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        seed: int = 0,
        *,
        begun: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.folder, self.plan, self.seed = folder, plan, seed
        self.device = torch.device(device)
        self.halves = self.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
        self.rank, self.processes = together.join()
        self.model = fresh_model(seed)
        if begun is not None:
            known = load_checkpoint(begun, "float32", "cpu").model
            self.model.load_state_dict(known.state_dict())
        self.model.to(self.device)
        self.codes = directions(shape.CONFIG.vision.hidden_size - PLACE).to(self.device)
        self.places = PLACE_STRENGTH * on(places, self.device, shape.GRID)
        self.weights = list(self.model.state_dict().values())
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = self._optimizers()
        self.step, self.seconds = 0, 0.0

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for everything else."""
        named = list(self.model.named_parameters())
        in_layers = [p for n, p in named if p.dim() == 2 and ".layers." in n]
        tables = [p for n, p in named if p.dim() > 1 and ".layers." not in n]
        rest = [p for _, p in named if p.dim() < 2]
        others: list[dict[str, Any]] = [
            {"params": tables, "weight_decay": 0.01},
            {"params": rest, "weight_decay": 0.0},
        ]
        return [
            Muon([{"params": in_layers}], weight_decay=0.02),
            torch.optim.AdamW(others, betas=(0.9, 0.98)),
        ]

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the whole state beside its place, then rename it: never half a file."""
        state = {
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
        state = torch.load(self.state_path, weights_only=True, map_location=self.device)
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def step_on(self, workers: int) -> None:
        """One step, not saved."""
        self._train_on(next(self._batches(workers)))
        self.step += 1

    def run(self, workers: int) -> None:
        """What is left of the run."""
        self.model.train()
        used = time.process_time()
        saved = time.monotonic()
        seen: list[dict[str, Tensor]] = []
        for batch in self._batches(workers):
            seen.append(self._train_on(batch))
            self.step += 1
            if self.step % 20 == 0 or self.step == self.plan.steps:
                now = time.process_time()
                self.seconds, used = self.seconds + self.processes * (now - used), now
                self._log(seen)
                seen = []
            if time.monotonic() - saved > SAVE_SECONDS and not seen:  # what was logged is finite
                self.save()
                saved = time.monotonic()
        self.save()

    def _train_on(self, batch: ReaderBatch) -> dict[str, Tensor]:
        """One step; its losses and the shares that were right."""
        self._set_rate()
        losses, figures = self.losses(batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        together.average_gradients(self.model.parameters())
        tower = list(self.model.vision.parameters())
        others = [*self.model.connector.parameters(), *self.model.decoder.parameters()]
        norms = [nn.utils.clip_grad_norm_(part, 1.0) for part in (tower, others)]
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            share = min(AVERAGED, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_([*self.average.values()], self.weights, 1 - share)
        of_losses = {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        return of_losses | figures | {"norm": torch.stack(norms).sum()}

    def _batches(self, workers: int) -> Iterator[ReaderBatch]:
        """What is left of the run."""
        plan, on_gpu = self.plan, self.device.type != "cpu"
        drawn = plan.steps * self.processes
        data = DrawnBatches(
            plan.groups,
            plan.size,
            drawn,
            seed=self.seed + 1,
            tiles=plan.tiles,
            growing=round(plan.growing * drawn),
            full=plan.full,
            room=ROOM if on_gpu else None,
        )
        first = self.step * self.processes + self.rank
        loader: DataLoader[ReaderBatch] = DataLoader(
            data,
            batch_size=None,
            sampler=range(first, len(data), self.processes),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=on_gpu,
        )
        yield from (batch.to(self.device) for batch in loader)

    def _set_rate(self) -> None:
        """Warm-up, then even, then straight down to (nearly) nothing."""
        left = (1 - self.step / self.plan.steps) / DECAY
        rate = self.plan.rate * min(1.0, (self.step + 1) / WARM_UP, max(0.005, left))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def losses(self, batch: ReaderBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both losses, and the shares of what is right: patches, cells, characters, answers."""
        # On a processor torch's fused attention is the slower one in bfloat16.
        plain = self.halves and self.device.type == "cpu"
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.halves)
        with half, attention.plain() if plain else nullcontext():
            states = shown = self.model.vision(normalized(batch.tiles))
            if self.step < self.plan.apart * self.plan.steps:
                generator = torch.Generator(self.device)
                generator.manual_seed(self.step * self.processes + self.rank)
                with torch.autocast(self.device.type, enabled=False):
                    shown = random_states(batch, self.codes, self.places, generator)
            logits = answer_logits(self.model, shown, batch)
        naming, of_patches = naming_loss(states.float(), batch, self.codes)
        answering, of_answers = answering_loss(logits.float(), batch)
        return {"naming": naming, "answering": answering}, of_patches | of_answers

    def _log(self, seen: list[dict[str, Tensor]]) -> None:
        line: dict[str, Any] = {"step": self.step}
        for name in seen[0]:
            values = torch.stack([figures[name].float() for figures in seen])
            if name in SHARES:  # those of nothing left out
                values = values[~values.isnan()]
            line[name] = round(values.mean().item(), 4) if len(values) else None
        if not math.isfinite(line["norm"]):
            raise FloatingPointError(f"gradient norm is {line['norm']} before step {self.step}")
        if self.rank:
            return
        line |= {"cpu_minutes": round(self.seconds / 60, 2), "at": time.strftime("%H:%M:%S")}
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--begun", type=Path, help="a checkpoint folder to begin from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 2) if on_gpu else 1,
        help="processes that draw images",
    )
    for name in ("steps", "groups", "tiles", "rate"):
        default = getattr(Plan, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help="of the plan")
    options = parser.parse_args()
    if options.begun is not None and not options.begun.is_dir():
        parser.error(f"there is no folder {options.begun}")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    options.folder.mkdir(parents=True, exist_ok=True)
    fonts.families("train")  # before the workers part, so that they need not look for them
    given = {name: getattr(options, name) for name in ("steps", "groups", "tiles", "rate")}
    if options.begun is not None:
        given["apart"] = 0.0  # its decoder knows already what to do with what a tower says
    trainer = Trainer(
        options.folder,
        replace(Plan(), **given),
        options.seed,
        begun=options.begun,
        device=options.device,
    )
    if options.resume:
        trainer.resume()
    trainer.run(options.workers)
    together.leave()


if __name__ == "__main__":
    main()
