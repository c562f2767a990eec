"""Whatever torch's default device is ("cuda" for a user, "meta" here), models on the CPU do what they always do."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsedm import diffusion, evaluate, samplers
from sparsedm.compression import bake, compress, decompress
from sparsedm.diffusion import VPSDE
from sparsedm.kernels import masked_adamw
from sparsedm.kernels.mask import _nan_flag
from sparsedm.kernels.pattern import Pattern
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model
from sparsedm.models.diffusers import from_diffusers, to_diffusers
from sparsedm.models.slimmable import SlimmableConfig, SlimmableDDPM
from sparsedm.optim import MaskedAdamW
from sparsedm.permutation import permute_channels
from sparsedm.sparsity import hold_masks, masks, set_masking, sparsify
from sparsedm.train.data import batch, load
from sparsedm.train.loop import train
from sparsedm.train.step import Loss, Student
from tests.tiny import OPTIONS, tiny, tiny_images
from tests.train.test_image_files import picture

UVIT = {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2}
SHAPE = (3, 8, 8)


def flat(tensors):
    return torch.cat([t.detach().flatten().float() for t in tensors])


def a_step_of_the_optimizer(model, x, t, folder):
    optimizer = MaskedAdamW(model.parameters(), model=sparsify(model, "2:4"))
    set_masking(model, decay=0.1)
    with hold_masks(model, optimizer=optimizer):
        model(x, t).square().sum().backward()
    optimizer.step()
    return flat(model.parameters())


def every_form(model, x, t, folder):
    outputs = []
    for pattern in ("2:4", "3:4", "1:16"):
        masked = sparsify(model, pattern).eval()
        small = compress(masked)
        file = save_model(folder / f"{len(list(folder.iterdir()))}.safetensors", small)
        forms = small, decompress(small), bake(masked), load_model(file, build_model).model
        outputs += [form(x, t) for form in forms]
    return flat(outputs)


def calibrated_masks(model, x, t, folder):
    permute_channels(model)
    return flat(masks(sparsify(model, "2:4", calibrate=[(x, t)])).values())


def losses(model, x, t, folder):
    drawn = diffusion.loss(model, x, VPSDE(), generator=torch.Generator().manual_seed(0)).total
    validation = [diffusion.validation_loss(model, x, VPSDE(), **how) for how in ({}, {"times": [0.5]})]
    return flat([drawn, *validation])


def samples(model, x, t, folder):
    return flat(samplers.sample(model, VPSDE(), 2, SHAPE, steps=3, spacing=way) for way in samplers.SPACINGS)


def distances(model, x, t, folder):
    a, b = x.flatten(1).double(), (t[:, None, None, None] * x).flatten(1).double()
    gaussians = (part for rows in (a, b) for part in (rows.mean(0), rows.T.cov()))
    found = evaluate.frechet_distance(*gaussians), *evaluate.kernel_distance(a, b, subsets=2)
    return torch.tensor(found, device="cpu")


def from_diffusers_and_back(model, x, t, folder):
    dit = build_model({"kind": "dit", "image_size": 8, "dim": 32, "depth": 1, "heads": 2}, device="cpu")
    state = dit.state_dict()
    return flat(from_diffusers(to_diffusers(state, dit.config), dit.config).values())


def drawn_widths(model, x, t, folder):
    return torch.tensor(SlimmableDDPM._sandwich(SimpleNamespace(config=SlimmableConfig(passes=8))), device="cpu")


def a_folder_of_images(model, x, t, folder):
    made = folder / f"images{len(list(folder.iterdir()))}"
    for number, name in enumerate(("a/0.png", "a/1.png", "b/2.png")):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(picture(number, (6, 6)))
    return flat([*batch(load(made, size=4), torch.arange(2, device="cpu"))])


WORK = [
    *(a_step_of_the_optimizer, every_form, calibrated_masks, losses, samples, distances),
    *(from_diffusers_and_back, drawn_widths, a_folder_of_images),
]


@pytest.mark.parametrize("work", WORK)
def test_nothing_changes(work, tmp_path):
    results = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        model, x, t = build_model(UVIT), torch.randn(4, *SHAPE), torch.linspace(0, 999, 4)
        with torch.device(default):
            results.append(work(model, x, t, tmp_path))
    assert torch.equal(*results)


def test_training_and_its_data(tmp_path):
    results = []
    for default in ("cpu", "meta"):
        student, loss = Student(sparsify(tiny(), "2:4"), None), Loss(VPSDE(), tiny(5), 0.1, 1.0)
        images, held_out, chosen = tiny_images(), tiny_images(16, seed=1), torch.arange(4)
        with torch.device(default):
            train(student, images, loss, OPTIONS, tmp_path / default, validation=held_out, progress=False)
            loaded = load("synthetic:64", split="train", limit=20)
            results.append(flat([*student.model.parameters(), batch(loaded, chosen)[0]]))
    assert torch.equal(*results)


def test_what_is_pinned_for_a_gpu_is_made_on_the_cpu():
    weight = torch.ones(8, 32)
    with torch.device("meta"):
        assert _nan_flag(weight, "fc").is_cpu
        work = masked_adamw.Work(weight, Pattern(2, 4))
        (kind,) = masked_adamw.kinds([work])
        tables = masked_adamw.plan(kind, [work]).arguments
        assert tables["sizes_ptr"].is_cpu
        assert tables["rates_ptr"].is_cpu


def test_the_package_may_be_imported_under_it():
    code = """
import torch
torch.set_default_device("meta")
from sparsedm.kernels.sparse24.format import pack, unpack
torch.set_default_device(None)
weight = torch.randn(16, 64).view(16, -1, 4).mul(torch.tensor([1, 0, 0, 1])).view(16, 64)
assert torch.equal(unpack(*pack(weight), 64), weight)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
