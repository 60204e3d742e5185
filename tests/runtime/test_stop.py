"""A request to stop that Python drops within a finaliser still stops the run, at the next shard."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from nec_ray.errors import Interrupted
from nec_ray.runtime.commit import Committer
from nec_ray.runtime.encode import prepare
from nec_ray.runtime.shard import Receipt, serially
from nec_ray.runtime.stop import stop_on_sigterm
from nec_ray.tiles import build_catalog, builtin_scene, write_catalog
from tests.runtime.make import random_codec


class Swallows:
    """What it raises when it is dropped is told as ignored, and nothing else happens."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_within_a_finaliser_stops_the_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    write_catalog(build_catalog(builtin_scene(), tile_size=64), tmp_path / "catalog.parquet")
    codec = random_codec(tmp_path / "codec")
    try:
        stop_on_sigterm()
        url = codec._store.url
        with prepare(tmp_path / "catalog.parquet", tmp_path / "a", codec_url=url, shard_tiles=16) as run:

            def receipts() -> Generator[Receipt]:
                for number, receipt in enumerate(serially(run.plan.shards(), run.codec, run.store)):
                    if number == 2:
                        del [Swallows()][0]
                    yield receipt

            committer = Committer(run.index, run.plan, run.codec, 1000.0, None)
            with pytest.raises(Interrupted):
                committer.run(receipts())
            assert committer.committed == 3 * 16
            assert run.plan.todo > 4 * 16
    finally:
        signal.signal(signal.SIGTERM, before)
