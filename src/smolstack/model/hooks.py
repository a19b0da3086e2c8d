"""Whether somebody observes or replaces a module's forward pass.

Where that is so, every module must be called as torch calls it; nothing may compute in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

# torch has no public way to ask whether a module has hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = tuple(f"_global{name}" for name in _HOOKS)


def is_watched(part: nn.Module) -> bool:
    """Whether a module has somebody else's hook, or its ``forward`` was replaced.

    transformers' own hooks collect states and attentions for calls that ask for them; those calls
    run on transformers' own modules anyway.
    """
    own = vars(part)
    if "_hf_hook" in own or "forward" in own:
        return True
    return any(_of_others(own.get(name)) for name in _HOOKS)


def watched_everywhere() -> bool:
    """Whether somebody registered a hook for every module of the process."""
    return any(_of_others(vars(torch_modules).get(name)) for name in _GLOBAL)


def any_watched(whole: nn.Module) -> bool:
    """Whether a module or any part of it is watched."""
    return watched_everywhere() or any(map(is_watched, whole.modules()))


def _of_others(hooks: Mapping[int, Any] | None) -> bool:
    if not hooks:
        return False
    owners = (str(getattr(hook, "__module__", "")) for hook in hooks.values())
    return not all(owner.startswith("transformers.") for owner in owners)
