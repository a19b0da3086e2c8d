"""Checkpoint folders: loading, saving, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import smolstack
from smolstack.checkpoint import keys
from smolstack.checkpoint.hub import READER, find
from smolstack.checkpoint.load import choose_dtype
from smolstack.checkpoint.new import new_checkpoint
from smolstack.checkpoint.save import save_checkpoint
from smolstack.checkpoint.weights import Entry, read_entries
from smolstack.errors import CheckpointError, ConfigError, SmolstackError
from smolstack.family import PRESETS, Preset
from smolstack.model.vlm import VisionLanguageModel


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_weight_has_one_name_in_each_world() -> None:
    for preset in PRESETS.values():
        config = preset.config.with_layers(2, 2)
        with torch.device("meta"):
            model = VisionLanguageModel(config)
        embedding = config.embedding_dim is not None
        for name in model.state_dict():
            theirs = keys.to_hf(name, embedding_head=embedding)
            assert keys.from_hf(theirs) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_model.encoder.layers.0.self_attn.q_proj.scale",
        "model.text_model.layers.x.mlp.up_proj.weight",
        "model.text_model.layers.0.mlp.up_proj",
        "model.resampler.weight",
        "",
    ],
)
def test_an_unknown_weight_name_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a weight of the"):
        keys.from_hf(name)
    assert keys.unknown_to_hf([name]) == [name]


def test_the_connector_is_stored_under_its_published_name() -> None:
    assert keys.to_hf("connector.proj.weight") == (
        "model.connector.modality_projection.proj.weight"
    )


def test_a_saved_checkpoint_gives_the_same_answers(
    tiny_vlm: smolstack.VLM, tmp_path: Path, images: list[Any]
) -> None:
    copy = smolstack.load(tiny_vlm.save(tmp_path / "copy"))
    for name, tensor in tiny_vlm.model.state_dict().items():
        assert torch.equal(tensor, copy.model.state_dict()[name])
    answers = [vlm.ask(images[0], "What?", max_new_tokens=8) for vlm in (tiny_vlm, copy)]
    assert answers[0].token_ids == answers[1].token_ids


def test_weights_may_be_spread_over_several_files(
    tiny_vlm: smolstack.VLM, tiny_folder: Path, tmp_path: Path
) -> None:
    side = {"tokenizer.json": b"{}"}
    folder = save_checkpoint(tmp_path / "parts", tiny_vlm.model, side, max_shard_bytes=50_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    parts, single = read_entries(folder), read_entries(tiny_folder)
    assert {name: entry.shape for name, entry in parts.items()} == {
        name: entry.shape for name, entry in single.items()
    }


def test_nothing_is_written_over_a_folder_unless_asked(
    tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty"):
        tiny_vlm.save(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    tiny_vlm.save(tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_save_that_fails_leaves_nothing_behind(tiny_vlm: smolstack.VLM, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "model", tiny_vlm.model, {"no/such/folder": b""})
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_bytes(tiny_preset: Preset, tmp_path: Path) -> None:
    folders = [new_checkpoint(tiny_preset, tmp_path / name, seed=5) for name in "ab"]
    first, second = ((f / "model.safetensors").read_bytes() for f in folders)
    assert first == second


def test_a_tied_head_is_recognised_by_its_absence(tied_folder: Path, folder: Path) -> None:
    assert smolstack.load(tied_folder).config.tied
    edit(folder / "config.json", lambda data: data.update(tie_word_embeddings=True))
    assert not smolstack.load(folder).config.tied, "the weights decide, not the flag"


def test_a_retrieval_head_is_recognised_and_saved(tiny_preset: Preset, tmp_path: Path) -> None:
    config = replace(tiny_preset.config, embedding_dim=16)
    folder = new_checkpoint(replace(tiny_preset, config=config), tmp_path / "col")
    assert "linear.bias" in read_entries(folder)
    vlm = smolstack.load(folder)
    batch = vlm.processor(["a longer text", "b"])
    embeddings = vlm.model.embed(batch)
    assert embeddings.shape == (*batch.token_ids.shape, 16)
    lengths = embeddings.norm(dim=-1)
    torch.testing.assert_close(lengths, batch.attention_mask.float())
    with pytest.raises(ConfigError, match="embedding head"):
        vlm.ask(None, "Hi")


def test_weights_are_mapped_and_not_copied(folder: Path) -> None:
    vlm = smolstack.load(folder)
    weights = [parameter.data_ptr() for parameter in vlm.model.parameters()]
    span = max(weights) - min(weights)
    assert span <= (folder / "model.safetensors").stat().st_size


def test_auto_takes_the_weights_own_type_unless_the_cpu_cannot(
    tiny_preset: Preset, tmp_path: Path
) -> None:
    folder = new_checkpoint(tiny_preset, tmp_path / "half", dtype="bfloat16")
    assert smolstack.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert smolstack.load(folder, dtype="float32").dtype == torch.float32
    entries = {"x": Entry("f", (10,), "BF16"), "y": Entry("f", (2,), "F32")}
    assert choose_dtype("auto", entries, torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int3', expected auto or one of"):
        smolstack.load(folder, dtype="int3")
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        smolstack.load(folder, device="gpu")


def test_the_template_may_stand_in_any_of_its_three_places(folder: Path) -> None:
    expected = smolstack.load(folder).processor(["Hi"]).token_ids.tolist()
    (folder / "chat_template.jinja").unlink()
    assert smolstack.load(folder).processor(["Hi"]).token_ids.tolist() == expected
    (folder / "chat_template.json").unlink()
    assert smolstack.load(folder).processor(["Hi"]).token_ids.tolist() == expected
    edit(folder / "tokenizer_config.json", lambda data: data.pop("chat_template"))
    with pytest.raises(CheckpointError, match="no chat template"):
        smolstack.load(folder).processor(["Hi"])


def test_preprocessing_may_stand_inside_the_processor_config(folder: Path) -> None:
    image = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor"):
        smolstack.load(folder)
    edit(folder / "processor_config.json", lambda data: data.update(image_processor=image))
    assert smolstack.load(folder).processor.settings.tile_edge == 32


def test_a_saved_folder_suits_readers_of_both_generations(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder / "processor_config.json", lambda data: data.update(image_processor=settings))
    for name in ("preprocessor_config.json", "chat_template.json"):
        (folder / name).unlink()
    saved = smolstack.load(folder).save(tmp_path / "saved")
    assert json.loads((saved / "preprocessor_config.json").read_text()) == settings
    assert (saved / "chat_template.json").is_file()
    assert (saved / "chat_template.jinja").is_file()
    config = json.loads((saved / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 10000.0
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_tokens_that_point_are_those_of_the_generation_config(folder: Path) -> None:
    assert not smolstack.load(folder).processor.pointing
    config = folder / "generation_config.json"

    def write(ids: object) -> None:
        edit(config, lambda data: data.update(pointing_token_ids=ids))

    write([7, 9])
    assert list(smolstack.load(folder).processor.pointing) == [7, 8, 9]
    for wrong in ([9, 7], [3], [1, 10**9], "7", [True, 9]):
        write(wrong)
        with pytest.raises(ConfigError, match=r"pointing_token_ids"):
            smolstack.load(folder)


def test_end_tokens_come_from_the_generation_config_first(folder: Path) -> None:
    edit(folder / "generation_config.json", lambda data: data.update(eos_token_id=[5, 6]))
    assert smolstack.load(folder).eos_token_ids == (5, 6)
    (folder / "generation_config.json").unlink()
    assert smolstack.load(folder).eos_token_ids == (900,)


Q_PROJ = "model.text_model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(Q_PROJ), rf"1 missing: {Q_PROJ}"),
        (lambda w: w.update(surplus=torch.zeros(2)), r"1 extra: surplus"),
        (
            lambda w: w.update({Q_PROJ: torch.zeros(3, 4)}),
            rf"1 of wrong shape or format: {Q_PROJ} \[3, 4\] instead of \[48, 48\]",
        ),
        (
            lambda w: w.update({Q_PROJ: torch.zeros(48, 48, dtype=torch.int8)}),
            "I8 instead of F32 or BF16 or F16",
        ),
    ],
)
def test_weights_that_do_not_match_the_config_are_listed(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=words):
        smolstack.load(folder)


def test_a_truncated_or_hostile_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    hostile = [
        whole[: len(whole) // 2],  # truncated in the weights
        whole[:100],  # truncated in the header
        b"",
        (2**62).to_bytes(8, "little") + whole[8:],  # a header larger than the file
        whole[:8] + b"x" * length + whole[8 + length :],  # no JSON
        whole[:8]
        + header.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
        + whole[8 + length :],
        b"PK\x03\x04" + whole,  # another kind of file
    ]
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            smolstack.load(folder)


def test_an_index_may_only_name_files_beside_it(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    names = list(read_entries(folder))
    single.rename(folder / "part.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert smolstack.load(folder).config.scale == 2
    for name, words in (
        ("../part.safetensors", "expected a .safetensors file in its folder"),
        ("part.bin", "expected a .safetensors file in its folder"),
        ("gone.safetensors", "does not exist"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
        with pytest.raises(CheckpointError, match=words):
            smolstack.load(folder)
    index.write_text(json.dumps({"weight_map": {"ghost": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"disagree: only in the index \['ghost'\]"):
        smolstack.load(folder)


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"\(pytorch_model\.bin\)"):
        smolstack.load(folder)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"image_token_id": 5}, "gives <image> the id 861"),
        ("config.json", {"scale_factor": 1}, r"proj\.weight \[48, 128\] instead of \[48, 32\]"),
        ("processor_config.json", {"image_seq_len": 7}, "image_seq_len 7, but config.json gives 4"),
        (
            "preprocessor_config.json",
            {"max_image_size": {"longest_edge": 64}},
            r"tiles of 64 pixels, a grid of 8x8 patches",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    folder: Path, file: str, change: dict[str, Any], words: str
) -> None:
    edit(folder / file, lambda data: data.update(change))
    with pytest.raises(SmolstackError, match=words):
        smolstack.load(folder)


def test_tiles_may_be_smaller_than_the_tower_allows(folder: Path, images: list[Any]) -> None:
    small = {"max_image_size": {"longest_edge": 16}, "size": {"longest_edge": 32}}
    edit(folder / "preprocessor_config.json", lambda data: data.update(small))
    with pytest.raises(CheckpointError, match=r"image_seq_len 4, .* gives 1 visual"):
        smolstack.load(folder)
    edit(folder / "processor_config.json", lambda data: data.update(image_seq_len=1))
    vlm = smolstack.load(folder)
    answer = vlm.ask(images[1], "What?", max_new_tokens=2)
    assert (answer.usage.tiles, answer.usage.visual_tokens) == (5, 5)


def test_a_token_without_an_embedding_is_refused(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<surplus>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    vlm = smolstack.load(folder)
    assert vlm.processor(["fine"]).token_ids.numel() > 0
    with pytest.raises(CheckpointError, match=r"'<surplus>'.* 904 "):
        vlm.processor(["a <surplus> word"])


def test_files_that_are_missing_or_no_json_are_named(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        smolstack.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="contains a list, expected a JSON object"):
        smolstack.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        smolstack.load(folder)


def test_a_place_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a checkpoint folder"):
        find(tmp_path / "file")
    with pytest.raises(CheckpointError, match="found nothing, expected a checkpoint folder"):
        find(tmp_path / "gone")
    assert find(None) == READER


def test_a_hub_id_is_fetched_by_its_client(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked, skipped = [], []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"]))
        skipped.append(options["ignore_patterns"])
        if repo == "nobody/gone":
            raise OSError("404 Not Found")
        return str(tiny_folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert find("nobody/model", revision="main") == tiny_folder
    assert asked == [("nobody/model", "main")]
    assert find("nobody/model", weights=False) == tiny_folder  # for its tokenizer
    assert skipped[0] is None
    assert "*.safetensors" in skipped[1]
    with pytest.raises(CheckpointError, match="404 Not Found"):
        find("nobody/gone")
