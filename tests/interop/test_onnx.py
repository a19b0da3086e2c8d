"""ONNX: what users of onnxruntime and transformers.js rely on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import smolstack
from smolstack.checkpoint.new import new_checkpoint
from smolstack.errors import CheckpointError, ConfigError, SmolstackError
from smolstack.family import PRESETS
from smolstack.interop.miniature import miniature
from smolstack.interop.onnx import export
from smolstack.interop.onnx.check import empty_cache

ROOT = Path(__file__).parent.parent.parent
# Runs the example with everything but its own needs out of reach.
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "smolstack", "transformers", "onnx", "jinja2")))
sys.argv = ["onnx_loop.py", *sys.argv[1:]]
runpy.run_path("examples/onnx_loop.py", run_name="__main__")
"""


def session(folder: Path, name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "onnx" / f"{name}.onnx"), options)


def answer_of_the_example(folder: Path, image: Path, question: str, *options: str) -> str:
    """What examples/onnx_loop.py prints."""
    arguments = [str(folder), str(image), question, "--threads", "1", *options]
    result = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    export(tiny_folder, folder, dtypes=["fp32", "fp16", "int8"])
    return folder


def test_the_folder_is_laid_out_as_published_exports_are(exported: Path) -> None:
    names = [
        f"{name}{suffix}.onnx"
        for name in ("decoder_model_merged", "embed_tokens", "vision_encoder")
        for suffix in ("", "_fp16", "_int8")
    ]
    assert sorted(p.name for p in (exported / "onnx").iterdir()) == sorted(names)
    for side in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "prompt.json",
    ):
        assert (exported / side).is_file()


def test_graphs_have_the_names_and_sizes_that_runtimes_look_for(exported: Path) -> None:
    def described(values: Any) -> dict[str, list[int | str]]:
        return {value.name: value.shape for value in values}

    vision = session(exported, "vision_encoder")
    assert described(vision.get_inputs()) == {
        "pixel_values": ["batch_size", "num_images", 3, 32, 32],
        "pixel_attention_mask": ["batch_size", "num_images", 32, 32],
    }
    assert described(vision.get_outputs()) == {"image_features": ["num_tiles", 4, 48]}
    embedding = session(exported, "embed_tokens")
    assert described(embedding.get_inputs()) == {"input_ids": ["batch_size", "sequence_length"]}
    assert described(embedding.get_outputs()) == {
        "inputs_embeds": ["batch_size", "sequence_length", 48]
    }
    decoder = session(exported, "decoder_model_merged")
    inputs, outputs = described(decoder.get_inputs()), described(decoder.get_outputs())
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    first = ["inputs_embeds", "attention_mask", "position_ids"]
    assert list(inputs) == [*first, *(f"past_key_values.{entry}" for entry in cache)]
    assert list(outputs) == ["logits", *(f"present.{entry}" for entry in cache)]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert outputs["logits"] == ["batch_size", "sequence_length", 904]


def test_numbers_outside_are_float32_in_every_format_but_the_cache(exported: Path) -> None:
    for dtype, cache in (("", "tensor(float)"), ("_fp16", "tensor(float16)")):
        decoder = session(exported, f"decoder_model_merged{dtype}")
        kinds = {value.name: value.type for value in decoder.get_inputs()}
        assert kinds["inputs_embeds"] == "tensor(float)"
        assert kinds["past_key_values.0.key"] == cache
    settings = json.loads((exported / "config.json").read_text())["transformers.js_config"]
    assert settings == {"dtype": "fp32", "kv_cache_dtype": {"fp16": "float16"}}


def test_smaller_formats_make_smaller_files(exported: Path) -> None:
    def size(suffix: str) -> int:
        return (exported / "onnx" / f"embed_tokens{suffix}.onnx").stat().st_size

    assert size("") > 1.8 * size("_fp16") > 3 * size("_int8")


def test_the_example_answers_as_smolstack_does_with_the_reader(tmp_path: Path) -> None:
    image, question = ROOT / "examples" / "number.png", "What does it say?"
    graphs = export(None, tmp_path / "reader", dtypes=["fp32", "int8"])
    assert max(graph.difference for graph in graphs if graph.precision == "fp32") < 1e-4
    vlm = smolstack.load(dtype="float32", device="cpu")
    expected = vlm.ask(image, question)
    assert expected.text
    found = answer_of_the_example(tmp_path / "reader", image, question, "--ids")
    assert [int(token) for token in found.split()] == list(expected.token_ids)
    assert answer_of_the_example(tmp_path / "reader", image, question) == expected.text.strip()
    in_8_bits = answer_of_the_example(
        tmp_path / "reader", image, question, "--dtype", "int8", "--ids"
    )
    assert in_8_bits.split()[0] == found.split()[0]


def test_the_example_answers_as_smolstack_does_with_several_tiles(tmp_path: Path) -> None:
    small = miniature(PRESETS["smolvlm-256m"], layers=1)
    small = replace(small, settings=replace(small.settings, longest_edge=1024))
    folder = new_checkpoint(small, tmp_path / "model", seed=5)
    export(folder, tmp_path / "exported")
    image = tmp_path / "wide.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 210, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(image)
    vlm = smolstack.load(folder)
    assert vlm.plan((210, 90)).tiles == 3
    expected = vlm.ask(image, "Describe it.", max_new_tokens=12)
    options = ("--ids", "--max-new-tokens", "12")
    found = answer_of_the_example(tmp_path / "exported", image, "Describe it.", *options)
    assert [int(token) for token in found.split()] == list(expected.token_ids)


def test_a_fine_tune_with_merged_adapters_answers_the_same(
    tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from smolstack.train import Data, Evaluation, Lora, Recipe, Stage, train

    image = tmp_path / "image.png"
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    recipe = Recipe(
        output=str(tmp_path / "run"),
        model=str(tiny_folder),
        data=Data(train="rows"),
        evaluation=Evaluation(answers=0),
        stages=(
            Stage(
                "lora",
                steps=6,
                batch=2,
                warmup=0,
                learning_rate=2e-2,
                lora=Lora(("decoder", "vision"), connector=True),
            ),
        ),
    )
    rows = [{"image": str(image), "text": f"answer {i}"} for i in range(2)]
    tuned = train(recipe, rows=rows, quiet=True).model
    export(tuned, tmp_path / "exported")
    question, options = "What does it say?", ("--ids", "--max-new-tokens", "8")
    answers = [
        list(smolstack.load(folder).ask(image, question, max_new_tokens=8).token_ids)
        for folder in (tuned, tiny_folder)
    ]
    found = answer_of_the_example(tmp_path / "exported", image, question, *options)
    assert [int(token) for token in found.split()] == answers[0] != answers[1]


def test_tiles_of_padding_have_no_features_and_part_of_a_tile_is_seen(
    exported: Path, tiny_vlm: smolstack.VLM
) -> None:
    pixels = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    mask = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    mask[0, 1] = False  # the first sequence has one image
    mask[1, 0, 16:] = False  # and the second's first one is half a tile high
    found = session(exported, "vision_encoder").run(
        None, {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()}
    )[0]
    real = torch.stack([pixels[0, 0], pixels[1, 0], pixels[1, 1]])
    with torch.inference_mode():
        expected = tiny_vlm.model.encode_tiles(real, [(4, 4), (2, 4), (4, 4)])
    assert found.shape == (3, 4, 48)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def both(folder: Path) -> tuple[Any, Any]:
    """The decoder and the token embeddings."""
    return session(folder, "decoder_model_merged"), session(folder, "embed_tokens")


def greedy(
    decoder: Any, embedding: Any, ids: np.ndarray[Any, Any], *, padding: int = 0, card: bool = False
) -> list[list[int]]:
    """Five tokens per row; as ``card``, the loop of published model cards with its shortcuts."""
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    positions = np.cumsum(mask, axis=1) - (0 if card else 1)
    past, tokens = empty_cache(decoder, len(ids)), ids
    answers = []
    for _ in range(5):
        embeds = embedding.run(None, {"input_ids": tokens})[0]
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        logits, *present = decoder.run(None, {**feeds, **past})
        past = dict(zip(past, present, strict=True))
        tokens = logits[:, -1].argmax(-1, keepdims=True)
        answers.append(tokens[:, 0].tolist())
        new = np.ones_like(tokens)
        mask = new if card else np.concatenate([mask, new], axis=1)
        positions = positions[:, -1:] + 1
    return [list(row) for row in zip(*answers, strict=True)]


def test_a_row_answers_the_same_alone_and_in_a_padded_batch(exported: Path) -> None:
    decoder, embedding = (
        session(exported, "decoder_model_merged"),
        session(exported, "embed_tokens"),
    )
    ids = np.random.default_rng(1).integers(3, 800, (2, 9))
    together = greedy(decoder, embedding, ids, padding=3)
    assert together[0] == greedy(decoder, embedding, ids[:1, 3:])[0]
    assert together[1] == greedy(decoder, embedding, ids[1:])[0]


def test_the_loop_of_published_model_cards_runs_as_it_is(exported: Path) -> None:
    """It counts positions from 1 and passes a mask of the new tokens alone."""
    decoder, embedding = (
        session(exported, "decoder_model_merged"),
        session(exported, "embed_tokens"),
    )
    ids = np.random.default_rng(2).integers(3, 800, (1, 11))
    assert greedy(decoder, embedding, ids, card=True) == greedy(decoder, embedding, ids)


@pytest.mark.parametrize("name", ["smolvlm2-500m", "smolvlm2-2.2b", "idefics3-8b"])
def test_other_shapes_are_exact_as_well(name: str, tmp_path: Path) -> None:
    """Tiles with pixels to spare, scales 2 and 3, rescaled rotary positions, an untied head."""
    folder = new_checkpoint(miniature(PRESETS[name], layers=1), tmp_path / "model", seed=2)
    graphs = export(folder, tmp_path / "exported")
    assert max(graph.difference for graph in graphs) < 1e-4


def test_a_head_tied_to_the_embedding_is_stored_once_per_graph(
    tied_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    export(tied_folder, tmp_path / "tied")
    export(tiny_folder, tmp_path / "untied")
    tied, untied = (
        (tmp_path / kind / "onnx" / "decoder_model_merged.onnx").stat().st_size
        for kind in ("tied", "untied")
    )
    assert abs(tied - untied) < 1000


def test_weights_beyond_a_graphs_limit_stand_beside_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolstack.interop.onnx.graph.MAX_INLINE_BYTES", 30_000)
    folder = tmp_path / "exported"
    graphs = export(tiny_folder, folder)
    assert sorted(p.name for p in (folder / "onnx").glob("*_data")) == [
        "decoder_model_merged.onnx_data",
        "embed_tokens.onnx_data",
        "vision_encoder.onnx_data",
    ]
    assert sum(graph.size for graph in graphs) == sum(
        file.stat().st_size for file in (folder / "onnx").iterdir()
    )
    settings = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"]["decoder_model_merged.onnx"] == 1


def test_a_graph_that_computes_something_else_is_never_written(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "smolstack.interop.onnx.decoder.rope_frequencies",
        lambda rope, head_dim: torch.ones(head_dim // 2),
    )
    with pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx .*torch"):
        export(tiny_folder, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_answers_in_no_text_is_refused(tmp_path: Path) -> None:
    folder = new_checkpoint(miniature(PRESETS["colsmol-256m"], layers=1), tmp_path / "model")
    with pytest.raises(ConfigError, match="embedding head"):
        export(folder, tmp_path / "exported")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [(["int4"], "dtype is 'int4', expected one or more of"), ([], "no dtype was given")],
)
def test_a_dtype_that_does_not_exist_is_refused(
    dtypes: list[str], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SmolstackError, match=message):
        export(tiny_folder, tmp_path / "exported", dtypes=dtypes)
    assert list(tmp_path.iterdir()) == []


def test_exporting_needs_no_transformers() -> None:
    program = (
        "import sys; import smolstack.interop.onnx;"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules;"
        "smolstack.interop.onnx.export; print('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "interop-onnx.md").read_text()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(block, "docs/interop-onnx.md", "exec"), {"__name__": "page"})
    reader = smolstack.load()
    tokens, width = reader.processor.tokens_per_tile, reader.config.text.hidden_size
    assert capsys.readouterr().out.endswith(f"(3, {tokens}, {width})\n")
