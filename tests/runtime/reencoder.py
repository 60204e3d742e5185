"""A process that re-encodes, for tests: may be killed anywhere, and says each cell that it has done.

python -m tests.runtime.reencoder ARCHIVE LAYERS CELL_TILES LEASE_SECONDS
"""

import sys
import time

from nec_ray.errors import LeaseHeld
from nec_ray.runtime.policy import LeaseSection, one_rule
from nec_ray.runtime.reencode import reencode
from nec_ray.runtime.reencode_account import Reencoding


def run(url: str, layers: int, cell_tiles: int, seconds: float) -> Reencoding:
    """Re-encode as soon as the lease is free."""
    policy = one_rule(url, layers=layers).model_copy(update={"lease": LeaseSection.model_construct(seconds=seconds)})

    def say(done: int, todo: int) -> None:
        sys.stdout.write(f"{done} of {todo}\n")
        sys.stdout.flush()

    while True:
        try:
            return reencode(policy, local=True, cell_tiles=cell_tiles, progress=say)
        except LeaseHeld:
            time.sleep(0.1)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
