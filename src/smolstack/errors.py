"""Exceptions raised by smolstack for invalid input.

Each is a ValueError whose message is one sentence: what was checked, what was found, and what was
expected. The command line prints that sentence and exits with code 2.
"""

from __future__ import annotations


class SmolstackError(ValueError):
    """Base of every documented smolstack error."""


class ConfigError(SmolstackError):
    """A config file lacks a key, or has an unsupported value."""


class CheckpointError(SmolstackError):
    """A checkpoint folder, its weights or its tokenizer cannot be used."""


class ImageError(SmolstackError):
    """An image cannot be found, decoded or accepted.

    Attributes:
        name: the image's name in its prompt (``Prompt.image_names``), if it has one; the message
            begins with it.
    """

    def __init__(self, message: str, *, name: str | None = None) -> None:
        super().__init__(message if name is None else f"{name}: {message}")
        self.name = name


class VideoError(SmolstackError):
    """A video cannot be found, decoded or accepted."""


class GridError(SmolstackError):
    """Patches do not form the requested grid, or scale does not divide it."""


class PromptError(SmolstackError):
    """A prompt or chat is malformed, or the numbers of placeholders and images differ."""


class AlignmentError(SmolstackError):
    """The numbers of visual tokens and of their positions in the token sequence differ."""


class ContextLengthError(SmolstackError):
    """A prompt (plus the requested answer length) does not fit into the model's context."""


class KVCacheError(SmolstackError):
    """A prompt (plus the requested answer length) needs more KV cache than there is memory for."""


class QueueFullError(SmolstackError):
    """More answers are requested than the queue may hold."""


class DeadlineError(SmolstackError):
    """An answer, or another result, was not complete at its deadline."""


class GenerationError(SmolstackError):
    """A sampling or stopping option has an invalid value.

    Attributes:
        option: the option of the answer's structure that is at fault (schema, regex, grammar,
            choices; tools), if one is.
    """

    option: str | None = None


class BulkError(SmolstackError):
    """The input, output or saved state of a bulk job cannot be used."""


class DataError(SmolstackError):
    """A training example, or the data source, cannot be used."""


class TrainingError(SmolstackError):
    """A training run cannot be started, continued or resumed."""
