"""Drawing images: the options and the work that `sparsedm sample` and `sparsedm evaluate` share."""

from pathlib import Path
from typing import NamedTuple

import torch

from sparsedm import samplers
from sparsedm.commands.options import (
    add_model_arguments,
    add_seed_and_device,
    add_vae,
    count,
    finite,
    load_named,
    sampling_steps,
    whole,
)
from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError, TooLittleMemory, check_memory
from sparsedm.memory import live_per_image, most_kept_per_image
from sparsedm.models.autoencoder import load_autoencoder
from sparsedm.stepaware.family import family_of, load_strategy
from sparsedm.train import distributed
from sparsedm.train.array_files import read_context
from sparsedm.train.data import check_context
from sparsedm.train.published import Published, published

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_sampling_arguments(parser, images):
    """The options of all commands that draw images: the networks, and how to sample."""
    parser.add_argument("run", help="run folder (its last stage), stage folder, or model file")
    add_model_arguments(parser, ": the model in a foreign file")
    parser.add_argument("--count", type=count, default=images, help="how many images (default: %(default)s)")
    parser.add_argument(
        "--strategy",
        metavar="FILE",
        help="a file written by `sparsedm search`, or released by DDSM: it says which network of RUN draws which step",
    )
    parser.add_argument(
        "--other-weights", action="store_true", help="use a strategy although it was found for other weights"
    )
    parser.add_argument(
        "--sampler",
        choices=[*samplers.SAMPLERS, "published"],
        help="how to sample. published: sampler, steps, clipping and guidance of the original paper's code (default: "
        "dpm++2m, or the strategy's)",
    )
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--sampling-steps", type=sampling_steps, help="sampling steps (default: 50, or the strategy's)")
    much.add_argument(
        "--nfe", type=sampling_steps, help="most network evaluations, in place of steps: heun makes two per step"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the network (auto: bf16 for a compressed one on a GPU, because its kernels need it; else fp32)",
    )
    parser.add_argument(
        "--guidance", type=finite, help="classifier-free guidance weight, for class- and text-conditional models"
    )
    parser.add_argument(
        "--clip",
        choices=samplers.CLIPS,
        help="clip images to [-1, 1] in every step, in the final one, or never (default: every, or the strategy's; "
        "latents: never)",
    )
    parser.add_argument(
        "--context",
        metavar="FILE.npz",
        help="texts of a text-conditional model: `context` (N, tokens, width), and for --guidance `null_context`",
    )
    parser.add_argument("--label", type=whole, help="draw only this class (default: all classes in turn)")
    parser.add_argument(
        "--batch-size",
        type=count,
        help="images at a time; changes only rounding (default: 256, on a CPU 64)",
    )
    parser.add_argument(
        "--which", choices=("ema", "model"), default="ema", help="EMA weights or last weights (default: ema)"
    )
    add_vae(parser, "decode latents to images by")
    parser.add_argument("--cuda-graph", action="store_true", help="replay whole steps as CUDA graphs: less host time")
    add_seed_and_device(parser)


class Source(NamedTuple):
    """The networks that a command draws with, one for each step, and the sampler."""

    words: str
    networks: list
    sampler: str
    steps: int
    clip: str | None = None  # one of samplers.CLIPS; None: every step for images, never for latents
    guidance: float | None = None
    compressed: bool = False
    cost: dict = {}  # the cost of a strategy, for the report

    @property
    def config(self):
        return self.networks[0].config

    @property
    def evaluations(self):
        return sum(samplers.evaluations(self.sampler, self.steps))

    @property
    def how(self):
        return f"{self.sampler} in {self.steps} steps ({self.evaluations} network evaluations)"


def source_of(options):
    """The Source of the command line: a run or model file, or with --strategy a family and its strategy.

    Raises: InputError for options that exclude each other, or as what loads the files.
    """
    if options.other_weights and options.strategy is None:
        raise InputError("--other-weights goes with --strategy")
    folders = [path for path in (options.run, getattr(options, "dense", None)) if path and Path(path).is_dir()]
    if options.which != "ema" and Path(options.run).is_file() and not folders:
        raise InputError(f"--which {options.which} goes with a run folder: the file {options.run} holds one network")
    if options.strategy is None:
        loaded = load_named(options, which=options.which)
        row = Published({}, 0, clip=None)
        if options.sampler == "published":
            row = published(loaded.model.config, any_dropout=True)
        if row is None:
            raise InputError(f"--sampler published: the network in {loaded.file} is not a published one")
        sampler = row.sampler if options.sampler in (None, "published") else options.sampler
        networks = [loaded.model] * (_steps(options, sampler) or row.steps)
        words = f"the {loaded.kind} model in {loaded.file}"
        guidance = row.guidance if options.guidance is None else options.guidance
        compressed = loaded.kind == "compressed"
        return Source(words, networks, sampler, len(networks), options.clip or row.clip, guidance, compressed)
    if options.model or options.set or options.which != "ema":
        raise InputError("--strategy needs a run folder: leave out --model, --set and --which")
    if options.sampler == "published":
        raise InputError("--strategy has its own sampler: leave out --sampler published")
    strategy, family = load_strategy(options.strategy), family_of(options.run)
    steps = _steps(options, options.sampler or strategy.sampler)
    networks = strategy.models(family, sampler=options.sampler, steps=steps, other_weights=options.other_weights)
    named = family.only(strategy.networks)
    guidance = strategy.guidance if options.guidance is None else options.guidance
    calls = 2 if guidance else 1
    macs, dearest = (calls * named.cost(strategy.sampler, i) for i in (strategy.indices, (0,) * strategy.steps))
    share = f"{macs / dearest:.0%} of the MACs of {named.names[0]}"
    words = f"the strategy {options.strategy}, {macs / 1e6:,.1f} M MACs an image, {share}"
    cost = {"strategy": options.strategy, "macs_per_image": macs, "share_of_macs": macs / dearest}
    clip = options.clip or strategy.clip
    return Source(words, networks, strategy.sampler, strategy.steps, clip, guidance, cost=cost)


def _steps(options, sampler):
    """The steps that the command line asks for, or None."""
    return options.sampling_steps if options.nfe is None else samplers.steps_for(sampler, options.nfe)


def batch_size_of(options):
    return options.batch_size or samplers.batch_of(options.device)


def network_dtype(options, compressed):
    dtype = DTYPES[options.dtype]
    if dtype is None:
        dtype = torch.bfloat16 if compressed and options.device.type == "cuda" else torch.float32
    return dtype


def beside(run):
    """The folder for results: the run folder; the current folder if `run` is a file."""
    return Path(run) if Path(run).is_dir() else Path()


def autoencoder_of(config, options):
    """The Autoencoder of --vae, or None. Raises: InputError if its latents are not the network's."""
    if options.vae is None:
        if options.latent_scale is not None:
            raise InputError("--latent-scale goes with --vae")
        return None
    scale = options.latent_scale or (published(config, any_dropout=True) or Published({}, 0)).latent_scale
    found = load_autoencoder(options.vae, options.device, scale)
    if found.channels != config.channels:
        rule = f"decodes latents of {found.channels} channels"
        raise InputError(f"--vae {options.vae} {rule}, and the network makes {config.channels}")
    return found


class Conditions(NamedTuple):
    """y: the condition of each sample: labels int64 (count,), or contexts (count, tokens, width).

    null: the context of the empty text, for guidance; None: the network's own null label.
    """

    y: torch.Tensor | None = None
    null: torch.Tensor | None = None


def conditions_of(source, options):
    """The Conditions of --count samples: all classes or all texts in turn, or --label.

    Raises InputError if the model does not fit --label or --guidance, or if --count images do not fit in memory.
    """
    config = source.config
    check_memory(8 * options.count * config.channels * config.image_size**2, f"--count {options.count}")
    _check_batch(source, options)
    if getattr(config, "context_tokens", 0):
        return _texts(source, options)
    if options.context is not None:
        raise InputError("--context needs a text-conditional model, but this one takes no text")
    if not config.num_classes:
        if options.label is not None or source.guidance:
            raise InputError("--label and --guidance need a class-conditional model, but this one is unconditional")
        return Conditions()
    labels = samplers.labels_in_turn(config, options.count)
    if options.label is None:
        return Conditions(labels)
    if options.label >= config.num_classes:
        raise InputError(f"--label {options.label}: the model has the classes 0 to {config.num_classes - 1}")
    return Conditions(torch.full_like(labels, options.label))


def _check_batch(source, options):
    """Raise TooLittleMemory if the images that are drawn at a time cannot fit in the device's memory."""
    size, width = batch_size_of(options), network_dtype(options, source.compressed).itemsize
    images = min(options.count, size) * (2 if source.guidance else 1)
    there = torch.cuda.get_device_properties(options.device).total_memory if options.device.type == "cuda" else None
    network = max(set(source.networks), key=most_kept_per_image)
    try:
        check_memory(images * most_kept_per_image(network), "", there)  # measuring may take seconds
    except TooLittleMemory:
        check_memory(images * live_per_image(network) * width // 4, f"--batch-size {size}", there)


def _texts(source, options):
    config = source.config
    if options.context is None:
        shape = f"(N, {config.context_tokens}, {config.context_dim})"
        raise InputError(f"the model takes a text: give --context FILE.npz with an array `context` {shape}")
    context, null = read_context(Path(options.context))
    check_context(config, context.shape, options.context)
    if options.label is not None:
        raise InputError("--label needs a class-conditional model, but this one takes a text")
    if source.guidance and null is None:
        raise InputError(f"--guidance needs the context of the empty text, `null_context` in {options.context}")
    return Conditions(context[torch.arange(options.count) % len(context)], null)


def draw(source, conditions, options):
    """(count, C, H, W) floating point samples. Only the main process gets them; the others get None."""
    config, dtype, batch_size = source.config, network_dtype(options, source.compressed), batch_size_of(options)
    y, null = conditions
    moved = {id(network): network.to(options.device, dtype) for network in source.networks}

    def drawn(start, stop):
        return samplers.sample(
            [moved[id(network)] for network in source.networks],
            schedule_of(source.networks[0]),
            stop - start,
            (config.channels, config.image_size, config.image_size),
            sampler=source.sampler,
            steps=source.steps,
            seed=options.seed,
            start=start,
            y=None if y is None else y[start:stop].to(options.device),
            guidance=source.guidance,
            null_label=null,
            clip=source.clip or ("every" if config.channels in (1, 3) and not options.vae else "never"),
            batch_size=batch_size,
            device=options.device,
            network_dtype=dtype,
            progress=distributed.is_main_process(),
            cuda_graph=options.cuda_graph,
        ).cpu()

    return distributed.gather(options.count, batch_size, drawn)
