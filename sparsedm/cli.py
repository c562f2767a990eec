"""The command line of `sparsedm`: what can be asked of every command. What they do stands in the modules imported here.

Exit codes: 0 done; 2 bad input or too little memory, one sentence on stderr; 3 when --minutes were over; 128 + signal
when training was interrupted and saved, or whoever read the output left.
"""

import argparse
import contextlib
import io
import logging
import math
import os
import signal
import sys
import textwrap

import torch

from sparsedm import __version__, samplers
from sparsedm.commands import quickstart
from sparsedm.commands import sample as drawing
from sparsedm.commands import search as search_command
from sparsedm.commands import train as commands
from sparsedm.errors import InputError
from sparsedm.models import convert as importing
from sparsedm.train.distributed import local_device
from sparsedm.train.loop import Interrupted


def main(arguments=None):
    """Run one command. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # into a pipe, too, line by line; and a path may hold any character
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in MOVED:
        print(f"sparsedm: {arguments[0]} is now: {MOVED[arguments[0]]}", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        options.run_command(options)
    except InputError as error:
        print(f"sparsedm: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        print(f"sparsedm: not enough memory ({reason}): a smaller batch or network needs less", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"sparsedm: {interruption}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("sparsedm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough; the rest was not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _lacks_memory(error):
    """Torch has a class of error for a GPU that its own allocator finds full, and none for any other lack."""
    said = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence on stderr, like every other refusal, and not the whole usage before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a help text, and names with hyphens in one piece."""

    def _split_lines(self, text, width):
        lines = [
            textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in text.split("\n")
        ]
        return [part for parts in lines for part in parts]


def _parser():
    parser = _Parser(
        "sparsedm",
        description="Train, run and measure 2:4 (and N:M) sparse diffusion models. Start with: sparsedm quickstart",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsedm {__version__}")
    commands_of = parser.add_subparsers(required=True, metavar="command")
    for name, run, add_arguments, summary, examples in COMMANDS:
        sub = commands_of.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  sparsedm {name} {line}".rstrip() for line in examples),
            formatter_class=_HelpFormatter,
        )
        sub.set_defaults(run_command=run)
        add_arguments(sub)
        if name not in WITHOUT_SEED:
            sub.add_argument("--seed", type=_seed, default=0, help="of all random numbers (default: 0)")
            sub.add_argument(
                "--device", type=_device, default=_device("auto"), help="auto, cpu, cuda, cuda:1 (default: auto)"
            )
    return parser


def _add_sample(sub):
    sub.add_argument("run", help="run folder (its last stage), stage folder, or model file")
    commands.add_model_arguments(sub, ": what a foreign file holds")
    _add_sampling(sub, count=64)
    sub.add_argument("--compress", action="store_true", help="hold and compute 2:4 weights in compressed form")
    sub.add_argument(
        "--out",
        help="the picture, or FILE.npz for numbers (default: drawn.png in the run folder, of a model file here)",
    )


def _add_evaluate(sub):
    sub.add_argument("run", help="run folder (its last stage), stage folder, or model file")
    commands.add_model_arguments(sub, ": what a foreign file holds")
    sub.add_argument("--data", required=True, help="the real images, as for train")
    sub.add_argument("--split", choices=("train", "test"), default="train", help="part of --data (default: train)")
    commands.add_crop(sub)
    sub.add_argument(
        "--features",
        default="random-conv",
        help="random-conv: built in, needs nothing, not comparable with published FIDs; inception; or an exported FILE",
    )
    sub.add_argument("--dense", metavar="RUN", help="also measure SSIM to this model's samples from the same noise")
    _add_sampling(sub, count=2000)
    sub.add_argument("--out", help="the numbers (default: evaluation.json in the run folder, of a model file here)")


def _add_sampling(sub, count):
    sub.add_argument("--count", type=int, default=count, help="how many images (default: %(default)s)")
    sub.add_argument("--strategy", metavar="FILE", help="use the networks of RUN as a file that search found says")
    sub.add_argument(
        "--sampler",
        choices=[*samplers.SAMPLERS, "published"],
        help="published: that of the original network, its steps and clipping (default: dpm++2m, or the strategy's)",
    )
    much = sub.add_mutually_exclusive_group()
    much.add_argument("--sampling-steps", type=int, help="(default: 50, or the strategy's)")
    much.add_argument("--nfe", type=int, help="network evaluations at most, in place of steps: heun has two in each")
    sub.add_argument(
        "--dtype",
        choices=drawing.DTYPES,
        default="auto",
        help="of the network (auto: bf16 for compressed ones on a GPU, whose kernels need it, else fp32)",
    )
    sub.add_argument("--guidance", type=_finite, help="classifier-free guidance weight, for class-conditional models")
    sub.add_argument(
        "--clip",
        choices=samplers.CLIPS,
        help="keep images in [-1, 1] in every step, in the final one, or never (default: every; latents: never)",
    )
    sub.add_argument("--label", type=int, help="draw only this class (default: all classes in turn)")
    sub.add_argument(
        "--batch-size", type=int, default=256, help="images at a time; changes nothing but rounding (default: 256)"
    )
    sub.add_argument("--which", choices=("ema", "model"), default="ema", help="averaged or last weights (default: ema)")
    sub.add_argument("--cuda-graph", action="store_true", help="replay whole steps as CUDA graphs: less host time")


def _seed(text):
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _finite(text):
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")


def _device(text):
    if text == "auto":
        return local_device()
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device, such as cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not served: cpu and cuda are")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


WITHOUT_SEED = ("inspect", "import")  # nor --device: they draw no random numbers, and compute on the CPU
MOVED = {  # what left the package for `bench/` in the repository, and where it is now
    "bench": "sparsedm inspect --time",
    "experiment": "python -m bench.experiments, in a checkout of the repository",
}
COMMANDS = (  # name, what it does, its arguments, a summary, examples
    (
        "quickstart",
        quickstart.quickstart,
        quickstart.add_arguments,
        "train a tiny U-ViT dense, then 3:4, then 2:4, and show how good each is, in minutes on a CPU",
        ["", "--data cifar-10-python.tar.gz"],
    ),
    (
        "train",
        commands.train,
        commands.add_train_arguments,
        "train a dense network and make it sparse, in stages; to resume, run the same command again",
        [
            "--model uvit-tiny --data cifar10 --chain dense,3:4,2:4 --steps 20000",
            "--model uvit-cifar10-small --data cifar10 --chain dense,31:32,15:16,7:8,3:4,2:4 --steps 600000 --dry-run",
            "--init runs/dense --model uvit-tiny --data cifar10 --method sr-ste+kd --pattern 2:4 --steps 10000",
        ],
    ),
    (
        "sample",
        drawing.sample,
        _add_sample,
        "draw images from a trained model into one picture",
        [
            "runs/quickstart",
            "runs/quickstart --count 64 --sampler ddim --sampling-steps 100 --compress",
            "runs/search-smoke-chain/family --strategy runs/search-smoke-chain/strategies/found-3.json",
        ],
    ),
    (
        "evaluate",
        drawing.evaluate_samples,
        _add_evaluate,
        "measure the distance of a model's samples to real images",
        ["runs/quickstart --data synthetic", "runs/mine --data cifar10 --features inception --count 50000"],
    ),
    (
        "inspect",
        commands.inspect_model,
        commands.add_inspect_arguments,
        "show what each layer of a model holds and costs, before and after",
        [
            "--model uvit-cifar10-small --pattern 2:4",
            "--model uvit-cifar10-small --pattern 2:4 --where all",
            "runs/quickstart",
            "--model uvit-imagenet256-large --pattern 2:4 --arch sm_90a --batch 64",
            "--model uvit-imagenet256-large --pattern 2:4 --time --batch 64",
        ],
    ),
    (
        "import",
        importing.run_import,
        importing.add_arguments,
        "make an official U-ViT or DiT checkpoint, or a diffusers folder, a model file of this package",
        ["cifar10_uvit_small.pth", "DiT-XL-2-256x256.pt", "ddpm-cifar10-32 --out ddpm.safetensors"],
    ),
    (
        "search",
        search_command.run_search,
        search_command.add_arguments,
        "find which network of a family to use at which step: N:M students, widths of a slimmable network, or both",
        ["--scale smoke", "--scale smoke --family widths", "runs/quickstart", "--scale lite --family both --dry-run"],
    ),
)


if __name__ == "__main__":
    sys.exit(main())
