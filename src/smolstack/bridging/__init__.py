"""Bridging: combines one model's vision tower with another's text tower by a new connector.

>>> from smolstack.bridging import bridge_towers
>>> bridge_towers("siglip-base-patch16-512", "SmolLM2-135M-Instruct", "bridged")
"""

from __future__ import annotations

from smolstack.bridging.bridge import Bridge, bridge_towers, plan_bridge

__all__ = ["Bridge", "bridge_towers", "plan_bridge"]
