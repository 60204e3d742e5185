"""Compare methods by accuracy and bytes; for `ray job submit -- python jobs/evaluate.py CONFIG.toml --out URL`.

The keys of CONFIG.toml are in schemas/evaluation.schema.json, of GEO-Bench in
schemas/geobench_evaluation.schema.json. Exit codes: 0 done; 1 an error that running again does
not mend; 75 run the same job again. Log lines go to stderr, the summary to stdout, both as JSON.
"""

import argparse
import sys
from pathlib import Path

from nec_ray.evaluate.evaluation import read_evaluation
from nec_ray.runtime.evaluate_job import evaluate
from nec_ray.runtime.job import run_job


def main() -> int:
    """Parse, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", required=True, help="folder for the results: a path or URL")
    asked = parser.parse_args()
    return run_job(lambda: evaluate(read_evaluation(asked.config), asked.out))


if __name__ == "__main__":
    sys.exit(main())
