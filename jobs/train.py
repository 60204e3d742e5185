"""Train a codec from a recipe; for `ray job submit -- python jobs/train.py RECIPE --out DIR`.

The folder of the run must be on storage that every node reaches. Exit codes: 0 done; 1 a typed error that running
again does not mend; 75 run the same job again.
"""

import argparse
import json
import sys
from pathlib import Path

from nec_ray.errors import NecError, RunError, StorageError
from nec_ray.runtime.recipe import read_recipe
from nec_ray.runtime.train import train

RETRY = 75


def main() -> int:
    """Parse, train, print where the codec is as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--restart", action="store_true")
    asked = parser.parse_args()
    try:
        recipe = read_recipe(asked.recipe, asked.set)
        codec = train(recipe, asked.out, restart=asked.restart, progress=lambda line: print(line, file=sys.stderr))
    except NecError as error:
        print(f"error: {error}", file=sys.stderr)
        return RETRY if isinstance(error, RunError | StorageError) else 1
    print(json.dumps({"codec": str(codec)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
