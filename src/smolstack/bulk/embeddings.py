"""Embeddings of images: visual tokens, their mean, or a retrieval model's vectors."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor

from smolstack.bulk.rows import Row, plain
from smolstack.bulk.tasks import ABOUT, ImageTask, Loaded
from smolstack.errors import BulkError
from smolstack.generation.request import Request
from smolstack.processor.inputs import ImageOptions
from smolstack.processor.processor import Prompt
from smolstack.retrieval import check_head, page_prompts

if TYPE_CHECKING:
    from smolstack.vlm import VLM

_DTYPES = {"float32": (torch.float32, pa.float32()), "float16": (torch.float16, pa.float16())}
RETRIEVAL = "retrieval"
KINDS = ("tokens", "mean", RETRIEVAL)
EMBED = "smolstack.embed"  # metadata keys of a table of pages: that it is one,
SHAPE = "smolstack.shape"  # and the shape of the model that created it


class _Kept(ImageTask):
    """Base of both kinds of embeddings: one array of numbers per image."""

    records = 1

    def __init__(
        self, vlm: VLM, image_options: ImageOptions, dtype: str, about: dict[str, str] | None
    ) -> None:
        super().__init__(vlm, image_options)
        self.dtype, number = _DTYPES[dtype]
        self.schema = pa.schema(
            [
                *ABOUT,
                ("embedding", self.column(vlm, number)),
                *((name, pa.int32()) for name in ("rows", "cols", "visual_tokens")),
                ("error", pa.string()),
            ],
            about,
        )

    @abstractmethod
    def column(self, vlm: VLM, number: pa.DataType) -> pa.DataType:
        """Return the type of the embedding column."""

    @abstractmethod
    def embedding(self, request: Request) -> Tensor:
        """Return the embedding of a row whose request is finished."""

    def plan(self, row: Row) -> int:
        return self.processor.plan(row.image, **self.image_options).visual_tokens

    def work(self, loaded: Loaded) -> pa.RecordBatch:
        records = [{**self.about(row), "error": plain(error)} for row, error in loaded.errors]
        self.finish(loaded)
        for row, (request,) in zip(loaded.rows, loaded.requests, strict=True):
            assert isinstance(request, Request)
            if request.error is not None:
                raise request.error
            found, plan = self.embedding(request), request.prompt.plans[0]
            numbers = found.to(self.dtype).cpu().numpy()
            records.append(
                {
                    **self.about(row),
                    "embedding": numbers if numbers.ndim == 1 else list(numbers),
                    "rows": plan.rows,
                    "cols": plan.cols,
                    "visual_tokens": plan.visual_tokens,
                }
            )
        return self.batch(records)


class Embeddings(_Kept):
    """Visual tokens of every image, as the decoder would read them, or their mean.

    ``embedding`` is a list of n·S lists of D numbers (tiles in reading order, the global tile
    last), or with kind "mean" a list of D numbers.
    """

    kind = "visual tokens"

    def __init__(self, vlm: VLM, kind: str, dtype: str, image_options: ImageOptions) -> None:
        check_embedding(kind, dtype)
        self.kind_of = kind
        super().__init__(vlm, image_options, dtype, None)

    def column(self, vlm: VLM, number: pa.DataType) -> pa.DataType:
        vector = pa.list_(number, vlm.config.text.hidden_size)
        return vector if self.kind_of == "mean" else pa.list_(vector)

    def prepare(self, row: Row) -> list[Prompt]:
        plan = self.processor.plan(row.image, **self.image_options)
        return [Prompt.of_images([row.image], [plan])]

    def embedding(self, request: Request) -> Tensor:
        tokens = request.visual[0].tokens.flatten(0, 1).float()
        return tokens.mean(dim=0) if self.kind_of == "mean" else tokens


class Pages(_Kept):
    """Late-interaction vectors of every page, from a retrieval model.

    ``embedding`` is a list of T lists of E numbers.
    """

    kind = "vectors"

    def __init__(self, vlm: VLM, dtype: str, image_options: ImageOptions) -> None:
        check_embedding(RETRIEVAL, dtype)
        super().__init__(vlm, image_options, dtype, {EMBED: RETRIEVAL, SHAPE: shape_of(vlm)})
        self.prompts = vlm.retrieval_prompts

    def column(self, vlm: VLM, number: pa.DataType) -> pa.DataType:
        return pa.list_(pa.list_(number, check_head(vlm.model, vlm.folder)))

    def prepare(self, row: Row) -> list[Prompt]:
        return page_prompts(self.processor, [row.image], self.prompts.page, self.image_options)

    def embedding(self, request: Request) -> Tensor:
        assert request.vectors is not None
        return request.vectors


def shape_of(vlm: VLM) -> str:
    """Describe a model's shape as text; vectors of models with different shapes cannot be
    compared.
    """
    text = vlm.config.text
    return f"{text.num_layers} layers of {text.hidden_size}, vectors of {vlm.config.embedding_dim}"


def check_embedding(kind: str, dtype: str) -> None:
    """Raise an error if a kind of embedding or its dtype is not supported."""
    if kind not in KINDS:
        raise BulkError(f"embed is {kind!r}, expected one of {list(KINDS)}")
    if dtype not in _DTYPES:
        raise BulkError(f"embed_dtype is {dtype!r}, expected one of {list(_DTYPES)}")
