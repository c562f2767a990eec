"""DDSM's supernet: its file becomes our slimmable network, which computes at every width what its code does.

The code is written out here as functions of the file's own names: every layer reads as many first channels as it is
given and writes a share of its own, also behind the concatenation of x and skip; times are rows of a table.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparsedm.cli import main
from sparsedm.errors import InputError
from sparsedm.models import MODELS, build_model, convert, model_config
from sparsedm.models.convert import read_foreign
from sparsedm.stepaware.family import family_of, load_strategy

CH, LEVELS, BLOCKS, GROUPS = 32, (1, 2), 1, 4
ATTENTION = 1  # the level with attention


def share(channels, width):
    return max(8, int(channels * width + 4) // 8 * 8)


class Released:
    """The network of a state dict, at a width."""

    def __init__(self, state, width):
        self.state, self.width = state, width

    def layer(self, name, x, width=None, stride=1):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        out = share(len(weight), self.width if width is None else width)
        weight, bias = weight[:out, : x.shape[1]], bias[:out]
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def norm(self, name, x):
        c = x.shape[1]
        return F.group_norm(x, GROUPS, self.state[f"{name}.weight"][:c], self.state[f"{name}.bias"][:c], 1e-5)

    def block(self, name, x, temb):
        h = self.layer(f"{name}.block1.2", F.silu(self.norm(f"{name}.block1.0", x)))
        h = h + self.layer(f"{name}.temb_proj.1", F.silu(temb))[:, :, None, None]
        h = self.layer(f"{name}.block2.3", F.silu(self.norm(f"{name}.block2.0", h)))
        h = h + (self.layer(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.state else x)
        return self.attention(f"{name}.attn", h) if f"{name}.attn.proj.weight" in self.state else h

    def attention(self, name, x):
        h = self.norm(f"{name}.group_norm", x)
        q, k, v = (self.layer(f"{name}.proj_{kind}", h).flatten(2) for kind in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), -1)
        return x + self.layer(f"{name}.proj", (v @ weights.transpose(1, 2)).view_as(x))

    def __call__(self, x, t):
        temb = self.state["time_embedding.timembedding.0.weight"][t]
        temb = F.silu(self.layer("time_embedding.timembedding.1", temb))
        temb = self.layer("time_embedding.timembedding.3", temb)
        x = self.layer("head", x)
        skips, number = [x], 0
        for level in range(len(LEVELS)):
            for _ in range(BLOCKS):
                x = self.block(f"downblocks.{number}", x, temb)
                skips.append(x)
                number += 1
            if level < len(LEVELS) - 1:
                x = self.layer(f"downblocks.{number}.main", x, stride=2)
                skips.append(x)
                number += 1
        for number in range(2):
            x = self.block(f"middleblocks.{number}", x, temb)
        number = 0
        for level in reversed(range(len(LEVELS))):
            for _ in range(BLOCKS + 1):
                x = self.block(f"upblocks.{number}", torch.cat([x, skips.pop()], 1), temb)
                number += 1
            if level:
                x = self.layer(f"upblocks.{number}.main", F.interpolate(x, scale_factor=2))
                number += 1
        return self.layer("tail.2", F.silu(self.norm("tail.0", x)), width=1)


def drawn(generator):
    return lambda *shape: torch.randn(*shape, generator=generator)


def released_state(make, ch=CH, levels=LEVELS, blocks=BLOCKS):
    """A state dict with the names and shapes of the release. make(*shape): a tensor."""
    state = {}

    def layer(name, out, *shape):
        state[f"{name}.weight"] = make(out, *shape) / math.sqrt(math.prod(shape) or 1)
        state[f"{name}.bias"] = make(out) / 4

    def block(name, cin, cout, attend):
        layer(f"{name}.block1.0", cin)
        layer(f"{name}.block1.2", cout, cin, 3, 3)
        layer(f"{name}.temb_proj.1", cout, 4 * ch)
        layer(f"{name}.block2.0", cout)
        layer(f"{name}.block2.3", cout, cout, 3, 3)
        if cin != cout:
            layer(f"{name}.shortcut", cout, cin, 1, 1)
        if attend:
            layer(f"{name}.attn.group_norm", cout)
            for kind in ("proj_q", "proj_k", "proj_v", "proj"):
                layer(f"{name}.attn.{kind}", cout, cout, 1, 1)

    angles = torch.arange(1000.0)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, ch, 2) / ch)
    state["time_embedding.timembedding.0.weight"] = torch.stack([angles.sin(), angles.cos()], -1).view(1000, ch)
    layer("time_embedding.timembedding.1", 4 * ch, ch)
    layer("time_embedding.timembedding.3", 4 * ch, 4 * ch)
    layer("head", ch, 3, 3, 3)
    skips, now, number = [ch], ch, 0
    for level, multiplier in enumerate(levels):
        for _ in range(blocks):
            block(f"downblocks.{number}", now, ch * multiplier, level == ATTENTION)
            now, number = ch * multiplier, number + 1
            skips.append(now)
        if level < len(levels) - 1:
            layer(f"downblocks.{number}.main", now, now, 3, 3)
            number += 1
            skips.append(now)
    block("middleblocks.0", now, now, True)
    block("middleblocks.1", now, now, False)
    number = 0
    for level, multiplier in reversed(list(enumerate(levels))):
        for _ in range(blocks + 1):
            block(f"upblocks.{number}", skips.pop() + now, ch * multiplier, level == ATTENTION)
            now, number = ch * multiplier, number + 1
        if level:
            layer(f"upblocks.{number}.main", now, now, 3, 3)
            number += 1
    layer("tail.0", now)
    layer("tail.2", 3, now, 3, 3)
    return state


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    file = tmp_path_factory.mktemp("ddsm") / "ckpt_450000.pt"
    state = released_state(drawn(torch.Generator().manual_seed(0)))
    torch.save({"net_model": {n: v + 1 for n, v in state.items()}, "ema_model": state, "step": 450_000}, file)
    return file, state


def test_every_width_computes_what_the_release_does(supernet):
    file, state = supernet
    found = read_foreign(file, overrides={"image_size": 16, "groups": GROUPS})
    assert "of DDSM's code" in found.about
    assert not any("groups" in note for note in found.notes)
    assert any("ema_model" in note for note in found.notes)
    config = found.model.config
    assert (config.kind, config.width, config.multipliers, config.attention) == ("slimmable", CH, LEVELS, (8,))
    assert (config.passes, config.same_images, config.ddsm) == (3, True, CH)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 940])
    for k in config.eighths:
        expected = Released(state, k / 8)(x, t)
        with found.model.at_width(k):
            torch.testing.assert_close(found.model(x, t.float()), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.model.export(k).eval()(x, t.float()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["slimmable-tiny", "ddpm-tiny"])
def test_a_named_network_computes_as_ddsms_code_too(supernet, name):
    """With the name of a plain network, the file is of the baseline."""
    file, state = supernet
    found = read_foreign(file, name, {"image_size": 16, "multipliers": LEVELS, "groups": GROUPS})
    assert (found.model.config.kind, found.model.config.ddsm) == (MODELS[name].kind, CH)
    assert name in found.about
    assert any("narrow widths were trained" in note for note in found.notes) == (name == "slimmable-tiny")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([7, 940])
    torch.testing.assert_close(found.model(x, t.float()), Released(state, 1)(x, t), rtol=1e-4, atol=1e-4)


class Unbuilt(torch.nn.Module):
    """A network's configuration without its layers."""

    def __init__(self, model, device, **overrides):
        super().__init__()
        self.config = model_config(model, **overrides)


@pytest.fixture
def of_published_size(tmp_path, monkeypatch):
    """A file of the supernet's names and shapes at CIFAR-10, without values. No network is built from it."""
    monkeypatch.setattr(convert, "build_model", Unbuilt)
    monkeypatch.setattr(convert, "fill", lambda model, tensors, file: None)
    state = released_state(lambda *shape: torch.empty(shape, device="meta"), 128, (1, 2, 2, 2), 2)
    monkeypatch.setattr(convert, "read_tensors", lambda file, weights: (state, {}))
    (tmp_path / "ckpt.pt").touch()
    return tmp_path / "ckpt.pt"


def test_what_a_file_of_ddsm_does_not_show_is_said(of_published_size):
    """Names and shapes are the same of the supernet with 32 groups and with 16, and of the baseline, which has 16."""
    released = replace(MODELS["slimmable-cifar10"], groups=32, ddsm=128, passes=3, same_images=True)
    for name in (None, "slimmable-cifar10"):
        found = read_foreign(of_published_size, name)
        assert found.model.config == released
        assert "supernet" not in found.about
        said = " ".join(found.notes)
        assert "does not show groups=32" in said
        assert "supernet g16 needs --set groups=16" in said
        assert "plain network, which --model ddpm-cifar10 reads" in said
        assert "narrow widths were trained" in said
    corrected = read_foreign(of_published_size, overrides={"groups": 16})
    assert corrected.model.config == replace(released, groups=16)
    assert "groups" not in " ".join(corrected.notes)
    plain = read_foreign(of_published_size, "ddpm-cifar10")
    assert plain.model.config == replace(MODELS["ddpm-cifar10"], groups=16, ddsm=128)
    assert "groups" not in " ".join(plain.notes)
    once = read_foreign(of_published_size, overrides={"passes": 0})
    assert once.model.config == replace(released, passes=0, same_images=False)
    state = convert._from_ddsm(convert.read_tensors(of_published_size, "average")[0], of_published_size)
    expected = build_model(released, device="meta").state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in expected.items()}


def test_a_file_that_lacks_something_is_refused(supernet, tmp_path):
    _, state = supernet
    for name, message in (("middleblocks.0.attn.proj_k.weight", "lacks a projection of middleblocks.0"),
                          ("middleblocks.0.block1.2.weight", r"mid\.blocks\.0\.conv1\.weight")):  # fmt: skip
        torch.save({n: v for n, v in state.items() if n != name}, tmp_path / "less.pt")
        with pytest.raises(InputError, match=message):
            read_foreign(tmp_path / "less.pt", overrides={"image_size": 16, "groups": GROUPS})
    torch.save(state | {"middleblocks.0.other.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(InputError, match=r"which has no middleblocks\.0\.other\.weight"):
        read_foreign(tmp_path / "more.pt")


def test_supernet_and_strategy_draw_together(supernet, tmp_path, capsys):
    file, _ = supernet
    ours, drawn = str(tmp_path / "supernet.safetensors"), str(tmp_path / "drawn.png")
    assert main(["import", str(file), "--set", "image_size=16", "--set", f"groups={GROUPS}", "--out", ours]) == 0
    (tmp_path / "search.txt").write_text("[1.0, 0.75, 0.5]")
    assert family_of(ours).names == ("dense 8/8", "dense 6/8", "dense 4/8", "dense 2/8")
    assert len(load_strategy(tmp_path / "search.txt").models(family_of(ours))) == 3
    command = ["sample", ours, "--strategy", str(tmp_path / "search.txt"), "--clip", "final", "--count", "2"]
    assert main([*command, "--out", drawn]) == 0
    assert "ddpm-large in 3 steps" in capsys.readouterr().out
