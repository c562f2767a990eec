"""The quickstart: train a tiny U-ViT dense, then 3:4, then 2:4 by transfer, and compare them.

Also compares with the dense network pruned in one shot. A few minutes on two CPU cores.
"""

import copy
import os
import time
from pathlib import Path

import torch

from sparsedm import diffusion, evaluate, samplers
from sparsedm.commands.options import add_seed_and_device
from sparsedm.commands.train import recipe_images, show_recipe, train_recipe
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import check_writable, write_json, write_text
from sparsedm.inspection import inspect
from sparsedm.model_files import save_model
from sparsedm.models import model_config
from sparsedm.plots import plot_losses, save_grid, table
from sparsedm.recipes import QUICKSTART
from sparsedm.sparsity import sparsify
from sparsedm.train import data
from sparsedm.train.data import check_source
from sparsedm.train.synthetic import CLASSES

EXAMPLES = ("", "--data cifar-10-python.tar.gz")
SHOWN = 20  # images of each network in the picture

SYNTHETIC_NOTE = """\
The images are drawn by a program: one shape on a plain ground. A good sample has one closed outline, straight or round
where it should be, in one flat colour."""
REAL_NOTE = """\
In a few minutes on two CPU cores a network of a million parameters learns colours, but no objects: expect patches of
colour. The numbers still rank the networks. For pictures, train a preset on a GPU:
  sparsedm train --model uvit-cifar10-small --data cifar10 --chain dense,3:4,2:4 --steps 500000"""


def add_arguments(parser):
    parser.add_argument(
        "--data", default="synthetic", help="as for train (default: synthetic, which needs no download)"
    )
    parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/quickstart, or with the data's name)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    add_seed_and_device(parser)


def run(options):
    """Writes a run folder; to resume, run it again.

    The folder holds one sub-folder with checkpoints per stage, the one-shot and the compressed network as model files,
    samples.png, loss.png, layers.png, report.md and report.json.
    """
    started = time.perf_counter()
    drawn = options.data == "synthetic"
    recipe, note = (QUICKSTART["synthetic"], SYNTHETIC_NOTE) if drawn else (QUICKSTART["images"], REAL_NOTE)
    folder = Path(options.run or f"runs/quickstart{'' if drawn else '-' + Path(os.path.abspath(options.data)).stem}")
    check_writable(folder / "report.json")
    check_source(options.data, model_config(recipe.model, **recipe.overrides), out=folder / "report.json")
    if options.dry_run:  # the number of classes of other images is unknown until they are read
        show_recipe(recipe, options, folder, classes=len(CLASSES) if drawn else 0)
        return
    images, validation = recipe_images(recipe, options.data)
    if images.is_latent:
        raise InputError(f"data {options.data} holds latents, not pictures: use sparsedm train")
    shape = images.images.shape[1:]
    evaluate.check_sets(shape, recipe.samples, shape, len(images))
    torch.set_num_threads(min(recipe.threads, torch.get_num_threads()))
    results = train_recipe(recipe, images, validation, folder, options)
    networks = _networks(results)
    save_model(folder / "one-shot-2of4.safetensors", networks["one-shot 2:4"])
    save_model(folder / "chain-2of4-compressed.safetensors", compress(networks["chain 2:4"]))
    rows, samples = _measure(networks, results, recipe, images, validation, options)
    _draw(folder, networks, results, samples, images, recipe.options)
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
    text = _table(rows)
    write_text(folder / "report.md", _markdown(report, text, note))
    print(f"\n{text}\n\n{note}\n")
    print(f"look at {folder / 'samples.png'} first, then loss.png, layers.png and report.md beside it")


def _draw(folder, networks, results, samples, images, training):
    """The pictures in the folder."""
    rows = [("real", _real_row(images))]
    rows += [(name, samples[name][:SHOWN]) for name in ("dense", "one-shot 2:4", "chain 2:4")]
    save_grid(folder / "samples.png", rows)
    curves = [(r.stage.pattern, r.metrics) for r in results]
    plot_losses(folder / "loss.png", curves, training.batch_size, f"quickstart on {images.source}")
    inspect(networks["chain 2:4"]).plot(folder / "layers.png", "chain 2:4: parameters per layer, before and after")


def _real_row(images):
    """SHOWN real images; with classes, each has the class of the samples below it."""
    classes = len(images.class_names)
    if not classes:
        return images.images[:: max(1, len(images) // SHOWN)][:SHOWN]
    chosen = []
    for column in range(SHOWN):
        alike = (images.labels == column % classes).nonzero().flatten()
        chosen.append(alike[column // classes % len(alike)] if len(alike) else column % len(images))
    return images.images[torch.tensor(chosen)]


def _networks(results):
    """{name: network with EMA weights}: dense, dense pruned in one shot, and the students of the chain."""
    dense, *students = [result.ema for result in results]
    networks = {"dense": dense, "one-shot 2:4": sparsify(copy.deepcopy(dense), "2:4")}
    return networks | {f"chain {result.stage.pattern}": ema for result, ema in zip(results[1:], students)}


def _measure(networks, results, recipe, images, validation, options):
    """A row of numbers per network, and its samples: {name: uint8 (n, C, H, W)}, all from the same noise and labels."""
    config = networks["dense"].config
    features = load_features("random-conv", options.device)
    reference = evaluate.summarize(images.images, features, f"{images.source} train", progress=True)
    shape = (config.channels, config.image_size, config.image_size)
    labels = samplers.labels_in_turn(config, recipe.samples)
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
                batch_size=samplers.batch_of(options.device),
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
    head = ("model", "val. loss", "Fréchet", "density", "parameters", "MACs", "training")
    body = [
        (
            row["model"],
            f"{row['validation_loss']:.4f}",
            f"{row['frechet_distance']:.2f}",
            f"{row['density']:.2f}",
            f"{row['parameters_after']:,}",
            f"{row['macs_after'] / 1e6:.1f} M",
            f"{row['training_seconds']:.0f} s",
        )
        for row in rows
    ]
    return table(head, body)


def _markdown(report, text, note):
    by_name = {row["model"]: row for row in report["models"]}
    dense, chain, one_shot = by_name["dense"], by_name["chain 2:4"], by_name["one-shot 2:4"]

    def against_dense(row):
        return f"{row['validation_loss'] / dense['validation_loss'] - 1:+.1%}"

    return f"""# Quickstart on {report["data"]}

```
{text}
```

The validation loss relative to dense: {against_dense(chain)} for the chain's 2:4 network, {against_dense(one_shot)} for
pruning in one shot. (The chain's students continued training after the dense network, so they have seen more images:
`sparsedm train --method dense` gives the control.)

* Fréchet distance: {dense["count"]:,} samples against {dense["reference_count"]:,} real images, on
  `{dense["features"]}` features: a fixed random convolution network. It ranks networks here and is not an FID.
* parameters and MACs count kept weights; MACs count the linear and convolution layers for one image. density is the
  share of the dense MACs.
* training: seconds for that network alone, on {report["device"]} (torch {report["torch"]}).

{note}

| file | what |
|---|---|
| samples.png | rows: real, dense, one-shot 2:4, chain 2:4; columns: one class each, and one noise for the networks |
| loss.png | noise-prediction loss over images seen, one colour per stage |
| layers.png | parameters per layer of the 2:4 network, before and after |
| report.json | all numbers |
| 00-dense, 01-3of4, 02-2of4 | checkpoints and metrics of each stage |
| one-shot-2of4.safetensors, chain-2of4-compressed.safetensors | for `sparsedm sample` and `inspect` |
"""
