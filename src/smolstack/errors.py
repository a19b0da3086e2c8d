"""The errors that smolstack raises for bad input.

Each is a ValueError whose message is one sentence: what was looked at, what was found, and what
was expected. The command line prints that sentence and exits with code 2.
"""

from __future__ import annotations


class SmolstackError(ValueError):
    """Base of every documented smolstack error."""


class ConfigError(SmolstackError):
    """A config file lacks a key, or holds a value that cannot be built."""


class CheckpointError(SmolstackError):
    """A checkpoint folder, its weights or its tokenizer cannot be used."""


class ImageError(SmolstackError):
    """An image cannot be found, decoded or accepted."""


class VideoError(SmolstackError):
    """A video cannot be found, decoded or accepted."""


class GridError(SmolstackError):
    """Patches do not form the grid that was asked for, or scale does not divide it."""


class PromptError(SmolstackError):
    """A prompt or chat is malformed, or its placeholders and images differ in number."""


class AlignmentError(SmolstackError):
    """Visual tokens and their places in the token sequence differ in number."""


class ContextLengthError(SmolstackError):
    """A prompt (with the answer asked for) does not fit into the model's context."""


class KVCacheError(SmolstackError):
    """A prompt (with the answer asked for) takes more KV cache than there is memory for."""


class QueueFullError(SmolstackError):
    """More answers are asked for than may wait."""


class DeadlineError(SmolstackError):
    """An answer was not complete when its time was over."""


class GenerationError(SmolstackError):
    """A sampling or stopping option has a value that has no meaning."""


class BulkError(SmolstackError):
    """The input, the output or the kept state of a bulk job cannot be used."""


class DataError(SmolstackError):
    """A training example, or the place that examples are read from, cannot be used."""


class TrainingError(SmolstackError):
    """A training run cannot begin, go on or be resumed."""
