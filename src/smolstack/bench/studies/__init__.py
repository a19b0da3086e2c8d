"""Studies without peers: quality of precisions, growth of cost, and token budgets.

A study adds rows of plain data to tables, which are printed, saved as JSON and plotted.
"""

from __future__ import annotations

from collections.abc import Callable

from smolstack.bench.studies import budget, growth, quality
from smolstack.bench.studies.kept import Kept
from smolstack.bench.workload import Workload

STUDIES: dict[str, Callable[[Workload, Kept], object]] = {
    "quality": quality.study,
    "growth": growth.study,
    "budget": budget.study,
}
# The titles of their tables.
TABLES = {
    "quality": (quality.READER, quality.LOGITS),
    "growth": (growth.TITLE,),
    "budget": (budget.TITLE,),
}
