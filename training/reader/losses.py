"""What training measures: names of patches, answers; and patch states made up from names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.batches import ReaderBatch
from training.reader.labels import BACKGROUND, CLASSES, FINAL, FIRST, IGNORED, LAST, OFF, WHERE
from training.reader.places import (
    CONSTANT,
    NEXT,
    PLACE,
    PLACE_STRENGTH,
    cell_places,
    constant_direction,
    next_channels,
    places,
)

BACKGROUND_WEIGHT, EDGE_COUNT = 0.05, 0.25  # how much naming a patch counts, beside a middle one
EDGE_WEIGHT, EDGE_SCALE = 0.5, 4.0
END_WEIGHT, ENDS_COUNT = 1.0, 8.0  # of ends of lines and words; how much a patch of one counts
JUMP, TURN = 4.0, 6.0  # how much answer tokens count that begin a line, and that end one
FINAL_COUNT = 16.0  # the same for the patches that tell whether lines go on below
KEPT, KEPT_PLACE, KEPT_CONSTANT = 1.4, 0.3, 0.05  # of a patch's own place; weights of keeping it
NEXT_WEIGHT, NEXT_SHARPNESS = 0.3, 1.5  # of the next character's place
WRONG_NEXT = 0.06  # of made-up places of the next character, the share beside it
UNSEEN = 2  # patches at a tile's edge, from which the tower cannot see that a line goes on


_KEPT: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}


def naming_loss(
    states: Tensor, batch: ReaderBatch, directions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of patch states, (N, H·W, C); shares of character patches right: the name, the next.

    Cross-entropy over patches, background weighted down, of the states' parts along a fixed
    direction for each class; the squared error of where a patch stands, in its character and
    in its line, read along WHERE more; and the cross-entropy of any of the cells that show the next
    character, whose places are compared with the last parts.
    """
    parts = states[..., : directions.shape[1]] @ directions.T
    scores, following = parts[..., :CLASSES], parts[..., -NEXT:]
    stand = parts[..., CLASSES:-NEXT] / EDGE_SCALE
    characters = batch.patch_labels > BACKGROUND
    weight = _naming_weight(batch)
    missed = functional.cross_entropy(
        scores.flatten(0, 1), batch.patch_labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    named = (weight.flatten() * missed).sum() / weight.sum()
    errors = (stand - batch.patch_places).square()
    placed = _mean(errors[..., :FIRST].mean(dim=-1), characters)
    counts = 1 + ENDS_COUNT * batch.patch_places[..., FIRST:]
    # Every line's last character says whether it is the last of all: both answers count alike.
    counts[..., FINAL - FIRST] = 1 + FINAL_COUNT * batch.patch_places[..., LAST]
    ends = (errors[..., FIRST:] * counts).sum() / counts.sum()
    right = _share(scores.argmax(-1) == batch.patch_labels, characters)
    linked, pointed = _linking_loss(following, batch)
    loss = named + EDGE_WEIGHT * placed + END_WEIGHT * ends + NEXT_WEIGHT * linked
    return loss + _keeping_loss(states), {"patches": right, "next": pointed}


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean over the places that hold; 0 where none does."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _share(right: Tensor, where: Tensor) -> Tensor:
    """The share of what is right among the places that hold; NaN where none does."""
    return (right & where).sum() / where.sum()


def _naming_weight(batch: ReaderBatch) -> Tensor:
    """How much the name of each patch counts: (N, H·W).

    The background little; of a character its middle most, where the decoder points.
    """
    beside = batch.patch_places[..., :FIRST].square()  # cos², 0 in the middle and 1 at the edge
    middle = (1 - beside).prod(dim=-1)
    weight = EDGE_COUNT + (1 - EDGE_COUNT) * middle
    weight = torch.where(batch.patch_labels == BACKGROUND, BACKGROUND_WEIGHT, weight)
    return weight * (batch.patch_labels != IGNORED)


def _keeping_loss(states: Tensor) -> Tensor:
    """Squared error of what every patch is to hold: its own place, and the constant."""
    device, width = states.device, states.shape[-1]
    own = states[..., -PLACE:] - KEPT * PLACE_STRENGTH * on(places, device, shape.GRID)
    constant = states @ on(constant_direction, device, width) - CONSTANT
    return KEPT_PLACE * own.square().mean() + KEPT_CONSTANT * constant.square().mean()


def _linking_loss(following: Tensor, batch: ReaderBatch) -> tuple[Tensor, Tensor]:
    """Loss of saying any of the cells that show the next character, and the share that is right."""
    known = batch.patch_next[..., 0] >= 0
    of_cells = on(cell_places, following.device)[:, next_channels()]
    scores = NEXT_SHARPNESS * following @ of_cells.T
    shown = _cells_shown(batch.patch_next)
    of_shown = scores.masked_fill(~shown, -1e9).logsumexp(-1)
    right = shown.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
    return _mean(scores.logsumexp(-1) - of_shown, known), _share(right, known)


def _cells_shown(ranges: Tensor) -> Tensor:
    """First and last row and column, (..., 4), as a mask of a tile's cells: (..., CELLS · GRID)."""
    low_row, high_row, low_col, high_col = ranges[..., None].unbind(-2)
    rows = torch.arange(shape.CELLS, device=ranges.device)
    cols = torch.arange(shape.GRID, device=ranges.device)
    in_rows = (rows >= low_row) & (rows <= high_row)
    in_cols = (cols >= low_col) & (cols <= high_col)
    return (in_rows[..., :, None] & in_cols[..., None, :]).flatten(-2)


def on(make: Callable[..., Tensor], device: torch.device, *arguments: int) -> Tensor:
    """What ``make`` makes, kept on a device."""
    key = make.__name__, str(device), arguments
    if key not in _KEPT:
        _KEPT[key] = make(*arguments).to(device)
    return _KEPT[key]


def answer_logits(model: VisionLanguageModel, states: Tensor, batch: ReaderBatch) -> Tensor:
    """Logits where answer tokens are predicted: (M, V).

    Rows are padded on the right, where no token before sees it.

    Args:
        states: (N, H·W, C), of patches.
    """
    visual = model.connector(states[: batch.asked_tiles], (shape.GRID, shape.GRID))
    embeddings = model.decoder.embedding(batch.token_ids)
    flat = embeddings.flatten(0, 1)
    flat = flat.index_copy(0, batch.images, visual.flatten(0, 1).to(flat.dtype))
    decoded = model.decoder(flat.view_as(embeddings))
    return model.logits(decoded.flatten(0, 1)[batch.at])


def answering_loss(logits: Tensor, batch: ReaderBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token loss; the shares of cells, of characters and of whole answers that are right.

    A share of nothing is NaN: of cells, where no answer points.

    The loss is that of saying any token that would be right: the cells that show a character share
    their probability as they like. Where a line begins counts JUMP times, where it is over TURN
    times: those tokens are few, and each spoils a whole line.
    """
    goals = batch.goals
    asked = goals[:, 0] != IGNORED
    of_goals = logits.gather(1, goals.clamp(min=0)).masked_fill(goals == IGNORED, -1e9)
    losses = logits.logsumexp(dim=1) - of_goals.logsumexp(dim=1)
    weights = _weights(batch) * asked
    losses = losses * asked
    loss = (weights * losses).sum() / weights.sum()
    right = (logits.argmax(dim=1, keepdim=True) == goals).any(dim=1)
    points = goals.amax(dim=-1) >= shape.FIRST_CELL
    wrong = torch.zeros(len(batch.token_ids), device=goals.device)
    wrong.index_add_(0, batch.at // batch.token_ids.shape[1], (asked & ~right).float())
    figures = {
        "characters": _share(right, asked & ~points),
        "cells": _share(right, points),
        "answers": _share(wrong == 0, batch.token_ids[:, 0] != shape.IDS[shape.PAD]),
    }
    return loss, figures


def _weights(batch: ReaderBatch) -> Tensor:
    """How much each answer token counts: (M,)."""
    before = batch.token_ids.flatten()[batch.at]
    goals = batch.goals
    points = goals.amax(dim=-1) >= shape.FIRST_CELL
    turns = (goals[:, 0] == ord("\n")) | (goals[:, 0] == shape.IDS[shape.END])
    jumps = points & ((before >= shape.FIRST_CELL) | (before == ord("\n")))
    weights = torch.ones(before.shape, device=goals.device)
    return weights.masked_fill(turns, TURN).masked_fill(jumps, JUMP)


def random_states(
    batch: ReaderBatch, codes: Tensor, own: Tensor, generator: torch.Generator
) -> Tensor:
    """What a tower that names patches would say of a batch, without a tower: (N, H·W, C).

    Each patch's class as a direction of its own, where it stands and where the next character does
    as some more, noise on all, and the patch's place in the last channels, normalized as the
    tower's output is, and the constant that every state holds. At the edges of a tile the ends of
    lines are doubtful.

    Args:
        batch: labels; a share of them is exchanged, as a tower errs.
        codes: (classes + WHERE + NEXT, content channels), a direction for each class, then for
            places, then for the next character's.
        own: (H·W, place channels), the place of each patch.
        generator: draws noise and errors.
    """

    device = batch.patch_labels.device

    def uniform(low: float, high: float, *shape_of: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape_of, generator=generator, device=device)

    classes = batch.patch_labels
    count, patches = classes.shape
    known = (classes != IGNORED)[..., None]
    other = torch.randint(CLASSES, classes.shape, generator=generator, device=device)
    errs = uniform(0, 1, count, patches) < uniform(0, 0.06, count, 1)
    errs &= classes > 0
    named = codes[torch.where(errs, other, classes.clamp(min=0))]
    content = named * uniform(4, 9, count, 1, 1) * known
    where = batch.patch_places.clone()
    where[..., :FIRST] *= known
    kept = uniform(0, 1, count, patches, WHERE - FIRST) > uniform(0, 0.2, count, 1, 1)
    where[..., FIRST:] *= kept
    where[..., OFF] *= batch.patch_next[..., 0] >= 0
    columns = torch.arange(patches, device=device) % shape.GRID
    for which, unseen in ((FIRST, columns < UNSEEN), (LAST, columns >= shape.GRID - UNSEEN)):
        doubt = uniform(0, 0.6, count, patches) * (unseen & (classes != BACKGROUND))
        where[..., which] = torch.maximum(where[..., which], doubt)
    content = content + where @ codes[CLASSES:-NEXT] * EDGE_SCALE
    content = content + _random_next(batch, generator) @ codes[-NEXT:] * uniform(
        0.8, 1.8, count, 1, 1
    )
    noise = torch.randn(count, patches, codes.shape[1], generator=generator, device=device)
    content = content + noise * uniform(0.15, 0.45, count, 1, 1)
    states = torch.cat((content, own.expand(count, -1, -1)), dim=-1)
    width = states.shape[-1]
    constant = CONSTANT * on(constant_direction, device, width)
    return functional.layer_norm(states, (width,)) + constant


def _random_next(batch: ReaderBatch, generator: torch.Generator) -> Tensor:
    """Places of cells that show the next character, some of them beside it: (N, H·W, NEXT)."""
    ranges = batch.patch_next.float()
    device = ranges.device
    shares = torch.rand(*ranges.shape[:-1], 2, generator=generator, device=device)
    low, high = ranges[..., ::2], ranges[..., 1::2]
    cells = (low + shares * (high - low)).round()
    errs = torch.rand(*cells.shape[:-1], 1, generator=generator, device=device) < WRONG_NEXT
    aside = torch.randint(-2, 3, cells.shape, generator=generator, device=device)
    cells = (cells + errs * aside).long().clamp(min=0)
    rows, cols = cells[..., 0].clamp(max=shape.CELLS - 1), cells[..., 1].clamp(max=shape.GRID - 1)
    of_cells = on(cell_places, ranges.device)[:, next_channels()]
    return of_cells[rows * shape.GRID + cols] * (ranges[..., :1] >= 0)
