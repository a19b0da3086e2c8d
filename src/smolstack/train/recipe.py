"""Recipes: the description of a training run, from TOML or Python, validated before any work."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from smolstack.errors import ConfigError

TRAINED = ("connector", "connector+text", "full", "lora")
PARTS = ("vision", "connector", "text")
AUTOCAST = ("none", "bfloat16")
VISION = ("float32", "bfloat16", "int8")
PARALLEL = ("ddp", "fsdp")
SAVED = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021), through peft.

    Attributes:
        modules: patterns of smolstack names of linear layers, with ``*`` as a wildcard:
            "decoder.layers.*.attention.query", "connector.proj", "vision.layers.*".
        rank, alpha, dropout: an adapter adds alpha / rank · B(A(dropout(x))).
        connector: also train the connector, fully.
    """

    modules: tuple[str, ...] = (
        "decoder.layers.*.attention.query",
        "decoder.layers.*.attention.value",
    )
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    connector: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        train: "connector" (both towers frozen), "connector+text" (vision tower frozen), "full",
            or "lora" (adapters; everything else frozen).
        steps: optimizer steps; alternatively ``epochs``.
        epochs: passes over the training data; may be a fraction.
        batch: examples per step, over all processes.
        micro_batch: examples per forward pass and process; gradients are accumulated.
        learning_rate: peak learning rate; ``learning_rates`` overrides it by part (vision,
            connector, text).
        warmup: steps of linear warm-up; a cosine follows, down to ``final_rate`` · peak.
        weight_decay: on matrices; biases, norms and embeddings have none.
        betas: betas of AdamW.
        clip: maximum gradient norm; 0: no clipping.
        lora: the adapters of a "lora" stage.
        keep_language: weight of the divergence from the model before the stage, KL(before ‖ now) in
            nats per token, on the answers of examples without images; of a "lora" stage.
    """

    train: str
    steps: int = 0
    epochs: float = 0.0
    batch: int = 16
    micro_batch: int = 4
    learning_rate: float = 1e-4
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    warmup: int = 20
    final_rate: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    lora: Lora = field(default_factory=Lora)
    keep_language: float = 0.0


@dataclass(frozen=True)
class Data:
    """The examples, and how their images are split into tiles.

    Attributes:
        train, evaluation: a folder of images with .txt files or metadata.jsonl, a .jsonl file of
            chats, or a dataset saved by ``datasets``; relative paths start at the recipe's folder.
        question: the question about images of a folder that has only answers.
        max_tokens: maximum length of an example; longer ones are errors. 0: the model's context.
        split, max_image_tokens, upscale: see smolstack.processor.geometry.Tiling.
        check: read every example's text and decode its images before the first step; False:
            the first 200 examples'.
        workers: processes that read and preprocess images ahead; 0: none.
    """

    train: str = ""
    evaluation: str = ""
    question: str = "What does it say?"
    max_tokens: int = 0
    split: bool | None = None
    max_image_tokens: int | None = None
    upscale: bool = True
    check: bool = True
    workers: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Evaluation during training, on the data's evaluation examples.

    Attributes:
        every: steps between evaluations; 0: only at the end of each stage.
        answers: examples answered by generation (exact match, character error rate, sheet);
            the loss is of all examples.
        max_new_tokens: maximum length of an answer.
        keep_special_tokens: compare special tokens too, for document models.
    """

    every: int = 0
    answers: int = 32
    max_new_tokens: int = 64
    keep_special_tokens: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Attributes:
        output: the run's folder; the trained checkpoint is its subfolder ``model``.
        model: a checkpoint folder or hub id; empty: the bundled reader.
        seed: seed of the order of examples, adapters and dropout.
        stages: stages in order, each on the weights of the previous one.
        autocast: "bfloat16" computes matrix products in it; weights stay float32.
        vision_dtype: the dtype in which a frozen vision tower computes: "float32", or "bfloat16"
            or "int8" by the compiled kernels. A tower that is trained follows ``autocast``.
        gradient_checkpointing: recompute layers in the backward pass, to save memory.
        cache: cache a frozen tower's outputs on disk, so that it runs once per image.
        cache_folder: folder of the cache; empty: the run's subfolder ``cache``.
        checkpoint_every: steps between checkpoints (there is also one at the end of each stage).
        keep_checkpoints: number of checkpoints kept.
        device: "auto", "cpu", "cuda", …
        parallel: "ddp" or "fsdp", under torchrun.
        save_dtype: dtype of the trained checkpoint; "auto": that of the base model.
        tensorboard: also write TensorBoard files (extra ``tensorboard``).
    """

    output: str
    stages: tuple[Stage, ...]
    data: Data
    model: str = ""
    seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)
    autocast: str = "none"
    vision_dtype: str = "float32"
    gradient_checkpointing: bool = False
    cache: bool = True
    cache_folder: str = ""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    device: str = "auto"
    parallel: str = "ddp"
    save_dtype: str = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a TOML file.

        Raises:
            ConfigError: the file is not TOML, or a key is unknown, missing or invalid.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path} is not a file, expected a recipe in TOML")
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_dict(values, where=path.name, base=path.parent)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, where: str = "recipe", base: Path | None = None
    ) -> Recipe:
        """Make a recipe from plain data; relative paths start at ``base`` if it is given."""
        recipe = _build(cls, values, where)
        assert isinstance(recipe, Recipe)
        return recipe if base is None else _rebased(recipe, base)

    def keeping_language(self, weight: float) -> Recipe:
        """Return the recipe with ``keep_language`` of its "lora" stages.

        Raises:
            ConfigError: it has none.
        """
        if not any(stage.train == "lora" for stage in self.stages):
            trained = [stage.train for stage in self.stages]
            raise ConfigError(f"keep_language needs a lora stage, the recipe's train {trained}")
        kept = (
            replace(stage, keep_language=weight) if stage.train == "lora" else stage
            for stage in self.stages
        )
        return replace(self, stages=tuple(kept))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def check(recipe: Recipe) -> None:
    """Check that all values are valid.

    Raises:
        ConfigError: names the key, the value and what was expected.
    """
    _require(bool(recipe.output), "output", recipe.output, "a folder for the run")
    _require(bool(recipe.stages), "stages", list(recipe.stages), "at least one [[stages]]")
    _require(bool(recipe.data.train), "data.train", recipe.data.train, "training data")
    _one_of("autocast", recipe.autocast, AUTOCAST)
    _one_of("vision_dtype", recipe.vision_dtype, VISION)
    frozen = recipe.vision_dtype == "float32" or any(s.train != "full" for s in recipe.stages)
    expected = "'float32', because every stage trains the vision tower"
    _require(frozen, "vision_dtype", recipe.vision_dtype, expected)
    _one_of("parallel", recipe.parallel, PARALLEL)
    _one_of("save_dtype", recipe.save_dtype, SAVED)
    _require(recipe.checkpoint_every > 0, "checkpoint_every", recipe.checkpoint_every, "1 or more")
    _require(recipe.keep_checkpoints > 0, "keep_checkpoints", recipe.keep_checkpoints, "1 or more")
    for name in ("every", "answers", "max_new_tokens"):
        value = getattr(recipe.evaluation, name)
        _require(value >= 0, f"evaluation.{name}", value, "0 or more")
    _require(recipe.data.max_tokens >= 0, "data.max_tokens", recipe.data.max_tokens, "0 or more")
    _require(recipe.data.workers >= 0, "data.workers", recipe.data.workers, "0 or more")
    for number, stage in enumerate(recipe.stages):
        _check_stage(stage, f"stages[{number}].")


def _check_stage(stage: Stage, where: str) -> None:
    _one_of(where + "train", stage.train, TRAINED)
    lengths = (stage.steps > 0) + (stage.epochs > 0)
    _require(
        lengths == 1, where + "steps", stage.steps, f"steps or epochs, one of them above 0 "
        f"(epochs is {stage.epochs})"
    )  # fmt: skip
    for name in ("batch", "micro_batch"):
        _require(getattr(stage, name) > 0, where + name, getattr(stage, name), "1 or more")
    _require(stage.learning_rate > 0, where + "learning_rate", stage.learning_rate, "above 0")
    for name in ("warmup", "final_rate", "weight_decay", "clip", "keep_language"):
        _require(getattr(stage, name) >= 0, where + name, getattr(stage, name), "0 or more")
    betas = stage.betas
    good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    _require(good, where + "betas", list(betas), "two numbers from 0 to below 1")
    unknown = sorted(set(stage.learning_rates) - set(PARTS))
    _require(not unknown, where + "learning_rates", unknown, f"some of {list(PARTS)}")
    expected = f'0 where train is {stage.train!r}; it needs "lora", whose adapters can be left out'
    kept = stage.keep_language == 0 or stage.train == "lora"
    _require(kept, where + "keep_language", stage.keep_language, expected)
    if stage.train == "lora":
        lora = stage.lora
        _require(lora.rank > 0, where + "lora.rank", lora.rank, "1 or more")
        _require(0 <= lora.dropout < 1, where + "lora.dropout", lora.dropout, "from 0 to below 1")
        _require(bool(lora.modules), where + "lora.modules", list(lora.modules), "patterns")


def _require(good: bool, key: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"the recipe's {key} is {value!r}, expected {expected}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"one of {list(allowed)}")


def _rebased(recipe: Recipe, base: Path) -> Recipe:
    """Return the recipe with relative paths starting at ``base``; a model may also be a hub id."""
    values = recipe.to_dict()

    def at_base(path: str) -> str:
        return str(base / path) if path else ""

    values["output"], values["cache_folder"] = map(at_base, (recipe.output, recipe.cache_folder))
    for name in ("train", "evaluation"):
        values["data"][name] = at_base(values["data"][name])
    if recipe.model and (base / recipe.model).is_dir():
        values["model"] = at_base(recipe.model)
    return Recipe.from_dict(values)


def _build(cls: Any, values: Any, where: str) -> Any:
    """Make a dataclass from a table; every key must be known and have the right type."""
    if is_dataclass(values) and isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r:.60}, expected a table")
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}, expected {sorted(hints)}")
    for item in fields(cls):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in values:
            raise ConfigError(f"{where} has no {item.name}")
    made = {
        name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()
    }
    return cls(**made)


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a string"),
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool | None: ((bool, type(None)), "true or false"),
    int | None: ((int, type(None)), "an integer"),
}
_LISTS: dict[Any, Any] = {
    tuple[Stage, ...]: Stage,
    tuple[str, ...]: str,
    tuple[float, ...]: float,
}


def _convert(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _build(kind, value, where)
    if kind in _LISTS:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r:.60}, expected a list")
        return tuple(_convert(_LISTS[kind], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind == Mapping[str, float]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r:.60}, expected a table of numbers")
        return {name: _convert(float, number, f"{where}.{name}") for name, number in value.items()}
    types, expected = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"{where} is {value!r:.60}, expected {expected}")
    return float(value) if isinstance(value, int) and kind is float else value
