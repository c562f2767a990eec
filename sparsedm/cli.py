"""The command line of `sparsedm`. Each command is a module of `commands/`, imported when it is called.

A command module offers EXAMPLES (its own command lines), `add_arguments(parser)` and `run(options)`.
"""

import argparse
import contextlib
import ctypes
import importlib
import io
import logging
import os
import re
import signal
import sys
import textwrap
import threading

from sparsedm import __version__
from sparsedm.errors import InputError, Stopped

COMMANDS = {  # name: (module, what it does)
    "quickstart": (
        "sparsedm.commands.quickstart",
        "train a tiny U-ViT dense, then 3:4, then 2:4, and compare them, in minutes on a CPU",
    ),
    "train": (
        "sparsedm.commands.train",
        "train a dense network and make it sparse, in stages; to resume, run the same command again",
    ),
    "sample": ("sparsedm.commands.sample", "draw images from a trained model into one picture"),
    "evaluate": ("sparsedm.commands.evaluate", "measure the distance of a model's samples to real images"),
    "inspect": ("sparsedm.commands.inspect", "show parameters, MACs and back end of each layer, dense and sparse"),
    "import": (
        "sparsedm.commands.convert",
        "convert an original U-ViT, DiT, DDPM or DDSM checkpoint, or a diffusers folder, to this package's model file",
    ),
    "encode": ("sparsedm.commands.encode", "make images latents of a diffusers autoencoder, in a file to train on"),
    "search": (
        "sparsedm.commands.search",
        "find which network of a family to use at which step: N:M students, widths of a slimmable network, or both",
    ),
}
MOVED = {  # commands that left the package: what to call now
    "bench": "sparsedm inspect --time",
    "experiment": "python -m bench.experiments, in a checkout of the repository",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
EXIT_CODES = """\
exit codes:
  0    done
  2    bad input or too little memory; one sentence on stderr says which
  3    the time of `search --minutes` is over; the same command continues
  130  interrupted (143: terminated); what was training has been saved, and the same command resumes it
  141  the reader of the output closed it"""


def main(arguments=None):
    """Run one command. Returns the exit code."""
    open_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # line by line, also into a pipe; a path may hold any character
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")

    def run():
        with _leaving_at_once():
            options = parse(sys.argv[1:] if arguments is None else arguments)
        with _stopping_at_sigterm():
            options.run_command(options)

    return exit_code("sparsedm", run)


def open_streams():
    """Let streams that the caller has closed lead nowhere: else the next file that is opened would be one of them."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def exit_code(program, function):
    """Call `function`, a program. Returns its exit code (None: 0), or the one of an exception that is no defect.

    Such an exception is said in one sentence on stderr, after the program's name.
    """

    def refuse(reason, code=2):
        print(f"{program}: {' '.join(str(reason).splitlines())}", file=sys.stderr)  # a name may hold a line break
        return code

    try:
        return function() or 0
    except InputError as error:
        return refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        reason = _first_line(error) or "out of memory"
        return refuse(f"not enough memory ({reason}): a smaller batch or network needs less")
    except Stopped as stop:
        return refuse(stop, stop.exit_code)
    except Terminated:
        return refuse("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return refuse("stopped", 130)
    except BrokenPipeError:  # a reader such as `head` closed our output; the rest was not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, which Windows has not
    except OSError as error:
        return refuse(f"{error.filename or 'the system refuses'}: {error.strerror or error}")


def parse(arguments):
    """The parsed command line. Its attribute `run_command` is the function to call with it."""
    check_values(arguments)
    return parser_for(arguments).parse_args(arguments)


def check_values(arguments):
    """Raise InputError for an option such as `--steps=--`, of which argparse makes an empty list."""
    for argument in arguments:
        if argument.startswith("-") and argument.endswith("=--"):
            raise InputError(f"{argument} gives no value: '--' only separates options from the rest")


def parser_for(arguments):
    """The parser, with the options of only that command which the arguments name."""
    parser = Parser(
        "sparsedm",
        description="Train, run and measure 2:4 (and N:M) sparse diffusion models. Start with: sparsedm quickstart",
        epilog=EXIT_CODES,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsedm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named in MOVED:
        raise InputError(f"{named} is now: {MOVED[named]}")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, formatter_class=_HelpFormatter)
        sub.register("type", None, nonempty)  # of options that name none
        if name == named:
            command = importlib.import_module(module)
            lines = "\n".join(f"  sparsedm {name} {example}".rstrip() for example in command.EXAMPLES)
            sub.description, sub.epilog = f"{summary[0].upper()}{summary[1:]}.", f"examples:\n{lines}\n\n{EXIT_CODES}"
            sub.set_defaults(run_command=command.run)
            command.add_arguments(sub)
    return parser


def keep_freed_memory():
    """Tell glibc's allocator not to give memory back between calls of a network: page faults cost more than a GELU.

    Does nothing under another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc has it
        # older versions take at most 32 MiB. The second threshold alone would freeze the first one at 128 KiB
        if libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _lacks_memory(error):
    """Whether an error means too little memory. Torch has an error class only for its GPU allocator.

    Further lines may be the output of a compiler, whose warnings tell of other overflows.
    """
    said = ("out of memory", "can't allocate memory", "calculation overflowed", "integer multiplication overflow")
    return isinstance(error, MemoryError) or any(words in _first_line(error) for words in said)


def _first_line(error):
    return str(getattr(error, "inner_exception", error)).partition("\n")[0]  # torch.compile wraps what went wrong


def _leaving_at_once():
    """In this context Ctrl-C ends the process at once: an interrupted import may raise anything."""

    def leave(signum, frame):
        os.write(2, b"sparsedm: stopped\n")
        os._exit(128 + signum)

    return _handled(signal.SIGINT, leave)


def _stopping_at_sigterm():
    """In this context SIGTERM raises Terminated, as Ctrl-C does KeyboardInterrupt: no half-written file stays."""

    def stop(signum, frame):
        raise Terminated

    return _handled(signal.SIGTERM, stop)


@contextlib.contextmanager
def _handled(number, handler):
    before = signal.getsignal(number)
    ignored = before in (signal.SIG_IGN, None)  # by whoever began this process, or a handler of C
    if ignored or threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. No handler of errors takes it for one."""


class Parser(argparse.ArgumentParser):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.I)  # also -1,2: a value, no option

    def error(self, message):
        """Print one sentence on stderr, like every other error, without the usage."""
        if found := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+): expected one argument", message):
            message += f": if it begins with -, write {found[1]}=VALUE"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def nonempty(text):
    """The type of options that name none: `text`, with the home folder for ~."""
    if not text:  # most likely an unset shell variable; as a path it would be the current folder
        raise argparse.ArgumentTypeError("it is empty")
    return os.path.expanduser(text)  # a shell leaves the ~ of --out=~/a.png as it is


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a help text, and does not break names at hyphens."""

    def _split_lines(self, text, width):
        lines = [
            textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in text.split("\n")
        ]
        return [part for parts in lines for part in parts]


if __name__ == "__main__":
    sys.exit(main())
