"""A fresh decoder that already looks where it will have to: beside, above, and where it points.

Random weights find such attention only after thousands of steps. So some channels of the stream
have a meaning at first: the place of a visual token in its tile (which the tower's states hold and
the connector hands on), the tile it stands in (which its first layer takes from the last marker),
and, in an answer, the cell pointed at last. Heads of the later layers look at the visual token of
that cell, and at those on its right. After a cell two of them copy what it names, after a
character two others copy where the next one is. Everything can still be unlearned.

Rotary positions would blur such a look over hundreds of tokens; in the slowest pairs of channels
they do not, so it uses those, and the fastest to look back by a few tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from smolstack.model.decoder import TextAttention, TextLayer, rope_frequencies
from smolstack.model.vlm import VisionLanguageModel
from training.reader import shape
from training.reader.labels import CLASSES, FINAL, GAP, LAST, OFF
from training.reader.places import (
    CONSTANT,
    NEXT,
    PLACE,
    cell_places,
    constant_direction,
    directions,
    moved,
    next_channels,
)
from training.reader.pointing import cell_of
from training.reader.targets import View

SPREAD, SHARP = 0.3, 0.6  # of the stream at first; of what becomes of it, the head's logits
EVEN = 4.0  # of the stream's first channel, in units of SPREAD
TILE = 5  # channels for a tile's row and column, each a point on a circle; of the whole: the last
TILES = shape.EDGE // shape.TILE
# Channels of the stream with a meaning; the first is always the same.
OWN = slice(1, 1 + PLACE)  # a visual token's place in its tile,
OWN_TILE = slice(OWN.stop, OWN.stop + TILE)  # and that tile
POINTED = slice(OWN_TILE.stop, OWN_TILE.stop + PLACE + TILE)  # of the cell pointed at last
IS_MARKER, IS_CELL = POINTED.stop, POINTED.stop + 1
HALF = IS_CELL + 1  # of a cell: positive in the right half of what a visual token shows;
LAST_HALF = HALF + 1  # of the cell pointed at last
IS_OFF = LAST_HALF + 1  # in an answer: whether the next character stands in the tile on the right
IS_START = IS_OFF + 1  # of the first token, which says nothing, so that heads can look at nothing
# In a visual token the channels of POINTED say where the next characters are of those in its left
# and its right half, and these and some more what follows: a space, the end, another tile.
FLAGS = (GAP, LAST, FINAL, OFF)
LEFT_FLAGS = slice(POINTED.start + 2 * NEXT, POINTED.start + 2 * NEXT + len(FLAGS))
RIGHT_FLAGS = slice(IS_START + 1, IS_START + 1 + len(FLAGS))
RESERVED = RIGHT_FLAGS.stop

ALIKE = 0.15  # what is left of the random part of cells, which their places tell apart
FAINT = 0.3  # what is left of the random part of queries and keys
CLOSENESS = 2.0  # of heads that look back by some tokens
TO_MARKER, TO_CELL = 1.65, 2.35  # of the heads that look back to the last marker, the last cell
TO_NOTHING, FIRM = 1.1, 3.0  # of the latter before any cell; of what the first token holds
MARKER_PAIRS, CELL_PAIRS = (7, 8, 9), (2, 3, 4)  # rotary pairs that fade over a tile, a few tokens
TO_PLACE, TO_TILE = 3.0, 3.6  # of heads that look at a cell
WAVES = (1, 2, 3, 4)  # of a place's frequencies, those that tell cells apart
SLOW = 13  # the first rotary pair that hardly turns within a chat
ACROSS = shape.TOKENS_PER_TILE + 2 - shape.CELLS + 1
BACK = (  # tokens that heads of the first two layers look back
    (1, shape.CELLS),
    (1, 2, 3, ACROSS),  # the last: over the edge of a tile, to the one on its left
)
BESIDE = (0, 1, 0, 0)  # cells to the right of the one pointed at that heads of the last two look
NAMING, REST = 0.16, 0.2  # of what a patch names, in the connector; of its random part
COPIED, READERS = 6.0, (2, 3)  # how much of what a cell names is added to the stream, by which
AWAY = 3.5  # heads of the last two layers; how firmly one looks at nothing when it has no part
LOW = 0.15  # of what visual tokens hold of the next character; how much heads of the last layer
LINKED, FLAGGED = 12.0, 4.0  # but one copy of its place, and of what follows


def start_reading(model: VisionLanguageModel) -> None:
    """Set the connector's and the decoder's weights of a model that is random so far."""
    decoder = model.decoder
    _start_embedding(decoder.embedding.weight)
    _start_connector(model)
    decoder.norm.weight.fill_(SHARP)
    layers = [layer for layer in decoder.layers if isinstance(layer, TextLayer)]
    for layer in layers:
        for written in (layer.attention.out.weight, layer.down.weight):
            written.mul_(SPREAD)
            written[:RESERVED] = 0
        layer.attention.query.weight.mul_(FAINT)
        layer.attention.key.weight.mul_(FAINT)
    first, second, third, fourth = (layer.attention for layer in layers)
    _look_back(first, BACK[0])
    _look_back(second, BACK[1])
    _look_for_markers_and_cells(first)
    for attention in (third, fourth):
        _look_at_cells(attention)
    _go_on(third, decoder.embedding.weight)
    _read(fourth)


def _tile_point(row: int, col: int) -> Tensor:
    """A tile's channels: its row and its column, each as a point on a circle."""
    angles = 2 * math.pi / TILES * torch.tensor([row, col])
    point = torch.stack((angles.cos(), angles.sin()), dim=1).flatten()
    return functional.pad(point, (0, 1), value=-1.0)


def _whole_point() -> Tensor:
    """The channels of the tile of the whole, for which only the last stands."""
    return functional.pad(torch.zeros(TILE - 1), (0, 1), value=2.0)


def _start_connector(model: VisionLanguageModel) -> None:
    width = model.vision.config.hidden_size
    patches = shape.SCALE**2
    weight = model.connector.proj.weight
    weight.mul_(SPREAD)
    weight[:RESERVED] = 0
    even = constant_direction(width)
    weight[0] = EVEN * SPREAD / CONSTANT / patches * even.repeat(patches)
    place = functional.pad(torch.eye(PLACE), (width - PLACE, 0))
    weight[OWN] = SPREAD / patches * place.repeat(1, patches)
    # What a patch names becomes the embedding of that character: to read is to copy. The
    # background is a space, for tokens all as long: their places would be unlike otherwise.
    named = directions(width - PLACE)[:CLASSES]
    characters = model.decoder.embedding.weight[[*f" {shape.CHARACTERS}".encode()]][:, RESERVED:]
    # The right half is turned out of the way of the left.
    naming = functional.pad(characters.T @ named, (0, PLACE)) * (NAMING / patches)
    halves = torch.cat((naming, _turn() @ naming), dim=1)  # a token's patches go row by row
    weight[RESERVED:].mul_(REST).add_(halves.repeat(1, shape.SCALE))
    # Where the next character is and what follows, of the patches of each half.
    said = directions(width - PLACE)
    following = functional.pad(said[-NEXT:], (0, PLACE)) * (LOW * SPREAD / shape.SCALE)
    flags = functional.pad(said[[CLASSES + flag for flag in FLAGS]], (0, PLACE))
    flags = flags * (LOW * SPREAD / shape.SCALE)
    by_half = weight.view(len(weight), shape.SCALE, shape.HALVES, width)
    for half, of_flags in enumerate((LEFT_FLAGS, RIGHT_FLAGS)):
        start = POINTED.start + half * NEXT
        by_half[start : start + NEXT, :, half] = following[:, None]
        by_half[of_flags, :, half] = flags[:, None]


def _turn() -> Tensor:
    """A rotation of the channels that have no meaning."""
    generator = torch.Generator().manual_seed(4)
    free = shape.CONFIG.text.hidden_size - RESERVED
    turned: Tensor = torch.linalg.qr(torch.randn(free, free, generator=generator)).Q
    return turned


def _start_embedding(weight: Tensor) -> None:
    weight.mul_(SPREAD / weight.std())
    used = torch.tensor([*"".join((" \n", shape.CHARACTERS)).encode(), *shape.IDS.values()])
    unused = torch.ones(len(weight), dtype=torch.bool).scatter(0, used, False)
    weight[unused] *= ALIKE
    weight[:, :RESERVED] = 0
    weight[:, 0] = EVEN * SPREAD
    for row in range(TILES):
        for col in range(TILES):
            marker = shape.IDS[f"<row_{row + 1}_col_{col + 1}>"]
            weight[marker, OWN_TILE] = 1.4 * SPREAD * _tile_point(row, col)
    weight[shape.IDS[shape.WHOLE], OWN_TILE] = 1.4 * SPREAD * _whole_point()
    for name in (*shape.TILE_MARKERS, shape.WHOLE):
        weight[shape.IDS[name], IS_MARKER] = EVEN * SPREAD
    weight[shape.IDS[shape.START], 1:] = 0
    weight[shape.IDS[shape.START], IS_START] = FIRM * EVEN * SPREAD
    of_cells = cell_places()
    for token in range(shape.FIRST_CELL, shape.FIRST_CELL + len(shape.CELL_TOKENS)):
        cell = cell_of(token)
        assert cell is not None
        tile = _whole_point()
        if cell.view is View.TILES:
            tile = _tile_point(cell.row // shape.CELLS, cell.col // shape.GRID)
        within = cell.row % shape.CELLS * shape.GRID + cell.col % shape.GRID
        weight[token, POINTED] = 1.4 * SPREAD * torch.cat((of_cells[within], tile))
        weight[token, IS_CELL] = EVEN * SPREAD
        weight[token, RESERVED:] *= ALIKE
        weight[token, HALF] = EVEN * SPREAD * (1 if cell.col % shape.HALVES else -1)


def _heads(attention: TextAttention) -> tuple[Tensor, Tensor]:
    """Queries' and keys' weights by head: (heads, K, D), (kv heads, K, D)."""
    config = shape.CONFIG.text
    size = (-1, config.head_dim, config.hidden_size)
    return attention.query.weight.view(size), attention.key.weight.view(size)


def _look_back(attention: TextAttention, offsets: tuple[int, ...]) -> None:
    """The first heads look back by so many tokens: keys are alike, queries turned."""
    queries, keys = _heads(attention)
    half = shape.CONFIG.text.head_dim // 2
    group = len(queries) // len(keys)
    frequencies = rope_frequencies(shape.CONFIG.text.rope, 2 * half)
    keys = keys[: -(-len(offsets) // group)]
    keys[:, :half, 0], keys[:, half:, 0] = CLOSENESS, 0.0
    for query, offset in zip(queries, offsets, strict=False):
        angles = -offset * frequencies
        query[:half, 0] = CLOSENESS * angles.cos()
        query[half:, 0] = CLOSENESS * angles.sin()


def _look_for_markers_and_cells(attention: TextAttention) -> None:
    """The third head takes the tile from the last marker, the fourth what was pointed at last."""
    queries, keys = _heads(attention)
    keys[1, :, 0] = 0
    for pairs, flag, strength, query in (
        (MARKER_PAIRS, IS_MARKER, TO_MARKER, queries[2]),
        (CELL_PAIRS, IS_CELL, TO_CELL, queries[3]),
    ):
        query[:, 0] = 0
        for pair in pairs:
            keys[1, pair, flag] = query[pair, 0] = strength
    still = shape.CONFIG.text.head_dim - 1  # of a slow pair: no distance matters
    keys[1, still, IS_START] = queries[3, still, 0] = TO_NOTHING
    config = shape.CONFIG.text
    values = attention.value.weight.view(config.num_kv_heads, config.head_dim, -1)[1]
    out = attention.out.weight.view(config.hidden_size, config.num_heads, config.head_dim)
    pointed = POINTED.stop - POINTED.start
    values[: TILE + pointed + 1] = 0
    values[:TILE, OWN_TILE] = torch.eye(TILE)
    values[TILE : TILE + pointed, POINTED] = torch.eye(pointed)
    values[TILE + pointed, HALF] = 1
    out[OWN_TILE, 2, :TILE] = SPREAD * torch.eye(TILE)
    out[POINTED, 3, TILE : TILE + pointed] = SPREAD * torch.eye(pointed)
    out[LAST_HALF, 3, TILE + pointed] = SPREAD


def _look_at_cells(attention: TextAttention) -> None:
    """Heads look at the visual token of the cell pointed at last, and at that on its right."""
    queries, keys = _heads(attention)
    half, count = shape.CONFIG.text.head_dim // 2, PLACE // 4
    chosen = [start + wave for start in (0, 2 * count) for wave in WAVES]  # sines; cosines follow
    sines = slice(SLOW, SLOW + len(chosen))
    cosines = slice(half + SLOW, half + SLOW + len(chosen))
    tile = [SLOW + len(chosen), SLOW + len(chosen) + 1]
    whole = SLOW + len(chosen) + 2
    for key in keys:
        key.zero_()
        key[sines, OWN] = TO_PLACE * torch.eye(PLACE)[chosen]
        key[cosines, OWN] = TO_PLACE * torch.eye(PLACE)[[one + count for one in chosen]]
        for axis in range(2):
            key[tile[axis], OWN_TILE.start + 2 * axis] = TO_TILE
            key[half + tile[axis], OWN_TILE.start + 2 * axis + 1] = TO_TILE
        key[whole, OWN_TILE.stop - 1] = TO_TILE
    for query, cells in zip(queries, BESIDE, strict=True):
        step = moved(0, cells * shape.SCALE)
        place = slice(POINTED.start, POINTED.start + PLACE)
        query.zero_()
        query[sines, place] = TO_PLACE * step[chosen]
        query[cosines, place] = TO_PLACE * step[[one + count for one in chosen]]
        for axis in range(2):
            query[tile[axis], place.stop + 2 * axis] = TO_TILE
            query[half + tile[axis], place.stop + 2 * axis + 1] = TO_TILE
        query[whole, POINTED.stop - 1] = TO_TILE


def _look_away(attention: TextAttention, half: int, *, always: int, after_cells: int) -> None:
    """READERS look at the first token, which says nothing, where they have no part.

    Args:
        half: the channel that says which half the cell has: that of the other head looks away.
        always, after_cells: how much both do, after any token, and after a cell besides; 2 is what
            the other half adds, and one's own half takes away.
    """
    queries, keys = _heads(attention)
    gate = shape.CONFIG.text.head_dim - 1  # of a slow pair, the half that nothing else uses
    keys[1, gate, IS_START] = AWAY
    for head, sign in zip(READERS, (1, -1), strict=True):
        queries[head, gate, half] = 2 * sign * AWAY
        queries[head, gate, 0], queries[head, gate, IS_CELL] = always * AWAY, after_cells * AWAY


def _go_on(attention: TextAttention, embedding: Tensor) -> None:
    """Two heads say where the next character is, and what comes before it, from each half.

    After a cell, which is to be read first, their weight goes to the first token.
    """
    config = shape.CONFIG.text
    _look_away(attention, LAST_HALF, always=1, after_cells=3)
    left, right = READERS
    values = attention.value.weight.view(config.num_kv_heads, config.head_dim, -1)[1]
    out = attention.out.weight.view(config.hidden_size, config.num_heads, config.head_dim)
    values.zero_()
    out[:, READERS, :] = 0
    flags = len(FLAGS)
    end, newline = embedding[shape.IDS[shape.END]], embedding[ord("\n")]
    follows = torch.stack((embedding[ord(" ")], newline, end - newline), dim=1)
    chosen = [POINTED.start + channel for channel in next_channels()]
    for half, (head, of_flags) in enumerate(((left, LEFT_FLAGS), (right, RIGHT_FLAGS))):
        start = half * (NEXT + flags)
        place, flag = slice(start, start + NEXT), slice(start + NEXT, start + NEXT + flags)
        held = slice(POINTED.start + half * NEXT, POINTED.start + half * NEXT + NEXT)
        values[place, held] = torch.eye(NEXT)
        values[flag, of_flags] = torch.eye(flags)
        out[chosen, head, place] = LINKED * torch.eye(NEXT)
        out[RESERVED:, head, flag.start : flag.stop - 1] = FLAGGED / SPREAD * follows[RESERVED:]
        out[IS_OFF, head, flag.stop - 1] = FLAGGED


def _read(attention: TextAttention) -> None:
    """Two heads copy what the cell pointed at names: one its left half, one its right.

    The other one's weight goes to the first token, which says nothing; so does that of both where
    no cell has just been pointed at.
    """
    config = shape.CONFIG.text
    _look_away(attention, HALF, always=2, after_cells=-2)
    left, right = READERS
    generator = torch.Generator().manual_seed(5)
    free = config.hidden_size - RESERVED
    rows = torch.linalg.qr(torch.randn(free, config.head_dim, generator=generator)).Q.T
    values = attention.value.weight.view(config.num_kv_heads, config.head_dim, -1)
    out = attention.out.weight.view(config.hidden_size, config.num_heads, config.head_dim)
    values[1] = functional.pad(rows, (RESERVED, 0))
    out[RESERVED:, left] = COPIED * rows.T
    out[RESERVED:, right] = COPIED * _turn().T @ rows.T
