"""smolstack and its peers, each with its implementations of the parts."""

from __future__ import annotations

from smolstack.bench.peers.llama_cpp import LlamaCpp
from smolstack.bench.peers.onnxruntime import OnnxRuntime
from smolstack.bench.peers.openvino import OpenVino
from smolstack.bench.peers.ours import Ours
from smolstack.bench.peers.side import Side
from smolstack.bench.peers.transformers import Transformers
from smolstack.bench.workload import Setting

PEERS: tuple[type[Side], ...] = (Transformers, OnnxRuntime, OpenVino, LlamaCpp)


def sides(setting: Setting) -> list[Side]:
    """Return smolstack, followed by every installed peer."""
    return [Ours(setting), *(peer(setting) for peer in PEERS if not peer.missing())]


def absent() -> dict[str, list[str]]:
    """Return the peers that are not installed, with their missing packages."""
    return {peer.name: peer.missing() for peer in PEERS if peer.missing()}
