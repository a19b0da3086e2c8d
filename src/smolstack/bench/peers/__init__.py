"""smolstack and its peers, each with its way to do the parts that it can do."""

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
    """smolstack first, then every peer that is installed."""
    return [Ours(setting), *(peer(setting) for peer in PEERS if not peer.missing())]


def absent() -> dict[str, list[str]]:
    """Peers that are not installed, with the packages that they lack."""
    return {peer.name: peer.missing() for peer in PEERS if peer.missing()}
