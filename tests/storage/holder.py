"""A process that wants a lease, for tests; it says `have` when it has it, `lost` when it finds that it has not.

python -m tests.storage.holder URL SECONDS count TIMES     adds 1 to a counter so many times, each under the lease
python -m tests.storage.holder URL SECONDS hold            takes it once and holds it until killed
"""

import sys
import time

from nec_ray.errors import LeaseHeld, LeaseLost
from nec_ray.storage import Store
from nec_ray.storage.lease import Lease


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def count(store: Store, seconds: float, times: int) -> None:
    """Reads, waits and writes: two at once would count too few."""
    while times:
        try:
            with Lease(store, "leases/test", seconds) as lease:
                before = int(store.read("counter")) if store.exists("counter") else 0
                time.sleep(0.02)
                lease.check()
                store.replace("counter", str(before + 1).encode())
                times -= 1
        except LeaseHeld:
            time.sleep(0.02)


def hold(store: Store, seconds: float) -> None:
    with Lease(store, "leases/test", seconds) as lease:
        say("have")
        while True:
            time.sleep(0.05)
            try:
                lease.check()
            except LeaseLost:
                say("lost")
                return


if __name__ == "__main__":
    where, life = Store(sys.argv[1]), float(sys.argv[2])
    if sys.argv[3] == "hold":
        hold(where, life)
    else:
        count(where, life, int(sys.argv[4]))
