"""smolstack's connector in a loaded transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smolstack.errors import ConfigError
from smolstack.model.connector import Idefics3Connector


class BridgeConnector(nn.Module):
    """Replaces transformers' Idefics3 connector, with the same weight name.

    transformers calls its connector with the patches only and assumes a square grid. This class
    remembers the grid of the last tiles in the vision tower, so that non-square tiles are
    unshuffled correctly.

    Attributes:
        modality_projection: contains the projection as ``proj``, shared with :attr:`bridge`.
        bridge: the :class:`Idefics3Connector` that computes the result.
    """

    def __init__(self, projection: nn.Linear, scale: int) -> None:
        super().__init__()
        self.scale_factor = scale
        text_hidden, features = projection.weight.shape
        with torch.device("meta"):
            bridge = Idefics3Connector(features // (scale * scale), text_hidden, scale)
        bridge.proj = projection
        self.modality_projection = nn.Module()
        self.modality_projection.proj = projection
        self.__dict__["bridge"] = bridge  # not registered: the weight has one name
        self.grid: tuple[int, int] | None = None

    def forward(self, image_hidden_states: Tensor) -> Tensor:
        """Return visual tokens: (N, H·W, C) → (N, S, D)."""
        bridge: Idefics3Connector = self.__dict__["bridge"]
        projection: nn.Linear = self.modality_projection.get_submodule("proj")  # type: ignore[assignment]
        bridge.proj = projection  # adapters may have replaced it
        patches = image_hidden_states.shape[1]
        grid = self.grid if self.grid and self.grid[0] * self.grid[1] == patches else None
        return bridge(image_hidden_states, grid)  # type: ignore[no-any-return]


def replace_connector(model: Any) -> Any:
    """Replace the connector of a transformers Idefics3 or SmolVLM model by smolstack's, in place.

    Results are the same for square tiles; non-square tiles are no longer scrambled. The names in
    the state dict and the weight's storage do not change.

    Args:
        model: an Idefics3Model, SmolVLMModel, or one of the ``ForConditionalGeneration`` models.

    Returns:
        The same model.

    Raises:
        ConfigError: the model has no connector of this family.
    """
    base = getattr(model, "model", model)
    theirs = getattr(base, "connector", None)
    projection = getattr(getattr(theirs, "modality_projection", None), "proj", None)
    vision = getattr(base, "vision_model", None)
    if theirs is None or vision is None or projection is None:
        raise ConfigError(
            f"{type(model).__name__} has no connector with a modality_projection; expected an "
            "Idefics3 or SmolVLM model of transformers"
        )
    if isinstance(theirs, BridgeConnector):
        return model
    ours = BridgeConnector(projection, int(theirs.scale_factor)).train(theirs.training)
    patch = int(vision.patch_size)

    def remember_grid(_tower: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        pixels = keywords["pixel_values"] if "pixel_values" in keywords else inputs[0]
        ours.grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch

    base.connector = ours
    vision.register_forward_pre_hook(remember_grid, with_kwargs=True)
    return model
