"""What every room's tests share: where the real data lies, and one local Ray for the session."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Ray and its workers read these when ray is imported: no environment of uv's for every worker, no token for a
# cluster of one test session, and that cluster on the loopback interface only.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.pop("RAY_ADDRESS", None)
# Two test processes share two cores: torch's threads must not spin while they wait for one another.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
from hypothesis import settings

from tests.s3 import Server

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real imagery beside the checkout."""
    if not _DATA.is_dir():
        pytest.skip("../shared/data is absent: this test needs its real imagery")
    return _DATA.resolve()


_ON_RAY = (
    "test_train.py",
    "test_pretrain.py",
    "test_reencode.py",
    "test_faults.py",
    "test_traps.py",
    "test_encode.py",
    "test_jobs.py",
    "test_bench_encode.py",
    "test_cronjob.py",
    "test_ray_dataset.py",
)
"""One after the other: two cores do not carry the processes of two clusters."""
_LONGEST = ("test_install.py", "test_docs.py", "test_readme.py", "test_bench_pull.py", "test_s3.py", "test_hostile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that none runs alone in the end."""
    order = [*_ON_RAY, *_LONGEST]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs a file's tests, which share fixtures, and all on Ray; xdist's own groups need pytest < 9."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.rpartition("/")[2] in _ON_RAY else file

    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="Random faults with 20 seeds instead of 3.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault_seed" in metafunc.fixturenames:
        metafunc.parametrize("fault_seed", range(20 if metafunc.config.getoption("--exhaustive") else 3))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, in the environment as a user would have it."""
    server = Server(tmp_path_factory.mktemp("s3"))
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine, which `connect()` finds and keeps."""
    from nec_ray.runtime.cluster import connect

    with connect():
        yield
