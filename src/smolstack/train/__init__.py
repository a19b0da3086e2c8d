"""Training: recipes in, checkpoint folders out. Needs the extra ``train``.

>>> from smolstack.train import Recipe, train
>>> train(Recipe.read("recipe.toml"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolstack.bridging import bridge_towers
    from smolstack.train.recipe import Data, Evaluation, Lora, Recipe, Stage
    from smolstack.train.trainer import Trained, train

_HOMES = {
    "Data": "recipe",
    "Evaluation": "recipe",
    "Lora": "recipe",
    "Recipe": "recipe",
    "Stage": "recipe",
    "Trained": "trainer",
    "bridge_towers": "smolstack.bridging",
    "train": "trainer",
}
__all__ = ["Data", "Evaluation", "Lora", "Recipe", "Stage", "Trained", "bridge_towers", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolstack.train' has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(import_module(home if "." in home else f"smolstack.train.{home}"), name)
    globals()[name] = value
    return value
