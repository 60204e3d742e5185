"""An evaluation as a job: its results go to a path or URL, and are found there by the next run."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from nec_ray.errors import NotFound
from nec_ray.evaluate.compare import RESULTS_JSON, compare
from nec_ray.evaluate.experiment import Experiment
from nec_ray.storage import Store

_LOG = logging.getLogger(__name__)


def evaluate(experiment: Experiment, out: str) -> dict[str, Any]:
    """Run an experiment and leave its results at a path or URL, after each head, so that a killed job goes on.

    Returns:
        `out` and the `summary` of results.json.

    Raises:
        The same as `nec_ray.evaluate.compare.compare`.
    """
    store = Store(out)
    with tempfile.TemporaryDirectory(prefix="nec-evaluate-") as name:
        folder = Path(name)
        try:
            (folder / RESULTS_JSON).write_bytes(store.read(RESULTS_JSON))
        except NotFound:
            store.check_writable()

        def done(heads: int, of: int) -> None:
            _LOG.info("head trained", extra={"facts": {"heads": heads, "of": of}})
            store.replace(RESULTS_JSON, (folder / RESULTS_JSON).read_bytes())

        document = compare(experiment, folder, done)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.replace(path.relative_to(folder).as_posix(), path.read_bytes())
    return {"out": store.url, "summary": document["summary"]}
