"""Encode a tile catalog into an archive; for `ray job submit -- python jobs/encode.py CATALOG ARCHIVE --codec CODEC`.

Exit codes: 0 done; 1 a typed error that running again does not mend; 75 run the same job again.
"""

import argparse
import json
import sys

from nec_ray.errors import ConflictError, NecError, RunError, StorageError
from nec_ray.runtime.encode import encode

RETRY = 75


def main() -> int:
    """Parse, encode, print the account as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("catalog")
    parser.add_argument("archive")
    parser.add_argument("--codec")
    parser.add_argument("--where")
    parser.add_argument("--workers", type=int)
    asked = parser.parse_args()
    try:
        account = encode(asked.catalog, asked.archive, codec_url=asked.codec, where=asked.where, workers=asked.workers)
    except NecError as error:
        print(f"error: {error}", file=sys.stderr)
        return RETRY if isinstance(error, ConflictError | RunError | StorageError) else 1
    print(json.dumps(account.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
