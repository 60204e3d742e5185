"""Encode a tile catalog into an archive; for `ray job submit -- python jobs/encode.py CONFIG.toml`.

The keys of CONFIG.toml are in schemas/encode_job.schema.json. Exit codes: 0 done; 1 an error that running again does
not mend; 75 run the same job again. Log lines go to stderr, the account to stdout, both as JSON.
"""

import argparse
import sys
from pathlib import Path

from nec_ray.runtime.encode import encode
from nec_ray.runtime.encode_job import read_encode_job
from nec_ray.runtime.job import run_job


def main() -> int:
    """Parse, encode, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    asked = parser.parse_args()

    def work() -> dict[str, object]:
        job = read_encode_job(asked.config, asked.overrides).model_dump()
        catalog, archive, codec = job.pop("catalog"), job.pop("archive"), job.pop("codec")
        return encode(catalog, archive, codec_url=codec, **job).to_dict()

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
