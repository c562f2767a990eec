"""The one exception that means "the input breaks a stated rule", as opposed to a defect of ours."""

import functools
import sys


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value and the rule; the CLI prints it and exits with 2."""


def program(name):
    """Decorates a `main`: where it raises InputError, the sentence goes to stderr after `name`, and it returns 2."""

    def decorate(main):
        @functools.wraps(main)
        def run(*arguments):
            try:
                return main(*arguments)
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2

        return run

    return decorate
