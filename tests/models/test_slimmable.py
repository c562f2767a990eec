"""A slimmable network at width k/8 is compared with a plain DDPM of that width: export by slices, bit for bit."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.pattern import group_view, holds
from sparsedm.models import build_model, model_config
from sparsedm.models.ddpm import DDPM
from sparsedm.sparsity import sparsify
from sparsedm.train.data import ImageSet
from sparsedm.train.loop import check_data
from tests.models import references

# unequal levels, attention in one of them, skips of other widths than x
SMALL = {"image_size": 8, "width": 32, "multipliers": (1, 2, 3), "attention": (4,), "groups": 4, "dropout": 0.0}


def make(**overrides):
    """A small network with weights far from their start: near-zero branches would hide mistakes."""
    model = build_model("slimmable-tiny", **SMALL | overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval(), model.example_inputs(5)


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("k", [2, 4, 6, 8])
def test_an_exported_width_computes_the_same_bits(k, labels):
    model, inputs = make(num_classes=labels)
    plain = model.export(k)
    assert type(plain) is DDPM
    assert plain.config == model.config.at(k)
    with model.at_width(k):
        assert torch.equal(plain(*inputs), model(*inputs))
    state = plain.state_dict()
    assert not {p.data_ptr() for p in state.values()} & {p.data_ptr() for p in model.parameters()}


def test_widths_differ_and_are_given_back():
    model, inputs = make()
    outputs = {}
    for k in model.config.eighths:
        with model.at_width(k):
            outputs[k] = model(*inputs)
    assert all(not torch.equal(outputs[a], outputs[b]) for a in outputs for b in outputs if a < b)
    assert model.width == 8
    model.set_width(4)
    assert torch.equal(model(*inputs), outputs[4])
    with pytest.raises(ZeroDivisionError), model.at_width(2):
        raise ZeroDivisionError
    assert model.width == 4


def test_a_compressed_one_has_its_full_width_only():
    model, inputs = make()
    small = compress(sparsify(model, "2:4"))
    assert small(*inputs).isfinite().all()
    for narrow in (lambda: small.export(4), lambda: small.export(8), lambda: narrow_call(small, inputs)):
        with pytest.raises(InputError, match="full width only: decompress it first"):
            narrow()


def narrow_call(model, inputs):
    with model.at_width(4):
        return model(*inputs)


def test_widths_are_rounded_as_make_divisible_does():
    config = model_config("slimmable-tiny", width=40)  # 10, 20, 30 and 40
    assert [config.at(k).width for k in config.eighths] == [16, 24, 32, 40]  # 8 is less than 9/10 of 10
    assert config.at(2).groups == config.groups == 8


def test_one_width_is_the_plain_network_with_its_gradients():
    model, inputs = make(eighths=(8,))
    plain = DDPM(model.config.at(8)).eval()
    plain.load_state_dict(model.state_dict())
    for network in (model, plain):
        network(*inputs).square().sum().backward()
    assert torch.equal(model(*inputs), plain(*inputs))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_gradients_of_a_narrow_width_are_those_of_its_export_and_zero_elsewhere():
    model, inputs = make()
    plain = model.export(4)
    plain(*inputs).square().sum().backward()
    with model.at_width(4):
        model(*inputs).square().sum().backward()
    for name, gradient in ((name, p.grad) for name, p in model.named_parameters()):
        theirs = plain.get_parameter(name).grad
        assert torch.equal(gradient[gradient != 0].sort().values, theirs[theirs != 0].sort().values), name
    conv = model.down[0].blocks[0].conv2.weight.grad
    assert not conv[16:].any()
    assert not conv[:, 16:].any()


def test_a_channel_keeps_its_meaning_where_tensors_lie_side_by_side():
    model, _ = make()
    half = model.export(4)
    whole_qkv, qkv = model.mid.attns[0].qkv.weight, half.mid.attns[0].qkv.weight  # q, k, v of 96 and of 48 channels
    assert torch.equal(qkv, whole_qkv.view(3, 96, 96)[:, :48, :48].reshape(144, 48))
    whole, conv = model.up[1].blocks[0].conv1.weight, half.up[1].blocks[0].conv1.weight  # x has 96 channels, skip 64
    assert torch.equal(conv, torch.cat([whole[:32, :48], whole[:32, 96 : 96 + 32]], 1))
    # of 16 frequencies 1e-4^(i / 15), the nearest to 1e-4^(j / 7): i = 15 j / 7
    nearest = torch.tensor([0, 2, 4, 6, 9, 11, 13, 15])
    fc1 = model.time_embed.fc1.weight[:64]
    assert torch.equal(half.time_embed.fc1.weight, torch.cat([fc1[:, nearest], fc1[:, 16 + nearest]], 1))


def test_patterns_go_with_the_weights():
    model, inputs = make()
    sparsify(model, "2:4")
    plain = model.export(4)
    with model.at_width(4):
        assert torch.equal(plain(*inputs), model(*inputs))
    layer = plain.mid.blocks[0].conv1
    assert str(layer.pattern) == "2:4"
    assert holds(group_view(layer.weight), layer.pattern)
    with model.at_width(4):  # straight through: pruned weights of the slice learn, all others do not
        model(*inputs).square().sum().backward()
    gradient = model.mid.blocks[0].conv1.weight.grad
    assert gradient[:48, :48].all()
    assert not gradient[48:].any()


def test_a_pattern_that_the_slice_cannot_hold_becomes_zeros():
    model, inputs = make()
    sparsify(model, "4:16")  # 8 input channels at a quarter
    plain = model.export(2)
    assert plain.down[0].blocks[0].conv1.pattern is None
    with model.at_width(2):
        assert torch.equal(plain(*inputs), model(*inputs))


def test_training_divides_the_batch_among_widths():
    model, (x, t, _) = make(passes=3)
    model.train()
    torch.manual_seed(1)
    middle = model.config.eighths[1:-1][torch.randint(2, (1,)).item()]
    torch.manual_seed(1)
    out = model(x, t)
    for k, part in zip((8, 2, middle), (slice(0, 2), slice(2, 4), slice(4, 5))):
        with model.eval().at_width(k):
            assert torch.equal(out[part], model(x[part], t[part])), k
    with model.train().at_width(4):
        assert torch.equal(model(x, t), model.export(4)(x, t))
    with pytest.raises(InputError, match="batch of 2 images cannot be divided among 3 widths"):
        model(x[:2], t[:2])
    whole, inputs = make(passes=0)
    assert torch.equal(whole.train()(*inputs), whole.eval()(*inputs))


def test_narrow_networks_train_with_dropout_and_evaluate_without():
    model, inputs = make(dropout=0.5)
    with model.train().at_width(4):
        assert not torch.equal(model(*inputs), model(*inputs))
        model.eval()
        assert torch.equal(model(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("k", "macs", "quoted"),
    [(8, 6_053_953_536, 6065.5), (6, 3_406_675_968, 3415.3), (4, 1_515_257_856, 1521.0), (2, 379_699_200, 382.6)],
)
def test_macs_of_the_published_widths(k, macs, quoted):
    """DDSM quotes 6070, 3420, 1520 and 382.5 M. Like DDPM's 6.07 G that counts, besides the products of the layers,
    each bias as one and each normalised value as two."""
    with torch.device("meta"):
        network = DDPM(model_config("slimmable-cifar10").at(k)).eval()
    assert round((macs + references.biases_and_normalised_values(network)) / 1e6, 1) == quoted
    assert inspect(network).totals()["macs"] == macs


def test_a_copy_and_a_state_dict_are_those_of_a_plain_network():
    model, inputs = make()
    twin = copy.deepcopy(model)
    for network in (model, twin):
        network.set_width(2)
    assert torch.equal(twin(*inputs), model(*inputs))
    assert model.state_dict().keys() == DDPM(model.config.at(8)).state_dict().keys()
    assert model_config(json.loads(json.dumps(asdict(model.config)))) == model.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eighths": (4, 2, 8)}, r"eighths=\(4, 2, 8\): must be increasing numbers from 2 to 8"),
        ({"eighths": (2, 4)}, r"eighths=\(2, 4\): must be .*8 the last"),
        ({"eighths": ()}, r"eighths=\(\): must be"),
        ({"eighths": (1, 8)}, r"eighths=\(1, 8\): must be .*from 2 to 8"),
        ({"passes": 1}, "passes=1: must be 0, or 2 and more"),
        ({"passes": 0, "same_images": True}, "same_images=True: needs passes"),
        ({"groups": 16}, "width=8: must be even, over 2 and a multiple of groups=16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        build_model("slimmable-tiny", device="meta", **overrides)


def test_unknown_widths_are_refused():
    model, _ = make()
    for use in (model.set_width, model.export):
        with pytest.raises(InputError, match="width 5/8: this network runs at 2/8, 4/8, 6/8, 8/8"):
            use(5)


def test_a_network_that_is_set_to_a_narrow_width_is_not_trained():
    """Its copies would train this width alone, and its file would not say so."""
    model = build_model("slimmable-tiny", image_size=8, multipliers=(1, 2), attention=(4,))
    images = ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), None, (), "zeros")
    check_data(model, images, None)
    model.set_width(4)
    with pytest.raises(InputError, match=r"set to 4/8 of its width: set_width\(8\) before training"):
        check_data(model, images, None)


def test_inspect_counts_the_width_that_is_set():
    model = build_model("slimmable-tiny").eval()
    sparsify(model, "2:4")
    with model.at_width(4):
        assert inspect(model).totals() == inspect(model.export(4)).totals()
        assert inspect(model).totals()["macs"] > 0
    assert inspect(model).totals()["macs"] > 2 * inspect(model.export(4)).totals()["macs"]


def test_a_narrow_network_without_data_is_counted():
    with torch.device("meta"):
        model = sparsify(build_model("slimmable-tiny"), "2:4")
    model.set_width(4)
    assert inspect(model).totals()["macs"] > inspect(model).totals()["macs_after"] > 0


def test_an_exported_network_is_in_the_mode_of_its_source():
    model, inputs = make(dropout=0.5)
    plain = model.export(4)
    assert not any(module.training for module in plain.modules())
    assert torch.equal(plain(*inputs), plain(*inputs))
    assert model.train().export(4).training
