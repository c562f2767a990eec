"""Features against scipy and pinned values; files that are no networks; Inception from a server on this machine."""

import contextlib
import hashlib
import http.server
import math
import threading

import numpy as np
import pytest
import scipy.signal
import torch

from sparsedm.errors import InputError
from sparsedm.evaluate import frechet_distance, moments
from sparsedm.features import Features, RandomConv, load_features, to_uint8
from tests.tolerance import assert_as_good_as_torch


def images(n, seed=0, size=16):
    """Smooth random colour fields, uint8 (n, 3, size, size)."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (255 * smooth).round().to(torch.uint8)


class Means(torch.nn.Module):
    """Features as a user would bring them: uint8 images in, their mean colours out."""

    def forward(self, images):
        return images.float().mean((2, 3))


# ---- images


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, -0.004, 0.0, 1.0, 1.5]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 127, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)
    assert to_uint8(every) is every


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), r"images must be \(n, C, h, w\), not of shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "images must be uint8 or floating point in .*, not torch.int64"),
        (torch.full((2, 3, 8, 8), math.nan), "2 of the 2 images hold NaN or infinity"),
        (torch.tensor([0.0, math.inf]).view(2, 1, 1, 1), "1 of the 2 images hold NaN or infinity"),
    ],
)
def test_to_uint8_refuses(bad, message):
    with pytest.raises(InputError, match=message):
        to_uint8(bad)


# ---- networks


def test_random_conv_weights_are_pinned():
    """The network is part of the meaning of every number it gave: these values must never change."""
    network = load_features().network
    assert network.first0[0, 0, 0].tolist() == [0.07826744019985199, -0.14419566094875336, -0.2828284502029419]
    assert network.second2[15, 15, 2].tolist() == [-0.12721489369869232, -0.12517382204532623, 0.09587812423706055]
    for name, weight in network.named_buffers():
        sums = weight.double().sum((2, 3)).abs().max()
        assert sums < 9 * torch.finfo(torch.float32).eps, name


def test_random_conv_is_what_its_docstring_says():
    """One image, convolved by scipy."""
    image = images(1, size=16)
    network = load_features().network
    results = []
    for dtype in (np.float64, np.float32):

        def response(planes, filters, dtype=dtype):
            padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), mode="reflect")
            filters = filters.numpy().astype(dtype)
            maps = [[scipy.signal.correlate2d(p, w, mode="valid") for p, w in zip(padded, f)] for f in filters]
            return np.abs(np.sum(maps, 1))

        def halved(planes, block=2):
            c, h, w = planes.shape
            return planes.reshape(c, h // block, block, w // block, block).mean((2, 4))

        x = image[0].numpy().astype(dtype) / dtype(127.5) - 1
        colours, features = halved(x, 4).ravel(), []
        for scale in "012":
            r = response(x, network.get_buffer("first" + scale))
            q = response(r, network.get_buffer("second" + scale))
            features += [np.log(z.mean((1, 2)) + dtype(1 / 64)) for z in (r, q)]
            x = halved(x)
        results.append(torch.from_numpy(np.concatenate([*features, colours])))
    high, low = results
    assert_as_good_as_torch(network(image)[0], high, low)


def test_random_conv_sees_what_it_should():
    """Between two halves of one set the distance is small; every kind of damage raises it well above that."""
    features = load_features()
    a, b = moments(features(images(400, 1))), images(400, 2)

    def distance(x):
        return frechet_distance(*a, *moments(features(x)))

    itself = distance(b)
    damaged = {
        "noise": (b + torch.randn(b.shape) * 10).clamp(0, 255).to(torch.uint8),
        "contrast": (b * 0.7 + 38).to(torch.uint8),
        "grey": b.float().mean(1, keepdim=True).expand(b.shape).to(torch.uint8),
        "torn": torch.cat([b[:, :, :, 8:], b[:, :, :, :8]], 3),
        "collapsed": b[:8].repeat(50, 1, 1, 1),
    }
    assert all(distance(x) > 2 * itself for x in damaged.values()), (
        itself,
        {k: distance(x) for k, x in damaged.items()},
    )


def test_features_do_not_depend_on_the_batch_and_take_floats_and_grey_images():
    features, x = load_features(), images(7)
    whole = features(x)
    assert whole.shape == (7, 144)
    assert whole.dtype == torch.float64
    parts = features(x, batch_size=3)
    assert_as_good_as_torch(parts.float(), whole, whole.float())
    assert torch.equal(features(x.float() / 127.5 - 1), whole)
    assert torch.equal(features(x[:, :1]), features(x[:, :1].repeat(1, 3, 1, 1)))


def save_script(path, module=None):
    torch.jit.save(torch.jit.trace(module or Means(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), path)


def save_exported(path):
    batch = torch.export.Dim("batch")
    example = (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),)
    torch.export.save(torch.export.export(Means(), example, dynamic_shapes=({0: batch},)), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("save", [save_script, save_exported])
def test_features_from_a_file(save, tmp_path):
    path = tmp_path / "means.pt2"
    save(path)
    features = load_features(str(path))
    assert features.name == f"means.pt2-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    x = images(5, size=8)
    assert torch.equal(features(x, batch_size=2), Means()(x).double())


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


def cut_in_half(path):
    save_script(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(Bomb(), path), "a plain pickle can run any code and is refused"),
        (
            lambda path: torch.save(Bomb(), path, _use_new_zipfile_serialization=False),
            "is not a TorchScript or torch.exp",
        ),
        (lambda path: torch.save(Means().state_dict(), path), "a plain pickle can run any code and is refused"),
        (lambda path: path.write_bytes(b""), "is not a TorchScript or torch.export file"),
        (cut_in_half, "is not a TorchScript or torch.export file"),
        (lambda path: None, "random-conv, inception, or a file"),
    ],
    ids=["pickle", "old pickle", "state dict", "empty", "truncated", "missing"],
)
def test_a_file_that_is_no_network_is_refused(write, message, tmp_path):
    write(tmp_path / "features.pt")
    with pytest.raises(InputError, match=message):
        load_features(str(tmp_path / "features.pt"))


@pytest.mark.parametrize(
    ("network", "x", "message"),
    [
        (lambda x: x.float(), images(2), r"features odd must give \(2, d\), but gave \(2, 3, 16, 16\)"),
        (lambda x: [x], images(2), r"features odd must give \(2, d\), but gave list"),
        (lambda x: x.float().mean((2, 3)) * math.nan, images(2), "features odd gave NaN or infinity"),
        (lambda x: x, images(2).repeat(1, 2, 1, 1), "features odd need images of 1 or 3 channels, not 6"),
        (RandomConv(), images(2, size=7), r"features random-conv need images of 8 x 8 .*, not \(7, 7\)"),
    ],
)
def test_features_refuse(network, x, message):
    with pytest.raises(InputError, match=message):
        Features("odd", network, torch.device("cpu"))(x)


# ---- Inception, from a server on this machine


class Detector(torch.nn.Module):
    """With the call of NVIDIA's file: features on request, else probabilities."""

    def forward(self, images, return_features: bool = False):
        features = images.float().mean((2, 3))
        return features if return_features else torch.softmax(features, 1)


@contextlib.contextmanager
def serve(body):
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/inception.pt", ranges
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def detector(tmp_path, monkeypatch):
    """The bytes of a TorchScript detector, whose checksum stands in for Inception's; the cache is in tmp_path."""
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        torch.jit.save(torch.jit.script(Detector()), tmp_path / "source.pt")
    body = (tmp_path / "source.pt").read_bytes()
    monkeypatch.setattr("sparsedm.features.INCEPTION_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSEDM_INCEPTION", raising=False)
    return body


def test_inception_is_downloaded_once(detector, monkeypatch):
    with serve(detector) as (url, ranges):
        monkeypatch.setattr("sparsedm.features.INCEPTION_URL", url)
        for _ in range(2):
            features = load_features("inception")
            assert features.name == "inception"
            assert torch.equal(features(images(3)), Means()(images(3)).double())
    assert len(ranges) == 1


def test_inception_from_a_local_file(detector, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsedm.features.INCEPTION_URL", "http://127.0.0.1:9/nobody-listens")
    assert load_features("inception", weights=tmp_path / "source.pt").name == "inception"
    monkeypatch.setenv("SPARSEDM_INCEPTION", str(tmp_path / "source.pt"))
    assert load_features("inception").name == "inception"


def test_another_network_is_never_called_inception(detector, tmp_path):
    save_exported(tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"has sha256 .* but must have"):
        load_features("inception", weights=tmp_path / "other.pt")


def test_inception_offline_says_what_to_do(detector, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsedm.features.INCEPTION_URL", "http://127.0.0.1:9/nobody-listens")
    with pytest.raises(InputError, match=r"cannot download http://127.* put the file at .*inception-2015-12-05\.pt"):
        load_features("inception")
