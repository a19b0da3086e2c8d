"""smolstack: the native PyTorch stack for Idefics3 / SmolVLM vision-language models.

>>> import smolstack
>>> vlm = smolstack.load()                      # the bundled reader; or a folder, or a hub id
>>> vlm.ask("sign.png", "What does it say?").text

Importing the package imports no torch: names are loaded when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolstack.batch import Batch, VisualTokens
    from smolstack.config import ModelConfig, TextConfig, VisionConfig
    from smolstack.generation.answer import Answer
    from smolstack.generation.engine import Engine
    from smolstack.model.connector import Idefics3Connector
    from smolstack.processor.geometry import TilePlan
    from smolstack.processor.video import Video
    from smolstack.quantization_job.job import quantize
    from smolstack.retrieval import maxsim
    from smolstack.vlm import VLM, load

__version__ = "0.1.0"

_HOMES = {
    "Answer": "smolstack.generation.answer",
    "Batch": "smolstack.batch",
    "Engine": "smolstack.generation.engine",
    "Idefics3Connector": "smolstack.model.connector",
    "ModelConfig": "smolstack.config",
    "TextConfig": "smolstack.config",
    "TilePlan": "smolstack.processor.geometry",
    "VLM": "smolstack.vlm",
    "Video": "smolstack.processor.video",
    "VisionConfig": "smolstack.config",
    "VisualTokens": "smolstack.batch",
    "load": "smolstack.vlm",
    "maxsim": "smolstack.retrieval",
    "quantize": "smolstack.quantization_job.job",
}
__all__ = [
    "VLM",
    "Answer",
    "Batch",
    "Engine",
    "Idefics3Connector",
    "ModelConfig",
    "TextConfig",
    "TilePlan",
    "Video",
    "VisionConfig",
    "VisualTokens",
    "__version__",
    "load",
    "maxsim",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolstack' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "IPython" in sys.modules:  # plans, answers and visual tokens show themselves
    from smolstack.notebook import register

    register()
    del register
