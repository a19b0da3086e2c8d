"""What is no race: how good each precision is, how cost grows, what a budget of tokens costs.

A study gives rows of plain data, which are printed, kept as JSON and plotted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from smolstack.bench.studies import budget, growth, quality
from smolstack.bench.workload import Setting

Row: TypeAlias = dict[str, Any]

STUDIES: dict[str, Callable[[Setting], dict[str, list[Row]]]] = {
    "quality": quality.study,
    "growth": growth.study,
    "budget": budget.study,
}
