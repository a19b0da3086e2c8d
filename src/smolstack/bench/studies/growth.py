"""How time and memory grow: over tiles, tokens of context, and sequences of a batch.

Each curve has a process of its own, which goes from small to large, so that its peak of memory is
that of the size just measured.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from smolstack.bench import sizes
from smolstack.bench.setting import Setting, text_batch
from smolstack.bench.worker import Worker
from smolstack.config import ModelConfig
from smolstack.vlm import VLM, load

TILES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (100, 200, 400, 800, 1600, 3200, 6400, 8000)
BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = 8
NEW_TOKENS = 32
REPEATS = 3  # of what takes less than a second


def study(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Rows of every curve and precision; what is expected is drawn through the middle size."""
    room = setting.config.text.max_positions - STEPS - 1
    contexts = tuple(length for length in CONTEXTS if length <= room)
    rows = []
    for dtype in setting.dtypes:
        for curve, counts in (("tiles", TILES), ("context", contexts), ("batch", BATCHES)):
            rows += _curve(setting, dtype, curve, counts)
    return {"growth": rows}


def _curve(
    setting: Setting, dtype: str, curve: str, counts: tuple[int, ...]
) -> list[dict[str, Any]]:
    arguments = {"folder": str(setting.folder), "dtype": dtype}
    told = []
    with Worker(f"{__name__}:growing", setting.threads, **arguments) as worker:
        for count in counts:
            told.append(worker.tell(curve=curve, count=count))
    rows = []
    for name in told[0]["value"]:
        taken = [answer["value"][name] for answer in told]
        middle = len(counts) // 2
        for count, seconds, answer in zip(counts, taken, told, strict=True):
            work = _work(setting.config, name, count) / _work(setting.config, name, counts[middle])
            held = _bytes(setting.config, curve, count) - _bytes(setting.config, curve, counts[0])
            rows.append(
                {
                    "precision": dtype,
                    "work": name,
                    "over": curve,
                    "count": count,
                    "seconds": seconds,
                    "expected seconds": taken[middle] * work,
                    "peak bytes": answer["peak_bytes"],
                    "expected bytes": told[0]["peak_bytes"] + held,
                }
            )
    return rows


def _work(config: ModelConfig, name: str, count: int) -> float:
    """What the mathematics of a curve's work is proportional to."""
    if name == "prefill":
        return sizes.prefill_flops(config, count)
    if name == "one more token":
        # Weights and cached keys and values that are read, both in 16 bits.
        return 2 * sizes.decoder(config) + sizes.cache_bytes(config, count, 2)
    return count  # tiles, and at most so for sequences: one more of them reads no more weights


def _bytes(config: ModelConfig, curve: str, count: int) -> int:
    """What must be held at the same time: pixels and visual tokens, or keys and values."""
    if curve == "tiles":
        vision = config.vision
        pixels = vision.num_channels * vision.image_size**2
        return 4 * count * (pixels + config.tokens_per_tile * config.text.hidden_size)
    tokens = count if curve == "context" else count * NEW_TOKENS
    return sizes.cache_bytes(config, tokens, 4)


def growing(folder: str, dtype: str, threads: int) -> Callable[..., dict[str, float]]:
    """A worker's work: seconds of each thing that a curve measures, at one size."""
    torch.set_num_threads(threads)
    vlm = load(folder, dtype=dtype)
    vlm.eos_token_ids = ()
    curves = {"tiles": _tiles, "context": _context, "batch": _batch}

    def run(curve: str, count: int) -> dict[str, float]:
        with torch.inference_mode():
            return curves[curve](vlm, count)

    return run


def _tiles(vlm: VLM, count: int) -> dict[str, float]:
    vision = vlm.config.vision
    tiles = torch.randn(count, vision.num_channels, vision.image_size, vision.image_size)
    return {"vision tower and connector": _seconds(lambda: vlm.model.encode_tiles(tiles))}


def _context(vlm: VLM, count: int) -> dict[str, float]:
    model = vlm.model
    batch = text_batch(torch.randint(3, 800, (1, count)))
    cache = model.new_cache(batch, count + STEPS)

    def prefill() -> None:
        cache.truncate(0)
        model.prefill(batch, cache)

    def decode() -> None:
        cache.truncate(count)
        token = batch.token_ids[:, -1]
        for _ in range(STEPS):
            token = model.decode_one_token(token, cache).argmax(dim=-1)

    return {"prefill": _seconds(prefill), "one more token": _seconds(decode) / STEPS}


def _batch(vlm: VLM, count: int) -> dict[str, float]:
    prompts = [f"What does line {number} say?" for number in range(count)]

    def run() -> None:
        vlm.forget()
        vlm.ask_many(prompts, max_new_tokens=NEW_TOKENS)

    return {f"{NEW_TOKENS} tokens for each sequence": _seconds(run)}


def _seconds(work: Callable[[], object]) -> float:
    """The median of some runs after a first one; of a long one, the first alone."""
    began = perf_counter()
    work()
    first = perf_counter() - began
    if first > 1:
        return first
    taken = []
    for _ in range(REPEATS):
        began = perf_counter()
        work()
        taken.append(perf_counter() - began)
    return median(taken)
