"""transformers' Trainer, timed step by step, for comparison with smolstack's training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import transformers


def trainer_seconds(
    model: Any,
    examples: Sequence[Any],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    *,
    steps: int,
    batch: int,
    autocast: bool,
    **settings: float,
) -> list[float]:
    """Train on the CPU; return the seconds of every step, including loading its examples.

    Args:
        model: a transformers or peft model; parameters that are not trained are frozen.
        examples, collate: the data, and the collator for batches of ``batch`` examples.
        autocast: compute in bfloat16.
        settings: further TrainingArguments (learning_rate, weight_decay, …).
    """
    clock = _Clock()
    with TemporaryDirectory(prefix="smolstack-") as folder:
        trainer: Any = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                use_cpu=True,
                bf16=autocast,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                **settings,  # type: ignore[arg-type]
            ),
            train_dataset=list(examples),
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds


class _Clock(transformers.TrainerCallback):
    """Records the seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_begin(self, *_given: Any, **_more: Any) -> None:
        self._began = perf_counter()

    def on_step_end(self, *_given: Any, **_more: Any) -> None:
        now = perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
