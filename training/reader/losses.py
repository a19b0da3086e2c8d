"""What training measures: names of patches, answers; and patch states made up from names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.batches import ReaderBatch
from training.reader.labels import BACKGROUND, CLASSES, FIRST, IGNORED, LAST, WHERE
from training.reader.places import CONSTANT, constant_direction

BACKGROUND_WEIGHT = 0.1
EDGE_WEIGHT, EDGE_SCALE = 0.5, 4.0
END_WEIGHT, ENDS_COUNT = 1.0, 8.0  # of ends of lines; how much a patch of one counts
UNSEEN = 2  # patches at a tile's edge, from which the tower cannot see that a line goes on


def naming_loss(states: Tensor, batch: ReaderBatch, directions: Tensor) -> tuple[Tensor, float]:
    """Loss of patch states, (N, H·W, C), and the share of character patches named right.

    Cross-entropy over patches, background weighted down, of the states' parts along a fixed
    direction for each class; and the squared error of where a patch stands, in its character and
    in its line, read along four more.
    """
    parts = states[..., : directions.shape[1]] @ directions.T
    scores, places = parts[..., :-WHERE], parts[..., -WHERE:] / EDGE_SCALE
    weight = torch.ones(CLASSES)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    named = functional.cross_entropy(
        scores.flatten(0, 1), batch.patch_labels.flatten(), weight=weight, ignore_index=IGNORED
    )
    characters = batch.patch_labels > BACKGROUND
    errors = (places - batch.patch_places).square()
    placed = errors[..., :FIRST][characters].mean()
    counts = 1 + ENDS_COUNT * batch.patch_places[..., FIRST:]
    ends = (errors[..., FIRST:] * counts).sum() / counts.sum()
    right = (scores.argmax(-1) == batch.patch_labels)[characters]
    return named + EDGE_WEIGHT * placed + END_WEIGHT * ends, float(right.float().mean())


def answer_logits(model: VisionLanguageModel, states: Tensor, batch: ReaderBatch) -> Tensor:
    """Logits where answer tokens are predicted: (B, A, V).

    Args:
        states: (B·n + X, H·W, C), of patches.
    """
    visual = model.connector(states[: batch.picture_tiles], (shape.GRID, shape.GRID))
    embeddings = model.decoder.embedding(batch.token_ids)
    spots = (batch.token_ids[0] == shape.IDS[shape.IMAGE]).nonzero().flatten()
    visual = visual.reshape(len(batch.token_ids), len(spots), -1).to(embeddings.dtype)
    decoded = model.decoder(embeddings.index_copy(1, spots, visual))
    return model.logits(decoded[:, batch.start :])


def answering_loss(logits: Tensor, batch: ReaderBatch) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss; the shares of cells, of characters and of whole answers that are right.

    The loss is that of saying any token that would be right: the cells that show a character share
    their probability as they like.
    """
    goals = batch.goals
    asked = goals[..., 0] != IGNORED
    logits, goals = logits[asked], goals[asked]
    of_goals = logits.gather(1, goals.clamp(min=0)).masked_fill(goals == IGNORED, -torch.inf)
    loss = (logits.logsumexp(dim=1) - of_goals.logsumexp(dim=1)).mean()
    right = torch.ones(asked.shape, dtype=torch.bool)
    right[asked] = (logits.argmax(dim=1, keepdim=True) == goals).any(dim=1)
    points = batch.goals.amax(dim=-1) >= shape.FIRST_CELL
    spells = asked & ~points
    figures = {
        "characters": float(right[spells].float().mean()),
        "answers": float(right.all(dim=1).float().mean()),
    }
    if points.any():
        figures["cells"] = float(right[points].float().mean())
    return loss, figures


def random_states(
    batch: ReaderBatch, codes: Tensor, places: Tensor, generator: torch.Generator
) -> Tensor:
    """What a tower that names patches would say of a batch, without a tower: (N, H·W, C).

    Each patch's class as a direction of its own, where it stands as four more, noise on both, and
    the patch's place in the last channels, normalised as the tower's output is, and the constant
    that every state holds. At the edges of a tile the ends of lines are doubtful.

    Args:
        batch: labels; a share of them is exchanged, as a tower errs.
        codes: (classes + WHERE, content channels), a direction for each class, then for places.
        places: (H·W, place channels).
        generator: draws noise and errors.
    """

    def uniform(low: float, high: float, *shape_of: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape_of, generator=generator)

    classes = batch.patch_labels
    count, patches = classes.shape
    known = (classes != IGNORED)[..., None]
    other = torch.randint(CLASSES, classes.shape, generator=generator)
    errs = torch.rand(classes.shape, generator=generator) < uniform(0, 0.06, count, 1)
    errs &= classes > 0
    named = codes[torch.where(errs, other, classes.clamp(min=0))]
    content = named * uniform(4, 9, count, 1, 1) * known
    where = batch.patch_places.clone()
    where[..., :FIRST] *= known
    where[..., FIRST:] *= uniform(0, 1, count, patches, 2) > uniform(0, 0.2, count, 1, 1)
    columns = torch.arange(patches) % shape.GRID
    for which, unseen in ((FIRST, columns < UNSEEN), (LAST, columns >= shape.GRID - UNSEEN)):
        doubt = uniform(0, 0.6, count, patches) * (unseen & (classes != BACKGROUND))
        where[..., which] = torch.maximum(where[..., which], doubt)
    content = content + where @ codes[-WHERE:] * EDGE_SCALE
    noise = torch.randn(count, patches, codes.shape[1], generator=generator)
    content = content + noise * uniform(0.15, 0.45, count, 1, 1)
    states = torch.cat((content, places.expand(count, -1, -1)), dim=-1)
    width = states.shape[-1]
    return functional.layer_norm(states, (width,)) + CONSTANT * constant_direction(width)
