"""Writes a checkpoint as ONNX graphs, in the usual folder layout of this family.

::

    DIR/config.json, tokenizer.json, preprocessor_config.json, …
    DIR/prompt.json                     prompt of a question about an image, without jinja2
    DIR/onnx/vision_encoder.onnx        _fp16.onnx, _int8.onnx
    DIR/onnx/embed_tokens.onnx          …
    DIR/onnx/decoder_model_merged.onnx  …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from smolstack.checkpoint.hub import locate
from smolstack.checkpoint.load import Checkpoint, load_checkpoint
from smolstack.checkpoint.save import atomic_folder, complete_side_files, config_json, to_json
from smolstack.errors import ConfigError
from smolstack.interop.onnx import graph as graphs
from smolstack.interop.onnx.check import Reference
from smolstack.interop.onnx.decoder import decoder_model_merged, embed_tokens
from smolstack.interop.onnx.graph import Graph, Precision
from smolstack.interop.onnx.vision import vision_encoder
from smolstack.interop.onnx.weights import Weights
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.prompt import user_message

_QUESTION = "\ue000"  # from the private use area: does not occur in templates
NAMES = ("vision_encoder", "embed_tokens", "decoder_model_merged")


@dataclass(frozen=True)
class ExportedGraph:
    """An exported and checked graph.

    Attributes:
        path: relative to the folder.
        size: bytes, including weights.
        difference: difference from torch: the largest in fp32 (relative to the largest value if
            above 1), the relative root mean square in the other formats.
    """

    path: Path
    precision: Precision
    size: int
    difference: float


def export(
    model: str | Path | None,
    folder: str | Path,
    *,
    dtypes: Sequence[str | Precision] = ("fp32",),
    revision: str | None = None,
    base: str | Path | None = None,
    mmproj: str | Path | None = None,
    overwrite: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> list[ExportedGraph]:
    """Write a checkpoint's graphs and side files, after comparing every graph with torch.

    Args:
        model: a checkpoint folder or a hub id; None is the bundled reader.
        folder: must not exist or be empty, unless ``overwrite``; it is created when all checks have
            passed.
        dtypes: one or more of "fp32", "fp16", "int8"; the first is transformers.js' default.
        revision: branch, tag or commit of a hub id.
        base, mmproj: as for :func:`smolstack.load`.
        on_step: called with a description before each of :func:`count_steps` steps.

    Raises:
        ConfigError: a dtype is unknown, or the model does not generate text.
        CheckpointError: the model cannot be read, the folder is not empty, or a graph's results
            differ from torch's. No output remains.
    """
    chosen = [_precision(name) for name in dict.fromkeys(dtypes)]
    if not chosen:
        raise ConfigError("no dtype was given, expected one or more of fp32, fp16, int8")
    step = on_step or (lambda message: None)
    # Check the folder before any work.
    with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
        step("Loading the model")
        where = locate(model, revision, base=base, mmproj=mmproj)
        checkpoint = load_checkpoint(where, "float32", "cpu")
        network, config = checkpoint.model, checkpoint.config
        if config.embedding_dim is not None:
            raise ConfigError(
                f"{checkpoint.files.folder} has an embedding head, expected a model that "
                "generates text"
            )
        edge = checkpoint.processor.settings.tile_edge
        step("Computing reference outputs with torch")
        reference = Reference(network, edge)
        (temporary / "onnx").mkdir()
        written = []
        for precision in chosen:
            for name in NAMES:
                step(f"{name}{precision.suffix}.onnx")
                path = temporary / "onnx" / f"{name}{precision.suffix}.onnx"
                write_graph(name, precision, path, network, edge)
                difference = reference.check(name, precision, path)
                size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
                written.append(
                    ExportedGraph(path.relative_to(temporary), precision, size, difference)
                )
        for file, content in _side_files(checkpoint).items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_bytes(content)
        data = config_json(config, network.dtype)
        data["transformers.js_config"] = _transformers_js(temporary / "onnx", chosen[0])
        (temporary / "config.json").write_text(to_json(data), encoding="utf-8")
    return written


def count_steps(dtypes: Sequence[str | Precision]) -> int:
    """Return the number of steps that :func:`export` reports."""
    return 2 + len(NAMES) * len(set(dtypes))


def write_graph(
    name: str, precision: Precision, path: Path, model: VisionLanguageModel, edge: int
) -> None:
    """Write one of NAMES to ``path``; weights beyond protobuf's limit are written to
    ``path``_data.
    """
    weights = Weights(model.state_dict())
    external = _bytes_of(name, precision, model) > graphs.MAX_INLINE_BYTES
    data = path.with_name(f"{path.name}_data") if external else None
    graph = Graph(name, precision, data)
    if name == "vision_encoder":
        vision_encoder(graph, model.config, weights, edge)
    elif name == "embed_tokens":
        embed_tokens(graph, model.config, weights)
    else:
        decoder_model_merged(graph, model.config, weights)
    onnx.save_model(graph.model(), str(path))
    onnx.checker.check_model(str(path))


def _bytes_of(name: str, precision: Precision, model: VisionLanguageModel) -> int:
    """Return the approximate bytes of a graph's weights."""
    parts: dict[str, tuple[str, ...]] = {
        "vision_encoder": ("vision.", "connector."),
        "embed_tokens": ("decoder.embedding.",),
        "decoder_model_merged": ("decoder.layers.", "head."),
    }
    own = parts[name]
    if name == "decoder_model_merged" and model.config.tied:
        own = (*own, "decoder.embedding.")
    width = {Precision.fp32: 4, Precision.fp16: 2, Precision.int8: 1}[precision]
    elements: int = sum(
        tensor.numel() for key, tensor in model.state_dict().items() if key.startswith(own)
    )
    return width * elements


def _side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the processor's files, with the chat template also where transformers.js expects
    it.
    """
    files = checkpoint.files
    side = complete_side_files(files, checkpoint.config, checkpoint.processor.settings)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **files.tokenizer_config}
    if files.chat_template is not None:
        tokenizer.setdefault("chat_template", files.chat_template)
    made = {**side, "tokenizer_config.json": to_json(tokenizer).encode()}
    if (around := _prompt(checkpoint)) is not None:
        made["prompt.json"] = to_json(around).encode()
    return made


def _prompt(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the text before and after a question about an image; None if it cannot be
    determined.
    """
    processor = checkpoint.processor
    text = processor.render([user_message(1, _QUESTION)])
    before, _, after = text.partition(_QUESTION)
    if text.count(_QUESTION) != 1 or text.count(processor.markers.image) != 1:
        return None
    bos = processor.tokenizer.special_tokens.get("bos_token")
    special = not (bos and text.startswith(bos))
    return {"before": before, "after": after, "add_special_tokens": special}


def _transformers_js(folder: Path, first: Precision) -> dict[str, Any]:
    """Return transformers.js settings: properties that graphs do not contain, and default graphs.

    Without ``dtype``, it would load 8-bit graphs with its own file names in a browser and fp32
    elsewhere, independent of the exported formats.
    """
    data = sorted(file.name.removesuffix("_data") for file in folder.glob("*.onnx_data"))
    settings: dict[str, Any] = {
        "dtype": first.value,
        "kv_cache_dtype": {"fp16": "float16"},
    }
    if data:
        settings["use_external_data_format"] = dict.fromkeys(data, 1)
    return settings


def _precision(name: str | Precision) -> Precision:
    try:
        return Precision(name)
    except ValueError:
        raise ConfigError(
            f"dtype is {name!r}, expected one or more of {[p.value for p in Precision]}"
        ) from None
