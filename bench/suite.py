"""One part of a campaign: a process with a limited time. Several may run side by side."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUT = 3  # exit code of a program that ran out of time
DEADLINE = "BENCH_DEADLINE"  # environment variable: the value of time.monotonic(), one clock for all processes
GRACE = 5  # a suite is asked to stop so many seconds after its time, and killed as many later


def deadline(seconds):
    """The value of time.monotonic() in so many `seconds`, or when the suite of this process ends, if that is earlier.

    The suite's time began with its process: importing torch is a part of it.
    """
    return min(time.monotonic() + seconds, float(os.environ.get(DEADLINE, "inf")))


@contextlib.contextmanager
def interruptible():
    """In this context SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Suite:
    """One process. In `command`, {folder}, {csv}, {seconds} and {minutes} are replaced by the campaign's folder, its
    results file and the time limit of the process.

    seconds: the limit, so that one suite cannot starve the others. group: successive suites of the same group run side
    by side; only for suites that time nothing. A suite is skipped if the program `needs` is not on the PATH, or if no
    more than `least` seconds are left. always: it runs although it ran before.
    """

    name: str
    command: tuple
    seconds: float = math.inf
    group: str | None = None
    needs: str | None = None
    least: float = 0.0
    always: bool = False

    def obstacle(self, left):
        """Why it is skipped with `left` seconds left, or None."""
        if self.needs and not shutil.which(self.needs):
            return f"{self.needs} is not on the PATH"
        return "no time was left" if min(self.seconds, left) <= self.least else None


def side_by_side(suites, folder, left):
    """Run suites at the same time, with `left` seconds left. Yields (its entry in index.json, its output).

    A process that exceeds its time is ended, with all its children. An interruption ends all.
    """
    processes = []
    with ThreadPoolExecutor(max(1, len(suites))) as pool:
        try:
            yield from pool.map(lambda suite: _run(suite, folder, left, processes), suites)
        except BaseException:
            for process in processes:
                _end(process, process.wait)
            raise


def _run(suite, folder, left, processes):
    if obstacle := suite.obstacle(left):
        return {"name": suite.name, "status": "skipped", "reason": obstacle}, ""
    began, seconds = time.monotonic(), min(suite.seconds, left)
    places = {"folder": folder, "csv": folder / "results.csv"}
    places |= {"seconds": f"{seconds:.0f}", "minutes": f"{seconds / 60:.2f}"}
    command = [part.format(**places) if "{" in part else part for part in suite.command]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipes |= {"text": True, "errors": "replace"}
    # a group and no session of its own: who ends the campaign's session ends this, too
    process = subprocess.Popen(command, process_group=0, env=os.environ | {DEADLINE: str(began + seconds)}, **pipes)
    processes.append(process)
    try:
        output = process.communicate(timeout=seconds + GRACE)[0]
        status = {0: "ran", CUT: "cut"}.get(process.returncode, "failed")
        reason = {"ran": "", "cut": "its time was up"}.get(status, reason_of(process.returncode, output))
    except subprocess.TimeoutExpired:
        ended = _end(process, process.communicate)
        output = ended[0] if ended else "it could not be ended: the device does not answer\n"
        status, reason = "cut", f"ended after {seconds:.0f} s without an answer: a hang, or slow"
    entry = {"name": suite.name, "status": status, "reason": reason, "seconds": round(time.monotonic() - began, 1)}
    return entry | {"command": shlex.join([Path(command[0]).name, *command[1:]])}, output


def _end(process, wait):
    """Ask the whole process group to stop, then kill it. Returns what `wait(timeout=GRACE)` does, or None."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        signal_all(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return wait(timeout=GRACE)


def signal_all(process, how):
    """Send a signal to a process that leads a group, and to its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def reason_of(code, output):
    """The exit code and the last line that was printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip()[:300] if lines else 'no output'}"
