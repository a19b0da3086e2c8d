"""The compiled kernels as Python calls them."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

from smolstack.native.compiling import CompileError, compiled

logger = logging.getLogger(__name__)

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
CACHE_FLOAT32, CACHE_FLOAT16 = range(2)
ACTIVATIONS = {"": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_pytorch_tanh": 4}

_integer, _pointer, _number, _count = (
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_double,
    ctypes.c_int,
)


class Linear(ctypes.Structure):
    """A linear layer as smolstack.h describes it."""

    _fields_ = (
        ("kind", _integer),
        ("inputs", _integer),
        ("outputs", _integer),
        ("weight", _pointer),
        ("scale", _pointer),
        ("sums", _pointer),
        ("bias", _pointer),
    )


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = (
        ("attention_norm", _pointer),
        ("mlp_norm", _pointer),
        ("query", Linear),
        ("key", Linear),
        ("value", Linear),
        ("out", Linear),
        ("gate", Linear),
        ("up", Linear),
        ("down", Linear),
    )


class Decoder(ctypes.Structure):
    """The decoder's sizes and weights."""

    _fields_ = (
        ("layers", _integer),
        ("hidden", _integer),
        ("intermediate", _integer),
        ("heads", _integer),
        ("kv_heads", _integer),
        ("head_dim", _integer),
        ("activation", _integer),
        ("cache", _integer),
        ("norm_eps", _number),
        ("frequencies", _pointer),
        ("norm", _pointer),
        ("layer", _pointer),
        ("head", Linear),
    )


class Place(ctypes.Structure):
    """Where a sequence stands in its cache."""

    _fields_ = (("past", _integer), ("capacity", _integer), ("first", _integer))


class Library:
    """The functions of a compiled library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = ctypes.CDLL(str(path))
        self.linear_layer = handle.linear_layer
        self.linear_layer.argtypes = [_pointer, _pointer, _integer, _pointer, _integer, _count]
        self.decode_step = handle.decode_step
        self.decode_step.argtypes = [_pointer, _integer, *[_pointer] * 5, _count]
        self.quantise_int8 = handle.quantise_int8
        self.quantise_int8.argtypes = [_pointer, _integer, _integer, _pointer, _pointer]
        self.sum_rows = handle.sum_rows
        self.sum_rows.argtypes = [_pointer, _integer, _integer, _pointer]
        self.instructions = (b"plain C", b"AVX2", b"VNNI")[handle.instructions()].decode()


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The kernels, compiled if need be; None where they cannot be had (see :func:`reason`)."""
    return _load()[0]


def reason() -> str:
    """Why there are no kernels; empty when there are."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str]:
    # torch's OpenMP must be in the process before the kernels ask for one: then both share it.
    import torch  # noqa: F401

    try:
        return Library(compiled()), ""
    except (CompileError, OSError, AttributeError) as error:
        logger.info("no native kernels: %s", error)
        return None, str(error)
