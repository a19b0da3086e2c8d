"""What training measures: names of patches, answers; and patch states made up from names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.batches import ReaderBatch
from training.reader.labels import BACKGROUND, CLASSES, IGNORED
from training.reader.start import CONSTANT, constant_direction

BACKGROUND_WEIGHT = 0.1
EDGE_WEIGHT, EDGE_SCALE = 0.5, 4.0


def naming_loss(states: Tensor, batch: ReaderBatch, directions: Tensor) -> tuple[Tensor, float]:
    """Loss of patch states, (N, H·W, C), and the share of character patches named right.

    Cross-entropy over patches, background weighted down, of the states' parts along a fixed
    direction for each class; and the squared error of where in its character a patch stands,
    read along one more direction.
    """
    parts = states[..., : directions.shape[1]] @ directions.T
    scores, places = parts[..., :-1], parts[..., -1] / EDGE_SCALE
    weight = torch.ones(CLASSES)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    named = functional.cross_entropy(
        scores.flatten(0, 1), batch.patch_labels.flatten(), weight=weight, ignore_index=IGNORED
    )
    characters = batch.patch_labels > BACKGROUND
    placed = functional.mse_loss(places[characters], batch.patch_places[characters])
    right = (scores.argmax(-1) == batch.patch_labels)[characters]
    return named + EDGE_WEIGHT * placed, float(right.float().mean())


def answer_logits(
    model: VisionLanguageModel, states: Tensor, batch: ReaderBatch
) -> tuple[Tensor, Tensor]:
    """Logits where answer tokens are predicted, and what the decoder's middle makes of the tiles.

    Args:
        states: (B·n + X, H·W, C), of patches.

    Returns:
        (B, A, V), and (B·n, S, D): states of visual tokens after half of the layers.
    """
    visual = model.connector(states[: batch.picture_tiles], (shape.GRID, shape.GRID))
    embeddings = model.decoder.embedding(batch.token_ids)
    spots = (batch.token_ids[0] == shape.IDS[shape.IMAGE]).nonzero().flatten()
    visual = visual.reshape(len(batch.token_ids), len(spots), -1).to(embeddings.dtype)
    embeddings = embeddings.index_copy(1, spots, visual)
    middle: list[Tensor] = []
    layer = model.decoder.layers[shape.CONFIG.text.num_layers // 2 - 1]
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: middle.append(output))
    try:
        decoded = model.decoder(embeddings)
    finally:
        hook.remove()
    seen = middle[0][:, spots].reshape(-1, shape.TOKENS_PER_TILE, middle[0].shape[-1])
    return model.logits(decoded[:, batch.start :]), seen


def finding_loss(scores: Tensor, batch: ReaderBatch) -> tuple[Tensor, float]:
    """Loss of guesses at each visual token's character and the one before it in its line.

    A decoder that knows both can go on reading from the character that it wrote last. Tokens
    without a character are left out.

    Args:
        scores: (B·n, S, 2·classes).

    Returns:
        Cross-entropy, and the share of characters before that were guessed right.
    """
    seen = batch.token_labels[..., 0] > BACKGROUND
    of_each = scores[seen].reshape(-1, 2, CLASSES)
    labels = batch.token_labels[seen]
    if not len(labels):
        return scores.sum() * 0, 1.0
    right = (of_each[:, 1].argmax(-1) == labels[:, 1])[labels[:, 1] != IGNORED].float().mean()
    loss = functional.cross_entropy(of_each.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return loss, float(right)


def random_states(
    batch: ReaderBatch, codes: Tensor, places: Tensor, generator: torch.Generator
) -> Tensor:
    """What a tower that names patches would say of a batch, without a tower: (N, H·W, C).

    Each patch's class as a direction of its own, where it stands in the character as one more,
    noise on both, and the patch's place in the last channels, normalised as the tower's output is,
    and the constant that every state holds.

    Args:
        batch: labels; a share of them is exchanged, as a tower errs.
        codes: (classes + 1, content channels), a direction for each class, then one for places.
        places: (H·W, place channels).
        generator: draws noise and errors.
    """

    def uniform(low: float, high: float, *shape_of: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape_of, generator=generator)

    classes = batch.patch_labels
    count, patches = classes.shape
    known = (classes != IGNORED)[..., None]
    other = torch.randint(len(codes) - 1, classes.shape, generator=generator)
    errs = torch.rand(classes.shape, generator=generator) < uniform(0, 0.06, count, 1)
    errs &= classes > 0
    named = codes[torch.where(errs, other, classes.clamp(min=0))]
    content = named * uniform(4, 9, count, 1, 1) * known
    content = content + batch.patch_places[..., None] * known * codes[-1] * 4
    noise = torch.randn(count, patches, codes.shape[1], generator=generator)
    content = content + noise * uniform(0.15, 0.45, count, 1, 1)
    states = torch.cat((content, places.expand(count, -1, -1)), dim=-1)
    width = states.shape[-1]
    return functional.layer_norm(states, (width,)) + CONSTANT * constant_direction(width)
