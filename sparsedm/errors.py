"""The one exception that means "the input breaks a stated rule", as opposed to a defect of ours."""


class InputError(ValueError):
    """Bad input. The message is one sentence that names the value and the rule; the CLI prints it and exits with 2."""
