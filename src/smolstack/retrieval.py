"""Document retrieval: late-interaction embeddings (ColSmol) and their comparison.

A page and a query each become one unit-length vector per token (ColPali, Faysse et al. 2024). The
prompts come from the checkpoint's own template, if it ships one
(``additional_chat_templates/sentence_transformers.jinja``), otherwise from ColPali's library
colpali-engine, version 0.3.13 and later (checked up to 0.3.18); docs/retrieval.md lists the prompts
of earlier versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smolstack.checkpoint.files import RETRIEVAL_TEMPLATE, CheckpointFiles
from smolstack.errors import ConfigError, PromptError
from smolstack.generation.inline import InlineEngine
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.inputs import ImageInput, ImageOptions, as_images
from smolstack.processor.processor import Processor, Prompt
from smolstack.processor.prompt import ChatTemplate, Markers, user_message

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAGE_PROMPT = "<|im_start|>User:<image>Describe the image.<end_of_utterance>\nAssistant:"
QUERY_PROMPT = "{query}" + 10 * "<end_of_utterance>"  # extra tokens for query augmentation
SLOT = "{query}"
ROWS = 256  # pages compared at once


@dataclass(frozen=True)
class RetrievalPrompts:
    """Prompt texts of a retrieval model, for a page (at ``<image>``) and a query (``{query}``)."""

    page: str = PAGE_PROMPT
    query: str = QUERY_PROMPT


def read_prompts(side: Mapping[str, bytes], special_tokens: Mapping[str, str]) -> RetrievalPrompts:
    """Return the prompt texts of a checkpoint's own template, or colpali-engine's.

    Args:
        side: the checkpoint's side files by name.
        special_tokens: names of special tokens for the template.

    Raises:
        PromptError: the template cannot be rendered, or drops the page or the query.
    """
    source = side.get(RETRIEVAL_TEMPLATE)
    if source is None:
        return RetrievalPrompts()
    known = dict(special_tokens)
    pages, queries = (
        ChatTemplate(source.decode("utf-8", "replace"), {**known, "task": task})
        for task in ("document", "query")
    )
    page = pages.render([{"role": "user", "content": [{"type": "image"}]}], answer_next=False)
    query = queries.render([user_message(0, SLOT)], answer_next=False)
    if page.count(Markers.image) != 1 or query.count(SLOT) != 1:
        raise PromptError(
            f"{RETRIEVAL_TEMPLATE} renders a page as {page!r:.80} and a query as {query!r:.80}, "
            f"expected {Markers.image} and the query once"
        )
    return RetrievalPrompts(page, query)


def page_prompts(
    processor: Processor, images: Sequence[ImageInput], prompt: str, options: ImageOptions
) -> list[Prompt]:
    """Build a prompt for each page, without pixels."""
    return [processor.prepare_text(prompt, [image], **options) for image in images]


def query_prompts(processor: Processor, queries: Sequence[str], prompt: str) -> list[Prompt]:
    """Build a prompt for each query.

    Raises:
        PromptError: no query, an empty one, or a prompt without a place for it.
    """
    if isinstance(queries, str) or not queries:
        raise PromptError("expected a list of queries")
    if prompt.count(SLOT) != 1:
        raise PromptError(f"the query prompt is {prompt!r:.80}, expected exactly one {SLOT} in it")
    for number, query in enumerate(queries):
        if not isinstance(query, str) or not query.strip():
            raise PromptError(f"query {number} is {query!r:.80}, expected non-empty text")
    texts = [prompt.replace(SLOT, processor.as_text(query)) for query in queries]
    return [processor.prepare_text(text, []) for text in texts]


def check_head(model: VisionLanguageModel, name: object) -> int:
    """Return the length of the embedding vectors.

    Raises:
        ConfigError: the model has no embedding head.
    """
    if model.config.embedding_dim is None:
        raise ConfigError(
            f"{name} has a language head, expected a retrieval model such as vidore/colSmol-256M"
        )
    return model.config.embedding_dim


class PageEmbedder:
    """Mixin of VLM with the methods of retrieval models (ColSmol)."""

    model: VisionLanguageModel
    processor: Processor
    folder: Path
    _files: CheckpointFiles
    _inline: InlineEngine

    def embed_pages(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        prompt: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> list[Tensor]:
        """Compute late-interaction vectors of pages with a retrieval model (ColSmol).

        Args:
            images: an image or several, as for :meth:`ask`.
            prompt: the prompt, with the page at ``<image>``; None for the checkpoint's own, or
                ColPali's.
            **options: split, max_image_tokens, upscale, password; see ImageOptions.

        Returns:
            For each page (T, E) in float32, of unit length: its visual tokens and the surrounding
            prompt tokens. :func:`smolstack.maxsim` compares them with queries.

        Raises:
            ConfigError: this checkpoint is not a retrieval model.
            ImageError, PromptError, ContextLengthError: before any work is done.
        """
        check_head(self.model, self.folder)
        prompt = self.retrieval_prompts.page if prompt is None else prompt
        prompts = page_prompts(self.processor, as_images(images), prompt, options)
        return self._inline.embed(prompts)

    def embed_queries(self, queries: Sequence[str], *, prompt: str | None = None) -> list[Tensor]:
        """Compute late-interaction vectors of queries with a retrieval model (ColSmol).

        Args:
            queries: questions or keywords.
            prompt: the prompt, with the query at ``{query}``; None as for a page.

        Returns:
            For each query (T, E) in float32, of unit length.

        Raises:
            ConfigError: this checkpoint is not a retrieval model.
            PromptError: an empty query, or a prompt without a place for it.
        """
        check_head(self.model, self.folder)
        prompt = self.retrieval_prompts.query if prompt is None else prompt
        return self._inline.embed(query_prompts(self.processor, queries, prompt))

    @cached_property
    def retrieval_prompts(self) -> RetrievalPrompts:
        """The prompt texts for pages and queries."""
        return read_prompts(self._files.side, self.processor.tokenizer.special_tokens)


def maxsim(queries: Sequence[Tensor], pages: Sequence[Tensor]) -> Tensor:
    """Score each page against each query: (Q, N), higher is better.

    For every query token the similarity of the most similar page token, summed over the query
    (MaxSim, Khattab and Zaharia 2020): Σ_i max_j q_i · p_j.

    Args:
        queries: Q tensors (T, E), as returned by ``vlm.embed_queries``.
        pages: N tensors (T, E), as returned by ``vlm.embed_pages``; float16 is compared in float32.

    Raises:
        PromptError: vectors of different lengths, or none.
    """
    shapes = {tuple(part.shape[1:]) for part in (*queries, *pages)}
    if not queries or not pages or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise PromptError(
            f"found {len(queries)} queries and {len(pages)} pages with vectors {sorted(shapes)}, "
            "expected at least one of each, of shape (T, E) with the same E"
        )
    if not all(len(part) for part in (*queries, *pages)):
        raise PromptError("a query or a page has no vectors, expected at least one of each")
    rows = torch.cat([query.float() for query in queries])
    lengths = [len(query) for query in queries]
    scores = []
    for start in range(0, len(pages), ROWS):
        part = [page.to(device=rows.device, dtype=torch.float32) for page in pages[start:][:ROWS]]
        similar = rows @ torch.cat(part).T
        best = torch.stack(
            [
                of_page.amax(dim=1)
                for of_page in torch.split(similar, [len(p) for p in part], dim=1)
            ],
            dim=1,
        )
        scores.append(torch.stack([of_query.sum(dim=0) for of_query in torch.split(best, lengths)]))
    return torch.cat(scores, dim=1)
