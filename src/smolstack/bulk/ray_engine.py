"""Engine "ray": the same work on the actors of Ray Data, a window at a time.

The dataset is the list of windows; an actor loads the checkpoint once, reads its windows' rows
itself and keeps their results in the job's folder, as the embedded engine does. So the input, the
checkpoint and the output's folder must be where every node sees them under the same paths, and
what a lost actor had done is not done again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolstack.bulk.input_listing import RowReader
from smolstack.bulk.inputs import ParquetFiles
from smolstack.bulk.local_engine import work_through
from smolstack.bulk.partial_results import Parts
from smolstack.bulk.rows import Window
from smolstack.errors import BulkError

_MOST_BLOCKS = 1000  # tasks that Ray keeps account of; each is one window or more


class Actor:
    """One worker: a loaded checkpoint, and the windows that come.

    Args:
        threads: CPU threads that it computes with.
    """

    def __init__(self, work: Any, source: ParquetFiles, folder: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.limits, self.task = work.limits, work.task()
        self.reader, self.parts = RowReader(source), Parts(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Windows as columns of numbers; the rows that were done for each."""
        done = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            counts: list[int] = []
            window = Window(int(start), int(stop))
            work_through(
                [window],
                self.reader,
                self.task,
                self.parts,
                limits=self.limits,
                done=counts.append,
            )
            done.append(sum(counts))
        return {"done": done}


def work_on_ray(
    pending: Iterable[Window],
    work: Any,
    source: ParquetFiles,
    folder: Path,
    *,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Answer every row of some windows on Ray: the cluster that RAY_ADDRESS names, or this machine.

    Args:
        work: what to do (see job.Work); goes to every actor.
        done: called with the number of rows, after each window.

    Raises:
        BulkError: Ray is not installed, or a worker failed.
    """
    windows = list(pending)
    if not windows:
        return
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _start(ray, workers)
    try:
        for result in _results(ray, windows, work, source, folder, workers=workers).iter_rows():
            done(int(result["done"]))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, OSError):
            raise cause from error
        last = str(cause).strip().splitlines()[-1]
        raise BulkError(f"a Ray worker failed: {last}") from error
    finally:
        if started:
            ray.shutdown()


def _results(
    ray: Any, windows: list[Window], work: Any, source: ParquetFiles, folder: Path, *, workers: int
) -> Any:
    """The dataset of windows, worked through by actors; nothing runs before it is iterated over."""
    gpu = work.device.startswith("cuda") or (work.device == "auto" and _has_gpu(ray))
    items = [{"start": window.start, "stop": window.stop} for window in windows]
    data = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
    return data.map_batches(
        Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(windows))),
        fn_constructor_args=(work, source, folder, max(1, (os.cpu_count() or 1) // workers)),
        num_cpus=1,
        num_gpus=1 if gpu else 0,
    )


def _ray() -> Any:
    # Without this, Ray's core warns on stderr about what Ray Data itself does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise BulkError("engine ray needs Ray; pip install 'smolstack[ray]'") from None
    return ray


def _start(ray: Any, workers: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; quietly."""
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        if "RAY_worker_niceness" not in os.environ:
            # Ray's own 15 lets one other busy process starve the workers.
            local["_system_config"] = {"worker_niceness": 0}
    with _quiet():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray's C++ writes past sys.stderr while it starts off the terminal.

    Its errors are raised, and its logs stand in its own folder.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _has_gpu(ray: Any) -> bool:
    return bool(ray.cluster_resources().get("GPU", 0))
