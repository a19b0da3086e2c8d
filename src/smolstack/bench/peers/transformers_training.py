"""transformers' Trainer with peft on the same weights, images and labels, in a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from smolstack.bench.peers.implementation import installed
from smolstack.bench.peers.training_run import BATCH, TrainingRun, TrainingTask
from smolstack.bench.workload import Workload
from smolstack.checkpoint.files import read_files
from smolstack.checkpoint.processor_files import build_processor, end_tokens
from smolstack.config import ModelConfig
from smolstack.train.batches import collate
from smolstack.train.data import Rows
from smolstack.train.loss_mask import Supervisor
from smolstack.train.recipe import Lora, Stage

PACKAGES = ("peft", "accelerate")


def runs(name: str, workload: Workload, task: TrainingTask) -> list[TrainingRun]:
    """Return a run in float32, and one under bfloat16 autocast if smolstack trains in bfloat16
    too; none if peft is not installed.
    """
    if not all(installed(package) for package in PACKAGES):
        return []
    forms = [("float32", "")]
    if workload.autocast != "none":
        forms.append(("bfloat16", "autocast"))
    return [
        TrainingRun(
            name,
            precision,
            form,
            task,
            f"{__name__}:training",
            workload.threads,
            {"folder": str(workload.folder), "autocast": bool(form)},
        )
        for precision, form in forms
    ]


def training(
    folder: str,
    task: dict[str, Any],
    autocast: bool,
    threads: int,
) -> Callable[[], list[list[float]]]:
    """A worker's work: one epoch; another would cost the same."""
    torch.set_num_threads(threads)
    given = TrainingTask(**task)

    def run() -> list[list[float]]:
        from smolstack.interop.reference import load_model
        from smolstack.interop.trainer import trainer_seconds

        settings = Stage(given.stage, steps=given.steps)
        seconds = trainer_seconds(
            _only_trained(load_model(folder), given.stage),
            _examples(folder, given.rows),
            _Collator(folder),
            steps=given.steps,
            batch=BATCH,
            autocast=autocast,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
        )
        return [seconds]

    return run


class _Collator:
    """Batches rows for the model: images by transformers' processor, padding on the right."""

    def __init__(self, folder: str) -> None:
        from smolstack.interop.reference import image_processor

        self.pad_id = _processor(folder).pad_id
        self.images = image_processor(_processor(folder).settings)

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = collate(examples, self.pad_id, None)
        opened = [[Image.open(e.images[0]).convert("RGB")] for e in examples]
        pixels = self.images(images=opened, do_image_splitting=False, return_tensors="pt")
        lengths = torch.tensor(batch.lengths)[:, None]
        return {
            "input_ids": batch.token_ids,
            "attention_mask": (torch.arange(batch.token_ids.shape[1])[None] < lengths).long(),
            "labels": batch.labels,
            "pixel_values": pixels["pixel_values"],
            "pixel_attention_mask": pixels["pixel_attention_mask"],
        }


def _examples(folder: str, rows: list[dict[str, str]]) -> Any:
    """Return every row's tokens and labels, the same that smolstack trains on."""
    files = read_files(Path(folder))
    processor = _processor(folder)
    ends = end_tokens(files, ModelConfig.from_hf(files.config), processor)
    supervisor = Supervisor(processor, ends, tiling={"split": False})
    source = Rows("images", rows, "")
    return [supervisor(source[index]) for index in range(len(source))]


def _processor(folder: str) -> Any:
    files = read_files(Path(folder))
    return build_processor(files, ModelConfig.from_hf(files.config))


def _only_trained(model: Any, stage: str) -> Any:
    """Return the model with gradients only for the weights of a stage."""
    if stage == "connector":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".connector." in name)
        return model
    import peft

    lora = Lora()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=r".*text_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    )
    return peft.get_peft_model(model, config)
