"""Make an archive what a policy says; for `ray job submit -- python jobs/reencode.py POLICY.toml`, now and then.

The keys of POLICY.toml are in schemas/policy.schema.json. Exit codes: 0 done; 1 an error that running again does not
mend; 75 run the same job again. Log lines go to stderr, the account to stdout, both as JSON.
"""

import argparse
import sys
from pathlib import Path

from nec_ray.runtime.job import run_job
from nec_ray.runtime.policy import read_policy
from nec_ray.runtime.reencode import dry_run, reencode


def main() -> int:
    """Parse, re-encode, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--workers", type=_at_least_one, help="tasks at a time; one a core where not given")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()

    def work() -> dict[str, object]:
        policy = read_policy(asked.policy)
        account = dry_run(policy) if asked.dry_run else reencode(policy, workers=asked.workers)
        return account.to_dict()

    return run_job(work)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
