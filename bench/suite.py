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

CUT = 3  # exit code of a program that left something out for lack of time
GRACE = 5  # seconds that a suite may take beyond its time before it is ended


@dataclass(frozen=True)
class Suite:
    """One process. In `command`, {folder}, {csv}, {seconds} and {minutes} stand for the campaign's folder, its results
    file and the time that the process may take.

    seconds: at most, so that one suite cannot starve the rest. group: suites that follow each other with the same one
    run side by side; only for what is not timed. A suite is skipped if the program `needs` is not on the PATH, or if
    no more than `least` seconds are left for it.
    """

    name: str
    command: tuple
    seconds: float = math.inf
    group: str | None = None
    needs: str | None = None
    least: float = 0.0

    def obstacle(self, left):
        """Why it is skipped where so many seconds are left, or None."""
        if self.needs and not shutil.which(self.needs):
            return f"{self.needs} is not on the PATH"
        return "no time was left" if min(self.seconds, left) <= self.least else None


def side_by_side(suites, folder, left):
    """Run them at the same time, with so many seconds left: yields (what index.json says of it, what it printed).

    A process that outlives its time by GRACE is ended, with all its children; an interruption ends all of them.
    """
    processes = []
    with ThreadPoolExecutor(max(1, len(suites))) as pool:
        try:
            yield from pool.map(lambda suite: _run(suite, folder, left, processes), suites)
        except BaseException:
            for process in processes:
                signal_all(process, signal.SIGTERM)
            raise


def _run(suite, folder, left, processes):
    if obstacle := suite.obstacle(left):
        return {"name": suite.name, "status": "skipped", "reason": obstacle}, ""
    began, seconds = time.monotonic(), min(suite.seconds, left)
    places = {"folder": folder, "csv": folder / "results.csv"}
    places |= {"seconds": f"{seconds:.0f}", "minutes": f"{seconds / 60:.2f}"}
    command = [part.format(**places) if "{" in part else part for part in suite.command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    processes.append(process)
    try:
        output = process.communicate(timeout=seconds + GRACE)[0]
        status = {0: "ran", CUT: "cut"}.get(process.returncode, "failed")
        reason = {"ran": "", "cut": "its time was up"}.get(status, reason_of(process.returncode, output))
    except subprocess.TimeoutExpired:
        output, status, reason = _end(process), "cut", f"ended after {seconds:.0f} s without an answer: a hang, or slow"
    entry = {"name": suite.name, "status": status, "reason": reason, "seconds": round(time.monotonic() - began, 1)}
    return entry | {"command": shlex.join([Path(command[0]).name, *command[1:]])}, output


def _end(process):
    """Ask the whole process group to stop, then make it; what it has printed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        signal_all(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[0]
    return "it could not be ended: the device does not answer\n"


def signal_all(process, how):
    """Send a signal to a process that leads a session, and to all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def reason_of(code, output):
    """The exit code and the last line that was printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip()[:300] if lines else 'no output'}"
