from dataclasses import FrozenInstanceError

import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.models import MODELS, build_model


def test_overrides_device_and_dtype():
    model = build_model("uvit-tiny", image_size=16, patch_size=2, device="meta", dtype=torch.bfloat16)
    assert (model.config.image_size, model.config.patch_size, model.config.dim) == (16, 2, 128)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert build_model("ddpm-tiny", multipliers=[1, 1, 2], device="meta").config.multipliers == (1, 1, 2)
    assert build_model("ddpm-tiny", dropout=0, device="meta").config.dropout == 0


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"device": "nonsense"}, "device='nonsense' is not a device of torch"),
        ({"device": 3.5}, "device=3.5 is not a device of torch"),
        ({"dtype": "bf16"}, "dtype='bf16': a dtype of floating-point numbers is needed"),
        ({"dtype": torch.int8}, "dtype=torch.int8: a dtype of floating-point"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64: a dtype of floating-point"),
    ],
)
def test_devices_and_dtypes_are_torchs(place, message):
    with pytest.raises(InputError, match=message):
        build_model("uvit-tiny", **place)


def test_the_generator_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model("uvit-tiny", dim=16).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        MODELS["uvit-tiny"].dim = 3


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("uvit-huge", {}, "unknown model 'uvit-huge': one of uvit-tiny, .*ddpm-cifar10"),
        (None, {}, "unknown model None"),
        (["uvit-tiny"], {}, r"unknown model \['uvit-tiny'\]"),
        ({"kind": "mixer"}, {}, "unknown model kind 'mixer': one of uvit, dit, ddpm, slimmable"),
        ({"kind": ["uvit"]}, {}, r"unknown model kind \['uvit'\]"),
        ({}, {}, "unknown model kind None"),
        ({"kind": "uvit", "width": 3}, {}, "unknown model option 'width': one of image_size, channels, patch_size"),
        ("uvit-tiny", {"kind": "ddpm"}, "unknown model option 'kind'"),
        ("uvit-tiny", {"dim": "128"}, "model option dim='128': must be of type int"),
        ("uvit-tiny", {"dim": True}, "model option dim=True: must be of type int"),
        ("uvit-tiny", {"final_conv": 1}, "model option final_conv=1: must be of type bool"),
        ("ddpm-tiny", {"multipliers": 2}, "model option multipliers=2: must be of type tuple"),
        ("ddpm-tiny", {"multipliers": [1, 2.0]}, r"model option multipliers=\(1, 2.0\): must be of type tuple"),
        ("ddpm-tiny", {"dropout": None}, "model option dropout=None: must be of type float"),
        ("uvit-tiny", {"image_size": 30}, "image_size=30: must be a multiple of patch_size=4"),
    ],
)
def test_refusals(model, overrides, message):
    with pytest.raises(InputError, match=message):
        build_model(model, device="meta", **overrides)
