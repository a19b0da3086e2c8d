"""Converts between smolstack models and Foundation Model Stack models."""

from __future__ import annotations

from typing import Any

import torch
from fms.distributed.strategy import TensorParallelStrategy
from fms.utils import serialization
from torch import Tensor

from smolstack.backends import accelerate
from smolstack.errors import CheckpointError
from smolstack.interop.fms.config import to_fms_config, to_smolstack_config
from smolstack.interop.fms.model import Idefics3
from smolstack.model.vlm import VisionLanguageModel

ARCHITECTURE = "idefics3"


def from_smolstack(model: VisionLanguageModel, **options: Any) -> Idefics3:
    """Return the FMS model of a loaded smolstack model.

    Weights with the same layout in FMS share storage; fused and reordered ones are copied.

    Args:
        model: ``smolstack.load(…).model``.
        **options: as for :class:`Idefics3`, e.g. ``fused_weights=False``.
    """
    with torch.device("meta"):
        converted = Idefics3(to_fms_config(model.config), **options)
    state = _adapt(converted, "smolstack", model.state_dict())
    if model.config.tied:
        state["language_model.head.weight"] = state["language_model.base_model.embedding.weight"]
    converted.load_state_dict(state, strict=True, assign=True)
    converted.post_init()
    return converted.eval()


def to_smolstack(model: Idefics3) -> VisionLanguageModel:
    """Return the smolstack model of an FMS model; ``save_checkpoint`` writes it as a Hugging Face
    folder.

    Raises:
        CheckpointError: the model is split between processes, or has no decoder.
    """
    with torch.device("meta"):
        converted = VisionLanguageModel(to_smolstack_config(model.get_config()))
    converted.load_state_dict(_adapt(model, "fms_to_smolstack", _own(model)), assign=True)
    return accelerate(converted.eval())


def hf_state_dict(model: Idefics3) -> dict[str, Tensor]:
    """Return an FMS model's weights with the names and layout of Hugging Face checkpoints."""
    return _adapt(model, "fms_to_hf", _own(model))


def _own(model: Idefics3) -> dict[str, Tensor]:
    """Return the model's weights without a tied head."""
    if isinstance(model.distributed_strategy, TensorParallelStrategy) or model._vision_only:
        what = "has no decoder" if model._vision_only else "is split between processes"
        raise CheckpointError(f"the model {what}; expected a complete model to convert its weights")
    state: dict[str, Tensor] = dict(model.state_dict())
    if model.config.text_config.tie_heads:
        del state["language_model.head.weight"]
    return state


def _adapt(model: Idefics3, source: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    options = {"model_config": model.get_config()}
    adapted = serialization.get_adapted(ARCHITECTURE, source, state, options)
    return {name: tensor.detach() for name, tensor in adapted.items()}
