"""GGUF files open as llama.cpp's users have them; broken ones are refused in one sentence."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoint.gguf_files import write_gguf

import smolstack
from smolstack.checkpoint.diff import diff_checkpoints
from smolstack.checkpoint.gguf_file import read_gguf
from smolstack.checkpoint.hub import ModelPath
from smolstack.checkpoint.inspect import inspect_checkpoint
from smolstack.checkpoint.new import side_files
from smolstack.checkpoint.save import save_checkpoint
from smolstack.checkpoint.verification.checkpoint import check_checkpoint
from smolstack.errors import CheckpointError
from smolstack.family import Preset
from smolstack.interop.reference import load_model
from smolstack.interop.weights import sharp_model

NUMBER = "examples/number.png"
QUESTION = "What does it say, in 1234 words?\n\nIt's a test."


@pytest.fixture(scope="session")
def wide_folder(tiny_preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with rows of whole blocks of 32, and answers that differ."""
    text = replace(tiny_preset.config.text, hidden_size=64, num_heads=8, head_dim=8)
    preset = replace(tiny_preset, config=replace(tiny_preset.config, text=text))
    model = sharp_model(preset.config, seed=5)
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_checkpoint(folder, model, side_files(preset, preset.config))


@pytest.fixture(scope="session")
def files(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_gguf(wide_folder, tmp_path_factory.mktemp("gguf"))


def test_a_pair_of_files_is_the_checkpoint_that_it_was_made_from(
    files: tuple[Path, Path], wide_folder: Path
) -> None:
    ours, theirs = smolstack.load(files[0], mmproj=files[1]), smolstack.load(wide_folder)
    assert ours.config == theirs.config
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.plan((1000, 700)) == theirs.plan((1000, 700))
    prompts = [vlm.processor.prepare((NUMBER, QUESTION)).token_ids for vlm in (ours, theirs)]
    assert prompts[0] == prompts[1]
    answers = [vlm.ask(NUMBER, QUESTION, max_new_tokens=12).token_ids for vlm in (ours, theirs)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_logits_are_those_of_transformers_on_the_dequantized_weights(
    kind: str, wide_folder: Path, tmp_path: Path
) -> None:
    text, tower = write_gguf(wide_folder, tmp_path / "gguf", kind)
    vlm = smolstack.load(text, mmproj=tower, dtype="float32")
    plain = tmp_path / "plain"
    save_checkpoint(plain, vlm.model, {p.name: p.read_bytes() for p in side(wide_folder)})
    for name, weight in load_file(wide_folder / "model.safetensors").items():
        found = load_file(plain / "model.safetensors")[name]
        matrix = weight.dim() == 2 and "vision" not in name and "connector" not in name
        if kind.startswith("Q") and matrix:
            number = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quants.quantize(weight.numpy(), number)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, number))
            assert torch.equal(found, expected), name
    batch = vlm.processor([(NUMBER, QUESTION)])
    with torch.no_grad():
        ours = vlm.model(batch)
        theirs = load_model(plain)(
            input_ids=batch.token_ids,
            attention_mask=batch.attention_mask.long(),
            pixel_values=batch.tiles[None],
        ).logits
    assert (ours - theirs).abs().max() < 1e-4


def side(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name not in ("config.json", "model.safetensors")]


def test_verify_inspect_and_diff_read_it(wide_folder: Path, tmp_path: Path) -> None:
    text, tower = write_gguf(wide_folder, tmp_path / "gguf", "Q8_0")
    where = ModelPath(text, mmproj=tower)
    checks = check_checkpoint(where, values=True)
    assert not [problem for check in checks for problem in check.problems]
    found = inspect_checkpoint(where)
    assert found.kind == "GGUF"
    assert found.stored["Q8_0"] > found.stored["float32"] > 0
    assert set(found.weight_files) == {"model.gguf", "mmproj.gguf"}
    assert found.total_parameters == inspect_checkpoint(wide_folder).total_parameters
    parts = {part.name: part for part in diff_checkpoints(wide_folder, where).parts}
    assert 0 < parts["decoder layers"].relative < 0.01
    assert parts["connector"].changed == 0


def test_it_is_saved_as_a_folder(
    files: tuple[Path, Path], wide_folder: Path, tmp_path: Path
) -> None:
    vlm = smolstack.load(files[0], mmproj=files[1], dtype="float32")
    saved = smolstack.load(vlm.save(tmp_path / "saved"))
    expected = smolstack.load(wide_folder).ask(NUMBER, QUESTION, max_new_tokens=8).token_ids
    assert saved.ask(NUMBER, QUESTION, max_new_tokens=8).token_ids == expected


def test_each_file_is_asked_for_by_name(files: tuple[Path, Path], wide_folder: Path) -> None:
    text, tower = files
    with pytest.raises(CheckpointError, match=r"--mmproj.*mmproj\.gguf"):
        smolstack.load(text)
    with pytest.raises(CheckpointError, match="vision tower; pass it as mmproj"):
        smolstack.load(tower, mmproj=text)
    with pytest.raises(CheckpointError, match=r"'llama'.*\(clip\)"):
        smolstack.load(text, mmproj=text)
    with pytest.raises(CheckpointError, match=r"GGUF file.*vision tower"):
        smolstack.load(wide_folder, mmproj=tower)
    with pytest.raises(CheckpointError, match="expected a GGUF file"):
        smolstack.load(text, mmproj="nowhere.gguf")


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def header(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def tensor(
    name: bytes = b"a", lengths: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    shape = struct.pack(f"<I{len(lengths)}Q", len(lengths), *lengths)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


ROOM = bytes(512)
HUGE = 2**63
ARRAY, TEXT = struct.pack("<I", 9), struct.pack("<I", 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"PK\3\4" + ROOM, "begins with b'PK"),
        (header(version=1) + ROOM, "is of version 1, expected a little-endian GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + ROOM, "is big-endian"),
        (header(tensors=HUGE) + ROOM, f"declares {HUGE} tensors, more than its"),
        (header(pairs=HUGE) + ROOM, f"declares {HUGE} metadata values"),
        (header(pairs=1) + string(b"k", HUGE) + ROOM, "ends at .* within a metadata key"),
        (header(pairs=1) + string(b"k") + TEXT + string(b"v", HUGE) + ROOM, "within k, which has"),
        (header(pairs=1) + string(b"k") + TEXT + string(b"\xff") + ROOM, "k is not valid UTF-8"),
        (header(pairs=1) + string(b"k") + struct.pack("<I", 77) + ROOM, "has k of type 77"),
        (
            header(pairs=1) + string(b"k") + ARRAY + struct.pack("<IQ", 4, HUGE) + ROOM,
            f"declares {HUGE} k, more",
        ),
        (
            header(pairs=1) + string(b"k") + ARRAY + struct.pack("<IQ", 8, HUGE) + ROOM,
            f"declares {HUGE} k, more",
        ),
        (
            header(pairs=1) + string(b"k") + ARRAY + struct.pack("<IQ", 9, 1) * 9 + ROOM,
            "has k of type 9",
        ),
        (header(pairs=2) + 2 * (string(b"k") + TEXT + string(b"v")) + ROOM, "has k twice"),
        (
            header(pairs=1) + string(b"general.alignment") + struct.pack("<II", 4, 0) + ROOM,
            "general.alignment 0, expected a power of two",
        ),
        (header(tensors=1) + tensor(lengths=(HUGE, HUGE)) + ROOM, "the file ends at"),
        (header(tensors=1) + tensor(lengths=(0, 4)) + ROOM, "expected lengths of at least 1"),
        (header(tensors=1) + tensor(lengths=(31,), kind=8) + ROOM, "rows of whole blocks of 32"),
        (header(tensors=1) + tensor(offset=2**40) + ROOM, "the file ends at"),
        (header(tensors=1) + tensor(offset=4) + ROOM, "begin at multiples of 32"),
        (header(tensors=1) + tensor(kind=999) + ROOM, "in number format 999"),
        (header(tensors=2) + 2 * tensor() + ROOM, "has the tensor a twice"),
        (header(tensors=1) + tensor(lengths=(1,) * 9) + ROOM, "with 9 dimensions"),
        (header() + ROOM, "has no general.architecture"),
    ],
)
def test_a_hostile_file_is_refused_in_one_sentence(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        smolstack.load(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("part", [0, 1])
def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(
    part: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    content = files[part].read_bytes()
    both = list(files)
    both[part] = tmp_path / "cut.gguf"
    for size in [*range(0, 4000, 397), len(content) // 2, len(content) - 40]:
        both[part].write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            smolstack.load(both[0], mmproj=both[1])


def spoilt(path: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A copy with other metadata (None: without it) and the same tensors."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, changes.pop("general.architecture", architecture))
    for name, one in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture")) or name in changes:
            continue
        kind, inner = one.types[0], one.types[-1] if len(one.types) > 1 else None
        writer.add_key_value(name, one.contents(), kind, inner)
    for name, value in changes.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for held in reader.tensors:
        writer.add_tensor(held.name, np.array(held.data), raw_dtype=held.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (0, {"general.architecture": "qwen2"}, "holds 'qwen2', expected a language model"),
        (0, {"llama.rope.freq_base": None}, "has no llama.rope.freq_base"),
        (0, {"llama.block_count": "two"}, "llama.block_count 'two'"),
        (0, {"llama.attention.head_count": 0}, "head_count 0"),
        (0, {"llama.rope.scaling.type": "yarn"}, "'yarn', expected none or linear"),
        (0, {"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2', expected"),
        (0, {"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, .* and 904 token types"),
        (0, {"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id 9999, but only 904 tokens"),
        (0, {"split.count": 3}, "is one of 3 parts; merge them with llama-gguf-split"),
        (1, {"clip.projector_type": "mlp"}, "projector of type 'mlp', expected 'idefics3'"),
        (1, {"clip.vision.projection_dim": 77}, "belong to different models"),
        (1, {"clip.vision.projector.scale_factor": None}, "has no clip.vision.projector"),
    ],
)
def test_what_it_says_of_itself_is_checked(
    part: int, changes: dict[str, Any], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    both = list(files)
    both[part] = spoilt(files[part], tmp_path / "spoilt.gguf", dict(changes))
    with pytest.raises(CheckpointError, match=message):
        smolstack.load(both[0], mmproj=both[1])


def test_a_tower_without_its_longest_edge_shows_images_unsplit_and_says_so(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    key = "clip.vision.preproc_image_size"
    tower = spoilt(files[1], tmp_path / "old.gguf", {key: None})
    assert smolstack.load(files[0], mmproj=tower).plan((1000, 700)).tiles == 1
    remarks = check_checkpoint(ModelPath(files[0], mmproj=tower))[0].remarks
    assert remarks == [f"old.gguf has no {key}; images are not split into tiles"]


def test_the_header_alone_is_read_and_weights_are_mapped(files: tuple[Path, Path]) -> None:
    found = read_gguf(files[0])
    rows = found.rows(found.tensors["token_embd.weight"])
    assert rows.shape == (904, 64 * 4)
    assert isinstance(rows.base, np.memmap)


def test_weights_that_contradict_the_metadata_are_listed(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    text = spoilt(files[0], tmp_path / "deep.gguf", {"llama.block_count": 3})
    with pytest.raises(CheckpointError, match=r"9 missing: model\.text_model\.layers\.2\."):
        smolstack.load(text, mmproj=files[1])


def test_the_command_line_takes_both(files: tuple[Path, Path]) -> None:
    from typer.testing import CliRunner

    from smolstack.cli.app import app

    model = ["--model", str(files[0]), "--mmproj", str(files[1])]
    done = CliRunner().invoke(app, ["ask", NUMBER, "What?", *model, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0
    for command in (["verify", *model[1:]], ["inspect", *model[1:]], ["plan", "64x64", *model]):
        assert CliRunner().invoke(app, command).exit_code == 0
