import pytest

from sparsedm import samplers
from sparsedm.models import MODELS, build_model, model_config
from sparsedm.recipes import EXPERIMENTS, SEARCHES
from sparsedm.train.image_files import CROPS
from sparsedm.train.loop import TrainOptions
from sparsedm.train.published import PUBLISHED, original_crop, published, trained_crop, unrecorded_crop


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_is_one(name):
    row = PUBLISHED[name]
    options = TrainOptions(steps=row.steps_trained, **row.training)
    assert published(MODELS[name]) is row
    assert row.sampler in samplers.SAMPLERS
    assert row.clip in samplers.CLIPS
    assert row.crop in CROPS
    assert sum(samplers.evaluations(row.sampler, row.steps)) == row.steps
    assert options.lr_at(100_000, 100_000) == options.lr
    if row.sampler == "ddpm-learned":
        assert build_model(name, device="meta").config.learn_sigma


def test_imported_networks_are_known_as_published():
    """A diffusers folder does not tell the dropout; DDSM's file is computed as by its code."""
    other = model_config("ddpm-cifar10", dropout=0.0)
    assert published(other, any_dropout=True) is PUBLISHED["ddpm-cifar10"]
    assert published(other) is None, "its training is its own, and older runs go on with the options they began with"
    assert published(model_config("ddpm-cifar10", width=64), any_dropout=True) is None
    for shape in ({}, {"groups": 32, "ddsm": 128}):
        released = model_config("slimmable-cifar10", passes=3, same_images=True, **shape)
        assert published(released) is PUBLISHED["slimmable-cifar10"]
    assert published(model_config("slimmable-cifar10", ddsm=128)) is None


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("uvit")])
def test_sparsedms_networks_are_trained_and_sampled_as_the_published_ones(name):
    """They have biases in qkv. Their configurations have the recipe, crop and scale of U-ViT's."""
    assert published(model_config(name, qkv_bias=True)) is PUBLISHED[name]


@pytest.mark.parametrize("scale", [EXPERIMENTS["full"], SEARCHES["full"]["chain"]], ids=["experiments", "chain"])
def test_a_full_scale_trains_as_its_network_was_published(scale):
    assert PUBLISHED[scale.model].training.items() <= vars(scale.options).items()


def test_images_are_cropped_as_for_the_training(tmp_path):
    """As the run folder says, also for one of its stages; else as in the original."""
    tiny, celeba = MODELS["uvit-tiny"], MODELS["uvit-celeba64-small"]
    (tmp_path / "run" / "00-dense").mkdir(parents=True)
    (tmp_path / "run" / "00-dense" / "options.json").write_text('{"stage": {}}')
    (tmp_path / "options.json").write_text("[]")  # somebody else's
    places = [tmp_path / "run", tmp_path / "run" / "00-dense", tmp_path / "model.safetensors"]
    assert [trained_crop(place, config) for place in places for config in (tiny, celeba)] == ["square", "celeba"] * 3
    for crop, config in (("celeba", tiny), ("square", celeba)):
        (tmp_path / "run" / "options.json").write_text(f'{{"crop": "{crop}"}}')
        assert [trained_crop(place, config) for place in places] == [crop, crop, original_crop(config)]


def test_run_folders_of_sparsedms_networks_that_record_no_crop_are_of_squares(tmp_path):
    """Version 0.1.0 knew no recipe for them, so it trained them on squares; a file is of the authors' training."""
    (tmp_path / "run" / "00-dense").mkdir(parents=True)
    for folder in ("run", "run/00-dense"):
        (tmp_path / folder / "options.json").write_text('{"data": "celeba"}')
    places = [tmp_path, tmp_path / "run", tmp_path / "run" / "00-dense", tmp_path / "model.safetensors"]
    config = model_config("uvit-celeba64-small", qkv_bias=True)
    assert [trained_crop(place, config) for place in places] == ["square"] * 3 + ["celeba"]
    assert (unrecorded_crop(config), unrecorded_crop(MODELS["uvit-celeba64-small"])) == ("square", "celeba")


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("tiny")])
def test_every_published_network_has_a_recipe(name):
    assert name in PUBLISHED
    assert published(build_model("uvit-tiny", device="meta").config) is None


# optimizer, lr, betas, weight decay, warm-up, batch, p_uncond, clip: the originals' configuration files
EXPECTED = {
    "uvit-cifar10-small": ("adamw", 2e-4, (0.99, 0.999), 0.03, 2500, 128, 0.1, 0),
    "uvit-celeba64-small": ("adamw", 2e-4, (0.99, 0.99), 0.03, 5000, 128, 0.1, 0),
    "uvit-imagenet64-mid": ("adamw", 3e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.1, 0),
    "uvit-imagenet256-large": ("adamw", 2e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.15, 0),
    "uvit-imagenet256-huge": ("adamw", 2e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.1, 0),
    "uvit-coco-small": ("adamw", 2e-4, (0.9, 0.9), 0.03, 5000, 256, 0.1, 0),
    "ddpm-cifar10": ("adam", 2e-4, (0.9, 0.999), 0.0, 5000, 128, 0.1, 1),
    "slimmable-cifar10": ("adam", 4e-4, (0.9, 0.999), 0.0, 5000, 256, 0.1, 1),
    "dit-imagenet256-xlarge": ("adamw", 1e-4, (0.9, 0.999), 0.0, 0, 256, 0.1, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_recipes_are_the_published_ones(name):
    o = TrainOptions(**PUBLISHED[name].training)
    warmup = next(u for u in range(10_000) if o.lr_at(u, u) == o.lr)
    warmup += 1 if warmup else 0  # the last of its steps has the full rate already
    found = (o.optimizer, o.lr, o.betas, o.weight_decay, warmup, o.batch_size, o.label_dropout, o.clip)
    assert found == EXPECTED[name]


def test_guidance_and_scale_of_latents_are_the_published_ones():
    """config.sample.scale and config.autoencoder.scale_factor of U-ViT; --cfg-scale of DiT's sample_ddp.py, minus 1."""
    found = {name: (row.guidance, row.latent_scale) for name, row in PUBLISHED.items()}
    found = {name: values for name, values in found.items() if any(values)}
    assert found == {
        "uvit-imagenet256-large": (0.4, None),
        "uvit-imagenet256-huge": (0.4, None),
        "uvit-imagenet512-large": (0.7, None),
        "uvit-imagenet512-huge": (0.7, None),
        "uvit-coco-small": (1.0, 0.2301),
        "uvit-coco-small-deep": (1.0, 0.2301),
        "dit-imagenet256-xlarge": (0.5, None),
        "dit-imagenet512-xlarge": (0.5, None),
    }


SAMPLING = {  # of the originals' configuration files: sampler, steps, clip, crop
    "uvit-cifar10-small": ("euler-maruyama-uvit", 1000, "never", "square"),
    "uvit-celeba64-small": ("euler-maruyama-uvit", 1000, "never", "celeba"),
    "uvit-imagenet64-mid": ("dpm++2m", 50, "never", "square"),
    "uvit-imagenet512-large": ("dpm++2m", 50, "never", "square"),
    "ddpm-cifar10": ("ddpm-large", 1000, "every", "square"),
    "ddpm-celeba64": ("ddpm-large", 1000, "every", "celeba"),
    "slimmable-cifar10": ("ddpm-large", 1000, "final", "square"),
    "dit-imagenet256-xlarge": ("ddpm-learned", 250, "never", "square"),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_networks_are_sampled_and_cropped_as_published(name):
    r = PUBLISHED[name]
    assert (r.sampler, r.steps, r.clip, r.crop) == SAMPLING[name]


def test_label_dropout_of_every_preset():
    rates = {name: TrainOptions(**row.training).label_dropout for name, row in PUBLISHED.items()}
    assert {name for name, rate in rates.items() if rate == 0.15} == {
        "uvit-imagenet256-large",
        "uvit-imagenet512-large",
    }
    assert {*rates.values()} == {0.1, 0.15}
