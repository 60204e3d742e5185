"""Train a codec; for `ray job submit -- python jobs/train.py RECIPE --out DIR`.

Exit codes: 0 done; 1 a typed error that running again does not mend; 75 run the same job again.
"""

import argparse
import sys
from pathlib import Path

from nec_ray.errors import ConflictError, NecError, RunError, StorageError
from nec_ray.runtime.recipe import read_recipe
from nec_ray.runtime.train import train

RETRY = 75


def main() -> int:
    """Parse, train, print where the codec is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    asked = parser.parse_args()
    try:
        codec = train(read_recipe(asked.recipe, asked.overrides), asked.out, progress=print)
    except NecError as error:
        print(f"error: {error}", file=sys.stderr)
        return RETRY if isinstance(error, ConflictError | RunError | StorageError) else 1
    print(codec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
