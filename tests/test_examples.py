"""The example scripts, as a user without a network connection runs them."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.train.data import load

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {  # script and options: size of the picture it leaves
    ("ddpm_pipeline.py", "--tuning-steps", "2"): (64, 32),
    ("dit_guidance.py", "--tuning-steps", "2"): (64, 32),
    ("stable_diffusion.py",): (64, 64),
    ("stable_diffusion.py", "--version", "3"): (64, 64),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {script for script, *_ in SCRIPTS} | {
        "resnet20_features.py"
    }


@pytest.mark.interop
@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_an_example_leaves_its_picture(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    picture = tmp_path / "picture.png"
    script, *options = command
    monkeypatch.setattr(sys, "argv", [script, *options, "--out", str(picture)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")  # in this process, which has the libraries by now
    said = capsys.readouterr().out
    assert f"2:4 compressed below: {picture}" in said
    difference = re.search(r"compressed network from the masked one: (\S+)", said)
    assert difference is None if script == "stable_diffusion.py" else float(difference[1]) < 1e-4
    with Image.open(picture) as image:
        width, height = SCRIPTS[command]
        assert image.size == (width, height)


@pytest.mark.interop
@pytest.mark.parametrize("script", ["ddpm_pipeline.py", "dit_guidance.py"])
def test_an_example_says_what_it_needs(script, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    for unwritable in ("no/where.png", "picture.what"):
        monkeypatch.setattr(sys, "argv", [script, "--out", unwritable])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        assert f"--out {unwritable}: must be a .png, .jpg or .webp in a fol" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [script, "--tuning-steps", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / script))
    assert "--tuning-steps 0: at least 1 is needed" in capsys.readouterr().err


# ---- resnet20_features.py --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet20():
    return runpy.run_path(str(EXAMPLES / "resnet20_features.py"))


@pytest.fixture
def weights(resnet20):
    """Random ones under the names of the public file, which has no counters of batches."""
    torch.manual_seed(0)
    state = resnet20["ResNet20"]().state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for name, value in state.items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(std=0.1)
    return {"state_dict": {f"module.{name}": value for name, value in state.items()}, "best_prec1": 91.8}


def paper_resnet20(state, images):
    """(features, logits): section 4.2 of arXiv 1512.03385 written out, with the images scaled as in its public code."""

    def conv(name, x, stride=1):
        return F.conv2d(x, state[f"module.{name}.weight"], stride=stride, padding=1)

    def norm(name, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"module.{name}.{part}"] for part in names))

    mean, deviation = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = F.relu(norm("bn1", conv("conv1", (images.float() - mean) / deviation)))
    for block in (f"layer{layer}.{number}" for layer in (1, 2, 3) for number in range(3)):
        shortcut, stride = x, 1
        if block in ("layer2.0", "layer3.0"):  # half the places, and zeros as new channels on both sides
            stride, zeros = 2, torch.zeros(len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2)
            shortcut = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
        x = F.relu(norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)))
        x = F.relu(norm(f"{block}.bn2", conv(f"{block}.conv2", x)) + shortcut)
    features = x.mean((2, 3))
    return features, F.linear(features, state["module.linear.weight"], state["module.linear.bias"])


def test_resnet20_features_are_those_of_the_paper(resnet20, weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "w.th")
    data, out = str(tmp_path / "set.npz"), str(tmp_path / "net.pt2")
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    classes = paper_resnet20(weights["state_dict"], images)[1].argmax(1)
    labels = (classes + (torch.arange(40) % 3 == 0)) % 10  # every third is one that the network does not say
    np.savez(data, images=images.numpy(), labels=labels.numpy())
    held_out = load(data, "test")
    expected, logits = paper_resnet20(weights["state_dict"], held_out.images)
    right = (logits.argmax(1) == held_out.labels).double().mean()
    assert 0 < right < 1
    assert expected.std(0).median() > 0

    resnet20["main"]([str(tmp_path / "w.th"), "--data", data, "--out", out])
    assert f"accuracy on 20 images ({data}, test): {right:.2%}" in capsys.readouterr().out
    features = load_features(out)
    assert torch.equal(features(held_out.images), expected.double())
    assert features(held_out.images[:1, :, :24, :24]).shape == (1, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "w.th"], "--out w.th: must end in .pt2"),
        (["--out", "net.pt2", "--data", "flat"], "data flat holds no labels"),
        (["--out", "flat/net.pt2", "--data", "flat"], "flat/net.pt2 lies in data .*, and would be read as an image"),
        (["--out", "net.pt2", "--data", "none"], "data 'none': no such file or folder"),
    ],
)
def test_resnet20_refuses_before_it_writes(arguments, message, resnet20, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    torch.save(weights, "w.th")
    before = (tmp_path / "w.th").read_bytes()
    with pytest.raises(InputError, match=message):
        resnet20["main"](["w.th", *arguments])
    assert (tmp_path / "w.th").read_bytes() == before
    assert not (tmp_path / "net.pt2").exists()


def test_resnet20_refuses_other_weights(resnet20, weights, tmp_path):
    del weights["state_dict"]["module.layer3.2.conv2.weight"]
    torch.save(weights, tmp_path / "w.th")
    with pytest.raises(InputError, match=r"w.th does not fit the model: 1 missing \(layer3.2.conv2.weight\)"):
        resnet20["main"]([str(tmp_path / "w.th"), "--out", str(tmp_path / "net.pt2")])
    assert not (tmp_path / "net.pt2").exists()
