"""A lease in a store: of several processes that ask for it one has it, until it lets go or stops renewing it.

The lease is the object with the highest number below its folder. To take, renew or release it is to create the next
number, which one process can; older ones are removed, the newest never, so that a number means one state for good. It
ends `seconds` after that object was written, both times by the store's own clock: no machine's clock is trusted.

A lease keeps two runs from doing the same work twice. It does not make their commits safe, since a process may be
stopped between its last look at the lease and its commit: that is what the index's transactions do.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from nec_ray.errors import LeaseHeld, LeaseLost, NecError, NotFound, StorageError
from nec_ray.storage.store import Store

_NAME = re.compile(r"[0-9]{12}\.json")
_ATTEMPTS = 20
_MAX_JSON = 1 << 16
_COARSE = timedelta(seconds=1)
"""S3 tells times in whole seconds."""


@dataclass(frozen=True)
class _State:
    """The newest object of a lease."""

    number: int
    holder: str | None
    """None where it was let go."""
    until: datetime
    """By the store's clock."""


class Lease:
    """A context inside which this process has the lease of a folder, renewed by a thread.

    Args:
        store: where.
        folder: of the lease, such as `leases/reencode`.
        seconds: after which the lease of a process that is gone may be taken.

    Raises:
        LeaseHeld: (on entering) another process has it; the message names it, and until when.
        StorageError: the store refused, or was away for too long.
    """

    def __init__(self, store: Store, folder: str, seconds: float) -> None:
        self._store = store
        self._folder = folder
        self._seconds = seconds
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._number = 0
        self._renewed = 0.0
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        for _ in range(_ATTEMPTS):
            state = self._newest()
            if state and state.holder and self._store.now() < state.until:
                raise LeaseHeld(
                    f"{self._store.url}: {state.holder} has the lease {self._folder} until "
                    f"{state.until.isoformat(timespec='seconds')}; run the same command again when it is done"
                )
            if self._create((state.number if state else 0) + 1, self.holder):
                break
        else:
            raise LeaseHeld(
                f"{self._store.url}: others came first {_ATTEMPTS} times at the lease {self._folder}; run the same "
                "command again"
            )
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._lost:
            return
        with suppress(NecError):  # what is not let go ends by itself
            self._create(self._number + 1, None)

    def check(self) -> None:
        """Make sure that the lease is still this process's; one request.

        Raises:
            LeaseLost: it is not, or could not be renewed in time.
        """
        # Monotonic time only measures how long ago this process renewed it, never what the time is.
        if not self._lost and time.monotonic() - self._renewed >= self._seconds:
            self._lost = "it could not be renewed in time"
        if not self._lost and max(self._numbers(), default=0) > self._number:
            newest = self._newest()  # a renewal by the thread may have come between
            if newest and newest.holder != self.holder:
                self._lost = f"{newest.holder or 'another process'} has taken it"
        if self._lost:
            raise LeaseLost(
                f"{self._store.url}: the lease {self._folder} was lost ({self._lost}); nothing more was committed, "
                "run the same command again"
            )

    def _keep(self) -> None:
        """Renew the lease until told to stop, three times in its life."""
        while not self._stop.wait(self._seconds / 3):
            try:
                if not self._create(self._number + 1, self.holder):
                    self._lost = "another process has taken it"
                    return
            except StorageError:
                continue  # it may answer again in time; check() knows when it is too late
            except NecError as error:
                self._lost = str(error)
                return

    def _create(self, number: int, holder: str | None) -> bool:
        """Make the lease's next state; false where another process made one."""
        started = time.monotonic()
        document = {"holder": holder, "seconds": self._seconds, "by": self.holder}
        name = self._name(number)
        # An answer that was lost makes the second attempt find the first one's object: look whose it is.
        if not self._store.create(name, json.dumps(document).encode()) and not self._is_mine(number):
            return False
        # Older numbers are removed, so that one of them can be made again by a process that looked long ago.
        numbers = self._numbers()
        if max(numbers, default=number) > number:
            with suppress(NecError):
                self._store.delete([name])
            return False
        self._number, self._renewed = number, started
        with suppress(NecError):
            self._store.delete([self._name(older) for older in numbers if older < number])
        return True

    def _is_mine(self, number: int) -> bool:
        try:
            return bool(json.loads(self._store.read_start(self._name(number), _MAX_JSON)).get("by") == self.holder)
        except (NotFound, ValueError, AttributeError):
            return False

    def _newest(self) -> _State | None:
        for _ in range(_ATTEMPTS):
            number = max(self._numbers(), default=0)
            if not number:
                return None
            name = self._name(number)
            try:
                raw, written = self._store.read_start(name, _MAX_JSON), self._store.modified(name)
            except NotFound:  # a newer one has come
                continue
            try:
                document = json.loads(raw)
                holder, seconds = document["holder"], float(document["seconds"])
                until = written + timedelta(seconds=seconds) + _COARSE
            except (ValueError, KeyError, TypeError, OverflowError):
                raise LeaseHeld(
                    f"{self._store.url}/{name}: no lease of this release; remove it if no run is at work"
                ) from None
            return _State(number, None if holder is None else str(holder)[:200], until)
        raise LeaseHeld(f"{self._store.url}: the lease {self._folder} changes too fast; run the same command again")

    def _numbers(self) -> list[int]:
        names = (name.rpartition("/")[2] for name in self._store.names(self._folder))
        return [int(name.removesuffix(".json")) for name in names if _NAME.fullmatch(name)]

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:012}.json"
