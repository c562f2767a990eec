"""The command line of `sparsedm`: train, sample, evaluate, inspect, quickstart. What they do stands in `commands.py`.

Exit codes: 0 done; 2 bad input, one sentence on stderr; 128 + signal when training was interrupted and saved.
"""

import argparse
import logging
import os
import sys

import torch

from sparsedm import __version__, commands, diffusion, drawing, importing, samplers, search_command
from sparsedm.bench import advice
from sparsedm.errors import InputError
from sparsedm.experiments import runner
from sparsedm.inspection import ARCHS
from sparsedm.models import MODELS
from sparsedm.quickstart import quickstart
from sparsedm.train.distributed import local_device
from sparsedm.train.loop import Interrupted
from sparsedm.train.methods import METHODS


def main(arguments=None):
    """Run one command. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        options.run_command(options)
    except InputError as error:
        print(f"sparsedm: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"sparsedm: {interruption}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("sparsedm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence on stderr, like every other refusal, and not the whole usage before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(
        "sparsedm",
        description="Train, run and measure 2:4 (and N:M) sparse diffusion models. Start with: sparsedm quickstart",
    )
    parser.add_argument("--version", action="version", version=f"sparsedm {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def command(name, function, summary, examples, computes=True):
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  sparsedm {name} {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_command=function)
        if not computes:
            return sub
        sub.add_argument("--seed", type=_seed, default=0, help="of all random numbers (default: 0)")
        sub.add_argument(
            "--device", type=_device, default=_device("auto"), help="auto, cpu, cuda, cuda:1 (default: auto)"
        )
        return sub

    train = command(
        "train",
        commands.train,
        "train a dense network and make it sparse, in stages; to resume, run the same command again",
        [
            "--model uvit-tiny --data cifar10 --chain dense,3:4,2:4 --steps 20000",
            "--model uvit-cifar10-small --data cifar10 --chain dense,31:32,15:16,7:8,3:4,2:4 --steps 600000 --dry-run",
            "--init runs/dense --model uvit-tiny --data cifar10 --method sr-ste+kd --pattern 2:4 --steps 10000",
        ],
    )
    _add_model(train, " (default: uvit-tiny, or what --init holds)")
    train.add_argument(
        "--data", required=True, help="synthetic, cifar10, a folder, a zip or tar.gz of images, or an .npz"
    )
    train.add_argument("--limit", type=int, help="use only so many training images")
    train.add_argument("--init", metavar="RUN", help="start from the dense network of this run folder or model file")
    how = train.add_mutually_exclusive_group()
    how.add_argument("--chain", default="dense,3:4,2:4", help="patterns, one stage each (default: %(default)s)")
    how.add_argument(
        "--method", metavar="NAME", help="; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    )
    train.add_argument("--pattern", default="2:4", help="what --method arrives at (default: 2:4)")
    train.add_argument("--where", help="layers to make sparse: all, or a regular expression on their names")
    train.add_argument("--steps", type=int, default=20_000, help="of all stages together (default: %(default)s)")
    train.add_argument("--split", help="shares of the steps, for example 2,1,1 (default: half for the dense stage)")
    train.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    train.add_argument(
        "--accumulate", type=int, default=1, help="parts of a batch, one after the other: less memory (default: 1)"
    )
    train.add_argument("--lr", type=float, default=2e-4, help="learning rate of AdamW (default: 2e-4)")
    train.add_argument(
        "--warmup", type=int, help="steps of linear warm-up (default: a tenth of the stage, at most 2500)"
    )
    train.add_argument("--cosine", action="store_true", help="let the learning rate fall to zero in each stage")
    train.add_argument(
        "--ema", type=float, default=0.9999, help="decay of the average of the weights (default: 0.9999)"
    )
    train.add_argument("--w-kd", type=float, default=0.1, help="weight of the transfer loss in a chain (default: 0.1)")
    train.add_argument("--distill", type=float, help="weight of a slimmable network's loss to its own widest self")
    train.add_argument("--decay", type=float, default=2e-4, help="SR-STE decay in a chain (default: 2e-4)")
    train.add_argument(
        "--weighting",
        choices=diffusion.WEIGHTINGS,
        default="noise",
        help="of the loss over noise levels; velocity, with --set velocity=true, suits short runs (default: noise)",
    )
    train.add_argument("--no-flip", action="store_true", help="do not mirror images at random")
    train.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="bf16 products (auto: on a GPU)")
    train.add_argument("--compile", action="store_true", help="torch.compile the network")
    train.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    train.add_argument("--log-every", type=int, default=100, help="steps between log records (default: 100)")
    train.add_argument("--run", metavar="DIR", help="run folder (default: runs/MODEL-CHAIN)")
    train.add_argument("--dry-run", action="store_true", help="print stages, steps, memory and folders, and stop")

    sample = command(
        "sample",
        drawing.sample,
        "draw images from a trained model into one picture",
        [
            "runs/quickstart",
            "runs/quickstart --count 64 --sampler ddim --sampling-steps 100 --compress",
            "runs/search-smoke-chain/family --strategy runs/search-smoke-chain/strategies/found-3.json",
        ],
    )
    sample.add_argument("run", help="run folder (its last stage), stage folder, or model file")
    _add_model(sample, ": what a foreign file holds")
    _add_sampling(sample, count=64)
    sample.add_argument("--compress", action="store_true", help="hold and compute 2:4 weights in compressed form")
    sample.add_argument("--out", help="the picture, or FILE.npz for numbers (default: drawn.png in the run folder)")

    evaluation = command(
        "evaluate",
        drawing.evaluate_samples,
        "measure the distance of a model's samples to real images",
        ["runs/quickstart --data synthetic", "runs/mine --data cifar10 --features inception --count 50000"],
    )
    evaluation.add_argument("run", help="run folder (its last stage), stage folder, or model file")
    _add_model(evaluation, ": what a foreign file holds")
    evaluation.add_argument("--data", required=True, help="the real images, as for train")
    evaluation.add_argument(
        "--split", choices=("train", "test"), default="train", help="part of --data (default: train)"
    )
    evaluation.add_argument(
        "--features",
        default="random-conv",
        help="random-conv: built in, needs nothing, not comparable with published FIDs; inception; or an exported FILE",
    )
    evaluation.add_argument(
        "--dense", metavar="RUN", help="also measure SSIM to this model's samples from the same noise"
    )
    _add_sampling(evaluation, count=2000)
    evaluation.add_argument("--out", help="the numbers (default: evaluation.json in the run folder)")

    inspection = command(
        "inspect",
        commands.inspect_model,
        "show what each layer of a model holds and costs, before and after",
        [
            "--model uvit-cifar10-small --pattern 2:4",
            "--model uvit-cifar10-small --pattern 2:4 --where all",
            "runs/quickstart",
            "--model uvit-imagenet256-large --pattern 2:4 --arch sm_90a --batch 64",
        ],
        computes=False,
    )
    inspection.add_argument("run", nargs="?", help="run folder, stage folder or model file")
    _add_model(inspection)
    inspection.add_argument("--pattern", help="N:M to apply, for example 2:4")
    inspection.add_argument("--where", help="layers to make sparse: all, or a regular expression on their names")
    inspection.add_argument(
        "--arch", choices=ARCHS, help="show the kernels the compressed model would use there, in bf16"
    )
    inspection.add_argument("--batch", type=int, default=1, help="images at a time, for --arch (default: 1)")
    inspection.add_argument("--plot", metavar="PNG", help="the chart (default: MODEL-PATTERN-layers.png)")
    inspection.add_argument("--json", metavar="FILE", help="also write the numbers")

    take = command(
        "import",
        importing.run_import,
        "make an official U-ViT or DiT checkpoint, or a diffusers folder, a model file of this package",
        ["cifar10_uvit_small.pth", "DiT-XL-2-256x256.pt", "ddpm-cifar10-32 --out ddpm.safetensors"],
        computes=False,
    )
    importing.add_arguments(take)

    bench = command(
        "bench",
        advice.advise,
        "measure whether 2:4 would make the layers of a model faster on this device",
        ["--model uvit-tiny --batch 4", "--model uvit-imagenet256-large --batch 64 --out layers.csv"],
    )
    advice.add_arguments(bench)

    searching = command(
        "search",
        search_command.run_search,
        "find which network of a family to use at which step: N:M students, widths of a slimmable network, or both",
        ["--scale smoke", "--scale smoke --family widths", "runs/quickstart", "--scale lite --family both --dry-run"],
    )
    search_command.add_arguments(searching)

    compare = command(
        "experiment",
        runner.experiment,
        "compare methods on equal terms, with several seeds: tables and pictures",
        ["arms", "arms --scale lite --seeds 3", "fixed-vs-inplace-vs-chain", "ratio --dry-run"],
    )
    runner.add_arguments(compare)

    quick = command(
        "quickstart",
        quickstart,
        "train a tiny U-ViT dense, then 3:4, then 2:4, and show how good each is, in minutes on a CPU",
        ["", "--data cifar-10-python.tar.gz"],
    )
    quick.add_argument("--data", default="synthetic", help="as for train (default: synthetic, which needs no download)")
    quick.add_argument("--run", metavar="DIR", help="run folder (default: runs/quickstart, or with the data's name)")
    quick.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    return parser


def _add_model(sub, note=""):
    sub.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)}{note}")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change an option of the model")


def _add_sampling(sub, count):
    sub.add_argument("--count", type=int, default=count, help="how many images (default: %(default)s)")
    sub.add_argument("--strategy", metavar="FILE", help="use the networks of RUN as a file that search found says")
    sub.add_argument("--sampler", choices=samplers.SAMPLERS, help="(default: dpm++2m, or the strategy's)")
    sub.add_argument("--sampling-steps", type=int, help="(default: 50, or the strategy's)")
    sub.add_argument(
        "--dtype",
        choices=drawing.DTYPES,
        default="auto",
        help="of the network (auto: bf16 for compressed ones on a GPU, whose kernels need it, else fp32)",
    )
    sub.add_argument("--guidance", type=float, help="classifier-free guidance weight, for class-conditional models")
    sub.add_argument("--no-clip", action="store_true", help="let images leave [-1, 1] on the way (latents always may)")
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


if __name__ == "__main__":
    sys.exit(main())
