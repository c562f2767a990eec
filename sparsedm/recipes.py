"""The sizes of runs, as rows: the quickstart on drawn and on other images; searches and experiments at several scales.

smoke   minutes on a CPU; shows that it works, not which is best
cpu     experiments with a clear result, in hours on CPU cores that have bf16 instructions; cpu-short on others
lite    half an hour on one large GPU, in parts of ten minutes
full    the papers' settings; days on a GPU
"""

from dataclasses import dataclass, field, replace

from sparsedm.train.loop import TrainOptions
from sparsedm.train.published import PUBLISHED
from sparsedm.train.stages import SR_STE, TRANSFER, Stage, named_stage


@dataclass(frozen=True)
class Scale:
    """The settings of one run: a network, its training, and the numbers of images to draw and measure."""

    data: str
    model: str
    samples: int  # images per network for the distances, or per row of a search's table
    sampling_steps: int
    options: TrainOptions  # seed is set for each run, steps by the stages, amp where it is None
    overrides: dict = field(default_factory=dict)  # options of the model
    stages: tuple = ()  # an experiment sets them for each run
    conditional: bool = False  # the network of an experiment gets class labels
    validation: int = 1024  # images for the validation loss
    features: str = "random-conv"
    threads: int | None = None  # on a CPU; None: torch decides
    summary: str = ""
    # of a search
    count: int = 0  # images per evaluation
    population: int = 0
    generations: int = 0
    # of an experiment
    base_steps: int = 0  # steps of the dense network that all runs of a seed start from
    steps: int = 0  # steps of each run
    lr: float | None = None  # learning rate of each run; None: options.lr
    ladder: tuple | None = None  # patterns before 2:4 in progressive methods; None: all of LADDER that are denser
    densities: tuple = ("2:4", "1:4", "3:4", "1:8", "7:8", "1:16", "15:16", "1:32", "31:32")  # of experiment `ratio`
    native: int | None = None  # images of this side are resized without --resize; other sizes need --resize
    seeds: int = 2


def _students(patterns, steps, **settings):
    settings = SR_STE | TRANSFER | settings
    return tuple(named_stage(pattern, steps, **settings) for pattern in patterns)


# of networks of a million parameters
_TINY = TrainOptions(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, cosine=True, weighting="velocity")
_PUBLISHED = TrainOptions(**PUBLISHED["uvit-cifar10-small"].training)

# ---- the quickstart

QUICKSTART = {
    "synthetic": Scale(
        data="synthetic",
        model="uvit-tiny",
        overrides={"image_size": 12, "patch_size": 3, "velocity": True},
        stages=(Stage("dense", 1600), *_students(["3:4"], 200), *_students(["2:4"], 450)),
        options=replace(_TINY, batch_size=32, ema=0.99, flip=False, log_every=20, save_every=500, validate_every=200),
        samples=500,
        sampling_steps=25,
        threads=1,  # with tensors this small a second thread mostly waits, and very long if another process is busy
    )
}
QUICKSTART["images"] = replace(
    QUICKSTART["synthetic"],
    overrides={"velocity": True},
    stages=(Stage("dense", 800), *_students(["3:4"], 120), *_students(["2:4"], 260)),
    options=replace(QUICKSTART["synthetic"].options, flip=True),
    samples=256,
    threads=2,
)

# ---- searches: by scale and by family


def _families(chain, widths, both):
    return {"chain": chain, "widths": replace(chain, **widths), "both": replace(chain, **both)}


_SLIMMABLE = {
    "model": "slimmable-tiny",
    "overrides": {"image_size": 12, "multipliers": (1, 2), "attention": (6,)},
    "options": replace(QUICKSTART["synthetic"].options, weighting="noise", lr=1e-3),
}
_SUPERNET = TrainOptions(batch_size=256, lr=4e-4, betas=(0.9, 0.999), weight_decay=0.0)
_LITE = {
    "model": "slimmable-cifar10",
    "overrides": {},
    "options": replace(_SUPERNET, ema=0.999, cosine=True),
}
_FULL = {"model": "slimmable-cifar10", "options": replace(_SUPERNET, warmup=5000)}

SEARCHES = {
    "smoke": _families(
        Scale(
            data="synthetic",
            model="uvit-tiny",
            overrides=QUICKSTART["synthetic"].overrides,
            stages=(Stage("dense", 1600), *_students(["2:4", "1:4", "1:8"], 150, lr=1e-3)),
            options=QUICKSTART["synthetic"].options,
            count=256,
            samples=256,
            validation=256,
            sampling_steps=12,
            population=16,
            generations=6,
            threads=1,
        ),
        widths=_SLIMMABLE | {"stages": (Stage("dense", 1000),)},
        both=_SLIMMABLE | {"stages": (Stage("dense", 800), *_students(["2:4"], 200, lr=1e-3))},
    ),
    "lite": _families(  # for two times ten minutes on one large GPU; not timed yet
        Scale(
            data="cifar10",
            model="uvit-cifar10-small",
            overrides={"velocity": True},
            stages=(Stage("dense", 3000), *_students(["3:4", "2:4", "1:4"], 600)),
            options=TrainOptions(lr=4e-4, ema=0.999, cosine=True, weighting="velocity"),
            count=1000,
            samples=3000,
            sampling_steps=20,
            population=24,
            generations=6,
        ),
        widths=_LITE | {"stages": (Stage("dense", 4000),)},
        both=_LITE | {"stages": (Stage("dense", 3000), *_students(["2:4"], 600))},
    ),
    "full": _families(
        Scale(
            data="cifar10",
            model="uvit-cifar10-small",
            stages=(Stage("dense", 200_000), *_students(["3:4", "2:4", "1:4"], 50_000)),
            options=_PUBLISHED,
            count=2000,
            samples=10_000,
            sampling_steps=25,
            population=24,
            generations=12,
        ),
        widths=_FULL | {"stages": (Stage("dense", 200_000),)},
        both=_FULL | {"stages": (Stage("dense", 200_000), *_students(["2:4"], 50_000))},
    ),
}

# ---- experiments

EXPERIMENTS = {
    "smoke": Scale(
        summary="a million parameters on drawn images: minutes on a CPU; shows that it works, not what is best",
        data="synthetic",
        model="uvit-tiny",
        overrides=QUICKSTART["synthetic"].overrides,
        conditional=True,
        base_steps=600,
        steps=120,
        ladder=("3:4",),
        samples=256,
        sampling_steps=15,
        options=QUICKSTART["synthetic"].options,
        validation=256,
        threads=1,
    ),
    # By measurement (pilot of 28 Nov 2026, two Zen 5 cores, one thread per process): patch 2 learns more per image than
    # patch 4 and its samples show pruning; bf16; 2M images until doubling them gains less than 2% of the loss; arms of
    # 12% of that. A Xeon with AMX trained 0.7 times as fast.
    "cpu": Scale(
        summary="a million parameters on CIFAR-10 at 16x16, 2,000,000 images for the dense network and 240,000 for "
        "each run: 4.6 hours for a seed of `claims` on a core of a Zen 5 (by a pilot, not run; a Xeon takes longer); "
        "give each seed a process and a folder of its own, and join them with --merge",
        data="cifar10",
        native=32,
        model="uvit-tiny",
        overrides={"image_size": 16, "patch_size": 2, "velocity": True},
        conditional=True,
        base_steps=31_250,
        steps=3750,
        lr=1e-3,
        ladder=("3:4",),
        densities=("2:4", "1:4", "1:8", "3:4", "1:16"),
        samples=5000,
        sampling_steps=20,
        validation=10_000,
        options=replace(_TINY, batch_size=64, ema=0.999, amp="bf16"),
        threads=1,
    ),
    "lite": Scale(
        summary="U-ViT S/2 on CIFAR-10 for half an hour of one large GPU, in three parts of ten minutes (not timed "
        "yet): 3,000 dense steps, then 900 for each run, on a ladder of three, so that each student has 300; the "
        "network computes the velocity, because one that computes the noise shows nothing after so few steps",
        data="cifar10",
        model="uvit-cifar10-small",
        overrides={"velocity": True},
        base_steps=3000,
        steps=900,
        ladder=("7:8", "3:4"),
        samples=5000,
        sampling_steps=25,
        # twice the published lr: with a network that has learnt too little, the distance does not show pruning
        options=TrainOptions(lr=4e-4, ema=0.999, cosine=True, weighting="velocity", save_every=2000),
    ),
    "full": Scale(
        summary="the paper's settings: U-ViT S/2 on CIFAR-10, 500,000 dense steps; days on a GPU",
        data="cifar10",
        model="uvit-cifar10-small",
        base_steps=500_000,
        steps=100_000,
        samples=50_000,
        sampling_steps=50,
        options=replace(_PUBLISHED, save_every=10_000, validate_every=5000),
        features="inception",
    ),
}
# A tenth of `cpu`'s images for the dense network, as the pilot's patch 2 had, and a sixth for each run.
EXPERIMENTS["cpu-short"] = replace(
    EXPERIMENTS["cpu"],
    summary="like cpu, but in fp32, with 200,000 images for the dense network and 39,936 for each run, and 2,000 "
    "samples: for a CPU that has no bf16 instructions",
    base_steps=3125,
    steps=624,
    samples=2000,
    validation=4096,
    options=replace(EXPERIMENTS["cpu"].options, amp=None),
)
