"""The benchmark: what is measured, on which shapes, against which providers, and how; and the pictures. For a checkout.

run           the suites from the command line: `python -m bench.run`
campaign      all suites within a number of minutes, as processes of limited time (`suite`); first: `first_contact`
measure       check, then time: the rows of one problem for a list of providers;  timing: clocks, rounds, percentiles
shapes        named shapes, taken from the models themselves, and sweeps
problems      data, reference and arithmetic of one shape: linear, convolution, masked training, masks
providers     dense torch and ours;  baselines: the 2:4 products of other libraries, and the list of all providers
cpu           the measurements on a CPU: five N:M patterns against both dense products of torch
networks      whole networks: one sampler step, whole sampling, a training step
ceilings      the limits of this device: copies, dense products, tensor-core instructions (`instruction_rates`)
results       the CSV files: one row per measurement, with device and versions; and speed-ups over dense
plot          every picture (`charts`), only from CSV files;  targets: the project's targets and the measured values
counters      the GPU's counters at the best and worst shapes, under ncu
experiments/  which method trains best: plans, runs and reports
"""

import argparse
import functools
import sys

from sparsedm.cli import Parser, check_values, exit_code, nonempty
from sparsedm.errors import InputError


def command_line(module, text):
    """The parser of `python -m MODULE`, whose help shows `text` as it is written."""
    parser = Parser(f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", None, nonempty)  # of options that name none
    return parser


def check_used(options, names, used, by):
    """Raise InputError if one of the options `names` is given and is not among the `used` ones of `by`."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) and name not in used]
    if given:
        raise InputError(f"{by} makes no use of {', '.join(given)}: leave out what would change nothing")


def program(name):
    """Decorates a `main`: an exception that is no defect is said in one sentence after `name`; see `exit_code`."""

    def decorate(main):
        @functools.wraps(main)
        def run(*arguments):
            def checked():
                check_values(sys.argv[1:] if arguments in ((), (None,)) else arguments[0])
                return main(*arguments)

            return exit_code(name, checked)

        return run

    return decorate
