"""A model's weights as numpy arrays, by smolstack name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Weights:
    """Weights under a prefix, converted to float32 on access.

    Args:
        state: a model's state dict.
        prefix: prefix of every name, without the following dot.
    """

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        found = self.get(name)
        if found is None:
            raise KeyError(self._full(name))
        return found

    def get(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a weight, or None if the model has none of that name."""
        tensor = self.state.get(self._full(name))
        if tensor is None:
            return None
        array: npt.NDArray[np.float32] = tensor.detach().to("cpu").float().numpy()
        return array

    def under(self, prefix: str) -> Weights:
        """Return the weights of a part of the model."""
        return Weights(self.state, self._full(prefix))

    def _full(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name
