"""Random weights for meaningful comparisons."""

from __future__ import annotations

import torch

from smolstack.checkpoint.new import random_model
from smolstack.config import ModelConfig
from smolstack.model.vlm import VisionLanguageModel

SHARPNESS = 4.0  # factor on queries: attention selects tokens instead of averaging them


def sharp_model(config: ModelConfig, *, seed: int = 0) -> VisionLanguageModel:
    """Return a random model whose decoder attends sharply, so that answers depend on the whole
    prompt.

    With plain random weights, attention averages over hundreds of visual tokens and greedy answers
    hardly depend on the image, so equal answers would prove little.
    """
    model = random_model(config, seed=seed)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith("attention.query.weight"):
                parameter.mul_(SHARPNESS)
    return model
