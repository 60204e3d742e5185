"""Connects to Ray: the cluster that RAY_ADDRESS names, or one started on this machine for the time being."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nec_ray.errors import RunError


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
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise RunError(
            f"Ray does not answer ({first}); check RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


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
