"""A fresh model: random weights, but attention that looks next door at first.

A transformer on a few tens of thousands of images spends most of them on finding out that
neighbouring patches belong together. So the tower starts knowing it: some channels carry a patch's
place and nothing else, and each head's queries are its keys moved by a step, so that at first it
looks at the patch one step up, down, left or right.

The tower's states also hold a constant along a direction of their own, for the decoder, whose own
start is ``start_decoder.py``. Everything can still be unlearned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smolstack.model.vision import VisionAttention, VisionTower
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.places import (
    CONSTANT,
    PLACE,
    PLACE_STRENGTH,
    constant_direction,
    moved,
    places,
)
from training.reader.start_decoder import start_reading

SHARPNESS = 1.1
UP, DOWN, LEFT, RIGHT = (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
HERE = (0.0, 0.0)
DIAGONALS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
STEPS = (  # (rows, columns) that heads of each layer look away from their own patch; others, freely
    (UP, DOWN, LEFT, RIGHT, HERE, (0.0, -2.0), (0.0, 2.0)),
    (*DIAGONALS, (2.0, 0.0), (0.0, -3.0), (0.0, 3.0)),
    (*((2 * row, 2 * col) for row, col in (UP, DOWN, LEFT, RIGHT)), HERE),
    ((-4.0, 0.0), (4.0, 0.0), (0.0, -1.5), (0.0, 1.5), (0.0, 3.0)),
    (UP, DOWN, LEFT, RIGHT),
    ((0.0, 1.0), (0.0, 2.0), (0.0, -1.0)),
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
            nn.init.normal_(module.weight, std=0.1, generator=generator)
    with torch.no_grad():
        _start_local(model.vision)
        model.vision.norm.bias.copy_(CONSTANT * constant_direction(shape.CONFIG.vision.hidden_size))
        start_reading(model)
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
        for head, (rows, columns) in enumerate(steps):
            channels = slice(head * PLACE, (head + 1) * PLACE)
            attention.query.weight[channels] = 0
            attention.key.weight[channels] = 0
            attention.key.weight[channels, content:] = SHARPNESS * torch.eye(PLACE)
            attention.query.weight[channels, content:] = SHARPNESS * moved(rows, columns)
        attention.out.weight[content:] = 0
    for name, module in tower.named_modules():
        if name.endswith(".down") and isinstance(module, nn.Linear):
            module.weight[content:] = 0


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
    planes = planes * (strengths / 4)[:, None, None]  # fine detail is faint in images
    planes[0] *= 2 / size  # the patch's mean would drown everything else
    colored = count // 10
    grey = planes[: count - colored, None] * torch.full((3, 1, 1), 1 / 3)
    red_blue = planes[:colored, None] * torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    filters = torch.zeros(count, 3, size, size)
    filters[: len(grey)] = grey
    filters[len(grey) : len(grey) + colored] = red_blue
    return filters
