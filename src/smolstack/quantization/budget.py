"""Choose each layer's bits within an average bit budget."""

from __future__ import annotations

from collections.abc import Mapping

from smolstack.config.quantization import Format
from smolstack.errors import ConfigError


def average_bits(formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Average bits per weight of some layers, including scales and zero points.

    Args:
        formats: by layer name.
        shapes: (O, I) of at least these layers.
    """
    weights = sum(shapes[name][0] * shapes[name][1] for name in formats)
    return sum(_bits(shapes[name], form) for name, form in formats.items()) / max(weights, 1)


def choose_formats(
    costs: Mapping[str, Mapping[Format, float]],
    shapes: Mapping[str, tuple[int, int]],
    bits: float,
) -> dict[str, Format]:
    """Choose the formats with the lowest total cost within a budget.

    A knapsack, solved greedily: every layer starts in its smallest format, and the step to a larger
    one that saves most per bit is taken next, as long as one fits. The result is at most one step
    from the optimum; it is therefore computed once for each format of the largest layer, which is
    most of some models.

    Args:
        costs: cost of each format of a layer, by layer name.
        shapes: (O, I), by layer name.
        bits: average bits per weight, including scales and zero points.

    Raises:
        ConfigError: the smallest formats exceed the budget.
    """
    smallest = {name: min(of, key=lambda f: _bits(shapes[name], f)) for name, of in costs.items()}
    room = bits * sum(shapes[name][0] * shapes[name][1] for name in costs)
    largest = max(costs, key=lambda name: shapes[name][0] * shapes[name][1])
    best: dict[str, Format] | None = None
    for form in costs[largest]:
        fixed = {**costs, largest: {form: costs[largest][form]}}
        found = _greedy({**smallest, largest: form}, fixed, shapes, room)
        if found is not None and (best is None or _total(costs, found) < _total(costs, best)):
            best = found
    if best is None:
        raise ConfigError(
            f"{bits:g} bits per weight are too few: the smallest formats take "
            f"{average_bits(smallest, shapes):.2f}, scales and zero points included"
        )
    return best


def _greedy(
    chosen: dict[str, Format],
    costs: Mapping[str, Mapping[Format, float]],
    shapes: Mapping[str, tuple[int, int]],
    room: float,
) -> dict[str, Format] | None:
    """Choose formats within a total number of bits; None if even the smallest ones exceed it."""
    left = room - sum(_bits(shapes[name], form) for name, form in chosen.items())
    if left < -1e-6 * room:
        return None
    while (step := _best_step(chosen, costs, shapes, left)) is not None:
        name, form = step
        left -= _bits(shapes[name], form) - _bits(shapes[name], chosen[name])
        chosen[name] = form
    return chosen


def _total(costs: Mapping[str, Mapping[Format, float]], chosen: Mapping[str, Format]) -> float:
    return sum(costs[name][form] for name, form in chosen.items())


def _best_step(
    chosen: Mapping[str, Format],
    costs: Mapping[str, Mapping[Format, float]],
    shapes: Mapping[str, tuple[int, int]],
    left: float,
) -> tuple[str, Format] | None:
    best, found = 0.0, None
    for name, of in costs.items():
        now = chosen[name]
        for form, cost in of.items():
            more = _bits(shapes[name], form) - _bits(shapes[name], now)
            saved = (of[now] - cost) / more if more > 0 else 0.0
            if more <= left and saved > best:
                best, found = saved, (name, form)
    return found


def _bits(shape: tuple[int, int], form: Format) -> float:
    return shape[0] * shape[1] * form.bits_per_weight(shape[1])
