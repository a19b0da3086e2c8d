"""Studies without peers: quality of precisions, growth of cost, and token budgets.

A study returns rows of plain data, which are printed, saved as JSON and plotted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from smolstack.bench.studies import budget, growth, quality
from smolstack.bench.workload import Workload

Row: TypeAlias = dict[str, Any]

STUDIES: dict[str, Callable[[Workload], dict[str, list[Row]]]] = {
    "quality": quality.study,
    "growth": growth.study,
    "budget": budget.study,
}
