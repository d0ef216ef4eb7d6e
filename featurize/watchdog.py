"""Ends a process in which nothing moves any more, as a crash would: Ray replaces it, and its tars are tried again.

A read from a dead mount, or a kernel that never ends, would keep a tar for ever, under a lease that goes on beating.
"""

import faulthandler
import threading


class Watchdog:
    """Entered once for every tar at hand, by any thread; what each of them is doing is printed before the end.

    Waiting and ending are done in C, by a thread of their own: whatever hangs may hold the interpreter.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tars = 0

    def moved(self) -> None:
        """Something was done; the time begins anew."""
        self._count(0)

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            self._tars += more
            if self._tars:
                faulthandler.dump_traceback_later(self._seconds, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()
