"""`python -m bench.experiments NAME`: see `runner.py`."""

import logging
import sys

from bench import command_line, program
from bench.experiments import runner
from sparsedm.commands.options import add_seed_and_device


@program("experiments")
def main(arguments=None):
    """Returns the exit code: 0 done, 2 bad input, 3 when --minutes were over, 128 + signal when it was interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = command_line("bench.experiments", runner.__doc__)
    runner.add_arguments(parser)
    add_seed_and_device(parser)
    runner.experiment(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
