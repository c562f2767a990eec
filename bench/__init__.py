"""The benchmark: what is measured, on which shapes, against whom, how; and the pictures of it. Run it in a checkout.

run           the suites from the command line: `python -m bench.run`
campaign      all of them within so many minutes, as processes of limited time (`suite`); `first_contact` goes before
measure       check, then time: the rows of one problem for a list of providers;  timing: clocks, rounds, percentiles
shapes        named shapes, taken from the models themselves, and sweeps
problems      data, reference and arithmetic of one shape: linear, convolution, masked training, masks
providers     dense torch and ours;  baselines: other people's 2:4 products, and the list of everybody
cpu           what is measured on a CPU: every N:M pattern against both dense products of torch
networks      whole networks: one sampler step, whole sampling, a training step
ceilings      what this device can do at most: copies, dense products, tensor-core instructions (`instruction_rates`)
results       the CSV files: one row per measurement, what it is stamped with, and speed-ups over dense
plot          every picture (`charts`), from CSV files alone;  targets: what the project wants, beside what was measured
counters      the GPU's counters at the best and worst shapes, under ncu
experiments/  which method trains best: plans, runs and reports
"""

import functools
import sys

from sparsedm.errors import InputError


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
