"""The quickstart: train a tiny U-ViT dense, then 3:4, then 2:4 by transfer, and show how good each is, beside pruning
the dense network in one shot. A few minutes on two CPU cores."""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsedm import diffusion, evaluate, samplers
from sparsedm import plots as pictures
from sparsedm.commands.train import show_plan
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import write_json, write_text
from sparsedm.inspection import inspect
from sparsedm.model_files import save_model
from sparsedm.models import build_model, model_config
from sparsedm.sparsity import compress, sparsify
from sparsedm.train import data
from sparsedm.train.chain import Start, run_chain
from sparsedm.train.data import load_images
from sparsedm.train.loop import TrainOptions, amp_of
from sparsedm.train.stages import Stage
from sparsedm.train.synthetic import CLASSES

TRANSFER = {"teacher": "dense", "w_kd": 0.1, "decay": 2e-4}


@dataclass(frozen=True)
class Recipe:
    """What one quickstart spends, and on what network."""

    model: dict  # options that differ from uvit-tiny
    stages: tuple
    options: TrainOptions
    samples: int  # for the distances, per network
    sampling_steps: int
    threads: int  # on a CPU; on tensors this small a second one mostly waits, and for ages if another process is busy


SYNTHETIC = Recipe(
    model={"image_size": 12, "patch_size": 3, "velocity": True},
    stages=(
        Stage("dense", 1600),
        Stage("3of4", 200, "3:4", **TRANSFER),
        Stage("2of4", 450, "2:4", **TRANSFER),
    ),
    options=TrainOptions(
        batch_size=32,
        lr=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        cosine=True,
        ema=0.99,
        weighting="velocity",
        flip=False,
        log_every=20,
        save_every=500,
        validate_every=200,
    ),
    samples=500,
    sampling_steps=25,
    threads=1,
)
REAL = replace(
    SYNTHETIC,
    model={"velocity": True},
    stages=(
        Stage("dense", 800),
        Stage("3of4", 120, "3:4", **TRANSFER),
        Stage("2of4", 260, "2:4", **TRANSFER),
    ),
    options=replace(SYNTHETIC.options, flip=True),
    samples=256,
    threads=2,
)

SHOWN = 20  # images of each network in the picture

SYNTHETIC_NOTE = """\
The images are drawn by a program: one shape on a plain ground. A good sample has one closed outline, straight or round
where it should be, in one flat colour."""
REAL_NOTE = """\
A few minutes of two CPU cores teach a network of a million parameters which colours there are, but no objects: expect
patches of colour. The numbers still rank the networks. For pictures, train a preset on a GPU:
  sparsedm train --model uvit-cifar10-small --data cifar10 --chain dense,3:4,2:4 --steps 500000"""


def add_arguments(parser):
    parser.add_argument(
        "--data", default="synthetic", help="as for train (default: synthetic, which needs no download)"
    )
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/quickstart, or with the data's name)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and stop")


def quickstart(options):
    """The command: options.data, run, seed, device, dry_run. Leaves a run folder; to resume, run it again.

    The folder: one sub-folder with checkpoints per stage, the one-shot and the compressed network as model files,
    samples.png, loss.png, layers.png, report.md, report.json.
    """
    started = time.perf_counter()
    drawn = options.data == "synthetic"
    recipe, note = (SYNTHETIC, SYNTHETIC_NOTE) if drawn else (REAL, REAL_NOTE)
    folder = Path(options.run or f"runs/quickstart{'' if drawn else '-' + Path(options.data).resolve().stem}")
    training = replace(recipe.options, seed=options.seed, amp=amp_of(options.device))
    if options.dry_run:  # how many classes other images have is not known before they are read
        classes = len(CLASSES) if drawn else 0
        network = build_model("uvit-tiny", device="meta", **recipe.model, num_classes=classes)
        show_plan(recipe.stages, training, network, folder)
        return
    size = model_config("uvit-tiny", **recipe.model).image_size
    images = load_images(options.data, "train", size)
    validation = load_images(options.data, "test", size, limit=1024)
    if images.is_latent:
        raise InputError(f"data {options.data} holds latents, of which no picture can be shown: use sparsedm train")
    torch.set_num_threads(min(recipe.threads, torch.get_num_threads()))
    results = _train(recipe, training, images, validation, folder, options)
    networks = _networks(results)
    save_model(folder / "one-shot-2of4.safetensors", networks["one-shot 2:4"])
    save_model(folder / "chain-2of4-compressed.safetensors", compress(networks["chain 2:4"]))
    rows, samples = _measure(networks, results, recipe, images, validation, options)
    _draw(folder, networks, results, samples, images, training)
    report = {
        "data": options.data,
        "images": len(images),
        "seed": options.seed,
        "device": str(options.device),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "models": rows,
    }
    write_json(folder / "report.json", report)
    table = _table(rows)
    write_text(folder / "report.md", _markdown(report, table, note))
    print(f"\n{table}\n\n{note}\n")
    print(f"look at {folder / 'samples.png'} first, then loss.png, layers.png and report.md beside it")


def _train(recipe, training, images, validation, folder, options):
    """[StageResult] of the recipe's chain."""
    torch.manual_seed(options.seed)
    channels, classes = images.images.shape[1], len(images.class_names)
    model = build_model("uvit-tiny", **recipe.model, channels=channels, num_classes=classes)
    print(f"training {' -> '.join(s.pattern for s in recipe.stages)} on {len(images):,} images of {images.source}")
    return run_chain(
        Start(model),
        recipe.stages,
        images,
        diffusion.schedule_of(model),
        training,
        folder,
        validation=validation,
        record={"data": options.data},
        device=options.device,
    )


def _draw(folder, networks, results, samples, images, training):
    """The pictures in the folder."""
    rows = [("real", _real_row(images))]
    rows += [(name, samples[name][:SHOWN]) for name in ("dense", "one-shot 2:4", "chain 2:4")]
    pictures.save_grid(folder / "samples.png", rows)
    curves = [(r.stage.pattern, r.metrics) for r in results]
    pictures.plot_losses(folder / "loss.png", curves, training.batch_size, f"quickstart on {images.source}")
    inspect(networks["chain 2:4"]).plot(folder / "layers.png", "chain 2:4: parameters per layer, before and after")


def _real_row(images):
    """SHOWN real images, above samples of the same class each where there are classes."""
    classes = len(images.class_names)
    if not classes:
        return images.images[:: max(1, len(images) // SHOWN)][:SHOWN]
    chosen = []
    for column in range(SHOWN):
        alike = (images.labels == column % classes).nonzero().flatten()
        chosen.append(alike[column // classes % len(alike)] if len(alike) else column % len(images))
    return images.images[torch.tensor(chosen)]


def _networks(results):
    """{name: network with averaged weights}: dense, the same pruned in one shot, and the students of the chain."""
    dense, *students = [result.ema for result in results]
    networks = {"dense": dense, "one-shot 2:4": sparsify(copy.deepcopy(dense), "2:4")}
    return networks | {f"chain {result.stage.pattern}": ema for result, ema in zip(results[1:], students)}


def _measure(networks, results, recipe, images, validation, options):
    """A row of numbers per network, and its samples: {name: uint8 (n, C, H, W)}, all from the same noise and labels."""
    config = networks["dense"].config
    features = load_features("random-conv", options.device)
    reference = evaluate.summarize(images.images, features, f"{images.source} train", progress=True)
    shape = (config.channels, config.image_size, config.image_size)
    labels = torch.arange(recipe.samples) % config.num_classes if config.num_classes else None
    x, y = data.batch(validation.to(options.device), torch.arange(len(validation)))
    seconds = {f"chain {result.stage.pattern}": result.result.seconds for result in results[1:]}
    seconds["dense"] = results[0].result.seconds
    rows, samples = [], {}
    for name, network in networks.items():
        schedule = diffusion.schedule_of(network)
        print(f"sampling and measuring: {name}")
        samples[name] = to_uint8(
            samplers.sample(
                network,
                schedule,
                recipe.samples,
                shape,
                steps=recipe.sampling_steps,
                seed=options.seed,
                y=labels,
                clip="every",
                batch_size=128,
                progress=True,
            ).cpu()
        )
        distances = evaluate.evaluate(samples[name], reference, features)
        totals = inspect(network).totals()
        rows.append(
            {
                "model": name,
                "validation_loss": float(diffusion.validation_loss(network, x, schedule, y=y)),
                **distances,
                **totals,
                "density": totals["macs_after"] / totals["macs"],
                "training_seconds": seconds.get(name, 0.0),
            }
        )
    return rows, samples


def _table(rows):
    head = f"{'model':<14}{'val. loss':>10}{'Fréchet':>9}{'density':>9}{'parameters':>12}{'MACs':>10}{'training':>10}"
    lines = [
        f"{r['model']:<14}{r['validation_loss']:>10.4f}{r['frechet_distance']:>9.2f}"
        f"{r['density']:>9.2f}{r['parameters_after']:>12,}{r['macs_after'] / 1e6:>8.1f} M"
        f"{r['training_seconds']:>8.0f} s"
        for r in rows
    ]
    return "\n".join([head, *lines])


def _markdown(report, table, note):
    by_name = {row["model"]: row for row in report["models"]}
    dense, chain, one_shot = by_name["dense"], by_name["chain 2:4"], by_name["one-shot 2:4"]

    def against_dense(row):
        return f"{row['validation_loss'] / dense['validation_loss'] - 1:+.1%}"

    return f"""# Quickstart on {report["data"]}

```
{table}
```

Against dense, the validation loss of the chain's 2:4 network is {against_dense(chain)}, that of pruning in one shot
{against_dense(one_shot)}. (The chain's students trained on where the dense network stopped, so they have also seen more
images: `sparsedm train --method dense` gives the control.)

* Fréchet distance: {dense["count"]:,} samples against {dense["reference_count"]:,} real images, on
  `{dense["features"]}` features: a fixed random convolution network. It ranks networks here and is not an FID.
* parameters and MACs count the kept weights, MACs those of linear and convolution layers for one image; density is
  their share of the dense MACs.
* training: seconds spent on that network alone, on {report["device"]} (torch {report["torch"]}). Masks are applied by
  plain torch here: a CPU gains no speed from them.

{note}

| file | what |
|---|---|
| samples.png | rows: real, dense, one-shot 2:4, chain 2:4; a column is one class and, of the networks, one noise |
| loss.png | noise-prediction loss over images seen, one colour per stage |
| layers.png | parameters per layer of the 2:4 network, before and after |
| report.json | all numbers |
| 00-dense, 01-3of4, 02-2of4 | checkpoints and metrics of each stage |
| one-shot-2of4.safetensors, chain-2of4-compressed.safetensors | for `sparsedm sample` and `inspect` |
"""
