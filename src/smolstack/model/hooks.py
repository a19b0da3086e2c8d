"""Detects hooks on modules, and modules whose forward pass was replaced.

Such modules must be called in the way that torch calls them; a backend must not compute them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

# torch has no public way to ask whether a module has hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = tuple(f"_global{name}" for name in _HOOKS)


def is_hooked(part: nn.Module) -> bool:
    """Whether a module has a hook, or its ``forward`` was replaced.

    transformers' own hooks do not count. They collect states and attentions for calls that request
    them, which run on transformers' modules anyway.
    """
    own = vars(part)
    if "_hf_hook" in own or "forward" in own:
        return True
    return any(_of_others(own.get(name)) for name in _HOOKS)


def globally_hooked() -> bool:
    """Whether a global hook is registered, for all modules of the process."""
    return any(_of_others(vars(torch_modules).get(name)) for name in _GLOBAL)


def any_hooked(whole: nn.Module) -> bool:
    """Whether a module or any of its submodules is hooked."""
    return globally_hooked() or any(map(is_hooked, whole.modules()))


def _of_others(hooks: Mapping[int, Any] | None) -> bool:
    if not hooks:
        return False
    owners = (str(getattr(hook, "__module__", "")) for hook in hooks.values())
    return not all(owner.startswith("transformers.") for owner in owners)
