"""Exports a checkpoint as ONNX graphs for onnxruntime and transformers.js (extra ``onnx``).

``export(model, folder)`` writes graphs that have been compared with torch; ``smolstack export`` is
the command. transformers is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from smolstack.errors import ConfigError

if TYPE_CHECKING:
    from smolstack.interop.onnx.exporting import ExportedGraph, count_steps, export
    from smolstack.interop.onnx.graph import Precision

__all__ = ["ExportedGraph", "Precision", "count_steps", "export"]


def __getattr__(name: str) -> object:
    """Import on first use: importing this package loads neither torch nor onnx."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX export needs {error.name}, which is not installed: pip install 'smolstack[onnx]'"
        ) from error
    module = import_module("smolstack.interop.onnx.exporting")
    return getattr(module, name)
