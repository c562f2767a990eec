"""Networks that are told texts, and networks of latents, from the command line."""

import argparse
import copy
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsedm import diffusion, samplers
from sparsedm.cli import main
from sparsedm.commands import drawing
from sparsedm.errors import InputError
from sparsedm.model_files import load_model
from sparsedm.models import MODELS, build_model
from sparsedm.models.autoencoder import WEIGHTS, Autoencoder, load_autoencoder
from sparsedm.train.data import batch, load

SMALL = ("image_size=8", "dim=32", "depth=2", "heads=2")
TEXT = (*SMALL, "context_tokens=3", "context_dim=5")


def run(*arguments):
    return main([str(a) for a in arguments])


def settings(*values):
    return [part for value in values for part in ("--set", value)]


def write_texts(path, **changed):
    """40 latents, each with a context that says how bright it is."""
    generator = np.random.default_rng(0)
    brightness = generator.random((40, 1, 1)).astype(np.float32)
    arrays = {
        "images": generator.standard_normal((40, 4, 8, 8)).astype(np.float32) * 0.1 + brightness[..., None],
        "context": np.tile(brightness, (1, 3, 5)).astype(np.float16),
        "null_context": np.full((3, 5), -1, np.float16),
    } | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.npz")


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "text"
    assert (
        run(
            *("train", "--model", "uvit-coco-small", *settings(*TEXT), "--data", texts, "--chain", "dense,2:4"),
            *("--steps", 4, "--batch-size", 8, "--label-dropout", 0.5, "--run", folder),
        )
        == 0
    )
    return folder


def test_a_batch_of_texts_is_that_of_its_images(texts):
    images = load(texts, "train")
    x, y = batch(images, torch.tensor([5, 0]), text=True)
    assert (images.shape, x.shape, y.shape, y.dtype) == ((4, 8, 8), (2, 4, 8, 8), (2, 3, 5), torch.float32)
    assert (x.mean((1, 2, 3)) - y.mean((1, 2))).abs().max() < 0.1
    assert batch(images, torch.tensor([0]))[1] is None, "no labels"
    assert torch.equal(images.to("cpu").context, images.context)


def test_the_network_is_told_the_text(trained):
    """And its samples are those of a network called by hand; guidance goes away from the empty text."""
    model = load_model(trained, build_model).model
    context, null = torch.randn(2, 3, 5), torch.zeros(3, 5)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        by_name = model(x, t, context=context)
        assert torch.equal(model(x, t, context), by_name)
        assert not torch.equal(model(x, t, null.expand(2, -1, -1)), by_name)
        extrapolated = 3 * by_name - 2 * model(x, t, context=null.expand(2, -1, -1))
    schedule = diffusion.schedule_of(model)
    options = {"sampler": "ddim", "steps": 1, "y": context}
    plain, guided = (
        samplers.sample(model, schedule, 2, (4, 8, 8), **options, guidance=w, null_label=null) for w in (None, 2.0)
    )
    assert not torch.equal(plain, guided)
    with torch.no_grad():
        ours = samplers.guided(model, context, 2.0, null)(x, t)
    torch.testing.assert_close(ours, extrapolated)


def test_texts_are_dropped_for_the_empty_one(trained, texts, monkeypatch):
    seen = []
    monkeypatch.setattr(diffusion, "loss", lambda *a, y, **k: seen.append(y) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(
            "train",
            "--model",
            "uvit-coco-small",
            *settings(*TEXT),
            "--data",
            texts,
            "--run",
            trained.parent / "b",
            "--batch-size",
            64,
            "--label-dropout",
            0.5,
            "--steps",
            4,
        )
    dropped = (seen[0] == -1).all((1, 2))
    assert 16 <= dropped.sum() <= 48
    assert (seen[0][~dropped] >= 0).all()


def test_sampling_takes_texts_from_a_file(trained, texts, tmp_path, capsys):
    for name, more in (("a", ()), ("b", ("--guidance", 1))):
        out = tmp_path / f"{name}.npz"
        command = ("sample", trained, "--count", 3, "--sampling-steps", 2, "--out", out)
        assert run(*command, "--context", texts, *more) == 0
        assert ("guidance 1, schedule scaled-linear" in capsys.readouterr().out) == bool(more)
    drawn = [np.load(tmp_path / f"{name}.npz")["images"] for name in "ab"]
    assert drawn[0].shape == (3, 4, 8, 8)
    assert not np.array_equal(*drawn)
    assert run(*command) == 2
    assert "give --context FILE.npz with an array `context` (N, 3, 5)" in capsys.readouterr().err
    lone = write_texts(tmp_path / "lone.npz", images=None, null_context=None)
    assert run(*command, "--context", lone) == 0
    assert run(*command, "--context", lone, "--guidance", 1) == 2
    assert "--guidance needs the context of the empty text" in capsys.readouterr().err
    assert run(*command, "--context", texts, "--label", 1) == 2


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"context": None, "null_context": None}, r"holds no context: an .npz file with an array `context` (N, 3, 5)"),
        ({"context": np.zeros((40, 3, 6)), "null_context": None}, "holds a context of shape (40, 3, 6): "),
    ],
)
@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_training_without_its_texts_is_refused_before_anything_is_written(changed, rule, more, tmp_path, capsys):
    data = write_texts(tmp_path / "texts.npz", **changed)
    command = ("train", "--model", "uvit-coco-small", *settings(*TEXT), "--run", tmp_path / "run", *more)
    for source in (data, "synthetic") if "context" in rule and changed["context"] is None else (data,):
        assert run(*command, "--data", source) == 2
        assert rule in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"context": np.zeros((39, 3, 5))}, "context must be one for each of the 40 images, not 39"),
        ({"context": np.zeros((40, 3, 5), int)}, "context must be floating point"),
        ({"context": np.full((40, 3, 5), np.inf)}, "context holds NaN or infinity"),
        ({"null_context": np.zeros((3, 4))}, "must have the shape of one context"),
        ({"images": None, "moments": np.full((40, 4, 8, 8), 1e30)}, "logarithms of variances, at most 60, not 1e\\+30"),
        ({"images": None, "moments": np.zeros((40, 3, 8, 8))}, "moments must be floating point with an even number"),
        ({"extra": np.zeros(3)}, "one of images, x, arr_0, moments is needed"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, rule, tmp_path):
    with pytest.raises(InputError, match=rule):
        load(write_texts(tmp_path / "texts.npz", **changed))


# ---- latents of a diffusers autoencoder


KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(folder of a tiny AutoencoderKL, the network): twice as many pixels per side as latents."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network, folder = diffusers.AutoencoderKL(**KL).eval(), tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder, network


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """.npz of 80 images of 16 x 16 pixels, of which 64 are held out."""
    generator, file = np.random.default_rng(0), tmp_path_factory.mktemp("pictures") / "pictures.npz"
    images, labels = generator.integers(256, size=(80, 16, 16, 3), dtype=np.uint8), generator.integers(3, size=80)
    context, null_context = np.tile(labels[:, None, None], (1, 3, 5)).astype(np.float32), np.ones((3, 5), np.float32)
    np.savez(file, images=images, labels=labels, context=context, null_context=null_context)
    return file


@pytest.fixture(scope="module")
def latents(vae, pictures, tmp_path_factory):
    file = tmp_path_factory.mktemp("latents") / "latents.npz"
    command = ("encode", "--data", pictures, "--size", 16, "--vae", vae[0], "--split", "test")
    assert run(*command, "--mirror", "--out", file) == 0
    return file


@pytest.mark.interop
@torch.no_grad()
def test_moments_are_those_of_the_autoencoder_and_a_batch_draws_from_them(vae, pictures, latents):
    held_out = load(pictures, "test")
    both = torch.cat((held_out.images, held_out.images.flip(-1)))
    posterior = vae[1].encode(both.float() / 127.5 - 1).latent_dist
    arrays = np.load(latents)
    mean, log_variance = torch.from_numpy(arrays["moments"]).chunk(2, dim=1)
    torch.testing.assert_close(mean, 0.18215 * posterior.mean)
    torch.testing.assert_close((log_variance / 2).exp(), 0.18215 * posterior.std)
    assert arrays["labels"].tolist() == 2 * held_out.labels.tolist()
    assert arrays["context"][:, 2, 4].tolist() == 2 * held_out.labels.tolist()
    assert arrays["null_context"].all()
    images = load(latents)
    assert images.shape == (4, 8, 8)
    rows = torch.arange(len(images))
    mean, log_variance = images.images.chunk(2, dim=1)
    draws = [batch(images, rows, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    z = torch.stack([(d - mean) / (log_variance / 2).exp() for d in draws[::2]])
    assert abs(z.mean()) < 0.05
    assert abs(z.std() - 1) < 0.05
    assert (z[0] != z[1]).all()
    assert torch.equal(batch(images, rows)[0], mean), "a validation loss sees the means"


@pytest.mark.interop
def test_a_network_of_latents_is_trained_drawn_and_measured(vae, pictures, latents, tmp_path, capsys):
    folder = tmp_path / "run"
    model = ("--model", "uvit-tiny", *settings(*SMALL, "channels=4", "patch_size=2"))
    steps = ("--steps", 2, "--batch-size", 8, "--chain", "dense")
    assert run("train", *model, "--data", latents, *steps, "--run", folder) == 0
    some = (folder, "--count", 4, "--sampling-steps", 2, "--vae", vae[0])
    assert run("sample", *some, "--out", tmp_path / "a.png") == 0
    assert run("sample", *some, "--out", tmp_path / "a.npz") == 0
    assert run("sample", *some[:-2], "--out", tmp_path / "latents.npz") == 0
    z, images = (np.load(tmp_path / name)["images"] for name in ("latents.npz", "a.npz"))
    with torch.no_grad():
        decoded = vae[1].decode(torch.from_numpy(z) / 0.18215).sample
    assert (images.dtype, images.shape) == (np.uint8, (4, 3, 16, 16))
    assert np.abs(images - ((decoded + 1) * 127.5).clamp(0, 255).numpy()).max() <= 1
    assert run("evaluate", *some, "--data", pictures, "--out", tmp_path / "e.json") == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert (report["count"], report["guidance"]) == (4, 0)
    assert run("sample", *some[:-2], "--out", tmp_path / "b.png") == 2
    assert "decode them with --vae DIR" in capsys.readouterr().err


@pytest.mark.interop
def test_one_draw_of_each_latent_can_be_stored(vae, pictures, tmp_path):
    out = tmp_path / "z.npz"
    command = ("encode", "--data", pictures, "--size", 16, "--vae", vae[0], "--limit", 4, "--out", out)
    assert run(*command, "--store", "latents") == 0
    assert np.load(out)["images"].shape == (4, 4, 8, 8)
    assert run(*command) == 2, "the file is there"
    out.unlink()
    scaled = tmp_path / "scaled.npz"
    assert run(*command[:-1], scaled, "--latent-scale", 0.2301) == 0
    mean = torch.from_numpy(np.load(scaled)["moments"]).chunk(2, dim=1)[0]
    with torch.no_grad():
        x = load(pictures, limit=4).images.float() / 127.5 - 1
        torch.testing.assert_close(mean, 0.2301 * vae[1].encode(x).latent_dist.mean)
        x = load_autoencoder(vae[0], scale=0.2301).decode(mean)
        torch.testing.assert_close(x, vae[1].decode(mean / 0.2301).sample)


def test_latents_of_a_published_network_have_its_scale(monkeypatch):
    """U-ViT's configuration for COCO: autoencoder.scale_factor = 0.23010."""
    given = []
    monkeypatch.setattr(drawing, "load_autoencoder", lambda *arguments: given.append(arguments) or 1 / 0)
    for name, more in (("uvit-coco-small", ()), ("uvit-imagenet256-large", ()), ("uvit-coco-small", (2.0,))):
        options = argparse.Namespace(vae="folder", device="cpu", latent_scale=next(iter(more), None))
        with pytest.raises(ZeroDivisionError):
            drawing.autoencoder_of(MODELS[name], options)
    assert [scale for _, _, scale in given] == [0.2301, None, 2.0]


@pytest.mark.interop
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or unreadable"),
        (lambda folder: edit(folder, _class_name="VQModel"), "holds a VQModel: an AutoencoderKL is needed"),
        (lambda folder: edit(folder, layers_per_block=2), "does not fit its config.json: missing keys"),
        (lambda folder: edit(folder, block_out_channels=[8, 24]), "is no readable AutoencoderKL"),
        (lambda folder: edit(folder, down_block_types=[0, 0]), "is no readable AutoencoderKL"),
        (lambda folder: edit(folder, block_out_channels=[]), r"block_out_channels \[\]: must be 1 to 10 whole numbers"),
        (
            lambda folder: edit(folder, layers_per_block=10**9),
            "layers_per_block 1000000000: must be a whole",
        ),
        (lambda folder: edit(folder, norm_num_groups=0), "norm_num_groups 0: must be a whole number"),
        (lambda folder: edit(folder, scaling_factor="x"), "scaling_factor x: must be a number above 0"),
        (lambda folder: edit(folder, latents_std=[0.0] * 4), "latents_std .* must be null, or a number for each"),
        (lambda folder: edit(folder, latents_mean=[1.0]), "latents_mean .* must be null, or a number for each"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "weights.bin"), "weights.bin is a pickle"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing or unreadable"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no weights"), "is no readable AutoencoderKL"),
    ],
)
def test_a_folder_without_a_whole_autoencoder_is_refused(change, said, vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae[0], folder)
    change(folder)
    with pytest.raises(InputError, match=said):
        load_autoencoder(folder)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.interop
def test_a_pipelines_folder_will_do_and_images_must_fit(vae, tmp_path):
    shutil.copytree(vae[0], tmp_path / "pipe" / "vae")
    encoder = load_autoencoder(tmp_path / "pipe")
    assert (encoder.channels, encoder.factor) == (4, 2)
    with pytest.raises(InputError, match=r"3 channels and sides that are multiples of 2, not \(3, 9, 8\)"):
        encoder.moments(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))


@pytest.mark.interop
@pytest.mark.parametrize("stored", [{"variant": "fp16"}, {"max_shard_size": "20KB"}])
def test_variants_and_shards_are_read_in_fp32(stored, vae, tmp_path):
    half = copy.deepcopy(vae[1]).half()
    half.save_pretrained(tmp_path, **stored)
    read = load_autoencoder(tmp_path).network
    assert not (tmp_path / WEIGHTS).exists()
    assert {weight.dtype for weight in read.parameters()} == {torch.float32}
    assert all(torch.equal(weight.float(), read.state_dict()[name]) for name, weight in half.state_dict().items())


def test_without_diffusers_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / WEIGHTS).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"latents need diffusers: pip install 'sparsedm\[interop\]'"):
        load_autoencoder(tmp_path)


def test_mean_and_deviation_of_a_folder_shift_the_latents_and_shift_them_back():
    config = SimpleNamespace(latent_channels=2, block_out_channels=(8,), in_channels=3, scaling_factor=0.5)
    config.latents_mean, config.latents_std, config.shift_factor = [1.0, -2.0], [2.0, 4.0], None
    z = torch.arange(8.0).view(1, 2, 2, 2)
    network = SimpleNamespace(config=config, device="cpu", decode=lambda z: SimpleNamespace(sample=z))
    network.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=z, logvar=torch.zeros_like(z)))
    images, vae = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), Autoencoder(network, "vae")
    mean, logvar = vae.moments(images).chunk(2, 1)
    std = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(mean, (z - torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)) * 0.5 / std)
    torch.testing.assert_close((logvar / 2).exp(), (0.5 / std).expand_as(z))
    torch.testing.assert_close(vae.decode(mean), z)
    config.latents_mean = config.latents_std = None
    config.shift_factor = 3.0
    torch.testing.assert_close(Autoencoder(network, "vae").moments(images)[:, :2], (z - 3) * 0.5)
