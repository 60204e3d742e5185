"""An evaluation as a job: its results go to a path or URL, and are found there by the next run."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from nec_ray.errors import NotFound
from nec_ray.evaluate.compare import MASKS, RESULTS_JSON
from nec_ray.evaluate.evaluation import Evaluation, run_evaluation
from nec_ray.storage import Store

_LOG = logging.getLogger(__name__)


def evaluate(experiment: Evaluation, out: str) -> dict[str, Any]:
    """Run an evaluation and leave its results at a path or URL, after each head, so that a killed job goes on.

    Returns:
        `out` and the `summary` of results.json.

    Raises:
        The same as `nec_ray.evaluate.evaluation.run_evaluation`.
    """
    store = Store(out)
    with tempfile.TemporaryDirectory(prefix="nec-evaluate-") as temporary:
        folder = Path(temporary)
        try:
            (folder / RESULTS_JSON).write_bytes(store.read(RESULTS_JSON))
        except NotFound:
            store.check_writable()
        kept = {name for name in store.names(MASKS) if name.endswith(".npz")}
        for name in kept:
            (folder / MASKS).mkdir(exist_ok=True)
            (folder / MASKS / Path(name).name).write_bytes(store.read(name))

        def done(heads: int, of: int) -> None:
            for path in sorted((folder / MASKS).glob("*.npz")):  # before the row that says they are there
                name = f"{MASKS}/{path.name}"
                if name not in kept:
                    store.replace(name, path.read_bytes())
                    kept.add(name)
            _LOG.info("head trained", extra={"facts": {"heads": heads, "of": of}})
            store.replace(RESULTS_JSON, (folder / RESULTS_JSON).read_bytes())

        document = run_evaluation(experiment, folder, done)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.replace(path.relative_to(folder).as_posix(), path.read_bytes())
    return {"out": store.url, "summary": document["summary"]}
