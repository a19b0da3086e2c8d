"""A frozen vision tower in a precision for which the compiled kernels are fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolstack.backends import accelerate
from smolstack.errors import ConfigError
from smolstack.model.vision import VisionTower
from smolstack.model.vlm import VisionLanguageModel
from smolstack.quantization.quantize import formats_of, quantize_model

PRECISIONS = ("float32", "bfloat16", "int8")


def tower_in(model: VisionLanguageModel, precision: str) -> VisionTower:
    """Return the model's vision tower in ``precision``, for inference; the model is not changed.

    "float32" is the model's own tower. Another precision is a copy whose unrounded weights share
    memory with the model. "int8" is the same as the tower of ``smolstack.load(…, dtype="int8")``.

    Raises:
        ConfigError: "int8" on another device than the CPU.
    """
    if precision == "float32":
        return model.vision
    if precision == "int8" and model.device.type != "cpu":
        raise ConfigError(
            f"the recipe's vision_dtype is 'int8', which only the CPU supports; the device is "
            f"{model.device.type}, expected 'float32' or 'bfloat16'"
        )
    with torch.device("meta"):
        holder = VisionLanguageModel(model.config)
    number = torch.bfloat16 if precision == "bfloat16" else torch.float32
    state = {name: _copied(tensor, number) for name, tensor in model.vision.state_dict().items()}
    holder.vision.load_state_dict(state, strict=True, assign=True)
    for parameter in holder.parameters():
        parameter.requires_grad_(False)
    if precision == "int8":
        names = {n: f for n, f in formats_of(holder, "int8").items() if n.startswith("vision.")}
        # The device of tiles is that of the embedding, so it must not be on the meta device.
        holder.decoder.embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        quantize_model(holder, names)
    return accelerate(holder.eval()).vision


def _copied(tensor: Tensor, number: torch.dtype) -> Tensor:
    return tensor.detach().to(number)
