"""Behind ``to_hf_api`` an FMS model generates as transformers' own model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import smolstack
from smolstack.errors import ConfigError

pytest.importorskip("fms")
transformers = pytest.importorskip("transformers")

from fms.models import get_model  # noqa: E402
from fms.models.hf import to_hf_api  # noqa: E402
from tests.interop.fms_prompts import uneven_prompts  # noqa: E402

from smolstack.interop import fms as bridge  # noqa: E402
from smolstack.interop.reference import load_model, model_inputs  # noqa: E402

BOUND = 1e-4


@pytest.fixture(params=["tiny_folder", "tied_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def adapted(folder: Path) -> Any:
    return to_hf_api(get_model("hf_pretrained", model_path=str(folder))).eval()


@pytest.fixture
def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Rows with three, no and two tiles, padded as transformers' processors pad."""
    vlm = smolstack.load(folder)
    return model_inputs(vlm.processor.batch(uneven_prompts(vlm)))


@torch.inference_mode()
def test_logits_and_loss_are_transformers_own(
    folder: Path, adapted: Any, inputs: dict[str, torch.Tensor]
) -> None:
    real = inputs["attention_mask"].bool()
    # A row's first token would be predicted from padding, whose logits mean nothing.
    labels = inputs["input_ids"].masked_fill(~real | ~real.roll(1, dims=1), -100)
    theirs, found = load_model(folder)(**inputs, labels=labels), adapted(**inputs, labels=labels)
    assert theirs.logits[real].std() > 0.1
    assert (found.logits - theirs.logits)[real].abs().max() < BOUND
    assert (found.loss - theirs.loss).abs() < BOUND


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"repetition_penalty": 1.3}],
    ids=["greedy", "beams", "uncached", "penalty"],
)
def test_generate_writes_what_transformers_writes(
    options: dict[str, Any], folder: Path, adapted: Any, inputs: dict[str, torch.Tensor]
) -> None:
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **options}
    theirs = load_model(folder).generate(**inputs, **options)
    assert torch.equal(adapted.generate(**inputs, **options), theirs)


@torch.inference_mode()
def test_what_it_saves_it_loads_again(
    adapted: Any, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(adapted)
    assert torch.equal(again(**inputs).logits, adapted(**inputs).logits)


def test_weights_are_shared_and_not_copied(adapted: Any) -> None:
    inner = adapted.model
    assert adapted.get_input_embeddings() is inner.embedding
    assert adapted.get_output_embeddings() is inner.language_model.head


def test_a_retrieval_model_has_no_head_to_adapt() -> None:
    from smolstack.checkpoint.new import random_model
    from smolstack.family import PRESETS
    from smolstack.interop.miniature import miniature

    retrieval = bridge.from_smolstack(random_model(miniature(PRESETS["colsmol-256m"]).config))
    with pytest.raises(ConfigError, match="a model with a language head"):
        to_hf_api(retrieval)
