"""Pages are found by questions: vectors as ColPali's library makes them, compared as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import smolstack
from smolstack.errors import ConfigError, PromptError

# What colpali-engine 0.3.18 writes around a page and after a query.
PAGE = "<|im_start|>User:<image>Describe the image.<end_of_utterance>\nAssistant:"
FILLED = "<end_of_utterance>" * 10
QUERIES = ["What was the profit in 2024?", "delivery note"]


@pytest.fixture(scope="module")
def colsmol(retrieval_folder: Path) -> smolstack.VLM:
    return smolstack.load(retrieval_folder)


def test_vectors_are_those_of_transformers_with_colpali_s_words(
    colsmol: smolstack.VLM, images: list[Image.Image]
) -> None:
    reference = pytest.importorskip("smolstack.interop.reference")
    processor = reference.load_processor(colsmol.folder)
    model = reference.share_model(colsmol.model)
    ours = colsmol.embed_pages(images)
    assert len(ours) == 3
    for image, vectors in zip(images, ours, strict=True):
        inputs = processor(text=[PAGE], images=[[image]], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs)[0]
        assert vectors.shape == (inputs["input_ids"].shape[1], 16)
        assert (vectors - theirs).abs().max() < 1e-5
    for query, vectors in zip(QUERIES, colsmol.embed_queries(QUERIES), strict=True):
        inputs = processor(text=[query + FILLED], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs)[0]
        assert (vectors - theirs).abs().max() < 1e-5
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_a_page_s_vectors_do_not_depend_on_the_others(
    colsmol: smolstack.VLM, images: list[Image.Image]
) -> None:
    many = colsmol.embed_pages([*images, images[0], images[0].rotate(180)])
    for image, vectors in zip(images, many, strict=False):
        (alone,) = colsmol.embed_pages(image)
        assert torch.allclose(alone, vectors, atol=1e-6)
    assert torch.equal(many[0], many[3])


def test_other_words_may_stand_around_them(
    colsmol: smolstack.VLM, images: list[Image.Image]
) -> None:
    """As indexes made with colpali-engine up to 0.3.10 need."""
    (usual,) = colsmol.embed_queries(["profit"])
    older = "Query: {query}" + FILLED + "\n"
    (other,) = colsmol.embed_queries(["profit"], prompt=older)
    plain = colsmol.processor.tokenizer.encode("Query: profit" + FILLED + "\n")
    assert len(other) == len(plain) > len(usual)
    page = "<|im_start|>User: Describe the image.<image><end_of_utterance>"
    assert len(colsmol.embed_pages(images[0], prompt=page)[0]) < len(
        colsmol.embed_pages(images[0])[0]
    )


def test_integers_make_nearly_the_same_vectors(
    retrieval_folder: Path, images: list[Image.Image]
) -> None:
    exact, rounded = (
        smolstack.load(retrieval_folder, dtype=dtype).embed_pages(images[0])[0]
        for dtype in ("float32", "int8")
    )
    assert (exact * rounded).sum(dim=1).min() > 0.99


def test_fewer_tokens_on_request(colsmol: smolstack.VLM, images: list[Image.Image]) -> None:
    whole, (small,) = (
        colsmol.embed_pages([images[0]])[0],
        colsmol.embed_pages([images[0]], split=False),
    )
    assert len(small) < len(whole)


def test_what_cannot_be_embedded_is_refused(
    colsmol: smolstack.VLM, tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    with pytest.raises(ConfigError, match=r"language head.*retrieval model"):
        tiny_vlm.embed_pages(images[0])
    with pytest.raises(ConfigError, match=r"language head.*retrieval model"):
        tiny_vlm.embed_queries(["?"])
    with pytest.raises(PromptError, match="query 1 is ' '"):
        colsmol.embed_queries(["profit", " "])
    with pytest.raises(PromptError, match="expected a list of queries"):
        colsmol.embed_queries("profit")
    with pytest.raises(PromptError, match=r"expected exactly one \{query\}"):
        colsmol.embed_queries(["profit"], prompt="Query:")
    with pytest.raises(PromptError, match="1 <image> placeholders for 0 images"):
        colsmol.embed_queries(["<image>"])
    with pytest.raises(PromptError, match="0 <image> placeholders for 1 images"):
        colsmol.embed_pages(images[0], prompt="Describe it.")


def some(lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 4, generator=generator) for length in lengths]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(LENGTHS, LENGTHS)
def test_a_score_is_the_sum_of_each_query_token_s_best(first: list[int], second: list[int]) -> None:
    queries, pages = some(first, 1), some(second, 2)
    scores = smolstack.maxsim(queries, pages)
    assert scores.shape == (len(queries), len(pages))
    for row, query in zip(scores, queries, strict=True):
        for score, page in zip(row, pages, strict=True):
            expected = sum(max(float(q @ p) for p in page) for q in query)
            assert float(score) == pytest.approx(expected, abs=1e-4)


def test_hundreds_of_pages_are_compared_piece_by_piece() -> None:
    queries, pages = some([3], 1), some([1, 2, 3] * 200, 2)
    whole = smolstack.maxsim(queries, pages)[0]
    apart = torch.cat([smolstack.maxsim(queries, [page])[0] for page in pages])
    assert torch.allclose(whole, apart, atol=1e-5)


def test_the_same_page_fits_itself_best() -> None:
    pages = [torch.nn.functional.normalize(page, dim=1) for page in some([5, 7, 6], 3)]
    assert smolstack.maxsim(pages, [p.half() for p in pages]).argmax(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("queries", "pages"),
    [
        ([], [torch.ones(1, 4)]),
        ([torch.ones(1, 4)], []),
        ([torch.ones(1, 4)], [torch.ones(1, 5)]),
        ([torch.ones(4)], [torch.ones(4)]),
        ([torch.ones(1, 4)], [torch.ones(0, 4)]),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(
    queries: list[Tensor], pages: list[Tensor]
) -> None:
    with pytest.raises(PromptError, match="expected"):
        smolstack.maxsim(queries, pages)


TEMPLATE = """{%- for message in messages -%}{%- for content in message['content'] -%}
{%- if content['type'] == 'image' -%}
{{- '<|im_start|>User: Describe the image.<image><end_of_utterance>' -}}
{%- elif task is defined and task == 'query' -%}
{{- 'Query: ' + content['text'] -}}
{%- for _ in range(10) -%}{{- '<end_of_utterance>' -}}{%- endfor -%}{{- '\\n' -}}
{%- else -%}{{- content['text'] -}}{%- endif -%}
{%- endfor -%}{%- endfor -%}"""


def test_a_checkpoint_s_own_words_come_before_colpali_s(
    retrieval_folder: Path, tmp_path: Path
) -> None:
    """Newer ColSmol folders ship the words that they were trained with."""
    plain = smolstack.load(retrieval_folder)
    folder = plain.save(tmp_path / "newer")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "sentence_transformers.jinja").write_text(TEMPLATE)
    for place in (folder, smolstack.load(folder).save(tmp_path / "again")):
        vlm = smolstack.load(place)
        page = "<|im_start|>User: Describe the image.<image><end_of_utterance>"
        query = "Query: {query}" + 10 * "<end_of_utterance>" + "\n"
        assert (vlm.retrieval_prompts.page, vlm.retrieval_prompts.query) == (page, query)
        (own,) = vlm.embed_queries(["What was the profit?"])
        (given,) = plain.embed_queries(["What was the profit?"], prompt=query)
        assert torch.equal(own, given)


def test_a_template_that_drops_the_page_is_refused(retrieval_folder: Path, tmp_path: Path) -> None:
    folder = smolstack.load(retrieval_folder).save(tmp_path / "newer")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "sentence_transformers.jinja").write_text("nothing")
    with pytest.raises(PromptError, match=r"'nothing'.*'nothing'"):
        smolstack.load(folder).embed_queries(["What?"])
