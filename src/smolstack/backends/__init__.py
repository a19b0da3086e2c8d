"""Backends: faster implementations of model/ (the interface is in model/backend.py)."""

from __future__ import annotations

from smolstack.backends.cpu.backend import CPU
from smolstack.model.backend import Backend
from smolstack.model.vlm import VisionLanguageModel


def best() -> Backend:
    """Return the fastest available backend. It leaves devices other than the CPU to torch."""
    return CPU


def accelerate(model: VisionLanguageModel) -> VisionLanguageModel:
    """Set the fastest backend on the model and return the model."""
    return model.use(best())
