"""A running stage: what is trained, the training loop, its evaluations and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smolstack.errors import ConfigError, TrainingError
from smolstack.train.adapters import Adapters, add_adapters
from smolstack.train.batches import MicroBatch, StepBatches
from smolstack.train.data import Source
from smolstack.train.evaluation import with_states
from smolstack.train.folder import last_checkpoint
from smolstack.train.frozen_tower import FrozenTower
from smolstack.train.loss_mask import Supervisor
from smolstack.train.objective import AnswerLoss, recomputed
from smolstack.train.optimizer import make_optimizer, moments, restore_moments, set_rates
from smolstack.train.processes import Processes, Spread, whole
from smolstack.train.progress import Display
from smolstack.train.recipe import Recipe
from smolstack.train.state import Place, Saved
from smolstack.train.trainable import freeze
from smolstack.vlm import VLM

_SEEDS = 2**31


class Run(Protocol):
    """The interface of a run, :class:`smolstack.train.trainer.Trainer`, for its stages."""

    recipe: Recipe
    vlm: VLM
    processes: Processes
    display: Display
    supervisor: Supervisor
    train_source: Source
    cache_folder: Path | None

    def restore_weights(self, saved: Saved) -> None:
        """Load a saved state's weights into the model."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""

    def evaluate(self, running: RunningStage) -> None:
        """Compute the loss and, if requested, answers."""

    def save(self, place: Place, optimizer: Mapping[str, Tensor]) -> None:
        """Save a state from which the run can resume."""


class RunningStage:
    """A stage of a run, ready to start or to continue from ``saved``."""

    def __init__(self, run: Run, number: int, saved: Saved | None) -> None:
        self.run, self.number = run, number
        self.stage = run.recipe.stages[number]
        self.steps = steps_of(run, number)
        self.step = 0 if saved is None else saved.place.step
        self.before = sum(steps_of(run, earlier) for earlier in range(number))
        model = run.vlm.model
        self.adapters: Adapters | None = None
        if self.stage.train == "lora":
            self.adapters = add_adapters(model, self.stage.lora, run.recipe.seed + number)
            model.to(run.vlm.device)
        freeze(model, self.stage)
        if saved is not None:
            run.restore_weights(saved)
        self.tower = self._frozen_tower()
        self.loss = AnswerLoss(
            model,
            projected=self.tower is not None and self.tower.projected,
            keep_language=self.stage.keep_language,
        )
        self.spread = Spread(self.loss, run.processes, run.recipe.parallel)
        self.optimizer = make_optimizer(self.spread.parameters, self.stage)
        if saved is not None:
            restore_moments(
                self.optimizer, self.spread.parameters, self.spread.scatter(saved.optimizer)
            )

    @property
    def place(self) -> Place:
        return Place(self.number, self.step, self.before + self.step)

    def _frozen_tower(self) -> FrozenTower | None:
        """Return the frozen part before the trained one; None if the vision tower is trained."""
        run, model = self.run, self.run.vlm.model
        if any(parameter.requires_grad for parameter in model.vision.parameters()):
            return None
        projected = not any(p.requires_grad for p in model.connector.parameters())
        return FrozenTower(
            model,
            run.vlm.processor,
            projected=projected,
            autocast=run.recipe.autocast == "bfloat16",
            precision=run.recipe.vision_dtype,
            cache=run.cache_folder,
        )

    def train(self) -> None:
        """Train to the end of the stage.

        Raises:
            TrainingError: the loss or gradient is not finite, or a checkpoint cannot be written.
        """
        run = self.run
        run.vlm.model.train()
        self.loss.train()
        self.spread.module.train()
        run.display.begin(f"{self.stage.train}", self.steps, self.step)
        with ExitStack() as stack:
            for model in self.spread.models():
                stack.enter_context(recomputed(model, run.recipe.gradient_checkpointing))
            began = perf_counter()
            for batches in self._batches():
                line = self._train(batches)
                now = perf_counter()
                line["seconds"], began = round(now - began, 4), now
                rate = line["tokens"] / max(line["seconds"], 1e-9)
                run.log(line)
                run.display.advance(f"loss {line['loss']:.4f}  {rate:,.0f} tokens/s")
                self._evaluate_and_save()
                began += perf_counter() - now
        run.display.end()

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """Yield the remaining batches of the stage, read ahead by workers if the recipe has any."""
        run, stage = self.run, self.stage
        data = StepBatches(
            run.train_source,
            run.supervisor,
            seed=run.recipe.seed + 7919 * self.number,
            batch=stage.batch,
            micro_batch=stage.micro_batch,
            cut=self.tower is None,
            rank=run.processes.rank,
            processes=run.processes.count,
        )
        workers = run.recipe.data.workers
        return iter(
            DataLoader(
                data,
                batch_size=None,
                sampler=range(self.step, self.steps),
                num_workers=workers,
                prefetch_factor=2 if workers else None,
            )
        )

    def _train(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Run one optimizer step; return its line for the log.

        The loss and its gradient are means over the tokens of the global batch, however it is
        divided into processes and micro-batches.
        """
        run, processes = self.run, self.run.processes
        seed = (run.recipe.seed * 1_000_003 + self.place.total) * 1009 + processes.rank
        torch.manual_seed(seed % _SEEDS)
        rate = set_rates(self.optimizer, self.stage, self.step, self.steps)
        supervised, tokens = processes.total(
            sum(batch.supervised for batch in batches),
            sum(int((batch.token_ids != run.vlm.processor.pad_id).sum()) for batch in batches),
        )
        self.optimizer.zero_grad(set_to_none=True)
        lost = torch.zeros((), dtype=torch.float64)
        bfloat16 = run.recipe.autocast == "bfloat16"
        device = run.vlm.device
        for number, batch in enumerate(batches, start=1):
            ready = with_states(batch, self.tower).to(device)
            with self.spread.accumulating(number == len(batches)):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = self.spread.module(ready)
                (loss * (processes.count / supervised)).backward()
            lost += loss.detach().double().cpu()
        mean = processes.total(float(lost))[0] / supervised
        norm = self._clip()
        self._check_finite(mean, norm)
        self.optimizer.step()
        self.step += 1
        line = {
            "step": self.place.total,
            "stage": self.number,
            "loss": mean,
            "learning_rate": rate,
            "gradient_norm": norm,
            "supervised": int(supervised),
            "tokens": int(tokens),
            "epoch": round(self.step * self.stage.batch / len(run.train_source), 4),
        }
        if self.stage.keep_language:
            divergence, count = processes.total(*self.spread.trained.language.tolist())
            self.spread.trained.language.zero_()
            if count:
                line["language_kl"] = divergence / count
        return line

    def _clip(self) -> float:
        """Clip the gradient norm; return the original norm."""
        parameters = self.spread.parameters
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        if without:
            raise TrainingError(
                f"{len(without)} of {len(parameters)} trained weights receive no gradient, the "
                f"first is {without[0]}; the model's output does not depend on it"
            )
        bound = self.stage.clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters.values(), bound)
        return float(whole(norm))

    def _check_finite(self, mean: float, norm: float) -> None:
        if math.isfinite(mean) and math.isfinite(norm):
            return
        last = last_checkpoint(self.run.recipe)
        found = f"the loss is {mean}" if not math.isfinite(mean) else f"the gradient is {norm}"
        raise TrainingError(
            f"{found} at step {self.place.total + 1} (stage {self.stage.train}); the step "
            f"was not applied, {last}. A lower learning rate or a longer warm-up may help"
        )

    def _evaluate_and_save(self) -> None:
        """Run the evaluations and checkpoints that are due after this step."""
        recipe, ended = self.run.recipe, self.step == self.steps
        every = recipe.evaluation.every
        evaluate = ended or bool(every and self.step % every == 0)
        save = ended or self.step % recipe.checkpoint_every == 0
        if not (evaluate or save):
            return
        self.spread.gather()
        if evaluate:
            self.run.evaluate(self)
        if save:
            memory = {
                name: whole(tensor)
                for name, tensor in moments(self.optimizer, self.spread.parameters).items()
            }
            self.run.save(self.place, memory)


def steps_of(run: Run, number: int) -> int:
    """Return the optimizer steps of a stage."""
    stage = run.recipe.stages[number]
    if stage.batch % run.processes.count:
        raise ConfigError(
            f"the recipe's stages[{number}].batch is {stage.batch}, expected a multiple of the "
            f"{run.processes.count} processes"
        )
    return stage.steps or math.ceil(stage.epochs * len(run.train_source) / stage.batch)
