"""Growth of time and memory with tiles, context length and batch size.

Each curve is measured in a separate process from small to large sizes, so that its peak memory is
that of the size just measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np
import torch

from smolstack.bench import sizes
from smolstack.bench.studies.kept import Kept, Row
from smolstack.bench.worker import Worker
from smolstack.bench.workload import Workload, text_batch
from smolstack.config import ModelConfig
from smolstack.vlm import VLM, load

TILES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (100, 200, 400, 800, 1600, 3200, 6400, 8000)
BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = 8
NEW_TOKENS = 32
# Powers of the count in each curve's time: in a prompt, linear layers process each token and
# attention each pair of tokens; a decoded token reads all weights, then keys and values; sequences
# of a batch share the weights.
TOWER, PROMPT, TOKEN, ANSWERS = (
    "vision tower and connector",
    "prefill",
    "one more token",
    f"{NEW_TOKENS} tokens for each sequence",
)
FORMS = {TOWER: (1,), PROMPT: (1, 2), TOKEN: (0, 1), ANSWERS: (0, 1)}
TITLE = "growth"
REPEATS = 3  # for runs of less than two seconds


def study(workload: Workload, kept: Kept | None = None) -> dict[str, list[Row]]:
    """Return rows of every curve and precision. The expected values are the theoretical form of
    each curve, fitted to it: if cost grew faster, the largest sizes would be above it.
    """
    room = workload.config.text.max_positions - STEPS - 1
    contexts = tuple(length for length in CONTEXTS if length <= room)
    kept = kept or Kept()
    for dtype in workload.dtypes:
        for curve, counts in (("tiles", TILES), ("context", contexts), ("batch", BATCHES)):
            if not kept.has(TITLE, precision=dtype, over=curve):
                kept.add(TITLE, _curve(workload, dtype, curve, counts))
    return kept.tables


def _curve(workload: Workload, dtype: str, curve: str, counts: tuple[int, ...]) -> list[Row]:
    arguments = {"folder": str(workload.saved(dtype)), "dtype": dtype}
    told = []
    with Worker(f"{__name__}:growing", workload.threads, **arguments) as worker:
        worker.tell(curve=curve, count=counts[0])  # a warm-up
        for count in counts:
            told.append(worker.tell(curve=curve, count=count))
    rows: list[Row] = []
    for name in told[0]["value"]:
        taken = [answer["value"][name] for answer in told]
        expected = fitted(counts, taken, FORMS[name])
        for count, seconds, likely, answer in zip(counts, taken, expected, told, strict=True):
            held = _bytes(workload.config, curve, count) - _bytes(workload.config, curve, counts[0])
            rows.append(
                {
                    "precision": dtype,
                    "work": name,
                    "over": curve,
                    "count": count,
                    "seconds": seconds,
                    "expected seconds": likely,
                    "peak bytes": answer["peak_bytes"],
                    "expected bytes": told[0]["peak_bytes"] + held,
                }
            )
    return rows


def fitted(counts: Sequence[int], taken: Sequence[float], powers: Sequence[int]) -> list[float]:
    """Return the fit of a polynomial with the given powers and coefficients ≥ 0 (least squares
    of relative errors).
    """
    kept = list(powers)
    while True:
        columns = np.array([[float(n) ** power for power in kept] for n in counts])
        scaled = columns / np.array(taken)[:, None]
        factors = np.linalg.lstsq(scaled, np.ones(len(counts)), rcond=None)[0]
        if (factors >= 0).all() or len(kept) == 1:
            return [float(value) for value in columns @ factors]
        del kept[int(factors.argmin())]


def _bytes(config: ModelConfig, curve: str, count: int) -> int:
    """Return the memory needed at the same time: pixels and visual tokens, or keys and values."""
    if curve == "tiles":
        vision = config.vision
        pixels = vision.num_channels * vision.image_size**2
        return 4 * count * (pixels + config.tokens_per_tile * config.text.hidden_size)
    tokens = count if curve == "context" else count * NEW_TOKENS
    return sizes.cache_bytes(config, tokens, 4)


def growing(folder: str, dtype: str, threads: int) -> Callable[..., dict[str, float]]:
    """A worker's work: seconds of each quantity of a curve at one size."""
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
    return {TOWER: _seconds(lambda: vlm.model.encode_tiles(tiles))}


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

    return {PROMPT: _seconds(prefill), TOKEN: _seconds(decode) / STEPS}


def _batch(vlm: VLM, count: int) -> dict[str, float]:
    prompts = [f"What does line {number} say?" for number in range(count)]

    def run() -> None:
        vlm.clear_caches()
        vlm.ask_many(prompts, max_new_tokens=NEW_TOKENS)

    return {ANSWERS: _seconds(run)}


def _seconds(work: Callable[[], object]) -> float:
    """Return the median of several runs after a first one; of a long one, only the first."""
    began = perf_counter()
    work()
    first = perf_counter() - began
    if first > 2:
        return first
    taken = []
    for _ in range(REPEATS):
        began = perf_counter()
        work()
        taken.append(perf_counter() - began)
    return median(taken)
