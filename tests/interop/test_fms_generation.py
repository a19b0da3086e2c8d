"""FMS's generate, compile and tensor parallelism with images in every row of a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch

import smolstack
from smolstack.batch import Batch
from smolstack.errors import AlignmentError, ConfigError, ContextLengthError, GridError
from smolstack.vlm import VLM

pytest.importorskip("fms")
pytest.importorskip("transformers")

from fms.models import get_model
from fms.utils.generation import generate
from tests.interop.fms_prompts import greedy, own_greedy, uneven_prompts

import smolstack.interop.fms as bridge
from smolstack.interop.reference import model_inputs, pixel_mask, share_model

BOUND = 1e-4
NEW = 6
# One of two processes: reads a checkpoint divided between them, writes logits and tokens. It leaves
# at once then: one of gloo's threads at times outlives the interpreter, which aborts.
WORKER = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
import torch.distributed as dist
rank, folder, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
import smolstack, smolstack.interop.fms as bridge
from fms.models import get_model
from tests.interop.fms_prompts import greedy, uneven_prompts
vlm = smolstack.load(folder)
model = get_model("hf_pretrained", model_path=folder).eval()
batch = vlm.processor.batch(uneven_prompts(vlm))
ids, extra = bridge.generation_inputs(batch)
with torch.inference_mode():
    logits = model(ids, **extra)
sizes = [sum(p.numel() for p in part.parameters())
         for part in (model.vision_tower.encoder, model.language_model.base_model.layers)]
tokens = greedy(model, batch, 6)
save_file({"logits": logits.contiguous(), "tokens": tokens.contiguous(),
           "sizes": torch.tensor(sizes)}, out / f"{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def model(tiny_vlm: VLM) -> Any:
    return bridge.from_smolstack(tiny_vlm.model)


@pytest.fixture(scope="module")
def batch(tiny_vlm: VLM) -> Batch:
    return tiny_vlm.processor.batch(uneven_prompts(tiny_vlm))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_every_row_gets_its_own_images_and_is_answered_as_alone(
    cached: bool, model: Any, tiny_vlm: VLM, batch: Batch
) -> None:
    together = greedy(model, batch, NEW, use_cache=cached)
    alone = [
        greedy(model, tiny_vlm.processor.batch([prompt]), NEW, use_cache=cached)
        for prompt in uneven_prompts(tiny_vlm)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, own_greedy(tiny_vlm.model, batch, NEW))


def test_inputs_of_transformers_processors_are_read_as_they_come(model: Any, batch: Batch) -> None:
    ids, extra = bridge.generation_inputs(batch)
    padded = model_inputs(batch)["pixel_values"]
    assert padded.dim() == 5
    flat = model.merge(ids, pixel_values=extra["pixel_values"])
    assert torch.equal(model.merge(ids, pixel_values=padded), flat)
    masks = torch.zeros(padded.shape[0], padded.shape[1], *padded.shape[3:], dtype=torch.bool)
    for row, tiles in enumerate(batch.tiles_per_sequence):
        masks[row, :tiles] = True
    assert torch.equal(model.merge(ids, pixel_values=padded, pixel_attention_mask=masks), flat)


def test_visual_tokens_made_before_are_spliced_as_pixels_are(model: Any, batch: Batch) -> None:
    ids, extra = bridge.generation_inputs(batch)
    visual = model.encode_tiles(batch.tiles)
    merged = model.merge(ids, visual_tokens=visual)
    assert torch.equal(merged, model.merge(ids, pixel_values=extra["pixel_values"]))


def test_generate_works_without_the_hook_too(model: Any, batch: Batch) -> None:
    ids, extra = bridge.generation_inputs(batch)
    out = generate(
        model, ids, max_new_tokens=NEW, do_sample=False, use_cache=True, extra_kwargs=extra
    )
    assert torch.equal(out[:, ids.shape[1] :], greedy(model, batch, NEW))


def test_partly_filled_tiles_are_seen_as_smolstack_and_transformers_see_them(
    model: Any, tiny_vlm: VLM, batch: Batch
) -> None:
    from dataclasses import replace

    # Grids whose positions transformers' floating-point buckets place where integers do.
    grids = [(4, 2), (2, 4), (4, 4), (1, 1), (2, 2), (4, 1), (1, 4), (2, 1)]
    count = batch.tiles.shape[0]
    chosen = tuple(grids[i % len(grids)] for i in range(count))
    mask = pixel_mask(list(chosen), 32, 8)
    tiles = batch.tiles * mask[:, None]
    partly = replace(batch, tiles=tiles, tile_grids=chosen)
    ids, extra = bridge.generation_inputs(partly)
    padded = model_inputs(partly)
    masks = torch.zeros(*padded["pixel_values"].shape[:2], 32, 32, dtype=torch.bool)
    start = 0
    for row, number in enumerate(batch.tiles_per_sequence):
        masks[row, :number] = mask[start : start + number]
        start += number
    real = batch.attention_mask
    with torch.inference_mode():
        found = model(ids, **extra)[real]
        ours = tiny_vlm.model(partly)[real]
        full = tiny_vlm.model(batch)[real]
        by_mask = model.merge(ids, pixel_values=padded["pixel_values"], pixel_attention_mask=masks)
        theirs = share_model(tiny_vlm.model)(**padded, pixel_attention_mask=masks).logits[real]
    assert (ours - full).abs().max() > 0.01
    assert (found - ours).abs().max() < BOUND
    assert (found - theirs).abs().max() < BOUND
    assert torch.equal(by_mask, model.merge(ids, pixel_values=tiles, tile_grids=chosen))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_an_image_token_that_the_model_writes_is_an_ordinary_token(
    cached: bool, model: Any, tiny_vlm: VLM, batch: Batch
) -> None:
    image = tiny_vlm.config.image_token_id

    def write_an_image_token(
        position: int, _logits: Any, token: torch.Tensor, kwargs: MutableMapping[str, Any]
    ) -> tuple[torch.Tensor, MutableMapping[str, Any]]:
        second = position == batch.token_ids.shape[1] + 1
        return (torch.full_like(token, image) if second else token), kwargs

    out = greedy(model, batch, NEW, use_cache=cached, post_iteration_hook=write_an_image_token)
    assert (out[:, 1] == image).all()
    with torch.inference_mode():
        cache = tiny_vlm.model.new_cache(batch, batch.token_ids.shape[1] + NEW)
        tiny_vlm.model.prefill(batch, cache)
        for place in range(2):
            logits = tiny_vlm.model.decode_one_token(out[:, place], cache)
    assert torch.equal(out[:, 2], logits.argmax(dim=-1))


def test_a_compiled_model_writes_the_same(model: Any, batch: Batch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, extra = bridge.generation_inputs(batch)
    with torch.inference_mode():
        out = generate(
            compiled,
            ids,
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            contiguous_cache=True,
            prepare_model_inputs_hook=model.prepare_inputs_for_generation,
            extra_kwargs=extra,
        )
    assert torch.equal(out[:, ids.shape[1] :], greedy(model, batch, NEW))


@pytest.mark.parametrize("form", ["flat", "padded", "masked", "grids", "encoded"])
def test_images_are_compiled_into_the_same_graph(
    form: str, model: Any, tiny_vlm: VLM, batch: Batch
) -> None:
    ids, extra = bridge.generation_inputs(batch)
    attention = {name: extra[name] for name in ("mask", "position_ids") if name in extra}
    tiles, count = batch.tiles, batch.tiles.shape[0]
    padded = model_inputs(batch)["pixel_values"]
    masks = torch.zeros(*padded.shape[:2], 32, 32, dtype=torch.bool)
    for row, number in enumerate(batch.tiles_per_sequence):
        masks[row, :number, :24, :16] = True
    forms: dict[str, dict[str, Any]] = {
        "flat": {"pixel_values": tiles, "tiles_per_sequence": batch.tiles_per_sequence},
        "padded": {"pixel_values": padded},
        "masked": {"pixel_values": padded * masks[:, :, None], "pixel_attention_mask": masks},
        "grids": {"pixel_values": tiles, "tile_grids": ((3, 2),) * count},
        "encoded": {"visual_tokens": torch.randn(count, 4, 48)},
    }
    images = forms[form]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        expected = model(ids, **images, **attention)
        torch.testing.assert_close(compiled(ids, **images, **attention), expected)
        if form == "flat":
            with pytest.raises(RuntimeError, match="differ in number"):
                compiled(ids, pixel_values=tiles[1:], **attention)


def test_pixels_and_image_tokens_that_disagree_are_refused_by_row(model: Any, batch: Batch) -> None:
    ids, _ = bridge.generation_inputs(batch)
    tiles, counts = batch.tiles, batch.tiles_per_sequence
    padded = model_inputs(batch)["pixel_values"]
    with pytest.raises(AlignmentError, match=rf"{sum(counts)} in total; pixel_values contain 1"):
        model.merge(ids, pixel_values=tiles[:1])
    with pytest.raises(AlignmentError, match=r"sequence 0 has .* image tokens, expected 4 "):
        model.merge(ids, pixel_values=tiles, tiles_per_sequence=(1, 0, sum(counts) - 1))
    crowded = padded.clone()
    crowded[1, 0] = 1.0
    with pytest.raises(AlignmentError, match="sequence 1 has pixels in tile 0"):
        model.merge(ids, pixel_values=crowded)
    with pytest.raises(AlignmentError, match="up to 1 for each of 3"):
        model.merge(ids, pixel_values=padded[:, :1])
    odd = ids.clone()
    odd[1, -1] = model.config.image_token_id
    with pytest.raises(AlignmentError, match="sequence 1 has 1 image tokens, expected 0"):
        model.merge(odd, pixel_values=tiles)
    with pytest.raises(GridError, match=r"\(N, 3, P, P\).*\(B, tiles, 3, P, P\)"):
        model.merge(ids, pixel_values=tiles[0])
    with pytest.raises(GridError, match=r"8x8.*4x4"):
        model.encode_tiles(torch.zeros(1, 3, 64, 64))
    ragged = torch.zeros(tiles.shape[0], 32, 32, dtype=torch.bool)
    ragged[:, :8, :8] = ragged[:, 16:, 16:] = True
    with pytest.raises(GridError, match="tile 0 "):
        model.merge(ids, pixel_values=tiles, pixel_attention_mask=ragged)


def test_a_prompt_with_images_is_never_cut_in_the_middle(model: Any, batch: Batch) -> None:
    with pytest.raises(ContextLengthError, match="cuts off the beginning of a prompt"):
        greedy(model, batch, NEW, use_cache=False, max_seq_len=batch.token_ids.shape[1] + 2)


def test_the_tower_alone_makes_the_embeddings_for_a_decoder_elsewhere(
    tiny_folder: Path, model: Any, batch: Batch
) -> None:
    alone = get_model("hf_pretrained", model_path=str(tiny_folder), vision_only=True)
    assert not hasattr(alone, "language_model")
    ids, extra = bridge.generation_inputs(batch)
    embeddings, rest = alone.prepare_inputs_for_generation(0, ids, {**extra, "use_cache": True})
    whole = bridge.generation_inputs(batch)[1]
    assert torch.equal(embeddings, model.merge(ids, pixel_values=whole["pixel_values"]))
    assert "pixel_values" not in rest
    with pytest.raises(ConfigError, match="a vision_only model has no decoder"):
        alone(embeddings)


def test_two_processes_share_the_layers_and_write_what_one_writes(
    tiny_folder: Path, model: Any, batch: Batch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tiny_folder), str(tmp_path)],
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0, output
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    ids, extra = bridge.generation_inputs(batch)
    with torch.inference_mode():
        logits = model(ids, **extra)
    real = batch.attention_mask
    written = greedy(model, batch, NEW)
    parts = (model.vision_tower.encoder, model.language_model.base_model.layers)
    for rank in (0, 1):
        assert (found[rank]["logits"] - logits)[real].abs().max() < BOUND
        assert torch.equal(found[rank]["tokens"], written)
        for size, part in zip(found[rank]["sizes"].tolist(), parts, strict=True):
            assert size < 0.6 * sum(p.numel() for p in part.parameters())


def test_processes_that_do_not_divide_the_heads_are_refused_in_words() -> None:
    from fms.distributed.strategy import TensorParallelStrategy

    from smolstack.family import PRESETS

    class Group:
        def size(self) -> int:
            return 2

    strategy = TensorParallelStrategy.__new__(TensorParallelStrategy)
    strategy.group = Group()
    config = bridge.to_fms_config(PRESETS["smolvlm-256m"].config)
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"2 processes.* 9 attention"),
    ):
        bridge.Idefics3(config, distributed_strategy=strategy)


def test_a_retrieval_model_writes_no_text() -> None:
    from smolstack.checkpoint.new import random_model
    from smolstack.family import PRESETS
    from smolstack.interop.miniature import miniature

    retrieval = bridge.from_smolstack(random_model(miniature(PRESETS["colsmol-256m"]).config))
    with pytest.raises(ConfigError, match="embedding head"):
        retrieval.prepare_inputs_for_generation(0, torch.zeros(1, 2, dtype=torch.long), {})


def test_fms_says_when_it_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['fms'] = None\n"
        "try:\n    import smolstack.interop.fms\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'smolstack[fms]'" in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_checkpoint_that_lacks_or_adds_weights_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from smolstack.errors import CheckpointError

    weights = load_file(tiny_folder / "model.safetensors")
    sizes = vars(bridge.to_fms_config(smolstack.load(tiny_folder).config))

    def load(state: dict[str, torch.Tensor]) -> Any:
        save_file(state, tmp_path / "model.safetensors")
        return get_model("idefics3", "smolvlm-256m", str(tmp_path), source="hf", **sizes)

    norm = "model.text_model.norm.weight"
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*base_model\.dec_norm"):
        load({name: tensor for name, tensor in weights.items() if name != norm})
    with pytest.raises(CheckpointError, match=r"'model.resampler.weight' is not a weight"):
        load({**weights, "model.resampler.weight": weights[norm].clone()})


def test_configs_that_fms_cannot_build_are_refused(tiny_vlm: VLM) -> None:
    from dataclasses import replace

    from smolstack.config import RopeConfig

    config = tiny_vlm.config
    linear = replace(config.text, rope=RopeConfig(theta=10000.0, type="linear", factor=2.0))
    with pytest.raises(ConfigError, match="rope_type is 'linear'"):
        bridge.to_fms_config(replace(config, text=linear))
    wide = replace(config.text, head_dim=16)
    with pytest.raises(ConfigError, match="head_dim is 16"):
        bridge.to_fms_config(replace(config, text=wide))
