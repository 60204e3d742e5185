"""Train a codec; for `ray job submit -- python jobs/train.py RECIPE.toml --out URL`.

The keys of RECIPE.toml are in schemas/recipe.schema.json. Exit codes: 0 done; 1 an error that running again does not
mend; 75 run the same job again. Log lines go to stderr, where the result is to stdout, both as JSON.
"""

import argparse
import logging
import sys
from pathlib import Path

from nec_ray.runtime.job import run_job
from nec_ray.runtime.recipe import read_recipe
from nec_ray.runtime.train import train


def main() -> int:
    """Parse, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", required=True, help="a path or URL that every node reaches")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    asked = parser.parse_args()

    def work() -> dict[str, str]:
        log = logging.getLogger("nec_ray.train").info
        return {"result": train(read_recipe(asked.recipe, asked.overrides), asked.out, progress=log)}

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
