"""A fresh model: random weights, and a vision tower that starts out looking at its surroundings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smolstack.model.vision import VisionAttention
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape


def fresh_model(seed: int) -> VisionLanguageModel:
    """The reader's shape with weights drawn from ``seed``.

    Matrices are scaled by their input width, those that write to a residual stream also by its
    depth; biases are zero. Three things make the tower learn sooner: its patch filters start as
    the smoothest cosines instead of noise, its positions as a map of the tile, and its keys equal
    to its queries, so that a patch first looks at patches near it and like it.
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
        model.vision.position_embedding.weight.copy_(
            0.5 * grid_waves(shape.GRID, shape.CONFIG.vision.hidden_size)
        )
        filters = cosine_filters(shape.PATCH, shape.CONFIG.vision.hidden_size)
        model.vision.patch_embedding.weight.copy_(filters)
        for module in model.vision.modules():
            if isinstance(module, VisionAttention):
                module.key.weight.copy_(module.query.weight)
    return model


def grid_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (side², width), as fixed positions are often made."""
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None, :].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, width)


def cosine_filters(size: int, count: int) -> Tensor:
    """The ``count`` smoothest filters of the cosine transform, grey: (count, 3, size, size).

    A tenth of them, the smoothest again, look at red against blue instead.
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
    return torch.cat((grey, red_blue))
