"""Quantizes a checkpoint with calibration data and saves it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smolstack.checkpoint.hub import locate
from smolstack.checkpoint.load import load_checkpoint
from smolstack.checkpoint.source import open_source
from smolstack.config.quantization import INT4, INT8, INT8_FINE, Format
from smolstack.errors import CheckpointError, ConfigError
from smolstack.generation.core import EngineCore
from smolstack.generation.inline import INLINE, InlineEngine
from smolstack.output_files import check_new_folder
from smolstack.progress import Tell, shown
from smolstack.quantization.budget import average_bits, choose_formats
from smolstack.quantization.quantize import formats_of, quantize_model
from smolstack.quantization.sensitivity import output_fisher, rounding_costs
from smolstack.quantization_job import self_calibration
from smolstack.quantization_job.measuring import Measured, Reference, merged_embeddings
from smolstack.quantization_job.results import Quantized, results_of
from smolstack.quantization_job.samples import Sample, Samples, divide, read_samples
from smolstack.quantization_job.state import State
from smolstack.vlm import VLM

TOKENS = 8192
QUESTION = "Describe this image."
_TILES = 24  # maximum number of tiles to calibrate the vision tower
_SENSITIVITY_TOKENS = 1024
_DRAWN = 6  # images
_TEXT = ("decoder.layers.", "head")


def quantize(
    model: str | Path | None,
    out: str | Path,
    *,
    bits: float = 8,
    calibrate: str | Path | None = None,
    tokens: int = TOKENS,
    question: str = QUESTION,
    device: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    on_progress: Tell | None = None,
) -> Quantized:
    """Quantize a checkpoint with calibration data and save it.

    After an interruption, the same call resumes.

    Args:
        model: a checkpoint with float weights, as for :func:`smolstack.load`; an adapter's changes
            are merged.
        out: the folder to write, atomically.
        bits: 8; 4 (all decoder layers; the head has 8); or a number between: the average bits per
            weight of the decoder's layers and the head, including scales and zero points.
        calibrate: a folder of images, a .jsonl file of chats or images, or a text file. None: text
            that the model generates, and drawn images.
        tokens: minimum number of calibration tokens, including visual tokens; samples are not cut.
        question: the question about images that have none.
        device, revision: as for :func:`smolstack.load`.
        overwrite: replace ``out`` if it exists.
        restart: discard the saved state of an interrupted call.
        on_progress: called with a stage, the amount done and the total. Default: a bar in
            notebooks.

    Raises:
        CheckpointError, ConfigError, DataError: before any work is done.
    """
    out, data = Path(out), None if calibrate is None else Path(calibrate)
    tell: Tell = shown(on_progress) or (lambda *_: None)
    _check(out, bits, tokens, overwrite=overwrite)
    where = locate(model, revision)
    if where.path.exists() and out.exists() and where.path.samefile(out):
        raise CheckpointError(f"{out} is the checkpoint to be quantized, expected another folder")
    vlm = VLM(load_checkpoint(where, "auto", device))
    network = vlm.model
    if network.scheme is not None:
        raise ConfigError(
            f"{where} already has {network.scheme} weights; quantize the float checkpoint that it "
            "was made from"
        )
    shapes = _shapes(network)
    _check_budget(network, bits, shapes)
    job = {
        "model": str(where.absolute()),
        "weights": open_source(where).sizes(),
        "bits": bits,
        "calibrate": None if data is None else str(data.absolute()),
        "tokens": tokens,
        "question": question,
    }
    with contextlib.closing(State(out, job, restart=restart)) as state:
        engine = InlineEngine(EngineCore(network, vlm.processor, INLINE))
        samples = _samples(vlm, engine, data, tokens, question, state, tell)
        embeddings = _embeddings(vlm, engine, samples, state, tell)
        tell("measuring the float model", 0, 1)
        reference = Reference.of(vlm, engine, samples.held_out)
        formats = _formats(vlm, bits, shapes, embeddings, state, tell)
        engine.core.clear_caches()
        quantize_model(
            network,
            formats,
            tiles=_tiles(vlm, samples),
            embeddings=embeddings,
            fitted=True,
            keeper=state,
            progress=lambda what, done, count: tell(f"quantizing {what}", done, count),
        )
        tell("measuring the quantized model", 0, 1)
        after = reference.compare(vlm, engine, samples.held_out)
        vlm.save(out, overwrite=overwrite)
        state.remove()
        measured = Measured(reference.perplexity, after, len(samples.held_out))
        return results_of(out, formats, shapes, state.errors, samples.tokens, measured)


def _check(out: Path, bits: float, tokens: int, *, overwrite: bool) -> None:
    if not 4 <= bits <= 8:
        raise ConfigError(f"bits is {bits:g}, expected 8, 4, or a number between")
    if tokens < 2:
        raise ConfigError(f"tokens is {tokens}, expected at least 2")
    check_new_folder(out, CheckpointError, overwrite=overwrite)


def _shapes(network: Any) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every linear layer, and of the head if it is the token embedding."""
    found = {n: (m.out_features, m.in_features) for n, m in _linears(network)}
    if network.head is None:
        rows, width = network.decoder.embedding.weight.shape
        found["head"] = (rows, width)
    return found


def _linears(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]


def _candidates(
    shapes: Mapping[str, tuple[int, int]], bits: float
) -> dict[str, tuple[Format, ...]]:
    """Return the formats that a budget chooses from, for each layer of the text tower.

    The head has 8 bits, with 16-bit activations, if that leaves 4 for all others.

    Raises:
        ConfigError: the budget is too small for the smallest formats.
    """
    found: dict[str, tuple[Format, ...]] = {}
    for name, (_, width) in shapes.items():
        if name.startswith(_TEXT):
            large = INT8_FINE if name == "head" else INT8
            found[name] = (large,) if width % INT4.group else (INT4, large)
    smallest = {name: formats[0] for name, formats in found.items()}
    if average_bits({**smallest, "head": INT8_FINE}, shapes) <= bits:
        found["head"] = (INT8_FINE,)
    elif (least := average_bits(smallest, shapes)) > bits:
        raise ConfigError(
            f"{bits:g} bits per weight are too few: the smallest formats take {least:.2f}, scales "
            "and zero points included"
        )
    return found


def _check_budget(network: Any, bits: float, shapes: Mapping[str, tuple[int, int]]) -> None:
    if bits in (4, 8):
        return
    if network.config.embedding_dim is not None:
        raise ConfigError(
            f"bits is {bits:g} and the checkpoint is a retrieval model, for which layer "
            "sensitivity cannot be measured, expected 8 or 4"
        )
    _candidates(shapes, bits)


def _samples(  # noqa: PLR0917
    vlm: VLM,
    engine: InlineEngine,
    data: Path | None,
    tokens: int,
    question: str,
    state: State,
    tell: Tell,
) -> Samples:
    """Return the calibration samples. The model answers questions without an answer; without data,
    half of the tokens are text that it generates. Both are saved in the job's state."""
    source: object = "self-calibration" if data is None else data
    if data is None:
        shown = self_calibration.image_samples(vlm, self_calibration.drawn_images(_DRAWN), question)
    else:
        shown = read_samples(data, vlm.processor, tokens, question)
    asks = all(sample.asks for sample in shown)
    if asks:
        shown = _first(shown, tokens // 2)
    shown = self_calibration.answered(
        vlm, engine, shown, state, lambda *n: tell("answering about images", *n)
    )
    if not asks:
        return divide(shown, source)
    written = self_calibration.own_text(
        vlm, tokens // 2, state, lambda *n: tell("writing texts", *n)
    )
    if min(len(shown), len(written)) < 2:
        return divide([*shown, *written], source)
    images, texts = divide(shown, source), divide(written, source)
    return Samples(images.fitted + texts.fitted, images.held_out + texts.held_out)


def _first(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Return the first samples with the given number of tokens together."""
    found, held = [], 0
    for sample in samples:
        if held < tokens:
            found.append(sample)
            held += len(sample.prompt.token_ids)
    return found


@torch.no_grad()
def _embeddings(
    vlm: VLM, engine: InlineEngine, samples: Samples, state: State, tell: Tell
) -> list[Tensor]:
    """Return the decoder's inputs for each calibration sample."""
    digests = [sample.digest() for sample in samples.fitted + samples.held_out]
    if state.json("samples") not in (None, digests):
        raise ConfigError(
            f"{state.folder} contains an unfinished job on different data; --restart discards it"
        )
    state.put_json("samples", digests)
    made = []
    for number, sample in enumerate(samples.fitted):
        known = state.tensors(f"sample.{number}")
        if known is None:
            known = {"states": merged_embeddings(vlm, engine, sample).float()}
            state.put_tensors(f"sample.{number}", known)
        made.append(known["states"].to(vlm.device))
        tell("reading the calibration data", number + 1, len(samples.fitted))
    return made


def _formats(  # noqa: PLR0917
    vlm: VLM,
    bits: float,
    shapes: Mapping[str, tuple[int, int]],
    embeddings: Sequence[Tensor],
    state: State,
    tell: Tell,
) -> dict[str, Format]:
    """Return the format of every layer; with a budget, chosen by sensitivity."""
    formats = formats_of(vlm.model, "int8" if bits == 8 else "int4")
    if vlm.model.config.embedding_dim is None:
        formats["head"] = INT8_FINE  # also if it is the token embedding
    if bits in (4, 8):
        return formats
    known = state.json("formats")
    if known is None:
        some = _some(embeddings, _SENSITIVITY_TOKENS)
        done = iter(range(1, len(some) + 1))
        what = "finding which layers matter"
        fisher = output_fisher(vlm.model, some, lambda: tell(what, next(done), len(some)))
        candidates = _candidates(shapes, bits)
        count = len(vlm.model.decoder.layers) + 1
        places = iter(range(1, count + 1))
        costs = rounding_costs(
            vlm.model,
            some,
            fisher,
            candidates,
            lambda: tell("weighing formats", next(places), count),
        )
        chosen = choose_formats(costs, shapes, bits)
        known = {n: [f.bits, f.group, f.activation_bits] for n, f in chosen.items()}
        state.put_json("formats", known)
    return {**formats, **{name: Format(*parts) for name, parts in known.items()}}


def _some(embeddings: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Return evenly spread sequences with about the given number of tokens together."""
    total = sum(some.shape[1] for some in embeddings)
    step = max(1, round(total / tokens))
    return list(embeddings[::step])


def _tiles(vlm: VLM, samples: Samples) -> list[Tensor]:
    """Return tiles to calibrate the vision tower: of each image the global tile and some others."""
    shown = [
        pair
        for sample in samples.fitted
        for pair in zip(sample.prompt.images, sample.prompt.plans, strict=True)
    ]
    if not shown:
        return []
    each = max(1, _TILES // len(shown))
    found = []
    for image, plan in shown[:_TILES]:
        pixels = vlm.processor.pixels(image, plan)  # type: ignore[arg-type]
        found += list(torch.split(pixels[-each:], 1))
    return found
