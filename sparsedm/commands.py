"""What the commands of `sparsedm` do: models, data, training, sampling and evaluation brought together.

Each function takes the parsed command line of `cli.py`. Bad input raises InputError.
"""

import copy
from pathlib import Path

import numpy as np
import torch

from sparsedm import evaluate, pictures, samplers
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import atomic_file, cache_folder, write_json
from sparsedm.inspection import inspect
from sparsedm.models import build_model, model_config, parse_overrides
from sparsedm.models.ddpm_diffusers import from_diffusers
from sparsedm.sparsity import compress, sparsify
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
    loaded = _load(options, path)
    if loaded.kind != "dense":
        raise InputError(f"--init {options.init}: {loaded.file} holds a {loaded.kind} network, not a dense one")
    return _load(options, path, which="model").model, loaded.model


def _load(options, path=None, which="ema"):
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
        return parse_chain(options.chain, options.steps, options.split, w_kd=options.w_kd, decay=options.decay)
    if options.split:
        raise InputError("--split goes with --chain: a method divides the steps itself")
    if ema is None and options.method not in ("dense", "random-init"):
        raise InputError(f"--method {options.method} starts from a dense network: give its run folder with --init")
    return method_stages(options.method, options.steps, options.pattern)


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


def sample(options):
    loaded = _load(options, which=options.which)
    model = (compress(loaded.model) if options.compress else loaded.model).to(options.device)
    out = Path(options.out or _beside(options.run) / "drawn.png")
    latents = model.config.channels not in (1, 3)
    if out.suffix != ".npz":
        _picture(out)
        if latents:
            raise InputError(
                f"{loaded.file} makes latents of {model.config.channels} channels, which are no picture: "
                "write the numbers with --out FILE.npz"
            )
    images = _draw(model, options)
    images = images.float() if latents else to_uint8(images)
    if out.suffix == ".npz":
        with atomic_file(out) as partial:
            np.savez(partial, images=images.numpy())
    else:
        pictures.save_grid(out, [("", row) for row in images.split(16)])
    print(
        f"{len(images)} samples of the {'compressed' if options.compress else loaded.kind} model in {loaded.file}, "
        f"{options.sampler} in {options.sampling_steps} steps, seed {options.seed}: {out}"
    )


def _beside(run):
    """The folder for what is made from a run folder; the current one if `run` is a file."""
    return Path(run) if Path(run).is_dir() else Path()


def _picture(path):
    """`path`, once it is known to be a name that a picture can have: refused before hours of sampling, not after."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"{path} must end in .png, .jpg or .webp")
    return Path(path)


def _draw(model, options):
    """(count, C, H, W) floating point samples of `model`, as the command line asks."""
    config = model.config
    labels = None
    if config.num_classes:
        labels = torch.arange(options.count) % config.num_classes
        if options.label is not None:
            if not 0 <= options.label < config.num_classes:
                raise InputError(f"--label {options.label}: the model has the classes 0 to {config.num_classes - 1}")
            labels = torch.full_like(labels, options.label)
    elif options.label is not None or options.guidance:
        raise InputError("--label and --guidance need a class-conditional model, and this one is unconditional")
    return samplers.sample(
        model,
        schedule_of(model),
        options.count,
        (config.channels, config.image_size, config.image_size),
        sampler=options.sampler,
        steps=options.sampling_steps,
        seed=options.seed,
        y=None if labels is None else labels.to(options.device),
        guidance=options.guidance,
        clip=None if options.no_clip or config.channels > 3 else 1.0,
        batch_size=options.batch_size,
        progress=True,
        cuda_graph=options.cuda_graph,
    ).cpu()


def evaluate_samples(options):
    loaded = _load(options, which=options.which)
    model = loaded.model.to(options.device)
    reference = load_images(options.data, options.split, model.config.image_size)
    features = load_features(options.features, options.device)
    summary = evaluate.summarize(
        reference.images, features, f"{reference.source} {options.split}", cache=cache_folder(), progress=True
    )
    paired = None
    if options.dense:
        dense = checkpoint.load_model(options.dense, build_model, which=options.which).model.to(options.device)
        paired = to_uint8(_draw(dense, options))
    images = to_uint8(_draw(model, options))
    report = evaluate.evaluate(images, summary, features, paired=paired, seed=options.seed, progress=True)
    report |= {
        "model": str(loaded.file),
        "data": options.data,
        "split": options.split,
        "sampler": options.sampler,
        "sampling_steps": options.sampling_steps,
        "seed": options.seed,
    }
    out = Path(options.out or _beside(options.run) / "evaluation.json")
    write_json(out, report)
    width = max(map(len, report))
    print(
        "\n".join(f"{k:<{width}}  {v:.5g}" if isinstance(v, float) else f"{k:<{width}}  {v}" for k, v in report.items())
    )
    print(f"written to {out}")


def inspect_model(options):
    if options.run is None and options.model is None:
        raise InputError("name something to inspect: a run folder or model file, or --model")
    if options.where and not options.pattern:
        raise InputError(f"--where {options.where} says where a pattern goes: give one with --pattern")
    if options.run:
        name, model = options.run, _load(options).model
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
        _picture(options.plot)
        if options.plot
        else f"{Path(title.replace(':', 'of').replace(' ', '-')).name}-layers.png"
    )
    table.plot(chart, f"{title}: parameters per layer, before and after")
    print(f"chart: {chart}")
