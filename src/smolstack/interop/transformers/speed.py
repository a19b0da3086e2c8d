"""Times transformers' model and smolstack behind its interface with the same alternating calls.

    python -m smolstack.interop.transformers.speed [MODEL] --new-tokens 32

Answers are greedy and of a fixed length; both models' tokens are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from smolstack.interop import transformers as bridge
from smolstack.interop.reference import model_inputs
from smolstack.interop.transformers.conversion import to_transformers
from smolstack.vlm import load


@dataclass(frozen=True)
class Compared:
    """Median seconds of the same call with transformers' model and with smolstack's.

    Attributes:
        call: description of the call.
        theirs, ours: seconds.
        same: whether the tokens are equal.
    """

    call: str
    theirs: float
    ours: float
    same: bool


def compare(
    folder: Path,
    *,
    dtype: str = "float32",
    rows: int,
    new_tokens: int,
    split: bool | None,
    rounds: int,
) -> list[Compared]:
    """Time ``generate`` on both models, for the first token only and for ``new_tokens`` tokens.

    Args:
        folder: a checkpoint folder.
        dtype: "float32" or "bfloat16".
        rows: prompts per batch, with one image each.
        split: whether images are split into tiles; None: the checkpoint's setting.
        rounds: alternating runs of each, after an uncounted one.
    """
    vlm = load(folder, dtype=dtype, device="cpu")
    theirs = to_transformers(vlm)
    family = "SmolVLM" if vlm.config.model_type == "smolvlm" else "Idefics3"
    ours: Any = getattr(bridge, f"{family}ForConditionalGeneration")
    ours = ours.from_pretrained(folder, dtype=vlm.model.dtype).eval()
    random = np.random.default_rng(0)
    prompts = [
        vlm.processor.prepare(
            (Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)), "Describe."),
            split=split,
        )
        for _ in range(rows)
    ]
    inputs = model_inputs(vlm.processor.batch(prompts))
    found = []
    for tokens in (1, new_tokens):
        options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, **inputs}
        seconds, answers = _in_turn(
            [partial(model.generate, **options) for model in (theirs, ours)], rounds
        )
        call = f"{rows} x {inputs['input_ids'].shape[1]} tokens, {tokens} new"
        found.append(Compared(call, seconds[0], seconds[1], torch.equal(*answers)))
    return found


def _in_turn(
    calls: list[Callable[[], torch.Tensor]], rounds: int
) -> tuple[list[float], list[torch.Tensor]]:
    """Return the median seconds of every call, and its last result."""
    seconds: list[list[float]] = [[] for _ in calls]
    results: list[torch.Tensor] = [call() for call in calls]
    for _ in range(rounds):
        for number, call in enumerate(calls):
            began = perf_counter()
            results[number] = call()
            seconds[number].append(perf_counter() - began)
    return [median(times) for times in seconds], results


def main(arguments: list[str] | None = None) -> None:
    """Compare and print a row per call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "model", nargs="?", type=Path, help="a checkpoint folder; default: the bundled reader"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--no-split", action="store_true", help="one tile per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{'call':<44}{'transformers':>14}{'smolstack':>12}{'ratio':>8}  tokens")
    for dtype, rows in product(options.dtype, options.rows):
        for one in compare(
            options.model or load().folder,
            dtype=dtype,
            rows=rows,
            new_tokens=options.new_tokens,
            split=False if options.no_split else None,
            rounds=options.rounds,
        ):
            print(
                f"{dtype + ', ' + one.call:<44}{one.theirs:>12.3f} s{one.ours:>10.3f} s"
                f"{one.theirs / one.ours:>8.2f}  {'same' if one.same else 'differ'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
