"""Peers that are installed compute what smolstack computes; those that are not are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smolstack.bench import peers
from smolstack.bench.cases import PARTS, components
from smolstack.bench.peers import PEERS, absent
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.peers.llama_cpp import LlamaCpp
from smolstack.bench.peers.onnxruntime import OnnxRuntime
from smolstack.bench.peers.openvino import OpenVino
from smolstack.bench.peers.towers import Towers
from smolstack.bench.running import absences
from smolstack.bench.timing import OURS, measure
from smolstack.bench.workload import Workload, text_batch
from smolstack.vlm import load

# Of states whose spread is about 1: what each number format may lose in two layers.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.2}
TOWERS = [peer for peer in (OnnxRuntime, OpenVino) if not peer.missing()]
needs_llama_cpp = pytest.mark.skipif(
    bool(LlamaCpp.missing()), reason="llama-cpp-python compiles itself and is optional"
)


@pytest.mark.parametrize("peer", TOWERS, ids=lambda peer: peer.name)
def test_the_towers_of_onnxruntime_and_openvino_compute_the_same_states(
    tiny: Workload, peer: type[Towers]
) -> None:
    vision = tiny.config.vision
    tile = tiny.noise(1, 3, vision.image_size, vision.image_size)
    with torch.inference_mode():
        expected = load(tiny.folder, dtype="float32").model.vision(tile).numpy()
    for precision in peer.precisions():
        found = peer(tiny).result(precision, tile)
        assert np.abs(found - expected).max() < BOUNDS[precision], precision


def test_the_vision_case_holds_every_side_that_is_installed(
    tiny: Workload, everyone: list[Implementation]
) -> None:
    results = measure(next(PARTS["vision"](tiny, everyone)), rounds=1)
    expected = {OURS, *(peer.name for peer in PEERS[:3] if not peer.missing())}
    assert {r.name for r in results} == expected
    assert all(r.median > 0 and r.gflops > 0 and r.gigabytes > 0 for r in results)
    ours = {r.precision: r.median for r in results if r.ours}
    for result in results:
        assert result.ratios == pytest.approx({p: result.median / m for p, m in ours.items()})


@needs_llama_cpp
def test_llama_cpp_reads_the_same_decoder(tiny: Workload) -> None:
    ids = tiny.ids(12)
    model = load(tiny.folder, dtype="float32").model
    batch = text_batch(ids)
    with torch.inference_mode():
        scores = model.prefill(batch, model.new_cache(batch, 13))[0]
    implementation = LlamaCpp(tiny)
    try:
        best = implementation.top_tokens("bfloat16", ids)
    finally:
        implementation.close()
    assert len(set(best) & set(scores.topk(10).indices.tolist())) >= 8


@needs_llama_cpp
def test_llama_cpp_takes_part_in_prefill_and_decoding(
    tiny: Workload, everyone: list[Implementation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "PROMPTS", (20,))
    monkeypatch.setattr(components, "CONTEXTS", (20,))
    for part in ("prefill", "decode"):
        results = measure(next(PARTS[part](tiny, everyone)), rounds=1)
        forms = [r.contender for r in results if r.name == "llama.cpp"]
        assert forms == ["llama.cpp bfloat16 BF16", "llama.cpp int8 Q8_0", "llama.cpp int4 Q4_0"]


def test_peers_that_are_not_installed_are_named_and_take_no_part(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVino, "packages", ("onnx", "no-such-package"))
    assert absent()["openvino"] == ["no-such-package"]
    assert "openvino takes no part: no-such-package not installed" in absences(["vision"])
    assert "openvino" not in [implementation.name for implementation in peers.implementations(tiny)]
    assert absences(["quality"]) == []
