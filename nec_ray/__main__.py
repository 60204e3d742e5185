"""`nec` and `python -m nec_ray`: the command, which Ctrl-C stops in one line while its modules are being loaded too."""

import os
import signal
import sys


def main() -> None:
    """Entry point of the `nec` command."""
    # Torch's threads wait for one another by spinning, and come to a standstill where anything else wants a core. A
    # thirtieth of the usual patience costs nothing where nothing does (700 tiles/s), and gains 4x where something does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGINT, _stop)
    from nec_ray.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _stop(*_: object) -> None:
    sys.stderr.write("nec: stopped; nothing was done\n")
    sys.stderr.flush()
    os._exit(130)  # an exception in the middle of an import would be a traceback, or lost


if __name__ == "__main__":
    main()
