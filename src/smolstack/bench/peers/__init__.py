"""smolstack and its peers, each with its implementations of the parts."""

from __future__ import annotations

from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.peers.llama_cpp import LlamaCpp
from smolstack.bench.peers.onnxruntime import OnnxRuntime
from smolstack.bench.peers.openvino import OpenVino
from smolstack.bench.peers.ours import Ours
from smolstack.bench.peers.transformers import Transformers
from smolstack.bench.workload import Workload

PEERS: tuple[type[Implementation], ...] = (Transformers, OnnxRuntime, OpenVino, LlamaCpp)


def implementations(workload: Workload) -> list[Implementation]:
    """Return smolstack, followed by every installed peer."""
    return [Ours(workload), *(peer(workload) for peer in PEERS if not peer.missing())]


def absent() -> dict[str, list[str]]:
    """Return the peers that are not installed, with their missing packages."""
    return {peer.name: peer.missing() for peer in PEERS if peer.missing()}
