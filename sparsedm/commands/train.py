"""`sparsedm train`: train a chain of stages, or by a method, in a run folder."""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from sparsedm import diffusion
from sparsedm.commands.options import (
    add_crop,
    add_model_arguments,
    add_seed_and_device,
    betas,
    count,
    dense_start,
    finite,
    whole,
)
from sparsedm.errors import InputError, TooLittleMemory
from sparsedm.files import check_writable
from sparsedm.inspection import inspect
from sparsedm.models import build_model, model_config, parse_overrides, schedule_note
from sparsedm.plots import plot_losses, table
from sparsedm.sparsity import sparsify
from sparsedm.train import distributed
from sparsedm.train.chain import Start, check_chain, plan, run_chain
from sparsedm.train.data import check_source, load_images
from sparsedm.train.loop import TrainOptions, amp_of
from sparsedm.train.published import original_crop, published, unrecorded_crop
from sparsedm.train.stages import METHODS, distilled, method_stages, parse_chain
from sparsedm.train.step import OPTIMIZERS, takes_text

EXAMPLES = (
    "--model uvit-tiny --data cifar10 --chain dense,3:4,2:4 --steps 20000",
    "--model uvit-cifar10-small --data cifar10 --chain dense,31:32,15:16,7:8,3:4,2:4 --steps 600000 --dry-run",
    "--init runs/dense --model uvit-tiny --data cifar10 --method sr-ste+kd --pattern 2:4 --steps 10000",
)
TRAINING = ("steps", "accumulate", "warmup", "cosine", "ema", "weighting", "seed", "compile", "log_every", "save_every")
RECIPE = ("batch_size", "lr", "optimizer", "betas", "weight_decay", "clip", "label_dropout", "ema_warmup")


def add_arguments(parser):
    add_model_arguments(parser, " (default: uvit-tiny, or what --init holds)")
    parser.add_argument(
        "--data",
        required=True,
        help="synthetic; cifar10 (downloaded, or its tar.gz); a folder or zip of images, a folder for each class, with "
        "folders train and test around them or without; or an .npz with images or moments, labels, context",
    )
    parser.add_argument("--limit", type=count, help="largest number of training images (default: all)")
    add_crop(parser, "as in the original of the model")
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/MODEL-CHAIN)")
    parser.add_argument("--dry-run", action="store_true", help="print stages, steps, memory and folders, and stop")
    _add_stages(parser.add_argument_group("from dense to sparse"))
    _add_optimization(parser.add_argument_group("every step"))
    add_seed_and_device(parser)


def _add_stages(group):
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--chain",
        default="dense,3:4,2:4",
        help="comma-separated patterns: dense, or N:M with M one of 2, 4, 8, 16, 32. Each is one training stage. A "
        "sparse stage trains a new student, started from the one before and taught by the dense network. A dense first "
        "stage gets half of the steps (default: %(default)s)",
    )
    methods = "\n".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    how.add_argument("--method", metavar="NAME", help=f"a ready list of stages, in place of --chain; one of\n{methods}")
    group.add_argument("--init", metavar="RUN", help="start from the dense network of this run folder or model file")
    group.add_argument("--pattern", help="pattern of the last stage of --method, N:M as in --chain (default: 2:4)")
    group.add_argument(
        "--where", help="layers to make sparse: all, or a regular expression on their names (default: the model's own)"
    )
    group.add_argument(
        "--steps", type=count, default=20_000, help="steps of all stages together (default: %(default)s)"
    )
    group.add_argument(
        "--split", help="the stages' shares of the steps, such as 2,1,1 (default: half for a dense stage)"
    )
    group.add_argument("--w-kd", type=finite, help="weight of the transfer loss in a chain (default: 0.1)")
    group.add_argument("--decay", type=finite, help="SR-STE decay in a chain (default: 2e-4)")
    group.add_argument("--distill", type=finite, help="weight of a slimmable network's loss to its own full width")


def _add_optimization(group):
    as_published = "(default: as in the original of the model, else {})".format
    group.add_argument("--batch-size", type=count, help=f"images per step {as_published(128)}")
    group.add_argument(
        "--accumulate", type=count, default=1, help="compute a batch in so many parts: less memory (default: 1)"
    )
    group.add_argument("--lr", type=finite, help=f"learning rate {as_published(2e-4)}")
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help=f"masked-adamw: adamw that selects the masks and adds --decay after clipping {as_published('adamw')}",
    )
    group.add_argument(
        "--betas", metavar="B,B", type=betas, help=f"betas of the optimizer {as_published('0.99,0.999')}"
    )
    group.add_argument("--weight-decay", type=finite, help=as_published(0.03))
    group.add_argument("--clip", type=finite, help=f"largest gradient norm, 0: no clipping {as_published(1)}")
    group.add_argument("--label-dropout", type=finite, help=f"share of labels left out in training {as_published(0.1)}")
    group.add_argument("--ema-warmup", type=count, help="warm-up of the EMA decay, 1: none (default: 10)")
    group.add_argument(
        "--warmup",
        type=whole,
        help="steps of linear warm-up (default: a tenth of the stage, at most as many as in the original)",
    )
    group.add_argument("--cosine", action="store_true", help="let the learning rate fall to zero in each stage")
    group.add_argument("--ema", type=finite, default=0.9999, help="decay of the EMA weights (default: 0.9999)")
    group.add_argument(
        "--weighting",
        choices=diffusion.WEIGHTINGS,
        default="noise",
        help="weighting of the loss over noise levels; velocity with --set velocity=true helps short runs (default: "
        "noise)",
    )
    group.add_argument("--no-flip", action="store_true", help="do not mirror images at random")
    group.add_argument(
        "--amp",
        choices=("auto", "off", "bf16"),
        default="auto",
        help="bf16 products (default: auto, on a GPU only; a CPU with avx512_bf16 or AMX is mostly faster with bf16)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--save-every", type=count, default=1000, help="steps between checkpoints (default: 1000)")
    group.add_argument("--log-every", type=count, default=100, help="steps between log records (default: 100)")


def _training(options, config):
    """The TrainOptions of a command line. Options that it leaves out are those of the network's original."""
    asked = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    recipe = published(config)
    if recipe:
        taken = ", ".join(f"{name}={value}" for name, value in (recipe.training | asked).items())
        print(f"recipe of the original: {taken}; it trained {recipe.steps_trained:,} steps")
    asked |= {name: getattr(options, name) for name in TRAINING if name != "warmup" or options.warmup is not None}
    if note := schedule_note(config):
        print(note)
    return TrainOptions(
        **(recipe.training if recipe else {}) | asked,
        flip=not options.no_flip,
        amp=amp_of(options.device, options.amp),
        validate_every=options.save_every,
    )


def run(options):
    torch.manual_seed(options.seed)
    if options.init:
        model, ema = dense_start(options)
    else:
        model = build_model(
            options.model or "uvit-tiny", device="meta" if options.dry_run else None, **parse_overrides(options.set)
        )
        ema = None
    training, stages = _training(options, model.config), _stages(options, ema)
    name = options.model or (os.path.basename(os.path.abspath(options.init)) if options.init else "uvit-tiny")
    folder = Path(options.run or f"runs/{name}-{options.method or options.chain.replace(':', 'of')}")
    start = Start(model, ema, build=lambda: build_model(model.config))
    check_source(options.data, model.config, out=folder / "loss.png")
    check_writable(folder / "loss.png")
    if options.dry_run:
        try:
            schedule = diffusion.schedule_of(model)
            check_chain(start, stages, None, schedule, training, options.where, device=options.device)
        except TooLittleMemory as error:  # the plan may be for another machine
            print(f"{error}: on this machine, give a smaller --batch-size or --accumulate")
        show_plan(stages, training, model, folder, options.where)
        return
    size = model.config.image_size
    crop = options.crop or original_crop(model.config)
    cropped = {} if crop == unrecorded_crop(model.config) else {"crop": crop}
    images = load_images(options.data, "train", size, limit=options.limit, crop=crop)
    validation = load_images(options.data, "test", size, limit=2048, crop=crop)
    if takes_text(model) and images.null_context is None and training.label_dropout:
        print(f"{options.data} has no null_context, the empty text: none is dropped, so guidance will not work")
    with distributed.process_group(options.device):
        results = run_chain(
            start,
            stages,
            images,
            diffusion.schedule_of(model),
            training,
            folder,
            where=options.where,
            validation=validation,
            record={"data": options.data, "init": options.init} | cropped,
            device=options.device,
        )
        if not distributed.is_main_process():
            return
    curves = [(f"{r.stage.name} {r.stage.pattern}", r.metrics) for r in results]
    plot_losses(folder / "loss.png", curves, training.batch_size, str(folder))
    for result in results:
        loss = result.result.validation_loss
        print(f"{result.stage.name:<12} {result.stage.pattern:<6} validation loss {loss:.4f}   {result.folder}")
    print(f"curves: {folder / 'loss.png'}   next: sparsedm sample {folder}")


def _stages(options, ema):
    if options.method and options.method not in METHODS:
        raise InputError(f"unknown method {options.method!r}: one of {', '.join(METHODS)}")
    if not options.method:
        if options.pattern:
            raise InputError(f"--pattern {options.pattern} needs --method: a chain names its patterns itself")
        given = {name: getattr(options, name) for name in ("w_kd", "decay") if getattr(options, name) is not None}
        stages = parse_chain(options.chain, options.steps, options.split, **given)
        _check_sparse(stages, options, "where", *given)
        return distilled(stages, options.distill)
    for name in ("split", "w_kd", "decay"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --chain: a method sets it itself")
    if ema is None and options.method not in ("dense", "random-init", "asp-random"):
        raise InputError(f"--method {options.method} starts from a dense network: give its run folder with --init")
    stages = method_stages(options.method, options.steps, options.pattern or "2:4")
    _check_sparse(stages, options, "where", "pattern")
    return distilled(stages, options.distill)


def _check_sparse(stages, options, *names):
    """Raise InputError for an option that only a sparse stage uses, if there is none."""
    for name in names:
        if getattr(options, name) is not None and all(stage.pattern == "dense" for stage in stages):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} {getattr(options, name)} is for sparse stages, but all stages are dense")


def recipe_images(recipe, source):
    """ImageSets for training and validation of the recipe's network."""
    size = model_config(recipe.model, **recipe.overrides).image_size
    return load_images(source, "train", size), load_images(source, "test", size, limit=1024)


def recipe_config(recipe, images):
    """The configuration of the recipe's network for these images."""
    shape = {"channels": images.shape[0], "num_classes": len(images.class_names)}
    return model_config(recipe.model, **recipe.overrides, **shape)


def train_recipe(recipe, images, validation, folder, options, deadline=math.inf):
    """Train a `recipes.Scale`. Returns [StageResult]. options: the command line's, of which seed and device count."""
    torch.manual_seed(options.seed)
    model = build_model(recipe_config(recipe, images))
    patterns = " -> ".join(stage.pattern for stage in recipe.stages)
    print(f"training {patterns} of {recipe.model} on {len(images):,} images of {images.source}")
    return run_chain(
        Start(model),
        recipe.stages,
        images,
        diffusion.schedule_of(model),
        replace(recipe.options, seed=options.seed, amp=amp_of(options.device)),
        folder,
        validation=validation,
        record={"data": images.source},
        deadline=deadline,
        device=options.device,
    )


def show_recipe(recipe, options, folder, classes=0):
    """Print what `train_recipe` would do; writes nothing."""
    training = replace(recipe.options, seed=options.seed, amp=amp_of(options.device))
    network = build_model(recipe.model, device="meta", **recipe.overrides, num_classes=classes)
    show_plan(recipe.stages, training, network, folder)


def show_plan(stages, training, model, folder, where=None):
    """Print what training would do, stage by stage; writes nothing. model: may live on the meta device."""
    head = ("stage", "pattern", "steps", "done", "lr", "teacher", "images")
    head += ("parameters", "MACs", "memory", "checkpoints")
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
    print(table(head, rows, left=(0, 1)))
    print(
        "parameters and MACs count kept weights; memory is without activations; two checkpoints of each stage are kept"
    )
    print(f"run folder: {folder}   (dry run: nothing was trained or written)")
