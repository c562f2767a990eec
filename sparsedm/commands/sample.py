"""The commands that draw from trained networks: `sparsedm sample` and `sparsedm evaluate`.

What they draw from is a model, or with --strategy the networks of a run folder in turn (see `stepaware.py`).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sparsedm import evaluate, samplers
from sparsedm import plots as pictures
from sparsedm.commands.train import crop_of, dense_part, load_named, picture_name
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import atomic_file, cache_folder, check_writable, write_json
from sparsedm.model_files import load_model
from sparsedm.models import build_model
from sparsedm.sparsity import compress, masked_layers
from sparsedm.stepaware import family as stepaware
from sparsedm.train import distributed
from sparsedm.train.data import load_images
from sparsedm.train.published import Published, published

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Source(NamedTuple):
    """What a command draws with: the network of each step."""

    words: str
    networks: list
    sampler: str
    steps: int
    clip: str | None = None  # of samplers.CLIPS; None: every step for images, never for latents
    compressed: bool = False
    cost: dict = {}  # of a strategy, for the report

    @property
    def config(self):
        return self.networks[0].config

    @property
    def evaluations(self):
        return sum(samplers.evaluations(self.sampler, self.steps))


def _source(options):
    """The _Source that the command line names: a run or model file, or with --strategy a family and its strategy."""
    if options.strategy is None:
        loaded = load_named(options, which=options.which)
        row = published(loaded.model.config) if options.sampler == "published" else Published({}, 0, clip=None)
        if row is None:
            raise InputError(f"--sampler published: {loaded.file} has the shape of no published network")
        sampler = row.sampler if options.sampler in (None, "published") else options.sampler
        steps = _steps(options, sampler) or row.steps
        networks = [loaded.model] * steps
        return _Source(f"the {loaded.kind} model in {loaded.file}", networks, sampler, steps, options.clip or row.clip)
    if options.model or options.set or options.which != "ema":
        raise InputError("--strategy goes with a run folder alone: leave --model, --set and --which away")
    strategy, family = stepaware.load_strategy(options.strategy), stepaware.family_of(options.run)
    if options.sampler == "published":
        raise InputError("--strategy has a sampler of its own: leave --sampler published away")
    steps = _steps(options, options.sampler or strategy.sampler)
    networks = strategy.models(family, sampler=options.sampler, steps=steps)
    macs, dearest = (family.cost(strategy.sampler, i) for i in (strategy.indices, (0,) * strategy.steps))
    share = f"{macs / dearest:.0%} of the MACs of {family.names[0]}"
    words = f"the strategy {options.strategy}, {macs / 1e6:,.1f} M MACs an image, {share}"
    cost = {"strategy": options.strategy, "macs_per_image": macs, "share_of_macs": macs / dearest}
    return _Source(words, networks, strategy.sampler, strategy.steps, options.clip, cost=cost)


def _steps(options, sampler):
    """The steps that the command line asks for, None where it leaves them open."""
    if options.sampling_steps is not None and options.sampling_steps < 1:
        raise InputError(f"--sampling-steps {options.sampling_steps}: at least 1 is needed")
    return options.sampling_steps if options.nfe is None else samplers.steps_for(sampler, options.nfe)


def _compressed(source, must):
    """The _Source with its masked networks compressed; must: refuse one that is not masked, rather than keep it."""
    small = {id(n): compress(n) if must or masked_layers(n) else n for n in source.networks}
    return source._replace(
        words=f"{source.words}, compressed", networks=[small[id(n)] for n in source.networks], compressed=True
    )


def sample(options):
    source = _source(options)
    out = Path(options.out or _beside(options.run) / "drawn.png")
    latents = source.config.channels not in (1, 3)
    if out.suffix != ".npz":
        picture_name(out)
        if latents:
            raise InputError(
                f"{options.run} makes latents of {source.config.channels} channels, which are no picture: "
                "write the numbers with --out FILE.npz"
            )
    if options.compress:
        source = _compressed(source, options.strategy is None)
    check_writable(out)
    with distributed.process_group(options.device):
        images = _draw(source, options)
    if images is None:
        return
    images = images.float() if latents else to_uint8(images)
    if out.suffix == ".npz":
        with atomic_file(out) as partial:
            np.savez(partial, images=images.numpy())
    else:
        classes = 1 if options.label is not None else source.config.num_classes or 1
        width = 16 // classes * classes or 16  # a class stands below itself
        pictures.save_grid(out, [("", row) for row in images.split(width)])
    how = f"{source.sampler} in {source.steps} steps ({source.evaluations} network evaluations)"
    how = f"{how}, schedule {source.config.schedule}, seed {options.seed}"
    print(f"{len(images)} samples of {source.words}, {how}: {out}")


def _beside(run):
    """The folder for what is made from a run folder; the current one if `run` is a file."""
    return Path(run) if Path(run).is_dir() else Path()


def _draw(source, options):
    """(count, C, H, W) floating point samples, as the command line asks; None but in the first of several processes."""
    config, dtype = source.config, DTYPES[options.dtype]
    if options.count < 1 or options.batch_size < 1:
        raise InputError(f"--count {options.count} --batch-size {options.batch_size}: both must be at least 1")
    if dtype is None:
        dtype = torch.bfloat16 if source.compressed and options.device.type == "cuda" else torch.float32
    labels = None
    if config.num_classes:
        labels = torch.arange(options.count) % config.num_classes
        if options.label is not None:
            if not 0 <= options.label < config.num_classes:
                raise InputError(f"--label {options.label}: the model has the classes 0 to {config.num_classes - 1}")
            labels = torch.full_like(labels, options.label)
    elif options.label is not None or options.guidance:
        raise InputError("--label and --guidance need a class-conditional model, and this one is unconditional")
    moved = {id(network): network.to(options.device, dtype) for network in source.networks}

    def draw(start, stop):
        return samplers.sample(
            [moved[id(network)] for network in source.networks],
            schedule_of(source.networks[0]),
            stop - start,
            (config.channels, config.image_size, config.image_size),
            sampler=source.sampler,
            steps=source.steps,
            seed=options.seed,
            start=start,
            y=None if labels is None else labels[start:stop].to(options.device),
            guidance=options.guidance,
            clip=source.clip or ("never" if config.channels > 3 else "every"),
            batch_size=options.batch_size,
            device=options.device,
            network_dtype=dtype,
            progress=distributed.is_main_process(),
            cuda_graph=options.cuda_graph,
        ).cpu()

    return distributed.gather(options.count, options.batch_size, draw)


def evaluate_samples(options):
    source = _source(options)
    out = Path(options.out or _beside(options.run) / "evaluation.json")
    check_writable(out)
    reference = load_images(options.data, options.split, source.config.image_size, crop=crop_of(options, source.config))
    with distributed.process_group(options.device):
        if distributed.is_main_process():
            features = load_features(options.features, options.device)
            name = f"{reference.source} {options.split}"
            summary = evaluate.summarize(reference.images, features, name, cache=cache_folder(), progress=True)
        paired = None
        if options.dense:
            dense = load_model(dense_part(options.dense), build_model, which=options.which).model
            paired = _draw(source._replace(networks=[dense] * source.steps), options)
        images = _draw(source, options)
    if images is None:
        return
    images, paired = to_uint8(images), None if paired is None else to_uint8(paired)
    report = evaluate.evaluate(images, summary, features, paired=paired, seed=options.seed, progress=True)
    report |= {
        "model": source.words,
        "data": options.data,
        "split": options.split,
        "sampler": source.sampler,
        "sampling_steps": source.steps,
        "network_evaluations": source.evaluations,
        "seed": options.seed,
        **source.cost,
    }
    write_json(out, report)
    width = max(map(len, report))
    print(
        "\n".join(f"{k:<{width}}  {v:.5g}" if isinstance(v, float) else f"{k:<{width}}  {v}" for k, v in report.items())
    )
    if report["rank_deficient"]:
        print(f"rank_deficient: {report['dimension']} images or fewer make a rough Fréchet distance: raise --count")
    print(f"written to {out}")
