"""One case of a hunt in a process of its own, under limits: a crash or a hang ends the case and not the hunt."""

import contextlib
import os
import resource
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """code: the exit code, negative for the signal that ended the process; None: it hung. said: its stderr."""

    code: int | None
    said: str


def forked(function, seconds=60, megabytes=2048):
    """Call `function` in a fork of this process and return the Outcome. What it returns is the exit code.

    seconds: of the CPU; six times that by the clock are a hang. megabytes: of memory, beyond what is taken already.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _run(function, out.fileno(), err.fileno(), seconds, megabytes)
        code = _wait(child, 6 * seconds)
        err.seek(0)
        return Outcome(code, err.read().decode(errors="replace"))


def _run(function, out, err, seconds, megabytes):
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(1, "w", closefd=False))))
            backslashes = {"errors": "backslashreplace"}  # as Python's own stderr has it
            err = stack.enter_context(open(2, "w", closefd=False, **backslashes))
            stack.enter_context(contextlib.redirect_stderr(err))
            code = function() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}"[:2000].encode(errors="replace"))
    finally:
        os._exit(code)


def _wait(child, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
