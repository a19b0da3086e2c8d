"""A fresh model: random weights, but attention that looks next door at first, in both towers.

A transformer on a few tens of thousands of pictures spends most of them on finding out that
neighbouring patches belong together. So the tower starts knowing it: some channels carry a patch's
place and nothing else, and each head's queries are its keys moved by a step, so that at first it
looks at the patch one step up, down, left or right.

The decoder's rotary positions can do the same for its first heads, the token before and the one
before that, if something in every token is always the same: so one channel is. The tower's states
hold a constant along a direction of their own, which the connector puts there. Everything can still
be unlearned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from smolstack.model.decoder import TextAttention, rope_frequencies
from smolstack.model.vision import VisionAttention, VisionTower
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.labels import CLASSES

PLACE = 32  # channels for a patch's place: sine and cosine of row and column at 8 frequencies
FREQUENCIES = torch.linspace(0.15, 2.2, PLACE // 4)
PLACE_STRENGTH = 0.9
SHARPNESS = 1.1
UP, DOWN, LEFT, RIGHT = (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
HERE = (0.0, 0.0)
DIAGONALS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
STEPS = (  # (rows, columns) that each head of each layer looks away from its own patch
    (UP, DOWN, LEFT, RIGHT, HERE),
    (*DIAGONALS, (2.0, 0.0)),
    (*((2 * row, 2 * col) for row, col in (UP, DOWN, LEFT, RIGHT)), HERE),
    ((-4.0, 0.0), (4.0, 0.0), (0.0, -1.5), (0.0, 1.5), (0.0, 3.0)),
)
SPREAD = 0.1  # of token embeddings
CONSTANT = 3.0  # of a patch's state, along its direction
EVEN = 4.0  # of the decoder's first channel, in units of the others' spread
CLOSENESS = 1.7
ACROSS = shape.TOKENS_PER_TILE + 2 - shape.GRID // shape.SCALE + 1
BACK = (  # tokens that each head of the decoder's first two layers looks back
    (1, 2, 3, shape.GRID // shape.SCALE),
    (1, 2, 1, ACROSS),  # the last: over the edge of a tile, to the one on its left
)


def fresh_model(seed: int) -> VisionLanguageModel:
    """The reader's shape with weights drawn from ``seed``.

    Matrices are scaled by their input width, those that write to a residual stream also by its
    depth; biases are zero; the tower then starts as described above, its patch filters as the
    smoothest cosines.
    """
    generator = torch.Generator().manual_seed(seed)
    model = VisionLanguageModel(shape.CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            scale = 1 / math.sqrt(module.weight[0].numel())
            if name.endswith((".out", ".down")):
                scale /= math.sqrt(2 * shape.CONFIG.text.num_layers)
            nn.init.normal_(module.weight, std=scale, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=SPREAD, generator=generator)
    with torch.no_grad():
        _start_local(model.vision)
        _start_reading(model)
    return model


def _start_local(tower: VisionTower) -> None:
    """Cosine filters, place channels, and heads that look one step away."""
    width = tower.config.hidden_size
    content = width - PLACE
    tower.patch_embedding.weight.zero_()
    tower.patch_embedding.weight[:content] = cosine_filters(shape.PATCH, content)
    tower.position_embedding.weight.zero_()
    tower.position_embedding.weight[:, content:] = PLACE_STRENGTH * places(shape.GRID)
    attentions = [module for module in tower.modules() if isinstance(module, VisionAttention)]
    for attention, steps in zip(attentions, STEPS, strict=True):
        attention.query.weight.zero_()
        attention.key.weight.zero_()
        for head, (rows, columns) in enumerate(steps):
            channels = slice(head * PLACE, (head + 1) * PLACE)
            attention.key.weight[channels, content:] = SHARPNESS * torch.eye(PLACE)
            attention.query.weight[channels, content:] = SHARPNESS * moved(rows, columns)
        attention.out.weight[content:] = 0
    for name, module in tower.named_modules():
        if name.endswith(".down") and isinstance(module, nn.Linear):
            module.weight[content:] = 0


def _start_reading(model: VisionLanguageModel) -> None:
    """One channel that is always the same, and heads that look some tokens back."""
    even = constant_direction(model.vision.config.hidden_size)
    model.vision.norm.bias.copy_(CONSTANT * even)
    patches = shape.SCALE**2
    model.connector.proj.weight[0] = EVEN / CONSTANT / patches * even.repeat(patches)
    model.decoder.embedding.weight[:, 0] = EVEN * SPREAD
    config = shape.CONFIG.text
    frequencies = rope_frequencies(config.rope, config.head_dim)
    half = config.head_dim // 2
    attentions = [module for module in model.decoder.modules() if isinstance(module, TextAttention)]
    for attention, offsets in zip(attentions, BACK, strict=False):
        attention.query.weight.mul_(0.3)
        attention.key.weight.mul_(0.3)
        keys = attention.key.weight.view(config.num_kv_heads, config.head_dim, -1)
        keys[:, :half, 0], keys[:, half:, 0] = CLOSENESS, 0.0
        queries = attention.query.weight.view(config.num_heads, config.head_dim, -1)
        for head, offset in enumerate(offsets):
            angles = -offset * frequencies
            queries[head, :half, 0] = CLOSENESS * angles.cos()
            queries[head, half:, 0] = CLOSENESS * angles.sin()


def constant_direction(width: int) -> Tensor:
    """The direction of a patch's state that is always the same: (width,).

    At right angles to those of the character classes, and to the place channels.
    """
    known = codes(CLASSES + 1, width - PLACE)
    generator = torch.Generator().manual_seed(2)
    free = torch.randn(width - PLACE, generator=generator)
    free -= known.T @ (known @ free)
    return functional.pad(free / free.norm(), (0, PLACE))


def places(side: int) -> Tensor:
    """Place channels of every patch, sines and cosines of its row, then its column.

    Returns:
        (side², PLACE).
    """
    angles = torch.arange(side)[:, None] * FREQUENCIES
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None, :].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, PLACE)


def moved(rows: float, columns: float) -> Tensor:
    """The matrix that turns the place channels of a patch into those of one some steps away."""
    matrix = torch.zeros(PLACE, PLACE)
    half = PLACE // 2
    for start, step in ((0, rows), (half, columns)):
        cos, sin = torch.diag((step * FREQUENCIES).cos()), torch.diag((step * FREQUENCIES).sin())
        turn = torch.cat((torch.cat((cos, sin), dim=1), torch.cat((-sin, cos), dim=1)))
        matrix[start : start + half, start : start + half] = turn
    return matrix


def cosine_filters(size: int, count: int) -> Tensor:
    """The smoothest filters of the cosine transform, grey: (count, 3, size, size).

    A tenth of them, the smoothest again, look at red against blue instead. Where the transform has
    fewer than asked for, the last filters are left at zero: channels that layers can write to.
    """
    steps = (torch.arange(size) + 0.5) * math.pi / size
    waves = torch.cos(torch.arange(size)[:, None] * steps)
    waves = waves / waves.norm(dim=1, keepdim=True)
    order = sorted((row**2 + col**2, row, col) for row in range(size) for col in range(size))
    planes = torch.stack([waves[row][:, None] * waves[col] for _, row, col in order])
    strengths = torch.tensor([1 + math.sqrt(square) for square, _, _ in order])
    planes = planes * (strengths / 4)[:, None, None]  # fine detail is faint in pictures
    planes[0] *= 2 / size  # the patch's mean would drown everything else
    colored = count // 10
    grey = planes[: count - colored, None] * torch.full((3, 1, 1), 1 / 3)
    red_blue = planes[:colored, None] * torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    filters = torch.zeros(count, 3, size, size)
    filters[: len(grey)] = grey
    filters[len(grey) : len(grey) + colored] = red_blue
    return filters


def codes(count: int, width: int) -> Tensor:
    """``count`` directions at right angles to each other, always the same: (count, width)."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(width, count, generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(matrix).Q.T.float().contiguous()
    return directions
