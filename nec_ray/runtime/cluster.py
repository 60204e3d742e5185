"""Connects to Ray: the cluster that RAY_ADDRESS names, or one started on this machine for the time being."""

import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from nec_ray.errors import NecError, RunError
from nec_ray.runtime.stop import check_stop, take_sigterm_back

if TYPE_CHECKING:
    from ray.data import Dataset

_LOG = logging.getLogger(__name__)

NODE_ENVIRONMENT = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}
"""Of the processes that start Ray's nodes. Encoders take all of a node's workers by Ray's count, one a core, so that it
ends a reader that has waited for a second, and the next shard waits until another has been started: 3 s of a core."""


@contextmanager
def connect() -> Iterator[None]:
    """Be connected to Ray inside the block; a connection that is there already is used and kept.

    Raises:
        RunError: no cluster answers, or none can be started.
    """
    # uv's hook would build a new environment in every session: 24 s for workers that have this one anyway.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks would run through the progress bar
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name, value in NODE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_task_oom_retries", "2")  # infinite otherwise: pipeline.py isolates what is left
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of workers: see nec_ray/__main__.py
    if "RAY_ADDRESS" not in os.environ:
        # Read when ray is imported: a cluster of our own listens on the loopback interface only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        with _no_remarks():
            ray.init(
                address=os.environ.get("RAY_ADDRESS") or "local",
                include_dashboard=None if os.environ.get("RAY_ADDRESS") else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except Exception as error:  # Ray raises a bare one where a node takes too long to start
        first = str(error).strip().split("\n", 1)[0]
        raise RunError(
            f"Ray does not answer ({first}); check RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    take_sigterm_back()
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # A thread of Ray's prints what raylets remark, such as a worker's death, where results belong.
    with redirect_stdout(_Remarks()):
        try:
            yield
        finally:
            try:
                _let_executors_end()
            finally:
                ray.shutdown()


def rows_of(dataset: "Dataset") -> Iterator[dict[str, Any]]:
    """A data set's rows, as its blocks are finished.

    Its own `iter_rows` reads ahead on threads that live on where the loop is broken off. The first that asks Ray for
    anything after the shutdown ends the whole process, whose exit code is then 1.
    """
    import ray
    from ray.data.block import BlockAccessor

    for bundle in dataset.iter_internal_ref_bundles():
        for block in ray.get(list(bundle.block_refs)):
            yield from BlockAccessor.for_block(block).iter_rows(public_row_format=True)


def _let_executors_end() -> None:
    """They have been told to, but Ray Data waits for two seconds at most."""
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(timeout=60)


@contextmanager
def asked_for(cores: int, gpus: int, seconds: float) -> Iterator[None]:
    """Ask the cluster's autoscaler for nodes, and wait until they have joined; after the block they may go.

    Args:
        cores: of all nodes together.
        gpus: of all nodes together; with both 0 nothing is asked for.
        seconds: how long to wait for them; after that the block begins with what there is.

    Raises:
        RunError: not a core came.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    if not cores and not gpus:
        yield
        return
    request_resources(bundles=[{"CPU": 1}] * cores + [{"GPU": 1}] * gpus)
    try:
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            there = ray.cluster_resources()
            came = {"cores": int(there.get("CPU", 0)), "gpus": int(there.get("GPU", 0))}
            if (came["cores"] >= cores and came["gpus"] >= gpus) or waited > seconds:
                break
            check_stop()
            time.sleep(1)
        if not came["cores"]:
            raise RunError(f"no core has joined the cluster in {seconds:g} s; see what its autoscaler says")
        _LOG.info("nodes came", extra={"facts": {**came, "seconds": waited}})
        yield
    finally:
        request_resources(bundles=[])


RETRIES = 2
"""Of a Ray Data task whose process died. Ray Data's own number is infinite: a tile that kills its process would be
tried for ever."""


@contextmanager
def ray_data(*, lost_blocks: int = 0, ordered: bool = False) -> Iterator[None]:
    """Settings of the datasets that are made inside the block, from their first step on; they are as before after it.

    Args:
        lost_blocks: blocks that a run may leave out since their processes died again and again.
        ordered: blocks keep their order.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.copy()
    context.enable_progress_bars = False  # the command line has one of its own
    context.max_errored_blocks = lost_blocks
    context.execution_options.preserve_order = ordered
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # Ray Data sets it when it is imported
    try:
        with warnings.catch_warnings():
            # The only way there is to say `max_retries`; gone in Ray 2.64, which pyproject.toml shuts out.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            yield
    finally:
        context.max_errored_blocks = before.max_errored_blocks
        context.enable_progress_bars = before.enable_progress_bars
        context.execution_options.preserve_order = before.execution_options.preserve_order


def raise_own(error: BaseException) -> None:
    """Raise the typed error of ours that a task ended with, if it was one: Ray wraps it in its own."""
    seen: list[BaseException | None] = [error]
    for one in seen:
        if one is None:
            continue
        if type(one).__module__ == NecError.__module__:
            raise one from None
        seen += [two for two in (getattr(one, "cause", None), one.__cause__) if two not in seen]


def broke_off(error: BaseException) -> RunError:
    """The error of an encoding run that Ray gave up."""
    cause = str(error).strip().splitlines()[-1]
    return RunError(f"the encoding run broke off ({cause}); run the same command again to go on")


class _Remarks(io.TextIOBase):
    """A stream into the log."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger("nec_ray.ray").info(text.strip())
        return len(text)


@contextmanager
def _no_remarks() -> Iterator[None]:
    """Keeps the C++ side of Ray from announcing its log level on stderr; errors come as exceptions all the same."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
