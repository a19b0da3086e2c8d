"""Preserves the language of a text tower while adapters are trained on it.

The reference is the model without its adapters, that is, as it was when the stage began: no copy
of its weights is needed. On the supervised tokens of examples without images, the loss gets the
divergence from it, KL(reference ‖ model), as in knowledge distillation (Hinton et al. 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.errors import ConfigError, DataError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.train.data import Source
from smolstack.train.recipe import Stage
from smolstack.train.trainable import adapted_layers


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the original layers of a model to which peft has added adapters.

    (peft's own switch also clears requires_grad of the adapters, which a forward pass whose
    gradient is still to be computed cannot have.)
    """
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    for layer in layers:
        layer.forward = layer.base_layer.forward  # type: ignore[union-attr]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference ‖ model) of logits (R, V), summed over the rows: a scalar, in nats."""
    one, other = reference.log_softmax(-1), logits.log_softmax(-1)
    return functional.kl_div(other, one, log_target=True, reduction="sum")


def check_keep_language(stage: Stage, model: VisionLanguageModel, source: Source) -> None:
    """Check that ``keep_language`` of a stage has an effect.

    Raises:
        ConfigError: the stage's adapters leave the text tower as it is.
        DataError: every training example has an image.
    """
    if not stage.keep_language:
        return
    if not any(name.startswith("decoder.") for name in adapted_layers(model, stage.lora)):
        raise ConfigError(
            f"the recipe's keep_language is {stage.keep_language:g}, expected 0: the adapters on "
            f"{list(stage.lora.modules)} do not change the language"
        )
    if not any(_text_only(source, index) for index in range(len(source))):
        raise DataError(
            f"all {len(source):,} training examples have an image, but keep_language is "
            f"{stage.keep_language:g}, expected some examples without images"
        )


def _text_only(source: Source, index: int) -> bool:
    contents = [message.get("content") for message in source[index].messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return not any(part.get("type") == "image" for part in parts)


def alone() -> bool:
    """Return whether this is the only process of a run."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
