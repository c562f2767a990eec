"""What the tests of commands share: how to run one, and the options of a tiny network."""

from sparsedm.cli import main

TINY = ["--set", "image_size=8", "--set", "dim=32", "--set", "depth=2", "--set", "heads=2", "--set", "num_classes=6"]


def run(*arguments):
    """The exit code of `sparsedm arguments`."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse's own refusals
        return exit.code
