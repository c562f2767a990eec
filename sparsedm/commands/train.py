"""`sparsedm train` and `inspect`, and what other commands share with them: which model, which images, the plan.

A command is a function of the parsed command line (`cli.py`). Bad input raises InputError.
"""

import copy
import functools
from pathlib import Path

import torch

from sparsedm import diffusion
from sparsedm import plots as pictures
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.files import write_json
from sparsedm.inspection import ARCHS, inspect, time_report
from sparsedm.model_files import load_model
from sparsedm.models import MODELS, build_model, model_config, parse_overrides, schedule_note
from sparsedm.models.diffusers import from_diffusers
from sparsedm.sparsity import sparsify
from sparsedm.train import distributed
from sparsedm.train.chain import Start, check_chain, plan, run_chain
from sparsedm.train.data import load_images
from sparsedm.train.image_files import CROPS
from sparsedm.train.loop import TrainOptions, amp_of
from sparsedm.train.published import Published, published
from sparsedm.train.stages import METHODS, distilled, method_stages, parse_chain
from sparsedm.train.step import OPTIMIZERS

TRAINING = ("steps", "accumulate", "warmup", "cosine", "ema", "weighting", "seed", "compile", "log_every")
RECIPE = ("batch_size", "lr", "optimizer", "betas", "weight_decay", "clip", "label_dropout", "ema_warmup")


def add_model_arguments(parser, note=""):
    parser.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)}{note}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change an option of the model"
    )


def add_crop(parser):
    parser.add_argument(
        "--crop",
        choices=CROPS,
        help="square: the largest in the centre; celeba: images of 178x218 to 128x128 at (25, 57), as U-ViT and DDIM "
        "do (default: as the model's original does)",
    )


def crop_of(options, config):
    return options.crop or (published(config) or Published({}, 0)).crop


def add_train_arguments(parser):
    add_model_arguments(parser, " (default: uvit-tiny, or what --init holds)")
    parser.add_argument(
        "--data", required=True, help="synthetic, cifar10, a folder, a zip or tar.gz of images, or an .npz"
    )
    parser.add_argument("--limit", type=int, help="use only so many training images")
    add_crop(parser)
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/MODEL-CHAIN)")
    parser.add_argument("--dry-run", action="store_true", help="print stages, steps, memory and folders, and stop")
    _add_stages(parser.add_argument_group("from dense to sparse"))
    _add_optimization(parser.add_argument_group("every step"))


def _add_stages(group):
    how = group.add_mutually_exclusive_group()
    how.add_argument("--chain", default="dense,3:4,2:4", help="patterns, one stage each (default: %(default)s)")
    methods = "\n".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    how.add_argument("--method", metavar="NAME", help=f"instead of a chain, one of\n{methods}")
    group.add_argument("--init", metavar="RUN", help="start from the dense network of this run folder or model file")
    group.add_argument("--pattern", default="2:4", help="what --method arrives at (default: 2:4)")
    group.add_argument("--where", help="layers to make sparse: all, or a regular expression on their names")
    group.add_argument("--steps", type=int, default=20_000, help="of all stages together (default: %(default)s)")
    group.add_argument("--split", help="shares of the steps, for example 2,1,1 (default: half for the dense stage)")
    group.add_argument("--w-kd", type=float, default=0.1, help="weight of the transfer loss in a chain (default: 0.1)")
    group.add_argument("--decay", type=float, default=2e-4, help="SR-STE decay in a chain (default: 2e-4)")
    group.add_argument("--distill", type=float, help="weight of a slimmable network's loss to its own widest self")


def _add_optimization(group):
    as_published = "(default: as the model's original, else {})".format
    group.add_argument("--batch-size", type=int, help=f"images per step {as_published(128)}")
    group.add_argument(
        "--accumulate", type=int, default=1, help="parts of a batch, one after the other: less memory (default: 1)"
    )
    group.add_argument("--lr", type=float, help=f"learning rate {as_published(2e-4)}")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=as_published("adamw"))
    group.add_argument("--betas", metavar="B,B", type=betas, help=f"of the optimizer {as_published('0.99,0.999')}")
    group.add_argument("--weight-decay", type=float, help=as_published(0.03))
    group.add_argument("--clip", type=float, help=f"largest gradient norm, 0: any {as_published(1)}")
    group.add_argument("--label-dropout", type=float, help=f"how often no class is told {as_published(0.1)}")
    group.add_argument("--ema-warmup", type=int, help="slow start of the average, 1: none (default: 10)")
    group.add_argument(
        "--warmup", type=int, help="steps of linear warm-up (default: a tenth of the stage, at most as in the original)"
    )
    group.add_argument("--cosine", action="store_true", help="let the learning rate fall to zero in each stage")
    group.add_argument(
        "--ema", type=float, default=0.9999, help="decay of the average of the weights (default: 0.9999)"
    )
    group.add_argument(
        "--weighting",
        choices=diffusion.WEIGHTINGS,
        default="noise",
        help="of the loss over noise levels; velocity, with --set velocity=true, suits short runs (default: noise)",
    )
    group.add_argument("--no-flip", action="store_true", help="do not mirror images at random")
    group.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto", help="bf16 products (auto: on a GPU)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default: 1000)")
    group.add_argument("--log-every", type=int, default=100, help="steps between log records (default: 100)")


def betas(text):
    return tuple(float(beta) for beta in text.split(","))


def _training(options, config):
    """The TrainOptions of a command line: what it says, else what the original of this network did."""
    asked = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    recipe = published(config)
    if recipe:
        print(f"recipe of the original: {', '.join(f'{k}={v}' for k, v in (recipe.training | asked).items())}")
    asked |= {name: getattr(options, name) for name in TRAINING if name != "warmup" or options.warmup is not None}
    if note := schedule_note(config):
        print(note)
    return TrainOptions(
        **(recipe.training if recipe else {}) | asked,
        flip=not options.no_flip,
        amp=amp_of(options.device) if options.amp == "auto" else None if options.amp == "off" else options.amp,
        save_every=options.save_every,
        validate_every=options.save_every,
    )


def train(options):
    torch.manual_seed(options.seed)
    if options.init:
        model, ema = _dense_start(options)
    else:
        model = build_model(
            options.model or "uvit-tiny", device="meta" if options.dry_run else None, **parse_overrides(options.set)
        )
        ema = None
    training, stages = _training(options, model.config), _stages(options, ema)
    name = options.model or (Path(options.init).name if options.init else "uvit-tiny")
    folder = Path(options.run or f"runs/{name}-{options.method or options.chain.replace(':', 'of')}")
    start = Start(model, ema, build=lambda: build_model(model.config))
    if options.dry_run:
        check_chain(start, stages, None, training, options.where)
        show_plan(stages, training, model, folder, options.where)
        return
    size = model.config.image_size
    crop = crop_of(options, model.config)
    images = load_images(options.data, "train", size, limit=options.limit, crop=crop)
    validation = load_images(options.data, "test", size, limit=2048, crop=crop)
    with distributed.process_group(options.device):
        results = run_chain(
            start,
            stages,
            images,
            schedule_of(model),
            training,
            folder,
            where=options.where,
            validation=validation,
            record={"data": options.data, "init": options.init},
            device=options.device,
        )
        if not distributed.is_main_process():
            return
    curves = [(f"{r.stage.name} {r.stage.pattern}", r.metrics) for r in results]
    pictures.plot_losses(folder / "loss.png", curves, training.batch_size, str(folder))
    for result in results:
        loss = result.result.validation_loss
        print(f"{result.stage.name:<12} {result.stage.pattern:<6} validation loss {loss:.4f}   {result.folder}")
    print(f"curves: {folder / 'loss.png'}   next: sparsedm sample {folder}")


def dense_part(run):
    """Where the dense network of a run lies: the first stage of a chain's folder, anything else as it is."""
    return next(iter(sorted(Path(run).glob("[0-9][0-9]-*"))), Path(run))


def _dense_start(options):
    """The dense network and its average that --init names."""
    path = dense_part(options.init)
    loaded = load_named(options, path)
    if loaded.kind != "dense":
        raise InputError(f"--init {options.init}: {loaded.file} holds a {loaded.kind} network, not a dense one")
    return load_named(options, path, which="model").model, loaded.model


def load_named(options, path=None, which="ema"):
    """The model file or run folder that the command line names; --model and --set say what a foreign file holds."""
    path = Path(path or options.run)
    named = options.model or options.set
    config = model_config(options.model or "uvit-tiny", **parse_overrides(options.set)) if named else None
    convert = functools.partial(from_diffusers, config=config) if config and config.kind == "ddpm" else None
    loaded = load_model(path, build_model, which=which, config=config, convert=convert)
    if config and config != loaded.model.config:
        raise InputError(f"{loaded.file} says itself what model it holds: leave --model and --set away")
    if note := schedule_note(loaded.model.config):
        print(note)
    return loaded


def _stages(options, ema):
    if options.method and options.method not in METHODS:
        raise InputError(f"unknown method {options.method!r}: one of {', '.join(METHODS)}")
    if not options.method:
        stages = parse_chain(options.chain, options.steps, options.split, w_kd=options.w_kd, decay=options.decay)
        return distilled(stages, options.distill)
    if options.split:
        raise InputError("--split goes with --chain: a method divides the steps itself")
    if ema is None and options.method not in ("dense", "random-init"):
        raise InputError(f"--method {options.method} starts from a dense network: give its run folder with --init")
    return distilled(method_stages(options.method, options.steps, options.pattern), options.distill)


def show_plan(stages, training, model, folder, where=None):
    """Print what training would do, stage by stage; writes nothing. model: may live on the meta device."""
    head = (
        "stage",
        "pattern",
        "steps",
        "done",
        "lr",
        "teacher",
        "images",
        "parameters",
        "MACs",
        "memory",
        "checkpoints",
    )
    rows = []
    for row in plan(stages, training, model, folder, where):
        macs = inspect(sparsify(copy.deepcopy(model), row["pattern"], where)).totals()["macs_after"]
        rows.append(
            (
                row["name"],
                row["pattern"],
                f"{row['steps']:,}",
                f"{row['steps_done']:,}",
                f"{row['lr']:g}",
                row["teacher"],
                f"{row['images']:,}",
                f"{row['parameters_kept']:,}",
                f"{macs / 1e6:,.1f} M",
                f"{row['memory_bytes'] / 2**20:,.0f} MiB",
                f"{row['checkpoint_bytes'] / 2**20:,.0f} MiB",
            )
        )
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    print(
        "parameters and MACs count kept weights; memory is without activations; two checkpoints of each stage are kept"
    )
    print(f"run folder: {folder}   (dry run: nothing was trained or written)")


def picture_name(path):
    """`path`, once it is known to be a name that a picture can have: refused before hours of sampling, not after."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{path} must end in .png, .jpg, .jpeg or .webp, as a picture does")
    return Path(path)


def add_inspect_arguments(parser):
    parser.add_argument("run", nargs="?", help="run folder, stage folder or model file")
    add_model_arguments(parser)
    parser.add_argument("--pattern", help="N:M to apply, for example 2:4")
    parser.add_argument("--where", help="layers to make sparse: all, or a regular expression on their names")
    parser.add_argument("--arch", choices=ARCHS, help="show the kernels the compressed model would use there, in bf16")
    parser.add_argument("--batch", type=int, default=1, help="images at a time, for --arch and --time (default: 1)")
    parser.add_argument("--time", action="store_true", help="time each 2:4 layer here, dense and compressed")
    parser.add_argument("--plot", metavar="PNG", help="the chart (default: MODEL-PATTERN-layers.png)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers")


def inspect_model(options):
    if options.run is None and options.model is None:
        raise InputError("name something to inspect: a run folder or model file, or --model")
    if options.where and not options.pattern:
        raise InputError(f"--where {options.where} says where a pattern goes: give one with --pattern")
    name = Path(options.run).resolve().name.removesuffix(".safetensors") if options.run else options.model
    title = f"{name} {options.pattern or ''}".strip()
    chart = picture_name(options.plot or f"{title.replace(':', 'of').replace(' ', '-')}-layers.png")
    if options.run:
        model = load_named(options).model
    else:
        model = build_model(options.model, device="meta", **parse_overrides(options.set))
    if options.pattern:
        sparsify(model, options.pattern, options.where)
    table = inspect(model, arch=options.arch, batch=options.batch)
    print(table)
    if options.time:
        print(f"\n{time_report(model, options.batch)}")
    if options.json:
        write_json(options.json, table.to_dict())
        print(f"numbers: {options.json}")
    table.plot(chart, f"{title}: parameters per layer, before and after")
    print(f"chart: {chart}")
