"""Backends: faster ways to compute what model/ describes (model/backend.py is the seam)."""

from __future__ import annotations

from smolstack.backends.cpu.backend import CPU
from smolstack.model.backend import Backend
from smolstack.model.vlm import VisionLanguageModel


def best() -> Backend:
    """The fastest backend there is. It leaves to torch what lies on other devices than the CPU."""
    return CPU


def accelerate(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model, computed by the fastest backend from now on."""
    return model.use(best())
