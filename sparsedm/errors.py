"""Exceptions that are no bugs: the input breaks a stated rule, or a run was stopped."""

import contextlib
import math
import os
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no limits
    resource = None


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value and the rule; the CLI prints it and exits with 2."""


class TooLittleMemory(InputError):
    """What is asked for needs more memory than there is."""


class Stopped(Exception):
    """A run ends early, on purpose; its work so far is saved. exit_code: of the process."""

    exit_code = 130


def check_memory(needed, what, there=None):
    """Raise TooLittleMemory if `what`, which takes `needed` bytes, needs more memory than this machine has.

    there: the bytes of another memory, such as a GPU's.
    """
    there = there or _memory()
    if needed > there:
        raise TooLittleMemory(
            f"not enough memory: {what} takes {_readable(needed)} or more, and there are {_readable(there)}"
        )


def _readable(size):
    size, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    return f"{size:,.0f} {unit}" if size >= 10 else f"{size:.3g} {unit}"


def _memory():
    """Bytes that this process may use: of the machine, of its container, and by `ulimit -v`. Infinite if unknown."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):  # Windows does not say
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if resource and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(limit)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)
