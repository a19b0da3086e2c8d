"""ctypes bindings of the compiled kernels."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import lru_cache
from pathlib import Path

from smolstack.native.compiling import compiled, fingerprint_of_sources
from smolstack.native.cpu_features import features
from smolstack.native.instruction_sets import KernelError, usable

logger = logging.getLogger(__name__)

SWITCH = "SMOLSTACK_NATIVE"  # 0: no kernels; jit: compile for this processor; else 1
_HERE = Path(__file__).parent
_SUFFIX = ".dll" if sys.platform == "win32" else ".so"
ABI_VERSION = 1  # must match smolstack.h

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
STORED_FLOAT32, STORED_BFLOAT16, STORED_FLOAT16 = range(3)
CACHE_FLOAT32, CACHE_FLOAT16, CACHE_BFLOAT16 = range(3)
NO_NORM, LAYER_NORM, RMS_NORM = range(3)
INSTRUCTIONS = (
    "plain C",
    "AVX2",
    "AVX2 VNNI",
    "AVX-512 VNNI",
    "AVX-512 BF16",
    "NEON",
    "NEON with dot products",
    "NEON i8mm",
    "NEON BF16",
)
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
        ("group", _integer),
        ("fine", _integer),
        ("weight", _pointer),
        ("scale", _pointer),
        ("zeros", _pointer),
        ("bias", _pointer),
    )


class Stored(ctypes.Structure):
    """A weight as a checkpoint stores it, with factors for its outputs and inputs."""

    _fields_ = (
        ("kind", _integer),
        ("inputs", _integer),
        ("outputs", _integer),
        ("weight", _pointer),
        ("by_output", _pointer),
        ("by_input", _pointer),
    )


class Norm(ctypes.Structure):
    """Normalization applied to rows before a layer multiplies them."""

    _fields_ = (("kind", _integer), ("eps", _number), ("weight", _pointer), ("bias", _pointer))


class EncoderLayer(ctypes.Structure):
    """A layer of the vision tower."""

    _fields_ = (
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("query", Linear),
        ("key", Linear),
        ("value", Linear),
        ("out", Linear),
        ("up", Linear),
        ("down", Linear),
    )


class Encoder(ctypes.Structure):
    """The vision tower between patch embedding and final norm."""

    _fields_ = (
        ("layers", _integer),
        ("hidden", _integer),
        ("heads", _integer),
        ("activation", _integer),
        ("layer", _pointer),
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


class CacheSlot(ctypes.Structure):
    """A sequence's position in its cache."""

    _fields_ = (("past", _integer), ("capacity", _integer), ("first", _integer))


# The structures shared with C, in the order of about.c.
STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Linear,
    Stored,
    Norm,
    EncoderLayer,
    Encoder,
    Layer,
    Decoder,
    CacheSlot,
)


class Library:
    """The functions of a compiled library.

    Raises:
        KernelError: the library's version does not match this module.
        OSError: it cannot be loaded.

    Attributes:
        instructions: what they were compiled for: "plain C", "AVX2", "AVX-512 VNNI" …
        weight_offset: what is added to 8-bit weights in panels, 0 or 128; libraries with the same
            offset can read each other's panels.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = ctypes.CDLL(str(path))
        _check(handle, path)
        handle.sources.restype = ctypes.c_char_p
        self.sources: str = handle.sources().decode()  # their SHA-256, of a library that came built
        self.decode_step = handle.decode_step
        self.decode_step.argtypes = [_pointer, _integer, *[_pointer] * 5, _count]
        self.want_large_pages = handle.want_large_pages
        self.want_large_pages.argtypes = [_pointer, _integer]
        self.release_pages = handle.release_pages
        self.release_pages.argtypes = [_pointer, _integer]
        self.resize_planes = handle.resize_planes
        self.resize_planes.argtypes = [_pointer, *[_integer] * 6, _count, _pointer, _count]
        self.look_up = handle.look_up
        self.look_up.argtypes = [*[_pointer] * 2, *[_integer] * 2, _pointer, _count]
        self.look_up.restype = None
        self.panel_bytes = handle.panel_bytes
        self.panel_bytes.argtypes, self.panel_bytes.restype = [_integer] * 3, _integer
        self.pack_panels = handle.pack_panels
        self.pack_panels.argtypes = [_integer, _pointer, *[_integer] * 3, _pointer, _count]
        self.pack_panels.restype = None
        self.pack_scales = handle.pack_scales
        self.pack_scales.argtypes = [_pointer, _integer, _integer, _pointer]
        self.pack_scales.restype = None
        self.pack_zeros = handle.pack_zeros
        self.pack_zeros.argtypes = [_pointer, _integer, _integer, _pointer]
        self.pack_zeros.restype = None
        self.unpack_panels = handle.unpack_panels
        self.unpack_panels.argtypes = [
            _integer,
            _pointer,
            *[_integer] * 2,
            _pointer,
            _integer,
            _count,
        ]
        self.unpack_panels.restype = None
        self.round_weight = handle.round_weight
        self.round_weight.argtypes = [
            _integer,
            *[_pointer] * 2,
            _integer,
            *[_pointer] * 2,
            _integer,
            *[_pointer] * 2,
            _count,
        ]
        self.stored_sizes = handle.stored_sizes
        self.stored_sizes.argtypes = [*[_pointer] * 3, _count]
        self.stored_product = handle.stored_product
        self.stored_product.argtypes = [*[_pointer] * 3, _integer, _pointer, _count]
        self.dense_rows = handle.dense_rows
        self.dense_rows.argtypes = [*[_pointer] * 3, *[_integer] * 2, *[_pointer] * 2, _count]
        self.encode_tiles = handle.encode_tiles
        self.encode_tiles.argtypes = [_pointer, _integer, _integer, _pointer, _count]
        self.prefill_rows = handle.prefill_rows
        self.prefill_rows.argtypes = [_pointer, _integer, *[_pointer] * 5, _count]
        self.instructions = INSTRUCTIONS[handle.instructions()]
        handle.weight_offset.restype = _integer
        self.weight_offset = int(handle.weight_offset())


def _check(handle: ctypes.CDLL, path: Path) -> None:
    """Reject a library whose structures differ in layout from this module's."""
    try:
        handle.abi_version.restype = handle.struct_bytes.restype = _integer
        handle.struct_bytes.argtypes = [_integer]
        found = handle.abi_version()
        sizes = [handle.struct_bytes(at) for at in range(len(STRUCTURES) + 1)]
    except AttributeError as error:
        raise KernelError(
            f"{path.name} is not a library of smolstack's kernels: {error}"
        ) from error
    if found != ABI_VERSION:
        raise KernelError(f"{path.name} has ABI version {found}, expected {ABI_VERSION}")
    for one, size in zip(STRUCTURES, sizes, strict=False):
        if size != ctypes.sizeof(one):
            raise KernelError(
                f"{path.name} was compiled with {one.__name__} of {size} bytes, "
                f"expected {ctypes.sizeof(one)}"
            )
    if sizes[-1]:
        raise KernelError(f"{path.name} has more than the {len(STRUCTURES)} structures expected")


def built(folder: Path = _HERE) -> list[Path]:
    """The libraries in a folder that this processor supports, best first.

    Raises:
        KernelError: the cap on instructions is unknown.
    """
    probe = folder / f"probe{_SUFFIX}"
    found = usable(features(probe if probe.is_file() else None))
    paths = (folder / f"kernels_{one.library}{_SUFFIX}" for one in found)
    return [path for path in paths if path.is_file()]


def _fresh(path: Path) -> Library:
    """A prebuilt library, unless its sources have changed since it was built."""
    opened = Library(path)
    if opened.sources != fingerprint_of_sources():
        raise KernelError(f"{path.name} was not compiled from the sources in its folder")
    return opened


@lru_cache(maxsize=1)
def library() -> Library | None:
    """Return the kernels, compiling if needed; None if unavailable (see :func:`reason`)."""
    return _load()[0]


def reason() -> str:
    """Why the kernels are unavailable; empty if they are available."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str]:
    # torch's OpenMP must be loaded before the kernels request one, so that both share it.
    import torch  # noqa: F401

    switch = os.environ.get(SWITCH, "") or "1"
    if switch == "0":
        return None, f"{SWITCH}=0"
    failures = []
    try:
        if switch not in ("1", "jit"):
            raise KernelError(f"{SWITCH} is {switch!r}, expected 0, 1 or jit")
        for path in built() if switch == "1" else ():
            try:
                return _fresh(path), ""
            except (KernelError, OSError, AttributeError) as error:
                logger.info("%s", error)
                failures.append(str(error))
        return Library(compiled()), ""
    except (KernelError, OSError, AttributeError) as error:
        why = "; ".join([*failures, str(error)])
        logger.warning("using torch instead of the compiled kernels: %s", why)
        return None, why
