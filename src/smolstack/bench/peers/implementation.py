"""An implementation: smolstack or a peer, with a method for each part."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution

from torch import Tensor

from smolstack.bench.peers.training_run import TrainingRun, TrainingTask
from smolstack.bench.timing import Contender
from smolstack.bench.workload import Scene, Workload


class Implementation:
    """A library that is measured; each method returns its contenders for one case, by default none.

    Attributes:
        name: name in results.
        packages: distributions that must be installed.
    """

    name = ""
    packages: tuple[str, ...] = ()

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    @classmethod
    def missing(cls) -> list[str]:
        """Distributions that are not installed."""
        return [package for package in cls.packages if not installed(package)]

    def connector(self, patches: Tensor) -> Sequence[Contender]:
        """Patch states (N, H·W, C) to visual tokens."""
        return ()

    def vision(self, tile: Tensor) -> Sequence[Contender]:
        """Encode one tile (1, 3, P, P)."""
        return ()

    def prefill(self, ids: Tensor) -> Sequence[Contender]:
        """A prompt (1, T) of text to the logits of the token after it."""
        return ()

    def decode(self, ids: Tensor, steps: int) -> Sequence[Contender]:
        """Decode ``steps`` tokens one at a time after a prompt (1, T)."""
        return ()

    def images(self, scene: Scene) -> Sequence[Contender]:
        """A decoded image to normalized tiles."""
        return ()

    def ask(self, scene: Scene) -> Sequence[Contender]:
        """Answer a question about an image file with ``workload.new_tokens`` tokens."""
        return ()

    def load(self) -> Sequence[Contender]:
        """Load the checkpoint folder."""
        return ()

    def memory(self, scene: Scene) -> Sequence[Contender]:
        """Peak memory of a new process that loads the checkpoint and answers once."""
        return ()

    def imports(self) -> Sequence[Contender]:
        """Import the package in a new process."""
        return ()

    def train(self, task: TrainingTask) -> Sequence[TrainingRun]:
        """A stage of training, in a fresh process."""
        return ()

    def close(self) -> None:
        """End child processes."""


def installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
