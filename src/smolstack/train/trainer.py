"""A training run: set-up, stages, and the trained checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from smolstack.checkpoint.hub import BUNDLED, find
from smolstack.checkpoint.load import choose_device, load_checkpoint
from smolstack.checkpoint.save import complete_side_files, save_checkpoint
from smolstack.errors import ConfigError, TrainingError
from smolstack.model.digest import weights_digest
from smolstack.output_files import exclusive_writer, remove_leftovers
from smolstack.processor.geometry import Tiling
from smolstack.train import preview
from smolstack.train.adapters import check_adapters, save_adapters
from smolstack.train.data import Source, open_source
from smolstack.train.evaluation import Evaluated, Evaluator, check_evaluation
from smolstack.train.evaluation_sheet import draw_sheet
from smolstack.train.folder import (
    CACHE,
    CHECKPOINTS,
    MODEL,
    claim_folder,
    last_checkpoint,
    prepare_folder,
    stored_dtype,
)
from smolstack.train.language import check_keep_language
from smolstack.train.loss_mask import Supervisor
from smolstack.train.metrics import Metrics, plot
from smolstack.train.processes import Processes, connected
from smolstack.train.progress import Display
from smolstack.train.recipe import Recipe
from smolstack.train.stage import RunningStage, steps_of
from smolstack.train.state import Place, Saved, save_state
from smolstack.train.trainable import changed_weights, plain_name
from smolstack.vlm import VLM

SHEET = "evaluation.png"
Rows: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        model: the trained checkpoint's folder.
        steps: optimizer steps over all stages.
        evaluated: the last evaluation, None without evaluation data.
        rank: index of the process; 0 is the first.
    """

    model: Path
    steps: int
    evaluated: Evaluated | None
    rank: int = 0


def train(
    recipe: Recipe,
    *,
    rows: Rows | None = None,
    evaluation_rows: Rows | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Trained:
    """Run a recipe; under torchrun, on all its processes.

    Args:
        recipe: see Recipe.
        rows: training examples instead of the recipe's files, e.g. a ``datasets.Dataset``; the
            recipe's ``data.train`` is then only their name in messages.
        evaluation_rows: the same for evaluation.
        resume: continue from the last checkpoint in ``recipe.output``, if there is one.
        overwrite: start over; files of an earlier run are removed.
        quiet: print nothing and show no progress.

    Raises:
        ConfigError, CheckpointError: the recipe or the model cannot be used.
        DataError: an example is invalid; names it, before the first step.
        TrainingError: the run cannot continue; its last checkpoint is intact.
    """
    with (
        connected(choose_device(recipe.device)) as processes,
        Display(processes.first and not quiet) as display,
        exclusive_writer(Path(recipe.output), TrainingError) if processes.first else nullcontext(),
    ):
        if processes.first:
            for folder in (Path(recipe.output), Path(recipe.output) / CHECKPOINTS):
                remove_leftovers(folder)  # of killed processes; may put a checkpoint back
        processes.wait()
        saved = claim_folder(recipe, resume=resume, overwrite=overwrite)
        try:
            return Trainer(
                recipe, processes, display, saved, rows=rows, evaluation_rows=evaluation_rows
            ).run()
        except OSError as error:
            found = f"{error.filename or recipe.output}: {error.strerror or error}"
            raise TrainingError(
                f"the run was stopped: {found}; {last_checkpoint(recipe)}"
            ) from error


class Trainer:
    """The model, data and folder of a run; the stages do the training."""

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        display: Display,
        saved: Saved | None,
        *,
        rows: Rows | None = None,
        evaluation_rows: Rows | None = None,
    ) -> None:
        self.recipe, self.processes, self.display = recipe, processes, display
        self.folder = Path(recipe.output)
        self.saved = saved
        folder = find(recipe.model or None, None)
        self.checkpoint = load_checkpoint(folder, "float32", str(processes.device))
        self.save_dtype = stored_dtype(folder, recipe.save_dtype)
        self.vlm = VLM(self.checkpoint)
        if self.vlm.config.embedding_dim is not None:
            raise ConfigError(
                f"{folder} has an embedding head, expected a model that generates text"
            )
        self.base = weights_digest(self.vlm.model.parameters()).hex()
        self.cache_folder: Path | None = None
        if recipe.cache:
            self.cache_folder = Path(recipe.cache_folder or self.folder / CACHE)
        data = recipe.data
        tiling: Tiling = {
            "split": data.split,
            "max_image_tokens": data.max_image_tokens,
            "upscale": data.upscale,
        }
        self.supervisor = Supervisor(
            self.vlm.processor, self.vlm.eos_token_ids, data.max_tokens, tiling
        )
        self.train_source = open_source(data.train, data.question, rows)
        self.evaluation_source: Source | None = None
        if data.evaluation or evaluation_rows is not None:
            name = data.evaluation or "evaluation"
            self.evaluation_source = open_source(name, data.question, evaluation_rows)
        self.evaluated: Evaluated | None = None
        self.total = sum(steps_of(self, number) for number in range(len(recipe.stages)))
        self._check_stages()
        if saved is not None:
            saved.check(self.base, len(self.train_source), data.train)
        elif processes.first:
            sources = {"training": self.train_source, "evaluation": self.evaluation_source}
            preview.show_examples(
                {name: source for name, source in sources.items() if source is not None},
                self.supervisor,
                display,
                everything=data.check,
            )
        processes.wait()  # all have looked for an earlier run before this one writes
        self.metrics: Metrics | None = None
        if processes.first:
            place = Place() if self.saved is None else self.saved.place
            prepare_folder(recipe, saved)
            self.metrics = Metrics(self.folder, place.total, tensorboard=recipe.tensorboard)
        processes.wait()

    def run(self) -> Trained:
        """Run the remaining stages, then write the checkpoint folder."""
        begin = 0 if self.saved is None else self.saved.place.stage
        try:
            for number in range(begin, len(self.recipe.stages)):
                saved = self.saved if number == begin else None
                running = RunningStage(self, number, saved)
                self.display.say(*self._announced(running))
                running.train()
                self._finish(running)
            return Trained(self._save_model(), self.total, self.evaluated, self.processes.rank)
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _announced(self, running: RunningStage) -> Iterator[str]:
        count = sum(p.numel() for p in running.spread.parameters.values())
        stage, number = running.stage, running.number
        yield (
            f"stage {number + 1} of {len(self.recipe.stages)}, {stage.train}: "
            f"{running.steps - running.step:,} steps of {stage.batch} examples, "
            f"{count:,} trained weights"
            + (f", continuing after step {running.step}" if running.step else "")
        )
        if running.tower is not None and self.cache_folder is not None:
            yield f"the vision tower is frozen; its outputs are cached in {self.cache_folder}"

    def log(self, line: Mapping[str, Any]) -> None:
        """Write one line to metrics.jsonl."""
        if self.metrics is not None:
            self.metrics.write(line)

    def evaluate(self, running: RunningStage) -> None:
        """Evaluate the current model in the first process; the others wait."""
        if self.evaluation_source is not None and self.processes.first:
            evaluator = Evaluator(
                self.vlm,
                self.evaluation_source,
                self.supervisor,
                self.recipe.evaluation,
                micro_batch=running.stage.micro_batch,
                autocast=self.recipe.autocast == "bfloat16",
            )
            found = self.evaluated = evaluator(running.loss, running.tower)
            place = running.place
            self.log({"step": place.total, "stage": place.stage, **found.metrics()})
            if found.answered:
                draw_sheet(found.answered, self.folder / SHEET)
            self.display.say(f"step {place.total:,}: " + found.sentence())
            plot(self.folder)
        self.processes.wait()

    def save(self, place: Place, optimizer: Mapping[str, Tensor]) -> None:
        """Write a checkpoint in the first process."""
        if self.processes.first:
            save_state(
                self.folder / CHECKPOINTS,
                place,
                self._changed(place.stage),
                optimizer,
                base=self.base,
                examples=len(self.train_source),
                keep=self.recipe.keep_checkpoints,
            )
            plot(self.folder)
        self.processes.wait()

    @contextmanager
    def _writing(self, target: Path) -> Iterator[None]:
        """Convert disk errors to a TrainingError; checkpoints are kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{target} cannot be written: {error}; {last_checkpoint(self.recipe)}"
            ) from error

    def restore_weights(self, saved: Saved) -> None:
        """Load a checkpoint's weights into the model, which already has its adapters."""
        own = dict(self.vlm.model.named_parameters())
        with torch.no_grad():
            for name, tensor in saved.weights.items():
                if name not in own or own[name].shape != tensor.shape:
                    raise TrainingError(
                        f"checkpoint {saved.folder} has {name} {list(tensor.shape)}, which the "
                        "recipe's model does not have"
                    )
                own[name].copy_(tensor)

    def _changed(self, stage: int) -> dict[str, Tensor]:
        """Return the weights that the run has changed so far, by their current names."""
        earlier = {
            name
            for before in self.recipe.stages[:stage]
            for name in changed_weights(self._plain, before)
        }
        return {
            name: parameter
            for name, parameter in self.vlm.model.named_parameters()
            if parameter.requires_grad or plain_name(name) in earlier
        }

    @property
    def _plain(self) -> Any:
        """Return the model's structure without adapters, for names."""
        from smolstack.model.vlm import VisionLanguageModel

        with torch.device("meta"):
            return VisionLanguageModel(self.vlm.config)

    def _finish(self, running: RunningStage) -> None:
        """Save a stage's adapters in peft's format, then merge them."""
        if running.adapters is None:
            return
        if self.processes.first:
            name = f"adapter-{running.number + 1}" if len(self.recipe.stages) > 1 else "adapter"
            base = self.recipe.model or BUNDLED
            with self._writing(self.folder / name):
                save_adapters(self.vlm.model, running.adapters, self.folder / name, base)
        running.adapters.merge()

    def _save_model(self) -> Path:
        target = self.folder / MODEL
        if self.processes.first:
            # In place, weight by weight: nothing is trained after this, and a copy of the whole
            # model would be the most memory that a run ever takes.
            model = self.vlm.model.eval().to(self.save_dtype)
            side = complete_side_files(
                self.checkpoint.files, self.vlm.config, self.vlm.processor.settings
            )
            with self._writing(target):
                save_checkpoint(target, model, side, overwrite=True)
        self.processes.wait()
        return target

    def _check_stages(self) -> None:
        """Check the settings of all stages before the first one starts."""
        for stage in self.recipe.stages:
            if stage.train == "lora":
                check_adapters(self.vlm.model, stage.lora)
                check_keep_language(stage, self.vlm.model, self.train_source)
        if self.evaluation_source is not None:
            check_evaluation(self.recipe.evaluation)
