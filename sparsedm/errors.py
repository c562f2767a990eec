"""Exceptions that are no bugs: the input breaks a stated rule, or a run was stopped."""

import os


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value and the rule; the CLI prints it and exits with 2."""


class Stopped(Exception):
    """A run ends early, on purpose; its work so far is saved. exit_code: of the process."""

    exit_code = 130


def check_memory(needed, what, there=None):
    """Raise InputError if `what`, which takes `needed` bytes, needs more memory than this machine has.

    there: the bytes of another memory, such as a GPU's.
    """
    if not there and not hasattr(os, "sysconf"):  # Windows does not say
        return
    there = there or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"not enough memory: {what} takes {needed / 2**30:,.0f} GiB or more, and there are {there / 2**30:,.0f} GiB"
        )
