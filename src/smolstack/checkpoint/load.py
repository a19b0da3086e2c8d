"""Loading: config and tokenizer from their files, memory-mapped weights into a model on the meta
device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from smolstack.backends import accelerate
from smolstack.checkpoint import keys
from smolstack.checkpoint.files import CheckpointFiles
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.packed_file import adopt_packed
from smolstack.checkpoint.processor_files import build_processor, end_tokens
from smolstack.checkpoint.quantized_layer import SCALE
from smolstack.checkpoint.source import Source, open_source
from smolstack.checkpoint.verify import compare, settle_head
from smolstack.checkpoint.weights import Entry
from smolstack.config import ModelConfig
from smolstack.config.quantization import SCHEMES
from smolstack.errors import ConfigError
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Processor
from smolstack.quantization.quantize import Progress, quantize_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

QUANTIZED = SCHEMES
logger = logging.getLogger(__name__)
_TABLE = "decoder.embedding.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; ``where`` is the location of its files, if it has any."""

    files: CheckpointFiles
    config: ModelConfig
    model: VisionLanguageModel
    processor: Processor
    eos_token_ids: tuple[int, ...]
    where: ModelPath | None = None


def load_checkpoint(
    where: Path | ModelPath,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Checkpoint:
    """Load a checkpoint in any supported file format (checkpoint/source.py).

    The model is built on the meta device and its weights are assigned from the memory-mapped
    files; nothing is copied unless ``dtype`` or ``device`` require it.

    Args:
        where: a Hugging Face checkpoint folder, an adapter folder (merged into its base's weights),
            an MLX folder, or a GGUF file with the file of its vision tower.
        dtype: "float32", "bfloat16", "float16", "int8" or "int4" (quantized while loading, unless
            they are stored so), or "auto": the stored dtype, except on a CPU without arithmetic in
            it, where float32 is faster and loses nothing.
        device: "cpu", "cuda", "mps", … or "auto": the first available of cuda, mps, cpu.
        progress: called with a description, the amount done and the total while weights are
            quantized or packed for the kernels.

    Raises:
        ConfigError, CheckpointError: naming file, key, what was found and what was expected.
    """
    source = open_source(where)
    files, entries = source.files, source.entries
    config = settle_head(ModelConfig.from_hf(files.config), entries)
    compare(config, entries).raise_if_wrong(source.where)
    for loss in source.weights.losses:
        logger.warning("%s: %s", source.where, loss)
    processor = build_processor(files, config)
    target = choose_device(device)
    stored = None if config.quantization is None else config.quantization.name
    if stored is not None and dtype not in ("auto", stored):
        raise ConfigError(
            f"{source.where} has {stored} weights, which cannot be converted to {dtype}; use dtype "
            f"{stored!r} or 'auto', or the float checkpoint that it was quantized from"
        )
    floats = _floats(dtype, config, entries, target)
    model = load_weights(source, config, floats, target)
    if dtype in QUANTIZED and stored is None:
        quantize_model(model, dtype, progress=progress)
    elif stored is not None:
        adopt_packed(model, source, progress=progress)
    ends = end_tokens(files, config, processor)
    return Checkpoint(files, model.config, model, processor, ends, source.where)


def load_weights(
    source: Source, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> VisionLanguageModel:
    """Return a model in evaluation mode with the weights of a source."""
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    state = {}
    for name, tensor in source.tensors():
        scale = name.endswith(f".{SCALE}")
        number = torch.bfloat16 if scale else dtype if tensor.is_floating_point() else None
        own = keys.from_hf(name)
        if own == _TABLE and config.quantization is not None:
            number = tensor.dtype  # only looked up, not multiplied
        state[own] = tensor.to(device=device, dtype=number)
    model.load_state_dict(state, strict=True, assign=True)
    return accelerate(model.eval())


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is the first available of cuda, mps, cpu."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).item()  # torch knows devices that are not present
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConfigError(f"device {device!r} cannot be used: {reason}") from error
    return target


def _floats(
    dtype: str, config: ModelConfig, entries: Mapping[str, Entry], device: torch.device
) -> torch.dtype:
    """Return the dtype in which float weights are loaded. Weights to be quantized keep their stored
    dtype, so that no complete float copy of the model is made; next to stored integers they are
    float32.
    """
    if config.quantization is not None:
        return torch.float32
    return stored_dtype(entries) if dtype in QUANTIZED else choose_dtype(dtype, entries, device)


def choose_dtype(dtype: str, entries: Mapping[str, Entry], device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" as described in :func:`load_checkpoint`."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                f"dtype is {dtype!r}, expected auto or one of {[*DTYPES, *QUANTIZED]}"
            )
        return DTYPES[dtype]
    own = stored_dtype(entries)
    if device.type == "cpu" and own != torch.float32 and not _cpu_computes_in(own):
        return torch.float32
    return own


def stored_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """Return the number format of most of the float weights."""
    stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    sizes = dict.fromkeys(stored, 0)
    for entry in entries.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.elements
    return stored[max(sizes, key=lambda name: sizes[name])]


def _cpu_computes_in(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for matrix products in ``dtype``."""
    supported = {
        torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    checks = (getattr(torch.cpu, name, None) for name in supported.get(dtype, ()))
    return any(check is not None and bool(check()) for check in checks)
