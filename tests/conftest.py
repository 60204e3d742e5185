"""What every room's tests share: where the real data lies, and one local Ray for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

# Ray and its workers read these when ray is imported: no environment of uv's for every worker, no token for a
# cluster of one test session, and that cluster on the loopback interface only.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.pop("RAY_ADDRESS", None)

import pytest

_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery beside the checkout."""
    if not _DATA.is_dir():
        pytest.skip("../shared/data is absent: this test needs its real imagery")
    return _DATA.resolve()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine, which `connect()` finds and keeps."""
    from nec_ray.runtime.cluster import connect

    with connect():
        yield
