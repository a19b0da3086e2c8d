"""Engine "ray": processes windows on Ray Data actors.

The dataset is the list of windows. An actor loads the checkpoint once, reads the rows of its
windows and saves their results in the job's folder, like the embedded engine. The input, the
checkpoint and the output's folder must therefore be accessible on all nodes under the same paths,
and results of a lost actor are kept.
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
from smolstack.bulk.local_engine import run_locally
from smolstack.bulk.partial_results import Parts
from smolstack.bulk.rows import Window
from smolstack.errors import BulkError

_MOST_BLOCKS = 1000  # tasks that Ray manages; each is one or more windows


class Actor:
    """A worker: loads a checkpoint and processes windows.

    Args:
        threads: number of CPU threads.
    """

    def __init__(self, work: Any, source: ParquetFiles, folder: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.limits, self.task = work.limits, work.task()
        self.reader, self.parts = RowReader(source), Parts(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Process windows, given as columns of numbers; return the number of rows done for each."""
        done = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            counts: list[int] = []
            window = Window(int(start), int(stop))
            run_locally(
                [window],
                self.reader,
                self.task,
                self.parts,
                limits=self.limits,
                done=counts.append,
            )
            done.append(sum(counts))
        return {"done": done}


def run_on_ray(
    pending: Iterable[Window],
    work: Any,
    source: ParquetFiles,
    folder: Path,
    *,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Process every row without results on Ray: the cluster of RAY_ADDRESS, or this machine.

    Args:
        work: the work of the job (settings.Work), sent to every actor.
        done: called with the number of rows after each window.

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
    """Return the dataset of windows processed by actors; it runs when iterated over."""
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
    # Without this, Ray's core prints warnings about Ray Data's own calls.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise BulkError("engine ray needs Ray; pip install 'smolstack[ray]'") from None
    return ray


def _start(ray: Any, workers: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine, without output."""
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        if "RAY_worker_niceness" not in os.environ:
            # With Ray's default of 15, one other busy process starves the workers.
            local["_system_config"] = {"worker_niceness": 0}
    with _quiet():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Ray's C++ code writes directly to stderr while it starts.

    Its errors are still raised, and its logs are written to its own folder.
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
