"""`sparsedm evaluate`: distances between a model's samples and real images, as numbers in a file."""

from pathlib import Path

from sparsedm import evaluate, samplers
from sparsedm.commands.drawing import add_sampling_arguments, autoencoder_of, beside, conditions_of, draw, source_of
from sparsedm.commands.options import add_crop, check_dense, check_out, dense_part
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import cache_folder, write_json
from sparsedm.model_files import load_model
from sparsedm.models import build_model
from sparsedm.plots import table
from sparsedm.train import distributed
from sparsedm.train.data import check_source, load_images
from sparsedm.train.published import trained_crop

EXAMPLES = ("runs/quickstart --data synthetic", "runs/mine --data cifar10 --features inception --count 50000")


def add_arguments(parser):
    add_sampling_arguments(parser, images=2000)
    parser.add_argument("--data", required=True, help="the real images, as for train")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="part of --data (default: train)")
    add_crop(parser)
    parser.add_argument(
        "--features",
        default="random-conv",
        help="random-conv: built in, not comparable with published FIDs; inception; or an exported FILE "
        "(default: random-conv)",
    )
    parser.add_argument("--dense", metavar="RUN", help="also measure SSIM to this model's samples from the same noise")
    parser.add_argument("--dry-run", action="store_true", help="print what would be drawn and compared, and stop")
    parser.add_argument(
        "--out",
        help="the numbers (default: evaluation.json in the run folder; for a model file, in the current folder)",
    )


def run(options):
    source = source_of(options)
    config, conditions = source.config, conditions_of(source, options)
    samplers.check(config, source.sampler, source.steps)
    autoencoder = autoencoder_of(config, options)
    size = config.image_size * (autoencoder.factor if autoencoder else 1)
    shape = (3 if autoencoder else config.channels, size, size)
    out = Path(options.out or beside(options.run) / "evaluation.json")
    names = ("run", "data", "dense", "features", "strategy", "context", "vae")
    check_out(out, *(getattr(options, name) for name in names))
    evaluate.check_sets(shape, options.count, shape, options.count)
    check_source(options.data, size=size, out=out)
    if options.features != "inception":  # which one process downloads
        load_features(options.features)
    dense = _paired(options, source) if options.dense else None
    if options.dry_run:
        print(f"{options.count:,} samples of {source.words}, {source.how},")
        print(f"against the {options.split} images of {options.data}: {out}   (dry run: nothing was drawn or written)")
        return
    crop = options.crop or trained_crop(options.run, config)
    reference = load_images(options.data, options.split, size, crop=crop)
    if reference.is_latent:
        raise InputError(f"data {options.data} holds latents: distances need images")
    evaluate.check_sets(shape, options.count, reference.images.shape[1:], len(reference))

    def summarized():
        features = load_features(options.features, options.device)
        name = f"{reference.source} {options.split}"
        return features, evaluate.summarize(reference.images, features, name, cache=cache_folder(), progress=True)

    paired = None
    with distributed.process_group(options.device):
        features, summary = distributed.first(summarized) or (None, None)
        if dense is not None:
            twin = source._replace(networks=[dense] * source.steps, compressed=False)
            paired = draw(twin, conditions, options)
        images = draw(source, conditions, options)
    if images is None:
        return
    if autoencoder:
        images, paired = (x if x is None else autoencoder.decode(x, progress=True) for x in (images, paired))
    images, paired = to_uint8(images), None if paired is None else to_uint8(paired)
    report = evaluate.evaluate(images, summary, features, paired=paired, seed=options.seed, progress=True)
    report |= {
        "model": source.words,
        "data": options.data,
        "split": options.split,
        "sampler": source.sampler,
        "sampling_steps": source.steps,
        "network_evaluations": source.evaluations,
        "guidance": source.guidance or 0.0,
        "seed": options.seed,
        **source.cost,
    }
    write_json(out, report)
    rows = [(name, f"{value:.5g}" if isinstance(value, float) else value) for name, value in report.items()]
    print(table(rows[0], rows[1:], left=(0, 1)))
    if report["rank_deficient"]:
        print(f"rank_deficient: {report['dimension']} images or fewer make a rough Fréchet distance: raise --count")
    print(f"written to {out}")


def _paired(options, source):
    """The network of --dense, whose samples from the same noise are compared with the model's."""
    loaded = load_model(dense_part(options.dense), build_model, which=options.which)
    check_dense(loaded, f"--dense {options.dense}")
    config = loaded.model.config
    for name in ("channels", "image_size", "num_classes", "context_tokens"):
        if getattr(config, name, 0) != getattr(source.config, name, 0):
            raise InputError(f"--dense {options.dense}: its {name} must equal the model's")
    try:
        samplers.check(config, source.sampler, source.steps)
    except InputError as error:
        raise InputError(f"--dense {options.dense}: {error}") from None
    return loaded.model
