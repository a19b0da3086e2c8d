"""A registered model answers as transformers' own does, behind the interface that people know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.conftest import Folder, random_image

transformers = pytest.importorskip("transformers")

from smolstack.interop import transformers as bridge  # noqa: E402
from smolstack.interop.transformers import speed  # noqa: E402
from smolstack.interop.transformers.cache import BorrowedCache  # noqa: E402

Inputs = dict[str, torch.Tensor]
BOUND = 1e-4
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture
def pair(folder: Folder) -> tuple[Any, Any]:
    """transformers' own model and the one that computes with smolstack, on the same weights."""
    return folder.theirs(), folder.ours()


@pytest.fixture
def smolstack_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every run of smolstack's decoder, by torch or compiled kernels, by its new tokens."""
    from smolstack.backends.cpu.decoder import NativeDecoder
    from smolstack.model.decoder import Decoder

    runs: list[int] = []

    def count(owner: Any, name: str, tokens: Callable[[torch.Tensor], int]) -> None:
        own = getattr(owner, name)

        def counted(self: Any, embeddings: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            runs.append(tokens(embeddings))
            return own(self, embeddings, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(Decoder, "forward", lambda embeddings: embeddings.shape[1])
    count(NativeDecoder, "__call__", lambda _: 1)
    count(NativeDecoder, "prefill", lambda embeddings: embeddings.shape[1])
    return runs


def test_logits_are_the_same(
    pair: tuple[Any, Any], prompts: Inputs, smolstack_runs: list[int]
) -> None:
    theirs, ours = (model(**prompts).logits for model in pair)
    real = prompts["attention_mask"].bool()
    assert theirs[real].std() > 0.1
    assert (theirs - ours)[real].abs().max() < BOUND
    assert smolstack_runs == [prompts["input_ids"].shape[1]]


def test_loss_and_gradients_are_the_same(
    pair: tuple[Any, Any], prompts: Inputs, smolstack_runs: list[int]
) -> None:
    gradients = []
    # Not the first token of a padded row: what padding predicts is of no meaning on either side.
    labels = prompts["input_ids"].clone()
    labels[:, :-6] = -100
    for model in pair:
        model.train()
        loss = model(**prompts, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert smolstack_runs
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_right_padding_trains_as_well(pair: tuple[Any, Any], smolstack_runs: list[int]) -> None:
    ids = torch.randint(3, 800, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    theirs, ours = (m(input_ids=ids, attention_mask=mask, use_cache=False) for m in pair)
    assert (theirs.logits - ours.logits)[mask.bool()].abs().max() < BOUND
    assert smolstack_runs == [9]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generate_gives_the_same_tokens(
    pair: tuple[Any, Any], prompts: Inputs, options: dict[str, Any]
) -> None:
    answers = []
    for model in pair:
        torch.manual_seed(5)
        answers.append(model.generate(**prompts, **{**GREEDY, **options}))
    assert torch.equal(*answers)


def test_generate_runs_on_smolstack(
    pair: tuple[Any, Any], prompts: Inputs, smolstack_runs: list[int]
) -> None:
    _, ours = pair
    ours.generate(**prompts, **GREEDY)
    assert smolstack_runs == [prompts["input_ids"].shape[1], *[1] * 11]


def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(
    folder: Folder, pair: tuple[Any, Any], prompts: Inputs
) -> None:
    """Prompt and answer by the kernels of the number format, where the processor has any."""
    load = type(pair[1]).from_pretrained
    theirs = type(pair[0]).from_pretrained(folder.path, dtype=torch.bfloat16).eval()
    ours = load(folder.path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = pair[0](**prompts, logits_to_keep=1).logits
        errors = []
        for model in (theirs, ours):
            first = model(**prompts, logits_to_keep=1, use_cache=True)
            assert first.logits.dtype == torch.bfloat16
            assert first.logits.shape == exact.shape
            errors.append((first.logits.float() - exact).square().mean().sqrt())
    assert errors[1] < 2 * errors[0]
    answers = [model.generate(**prompts, **GREEDY) for model in (theirs, ours)]
    assert answers[0].shape == answers[1].shape


def test_the_next_token_follows_whatever_was_done_to_the_cache(
    pair: tuple[Any, Any], prompts: Inputs
) -> None:
    """Rows exchanged, repeated and cut off, as beams and assistants do."""
    logits = []
    for model in pair:
        with torch.no_grad():
            out = model(**prompts, use_cache=True)
            cache, mask = out.cache, prompts["attention_mask"]
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            cache.crop(-2)
            cache.batch_repeat_interleave(2)
            mask = mask[[2, 0, 0], :-2].repeat_interleave(2, dim=0)
            for token in (5, 7):
                mask = torch.cat((mask, mask.new_ones(6, 1)), dim=1)
                out = model(input_ids=torch.full((6, 1), token), attention_mask=mask, cache=cache)
            logits.append(out.logits)
    assert (logits[0] - logits[1]).abs().max() < BOUND


def test_hooks_of_others_are_called(folder: Folder, prompts: Inputs) -> None:
    model, seen = folder.ours(), []
    with torch.no_grad():
        before = model(**prompts).logits
        model(**prompts, output_hidden_states=True)  # leaves transformers' own hooks behind
        layer = model.model.text_model.layers[1]
        hook = layer.register_forward_hook(lambda *_: seen.append(1))
        watched = model(**prompts).logits
        hook.remove()
        after = model(**prompts).logits
    assert seen == [1]
    assert (watched - before)[prompts["attention_mask"].bool()].abs().max() < BOUND
    assert torch.equal(after, before)


def test_an_assistant_helps_without_changing_the_answer(
    pair: tuple[Any, Any], folder: Folder, prompts: Inputs
) -> None:
    theirs, ours = pair
    one = {name: value[:1] for name, value in prompts.items()}
    # A guessed image token stands in the prompt when the images are counted: neither side can.
    options = {**GREEDY, "suppress_tokens": [folder.vlm().config.image_token_id]}
    plain = theirs.generate(**one, **options)
    assistant = folder.ours()
    assert torch.equal(ours.generate(**one, **options, assistant_model=assistant), plain)
    assert torch.equal(ours.generate(**one, **options, prompt_lookup_num_tokens=3), plain)


def test_processors_criteria_and_streamers_are_heard(
    pair: tuple[Any, Any], prompts: Inputs
) -> None:
    one = {name: value[:1] for name, value in prompts.items()}
    streamed: list[int] = []

    base: Any = transformers.generation.streamers.BaseStreamer

    class Keep(base):  # type: ignore[misc]
        def put(self, value: torch.Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    def only_even(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 1::2] = -torch.inf
        return scores

    def four_tokens(ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= one["input_ids"].shape[1] + 4)

    answers = []
    for model in pair:
        answers.append(
            model.generate(
                **one,
                **GREEDY,
                logits_processor=transformers.LogitsProcessorList([only_even]),
                stopping_criteria=transformers.StoppingCriteriaList([four_tokens]),
                streamer=Keep(),
            )[0]
        )
    new = answers[1][one["input_ids"].shape[1] :].tolist()
    assert torch.equal(*answers)
    assert len(new) == 4
    assert all(token % 2 == 0 for token in new)
    assert streamed[-5:] == [*new, -1]


def test_a_dictionary_with_scores_comes_back(pair: tuple[Any, Any], prompts: Inputs) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = (model.generate(**prompts, **GREEDY, **wanted) for model in pair)
    assert torch.equal(theirs.sequences, ours.sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        assert (mine - other).abs().max() < BOUND


def test_a_conversation_goes_on_from_its_cache(pair: tuple[Any, Any], prompts: Inputs) -> None:
    theirs, ours = pair
    one = {name: value[:1] for name, value in prompts.items()}
    first = ours.generate(**one, **GREEDY, return_dict_in_generate=True)
    more = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), dim=1)
    everything = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    went_on = ours.generate(**everything, **GREEDY, cache=first.cache)
    fresh = theirs.generate(**everything, pixel_values=one["pixel_values"], **GREEDY)
    assert torch.equal(went_on, fresh)


def test_what_only_transformers_returns_is_still_returned(
    pair: tuple[Any, Any], prompts: Inputs, smolstack_runs: list[int]
) -> None:
    theirs, ours = (model(**prompts, output_hidden_states=True) for model in pair)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert smolstack_runs == []


def test_adapters_are_never_ignored(folder: Folder, prompts: Inputs) -> None:
    model = folder.ours()
    before = model(**prompts).logits
    attention = model.model.text_model.layers[0].self_attn
    plain = attention.q_proj
    attention.q_proj = torch.nn.Sequential(plain, torch.nn.Linear(*[plain.out_features] * 2))
    assert (model(**prompts).logits - before).abs().max() > BOUND
    attention.q_proj = plain
    assert torch.equal(model(**prompts).logits, before)


def test_parameters_exchanged_later_are_seen(folder: Folder, prompts: Inputs) -> None:
    model = folder.ours()
    before = model(**prompts).logits
    model.model.connector.modality_projection.proj.weight = torch.nn.Parameter(
        torch.zeros_like(model.model.connector.modality_projection.proj.weight)
    )
    assert (model(**prompts).logits - before).abs().max() > BOUND


def test_more_tokens_can_be_embedded(pair: tuple[Any, Any], prompts: Inputs) -> None:
    logits = []
    for model in pair:
        torch.manual_seed(0)
        model.resize_token_embeddings(920)
        logits.append(model(**prompts).logits)
    assert logits[1].shape[-1] == 920
    real = prompts["attention_mask"].bool()
    assert (logits[0] - logits[1])[real].abs().max() < BOUND


def test_embeddings_can_be_given_instead_of_ids(
    pair: tuple[Any, Any], smolstack_runs: list[int]
) -> None:
    ids = torch.tensor([[1, 40, 50, 60]])
    for model in pair:
        embeddings = model.get_input_embeddings()(ids)
        both = model(input_ids=ids).logits, model(inputs_embeds=embeddings).logits
        assert (both[0] - both[1]).abs().max() < BOUND
    assert smolstack_runs == [4, 4]


def test_partly_filled_tiles_are_the_same(pair: tuple[Any, Any], prompts: Inputs) -> None:
    pixels = prompts["pixel_values"][1:2, :2]
    mask = torch.ones(1, 2, *pixels.shape[-2:], dtype=torch.bool)
    mask[0, 1, :, 16:] = False
    mask[0, 0, 24:] = False
    theirs, ours = (m.model.get_image_features(pixels, mask).pooler_output[0] for m in pair)
    # Visual tokens that hold padding patches are of no meaning; the first of each tile holds none.
    per_tile = theirs.shape[0] // 2
    assert (theirs - ours)[::per_tile].abs().max() < BOUND


def test_too_few_image_tokens_are_refused(folder: Folder, prompts: Inputs) -> None:
    ids = prompts["input_ids"].clone()
    place = (ids[0] == folder.vlm().config.image_token_id).nonzero()[0]
    ids[0, place] = 5
    with pytest.raises(ValueError, match="image tokens"):
        folder.ours()(**{**prompts, "input_ids": ids})


def test_copies_and_saved_models_are_whole(folder: Folder, prompts: Inputs, tmp_path: Path) -> None:
    model = folder.ours()
    logits = model(**prompts).logits
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.model.connector.modality_projection.proj.weight)
    assert torch.equal(twin(**prompts).logits, logits)
    twin.save_pretrained(tmp_path / "saved")
    again = type(folder.theirs()).from_pretrained(tmp_path / "saved")
    assert (again(**prompts).logits - logits)[prompts["attention_mask"].bool()].abs().max() < BOUND


def test_the_cache_is_written_in_place(folder: Folder, prompts: Inputs) -> None:
    with torch.no_grad():
        cache = folder.ours()(**prompts).cache
    layer = cache.layers[0]
    borrowed = BorrowedCache(cache, None)
    length, place = borrowed.length, layer.keys.data_ptr()
    token = layer.keys[:, :, -1:].clone()
    for _ in range(3):
        borrowed.append(0, token, token)
    assert layer.get_seq_length() == length + 3
    assert layer.keys.data_ptr() == place
    assert torch.equal(layer.keys[:, :, -1:], token)


def test_auto_classes_and_pipelines_build_it(folder: Folder) -> None:
    auto = transformers.AutoModelForImageTextToText
    bridge.register()
    try:
        model = auto.from_pretrained(folder.path)
        assert type(model).__module__.startswith("smolstack.")
    finally:
        bridge.unregister()
    assert type(auto.from_pretrained(folder.path)).__module__.startswith("transformers.")


def test_the_pipeline_answers_as_ask_does(folder: Folder) -> None:
    from smolstack.interop.reference import load_processor

    processor = load_processor(folder.path, folder.model_type)
    image = random_image(80, 40)
    message = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read it."}],
    }
    pipe = transformers.pipeline("image-text-to-text", model=folder.ours(), processor=processor)
    said = pipe(
        text=[message], return_full_text=False, generate_kwargs={**GREEDY, "max_new_tokens": 6}
    )
    expected = folder.vlm().ask(image, "Read it.", max_new_tokens=6)
    assert said[0]["generated_text"].strip() == expected.text.strip()


def test_its_speed_can_be_compared_in_the_same_call(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rounds", "1", "--new-tokens", "3", "--no-split", "--rows", "2"]
    threads = ["--threads", str(torch.get_num_threads())]
    speed.main([str(folder.path), *options, *threads])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2
    assert all(line.endswith("same") for line in lines)
