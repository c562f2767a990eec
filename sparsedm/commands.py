"""What the commands of `sparsedm` do: models, data, training, sampling and evaluation brought together.

Each function takes the parsed command line of `cli.py`. Bad input raises InputError.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from sparsedm import pictures
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.files import write_json
from sparsedm.inspection import inspect
from sparsedm.models import build_model, model_config, parse_overrides
from sparsedm.models.ddpm_diffusers import from_diffusers
from sparsedm.sparsity import sparsify
from sparsedm.train import checkpoint, data, distributed
from sparsedm.train.chain import check_stages, parse_chain, plan, run_chain
from sparsedm.train.loop import TrainOptions
from sparsedm.train.methods import METHODS, method_stages

TRAINING = ("steps", "batch_size", "accumulate", "lr", "warmup", "cosine", "ema")
TRAINING += ("weighting", "seed", "compile", "log_every")


def train(options):
    training = TrainOptions(
        **{name: getattr(options, name) for name in TRAINING},
        flip=not options.no_flip,
        amp=amp_of(options.device) if options.amp == "auto" else None if options.amp == "off" else options.amp,
        save_every=options.save_every,
        validate_every=options.save_every,
    )
    torch.manual_seed(options.seed)
    if options.init:
        model, ema = _dense_start(options)
    else:
        model = build_model(
            options.model or "uvit-tiny", device="meta" if options.dry_run else None, **parse_overrides(options.set)
        )
        ema = None
    stages = _stages(options, ema)
    name = options.model or (Path(options.init).name if options.init else "uvit-tiny")
    folder = Path(options.run or f"runs/{name}-{options.method or options.chain.replace(':', 'of')}")
    if options.dry_run:
        check_stages(stages, ema, build_model)
        show_plan(stages, training, model, folder, options.where)
        return
    size = model.config.image_size
    images = load_images(options.data, "train", size, limit=options.limit)
    validation = load_images(options.data, "test", size, limit=2048)
    with distributed.process_group(options.device):
        results = run_chain(
            model,
            stages,
            images,
            schedule_of(model),
            training,
            folder,
            ema=ema,
            where=options.where,
            build=lambda: build_model(model.config),
            validation=validation,
            record={"data": options.data, "init": options.init},
            device=options.device,
        )
        if not distributed.first():
            return
    curves = [(f"{r.stage.name} {r.stage.pattern}", r.metrics) for r in results]
    pictures.plot_losses(folder / "loss.png", curves, training.batch_size, str(folder))
    for result in results:
        loss = result.result.validation_loss
        print(f"{result.stage.name:<12} {result.stage.pattern:<6} validation loss {loss:.4f}   {result.folder}")
    print(f"curves: {folder / 'loss.png'}   next: sparsedm sample {folder}")


def load_images(source, split, size, limit=None):
    """Images of the size the network takes. Mixed sizes are refused; one other size is fitted, and it is said."""
    if source.partition(":")[0] == "synthetic":  # drawn at any size
        return data.load(source, split, size=size, limit=limit)
    found = data.load(source, split, limit=limit)
    height, width = found.images.shape[2:]
    if found.is_latent or (height, width) == (size, size):
        return found
    print(f"the {split} images of {width}x{height} pixels are cropped to squares and resized to {size}x{size}")
    return data.load(source, split, size=size, limit=limit)


def amp_of(device):
    """Products in bf16 on a GPU, in fp32 elsewhere."""
    return "bf16" if device.type == "cuda" else None


def _dense_start(options):
    """The dense network and its average that --init names: of a chain's folder, those of its first stage."""
    stages = sorted(Path(options.init).glob("[0-9][0-9]-*"))
    path = stages[0] if stages else options.init
    loaded = load_named(options, path)
    if loaded.kind != "dense":
        raise InputError(f"--init {options.init}: {loaded.file} holds a {loaded.kind} network, not a dense one")
    return load_named(options, path, which="model").model, loaded.model


def load_named(options, path=None, which="ema"):
    """The model file or run folder that the command line names; --model and --set say what a foreign file holds."""
    path = Path(path or options.run)
    named = options.model or options.set
    config = model_config(options.model or "uvit-tiny", **parse_overrides(options.set)) if named else None
    convert = from_diffusers if config and config.kind == "ddpm" else None
    loaded = checkpoint.load_model(path, build_model, which=which, config=config, convert=convert)
    if config and config != loaded.model.config:
        raise InputError(f"{loaded.file} says itself what model it holds: leave --model and --set away")
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


def distilled(stages, weight):
    """The stages; with a weight, a slimmable network learns from its widest self in the dense ones."""
    if weight is None:
        return stages
    if not any(stage.pattern == "dense" for stage in stages):
        raise InputError("--distill is for dense stages, and there is none: sparse ones learn from the dense network")
    return [replace(s, teacher="widest", w_kd=weight) if s.pattern == "dense" else s for s in stages]


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
        raise InputError(f"{path} must end in .png, .jpg or .webp")
    return Path(path)


def inspect_model(options):
    if options.run is None and options.model is None:
        raise InputError("name something to inspect: a run folder or model file, or --model")
    if options.where and not options.pattern:
        raise InputError(f"--where {options.where} says where a pattern goes: give one with --pattern")
    if options.run:
        name, model = options.run, load_named(options).model
    else:
        name, model = options.model, build_model(options.model, device="meta", **parse_overrides(options.set))
    if options.pattern:
        sparsify(model, options.pattern, options.where)
    table = inspect(model, arch=options.arch, batch=options.batch)
    print(table)
    title = f"{name} {options.pattern or ''}".strip()
    if options.json:
        write_json(options.json, table.to_dict())
        print(f"numbers: {options.json}")
    chart = (
        picture_name(options.plot)
        if options.plot
        else f"{Path(title.replace(':', 'of').replace(' ', '-')).name}-layers.png"
    )
    table.plot(chart, f"{title}: parameters per layer, before and after")
    print(f"chart: {chart}")
