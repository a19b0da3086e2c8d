"""What transformers' own tests ask of an Idefics3 or SmolVLM model, asked of the registered one.

Written anew in our words; docs/interop.md has the table. The processor's part is asked of
smolstack's own processor, beside transformers' where both have an answer.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.conftest import Folder, random_image

from smolstack.errors import ContextLengthError, PromptError

transformers = pytest.importorskip("transformers")

from smolstack.interop.reference import load_processor  # noqa: E402

Inputs = dict[str, torch.Tensor]
BOUND = 1e-4
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture
def pair(folder: Folder) -> tuple[Any, Any]:
    """transformers' own model and the one that computes with smolstack, on the same weights."""
    return folder.theirs(), folder.ours()


def real(prompts: Inputs) -> torch.Tensor:
    return prompts["attention_mask"].bool()


# The model


def test_names_shapes_and_classes_are_transformers_own(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    assert {n: p.shape for n, p in ours.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }
    assert isinstance(ours, type(theirs))
    assert isinstance(ours.model, type(theirs.model))
    assert ours.main_input_name == theirs.main_input_name == "input_ids"
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.can_generate()


def test_a_tuple_comes_back_where_one_is_asked_for(pair: tuple[Any, Any], prompts: Inputs) -> None:
    for model in pair:
        named = model(**prompts)
        plain = model(**prompts, return_dict=False)
        assert isinstance(plain, tuple)
        assert (plain[0] - named.logits)[real(prompts)].abs().max() < BOUND


def test_states_and_attentions_of_every_layer(folder: Folder, prompts: Inputs) -> None:
    outputs = []
    for load in (folder.theirs, folder.ours):
        model = load()
        model.set_attn_implementation("eager")
        wanted = {"output_hidden_states": True, "output_attentions": True}
        outputs.append(model(**prompts, **wanted))
    for kind in ("hidden_states", "attentions"):
        theirs, ours = (getattr(output, kind) for output in outputs)
        assert len(theirs) == len(ours) > 0
        for one, other in zip(theirs, ours, strict=True):
            assert torch.allclose(one, other, atol=BOUND)


def test_a_row_gives_the_same_alone_as_in_a_batch(folder: Folder) -> None:
    from smolstack.interop.reference import model_inputs

    processor, model = folder.vlm().processor, folder.ours()
    rows = [
        processor.prepare(
            (random_image(80, 40, 4), "A longer question, so that the other is padded.")
        ),
        processor.prepare((random_image(30, 30, 5), "Short."), split=False),
    ]
    together = model(**model_inputs(processor.batch(rows))).logits
    for number, row in enumerate(rows):
        alone = model(**model_inputs(processor.batch([row]))).logits[0]
        assert (together[number, -len(alone) :] - alone).abs().max() < BOUND


@pytest.mark.parametrize("keep", [1, 3, 0], ids=lambda keep: f"keep {keep}")
def test_only_the_last_logits_can_be_kept(
    pair: tuple[Any, Any], prompts: Inputs, keep: int
) -> None:
    with torch.no_grad():
        theirs, ours = (m(**prompts, logits_to_keep=keep).logits for m in pair)
    assert theirs.shape == ours.shape
    mask = real(prompts)[:, -theirs.shape[1] :]
    assert (theirs - ours)[mask].abs().max() < BOUND


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.4},
        {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 7},
        {"guidance_scale": 1.5},
        {"min_new_tokens": 4},
    ],
    ids="-".join,
)
def test_ways_of_generating_return_the_same_dictionaries(
    pair: tuple[Any, Any], prompts: Inputs, folder: Folder, options: dict[str, Any]
) -> None:
    one = {name: value[:1] for name, value in prompts.items()}
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    image = folder.vlm().config.image_token_id
    results = []
    for model in pair:
        torch.manual_seed(11)
        results.append(
            model.generate(**one, **{**GREEDY, **wanted, **options}, suppress_tokens=[image])
        )
    theirs, ours = results
    assert type(theirs) is type(ours)
    assert torch.equal(theirs.sequences, ours.sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        finite = torch.isfinite(other)
        assert (mine - other)[finite].abs().max() < BOUND


def test_generating_from_embeddings_and_going_on_from_them(pair: tuple[Any, Any]) -> None:
    ids = torch.randint(3, 800, (2, 7), generator=torch.Generator().manual_seed(3))
    answers = []
    for model in pair:
        embeddings = model.get_input_embeddings()(ids)
        from_embeddings = model.generate(inputs_embeds=embeddings, **GREEDY)
        from_ids = model.generate(input_ids=ids, **GREEDY)[:, 7:]
        assert torch.equal(from_embeddings, from_ids)
        answers.append(from_ids)
    assert torch.equal(*answers)


def test_a_mask_of_four_dimensions_is_obeyed(pair: tuple[Any, Any]) -> None:
    ids = torch.randint(3, 800, (1, 6), generator=torch.Generator().manual_seed(4))
    allowed = torch.ones(6, 6).tril()
    allowed[4:, 1] = 0  # no padding could say this
    mask = torch.zeros(1, 1, 6, 6).masked_fill(allowed == 0, torch.finfo(torch.float32).min)
    theirs, ours = (model(input_ids=ids, attention_mask=mask).logits for model in pair)
    plain = pair[0](input_ids=ids).logits
    assert (theirs - plain).abs().max() > BOUND
    assert (theirs - ours).abs().max() < BOUND


def test_gradient_checkpointing_trains_the_same(pair: tuple[Any, Any], prompts: Inputs) -> None:
    gradients = []
    for model in pair:
        model.train()
        model.gradient_checkpointing_enable()
        labels = prompts["input_ids"].clone()
        labels[:, :-4] = -100
        model(**prompts, labels=labels).loss.backward()
        gradients.append(model.model.connector.modality_projection.proj.weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() < BOUND


@pytest.mark.parametrize("size", [920, 890])
def test_embeddings_may_grow_and_shrink(pair: tuple[Any, Any], folder: Folder, size: int) -> None:
    ids = torch.randint(3, 800, (1, 9), generator=torch.Generator().manual_seed(6))
    logits = []
    for model in pair:
        torch.manual_seed(0)
        model.resize_token_embeddings(size)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert logits[1].shape[-1] == size
    assert (logits[0] - logits[1]).abs().max() < BOUND


def test_saved_folders_and_pickled_models_load_again(
    pair: tuple[Any, Any], prompts: Inputs, tmp_path: Path
) -> None:
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert saved[0] == saved[1]
    with torch.no_grad():
        expected = ours(**prompts, logits_to_keep=1).logits
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again(**prompts, logits_to_keep=1).logits, expected)


def test_a_compiled_forward_pass_gives_the_same(pair: tuple[Any, Any]) -> None:
    ids = torch.randint(3, 800, (1, 6), generator=torch.Generator().manual_seed(8))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = pair[0](input_ids=ids, use_cache=False).logits
        compiled: Any = torch.compile(pair[1], backend="eager")
        found = compiled(input_ids=ids, use_cache=False).logits
    assert (found - expected).abs().max() < BOUND


def test_half_precision_keeps_its_dtype(folder: Folder, prompts: Inputs) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = folder.ours().to(dtype)
        logits = model(**prompts).logits
        assert logits.dtype == dtype
        assert bool(torch.isfinite(logits[real(prompts)]).all())


# The processor


def test_interleaved_images_become_the_same_tokens_and_pixels(folder: Folder) -> None:
    """Rows with one and with two images, split and whole; padded on the left."""
    ours, theirs = folder.vlm().processor, load_processor(folder.path, folder.model_type)
    images = [random_image(80, 40, 1), random_image(30, 30, 2), random_image(50, 90, 3)]
    chats: list[Any] = []
    for some, question in ((images[:1], "In this image, we see"), (images[1:], "bla, bla")):
        parts: list[Any] = [{"type": "image", "image": one} for one in some]
        chats.append([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
    bare = [
        [{"role": "user", "content": [{"type": p["type"], **_text(p)} for p in chat[0]["content"]]}]
        for chat in chats
    ]
    for split in (True, False):
        batch = ours.batch([ours.prepare(chat, split=split) for chat in chats])
        expected = theirs(
            text=[theirs.apply_chat_template(chat, add_generation_prompt=True) for chat in bare],
            images=[images[:1], images[1:]],
            padding=True,
            do_image_splitting=split,
            return_tensors="pt",
        )
        assert torch.equal(batch.token_ids, expected["input_ids"])
        assert torch.equal(batch.attention_mask.long(), expected["attention_mask"])
        tiles = expected["pixel_values"].flatten(0, 1)
        tiles = tiles[(tiles != 0).flatten(1).any(dim=1)]
        assert (batch.tiles - tiles).abs().max() < 1e-6


def _text(part: Any) -> dict[str, str]:
    return {"text": part["text"]} if part["type"] == "text" else {}


@pytest.mark.parametrize(("parts", "count"), [(0, 1), (1, 0), (2, 1), (1, 2)], ids=str)
def test_images_and_their_places_must_agree(folder: Folder, parts: int, count: int) -> None:
    """Both processors refuse a prompt whose placeholders and images differ in number."""
    ours, theirs = folder.vlm().processor, load_processor(folder.path, folder.model_type)
    images = [random_image(30, 30, number) for number in range(count)]
    content: list[Any] = [{"type": "image"}] * parts + [{"type": "text", "text": "What?"}]
    with pytest.raises(ValueError, match="image"):
        theirs(text=["<image>" * parts + "What?"], images=[images] if images else None)
    with pytest.raises(PromptError):
        ours.prepare((images, [{"role": "user", "content": content}]))


def test_a_prompt_of_text_alone_has_no_pixels(folder: Folder) -> None:
    ours, theirs = folder.vlm().processor, load_processor(folder.path, folder.model_type)
    batch = ours.batch([ours.prepare("lower newer")])
    chat = [{"role": "user", "content": [{"type": "text", "text": "lower newer"}]}]
    rendered = theirs.apply_chat_template(chat, add_generation_prompt=True)
    expected = theirs(text=rendered, return_tensors="pt")
    assert torch.equal(batch.token_ids, expected["input_ids"])
    assert batch.tiles.shape[0] == 0
    assert "pixel_values" not in expected


def test_a_prompt_is_never_cut_off_inside_an_image(folder: Folder) -> None:
    """transformers cuts where ``max_length`` says and then notices; here it is refused before."""
    processor = folder.vlm().processor
    question = "What? " * processor.config.text.max_positions
    with pytest.raises(ContextLengthError, match=r"visual\).*context"):
        processor.prepare((random_image(80, 40), question))
