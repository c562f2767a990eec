"""When a GPU hangs or is lost in the middle of a benchmark: the process starts itself again, and goes on behind it.

A kernel that never ends, or that writes out of bounds, takes the process with it; nothing in it can be timed any more.
The results file knows who was under way, and with --resume passes over it.
"""

import faulthandler
import os
import sys
import threading


class Watch:
    """Calls `late()`, in a thread of its own, if no other `expect` and no `done` follows `expect(seconds)` in time."""

    def __init__(self, late):
        self.late = late
        self.timer = None

    def expect(self, seconds):
        self.done()
        self.timer = threading.Timer(seconds, self.late)
        self.timer.daemon = True
        self.timer.start()

    def done(self):
        if self.timer:
            self.timer.cancel()


def start_again(module, arguments):
    """Replace this process by `python -m module arguments`, having written where every thread of it was."""
    faulthandler.dump_traceback(sys.__stderr__)
    os.closerange(3, 1 << 16)  # the driver gives a GPU back when its files are closed
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
