"""Distances against independent implementations: scipy's matrix square root, and numpy written from the formulas."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import SafetensorError

from sparsedm import evaluate
from sparsedm.errors import InputError
from sparsedm.features import Features, load_features
from tests.test_features import Means, images
from tests.tolerance import assert_as_good_as_torch


def spread(d, seed):
    """A random symmetric positive matrix (d, d), float64, with eigenvalues over two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    values = torch.logspace(-2, 0, d, dtype=torch.float64)
    return basis * values @ basis.T


def scipy_frechet(mean_a, a, mean_b, b):
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    return ((mean_a - mean_b) ** 2).sum() + torch.trace(a + b) - 2 * np.trace(root)


# ---- Fréchet distance


@pytest.mark.parametrize("d", [1, 7, 64])
def test_frechet_distance_is_as_good_as_scipys(d):
    """B = A^(-1/2) C² A^(-1/2) makes A^(1/2) B A^(1/2) = C², so that the cross term is tr C: known, not commuting."""
    root, c = spread(d, 1), spread(d, 2)
    inverse = torch.linalg.inv(root)
    a, b = root @ root, inverse @ c @ c @ inverse
    b = (b + b.T) / 2
    mean_a, mean_b = torch.randn(2, d, dtype=torch.float64)
    known = (mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * c.trace()
    ours = torch.tensor(evaluate.frechet_distance(mean_a, a, mean_b, b), dtype=torch.float64)
    assert_as_good_as_torch(ours, known, torch.as_tensor(scipy_frechet(mean_a, a, mean_b, b)))


def test_frechet_distance_from_features_agrees_with_scipy():
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64) * 2 + 1
    ours = evaluate.frechet_distance(*evaluate.moments(x), *evaluate.moments(y))
    mean_a, mean_b = x.mean(0), y.mean(0)
    a, b = (torch.from_numpy(np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    reference = torch.as_tensor(scipy_frechet(mean_a, a, mean_b, b))
    assert_as_good_as_torch(torch.tensor(ours).float(), reference, reference.float())


@pytest.mark.parametrize(("rank_a", "rank_b"), [(0, 0), (0, 8), (3, 3), (3, 8)])
def test_frechet_distance_of_singular_covariances(rank_a, rank_b):
    """Commuting covariances: the distance is Σ (√a_i - √b_i)², whatever eigenvalues are zero. fp32 is the yardstick."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))
    a, b = torch.rand(2, 8, generator=g, dtype=torch.float64)
    a[rank_a:], b[rank_b:] = 0, 0
    zero = torch.zeros(8, dtype=torch.float64)
    ours = evaluate.frechet_distance(zero, basis * a @ basis.T, zero, basis * b @ basis.T)
    known = (a.sqrt() - b.sqrt()).square().sum()
    assert_as_good_as_torch(torch.tensor(ours).float(), known, known.float(), eps=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_distance(bad):
    x = torch.randn(20, 3, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[3, 1] = bad
    for a, b in ((x, spoiled), (spoiled, x)):
        with pytest.raises(InputError, match="is not finite"):
            evaluate.frechet_distance(*evaluate.moments(a), *evaluate.moments(b))
        with pytest.raises(InputError, match="hold NaN or infinity"):
            evaluate.kernel_distance(a, b, subsets=2)


def test_frechet_distance_is_symmetric_zero_on_itself_and_counts_the_mean():
    mean, a, b = torch.ones(5, dtype=torch.float64), spread(5, 3), spread(5, 4)
    there, back = evaluate.frechet_distance(mean, a, -mean, b), evaluate.frechet_distance(-mean, b, mean, a)
    there, back = torch.tensor([there, back], dtype=torch.float64)
    assert_as_good_as_torch(there.float(), back, back.float())
    itself, zero = torch.tensor([evaluate.frechet_distance(mean, a, mean, a), 0], dtype=torch.float64)
    assert itself >= 0
    assert_as_good_as_torch(itself.float(), zero, zero.float(), eps=torch.finfo(torch.float32).eps)
    assert evaluate.frechet_distance(mean, 0 * a, -mean, 0 * a) == 20


# ---- kernel distance


def brute_force_mmd(x, y):
    """Unbiased squared MMD with the cubic kernel, pair by pair."""

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(a, b) for (i, a), (j, b) in itertools.product(enumerate(x), repeat=2) if i != j) / (n * (n - 1))
    yy = sum(k(a, b) for (i, a), (j, b) in itertools.product(enumerate(y), repeat=2) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_of_whole_sets_is_the_brute_force():
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64) + 0.5
    mean, std = evaluate.kernel_distance(x, y, subsets=3, subset_size=12)
    reference = torch.tensor(brute_force_mmd(x.tolist(), y.tolist()), dtype=torch.float64)
    assert_as_good_as_torch(torch.tensor(mean).float(), reference, reference.float())
    assert_as_good_as_torch(torch.tensor(std).float(), torch.tensor(0.0).double(), torch.tensor(0.0), eps=2**-23)


def test_kernel_distance_is_the_mean_and_spread_over_subsets():
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    draws = [[z[torch.randperm(len(z), generator=g)[:6]].tolist() for z in (x, y)] for _ in range(5)]
    values = np.array([brute_force_mmd(a, b) for a, b in draws])
    reference = torch.tensor([values.mean(), values.std()])
    ours = torch.tensor(evaluate.kernel_distance(x, y, subsets=5, subset_size=6, seed=4), dtype=torch.float64)
    assert_as_good_as_torch(ours.float(), reference, reference.float())


def test_kernel_distance_is_unbiased():
    """Two samples of one distribution: zero in the mean. 200 independent values, 5 standard errors."""
    g = torch.Generator().manual_seed(0)
    pairs = torch.randn(200, 2, 30, 4, generator=g, dtype=torch.float64)
    values = torch.tensor([evaluate.kernel_distance(x, y, subsets=1, subset_size=30)[0] for x, y in pairs])
    assert values.mean().abs() < 5 * values.std() / math.sqrt(200)


def test_default_subsets_differ_from_one_another():
    x, y = torch.randn(2, 20, 3, dtype=torch.float64)
    assert evaluate.default_subset_size(x, y) == 10
    assert evaluate.kernel_distance(x, y)[1] > 0
    assert evaluate.default_subset_size(torch.empty(5000, 1), torch.empty(2500, 1)) == 1000


# ---- precision and recall


def brute_force_share(points, members, k):
    def distance(a, b):
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b)))

    inside = 0
    for point in points:
        for i, member in enumerate(members):
            others = sorted(distance(member, other) for j, other in enumerate(members) if j != i)
            if distance(point, member) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_the_brute_force(neighbours):
    g = torch.Generator().manual_seed(1)
    real = torch.randn(30, 2, generator=g, dtype=torch.float64)
    fake = torch.randn(25, 2, generator=g, dtype=torch.float64) + 0.8
    precision, recall = evaluate.precision_recall(fake, real, neighbours=neighbours)
    assert precision == brute_force_share(fake.tolist(), real.tolist(), neighbours)
    assert recall == brute_force_share(real.tolist(), fake.tolist(), neighbours)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_at_the_extremes():
    x = torch.randn(1100, 3, dtype=torch.float64)  # more than one block of rows
    assert evaluate.precision_recall(x, x.flip(0)) == (1, 1)
    assert evaluate.precision_recall(x, x + 1000) == (0, 0)
    copies = (3 + torch.randn(30, 144, dtype=torch.float64)).repeat(5, 1)  # every ball has radius zero
    assert evaluate._squared_distances(copies[:30], copies[30:60]).diagonal().count_nonzero() == 0
    assert evaluate.precision_recall(copies[:61], copies) == (1, 1)
    collapsed = x[:1].expand(1100, -1)  # one image over and over: a good one, but only that one
    assert evaluate.precision_recall(collapsed, x) == (1, 1 / 1100)


# ---- SSIM


def brute_force_ssim(a, b, size):
    """Wang et al. (2004) for one channel, window by window."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            x, y = (z[i : i + size, j : j + size].astype(np.float64) for z in (a, b))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            values.append(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("height", "width", "window"), [(16, 13, 11), (8, 8, 7), (11, 5, 5)])
def test_ssim_is_the_brute_force(height, width, window):
    a = images(2, 1, 32)[:, :, :height, :width]
    b = images(2, 2, 32)[:, :, :height, :width]
    assert evaluate.ssim_window(a.shape) == window
    reference = torch.tensor(
        [[brute_force_ssim(x, y, window) for x, y in zip(p.numpy(), q.numpy())] for p, q in zip(a, b)]
    )
    reference = reference.mean(1)
    assert_as_good_as_torch(evaluate.ssim(a, b).float(), reference, reference.float())


def test_ssim_of_equal_images_is_one_and_falls_with_noise():
    a = images(300)  # more than one block
    noisy = [(a + (s * torch.randn(a.shape)).round()).clamp(0, 255).to(torch.uint8) for s in (4, 16, 64)]
    one, *falling = (evaluate.ssim(a, b) for b in [a, *noisy])
    assert one.shape == (300,)
    assert_as_good_as_torch(one.float(), torch.ones(300, dtype=torch.float64), torch.ones(300))
    assert all((low < high).all() for high, low in itertools.pairwise([one, *falling]))


# ---- summaries and the whole comparison


def test_progress_bars_are_shown_only_when_asked(monkeypatch):
    shown = []

    def bar(items, desc, disable):
        shown.append((desc, disable))
        return items

    monkeypatch.setattr(evaluate, "tqdm", bar)
    monkeypatch.setattr("sparsedm.features.tqdm", bar)
    features = load_features()
    reference = evaluate.summarize(images(9), features, "set")
    evaluate.evaluate(images(9), reference, features, progress=True)
    evaluate.kernel_distance(reference.kept, reference.kept)
    bars = [("random-conv-1", True), ("random-conv-1", None), ("kernel distance", None), ("kernel distance", True)]
    assert shown == bars


def test_summary_is_cached_by_content(tmp_path):
    calls = []
    plain = load_features().network
    features = Features("counted", lambda x: calls.append(len(x)) or plain(x), torch.device("cpu"))
    first = evaluate.summarize(images(20), features, "train", cache=tmp_path)
    again = evaluate.summarize(images(20).float() / 127.5 - 1, features, "the same, as floats", cache=tmp_path)
    assert calls == [20]
    assert (first.name, again.name) == ("train", "the same, as floats")
    assert (again.features, again.count, again.shape) == ("counted", 20, (3, 16, 16))
    for ours, theirs in zip((first.mean, first.covariance, first.kept), (again.mean, again.covariance, again.kept)):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, theirs)

    evaluate.summarize(images(20, seed=1), features, "train", cache=tmp_path)
    evaluate.summarize(images(20).flip(0), features, "train", cache=tmp_path)
    evaluate.summarize(images(20), Features("renamed", features.network, features.device), "", cache=tmp_path)
    evaluate.summarize(images(20), features, "train")
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, monkeypatch):
    def full_disk(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(evaluate, "save_file", full_disk)
    features = load_features("random-conv")
    with pytest.warns(UserWarning, match="are not kept for the next run: No space left"):
        kept = evaluate.summarize(images(20), features, "set", cache=tmp_path)
    assert torch.equal(kept.mean, evaluate.summarize(images(20), features, "set").mean)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:-1] + bytes([whole[-1] ^ 64])])
def test_a_broken_cache_is_computed_anew(damage, tmp_path):
    features = load_features()
    first = evaluate.summarize(images(20), features, "train", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="cannot be read .* is computed anew"):
        again = evaluate.summarize(images(20), features, "train", cache=tmp_path)
    assert torch.equal(again.mean, first.mean)
    assert torch.equal(again.kept, first.kept)
    with warnings.catch_warnings(action="error"):
        evaluate.summarize(images(20), features, "train", cache=tmp_path)


def test_a_summary_keeps_a_random_part_of_the_features(monkeypatch):
    monkeypatch.setattr(evaluate, "KEPT", 6)
    features, x = load_features(), images(20)
    summary = evaluate.summarize(x, features, "train")
    every = features(x)
    assert summary.count == 20
    assert torch.equal(summary.mean, every.mean(0))
    assert summary.kept.shape == (6, 144)
    rows = [(every == row).all(1).nonzero().item() for row in summary.kept]
    assert len(set(rows)) == 6
    assert rows != sorted(rows)


def test_evaluate_says_everything_it_depends_on(monkeypatch):
    features = load_features()
    reference = evaluate.summarize(images(40, 1), features, "fields, train")
    generated, paired = images(30, 2), images(30, 3)
    result = evaluate.evaluate(generated, reference, features, paired=paired, seed=3)
    json.dumps(result, allow_nan=False)
    x, y = features(generated), features(images(40, 1))
    order = [torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (30, 40)]
    kernel = evaluate.kernel_distance(x[order[0]], y[order[1]], seed=3)
    precision, recall = evaluate.precision_recall(x, y)
    assert result == dict(
        features="random-conv-1",
        dimension=144,
        reference="fields, train",
        reference_count=40,
        count=30,
        rank_deficient=True,
        frechet_distance=evaluate.frechet_distance(*evaluate.moments(x), *evaluate.moments(y)),
        kernel_distance=kernel[0],
        kernel_distance_std=kernel[1],
        kernel_subset_size=15,
        precision=precision,
        recall=recall,
        neighbours=3,
        ssim=evaluate.ssim(generated, paired).mean().item(),
        ssim_window=11,
    )
    computed, radii = [], evaluate._radii
    monkeypatch.setattr(evaluate, "_radii", lambda members, k: computed.append(len(members)) or radii(members, k))
    again = evaluate.evaluate(generated, reference, features, seed=3)
    assert again == {name: value for name, value in result.items() if "ssim" not in name}
    assert computed == [30], "those of the reference are kept"


@pytest.mark.parametrize(("count", "reference_count", "deficient"), [(4, 5, False), (3, 5, True), (4, 3, True)])
def test_too_few_images_for_the_dimension_are_flagged(count, reference_count, deficient):
    features = Features("means", Means(), torch.device("cpu"))
    reference = evaluate.summarize(images(reference_count, 1), features, "train")
    result = evaluate.evaluate(images(count), reference, features, neighbours=1)
    assert result["rank_deficient"] is deficient
    assert math.isfinite(result["frechet_distance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=images(1)), "1 generated and 9 real images to .* at least 4 of both are needed"),
        (dict(images=images(0)), "0 generated and 9 real images to .* at least 4 of both are needed"),
        (dict(images=images(3)), "3 generated and 9 real images to .* at least 4 of both are needed"),
        (dict(images=torch.full((9, 3, 16, 16), math.nan)), "9 of the 9 images hold NaN"),
        (dict(images=images(9, size=8)), r"the images are \(3, 8, 8\), but the reference images \(3, 16, 16\)"),
        (dict(paired=images(8)), r"SSIM compares pairs, but the shapes are \(9, 3, 16, 16\) and \(8, 3, 16, 16\)"),
        (
            dict(features=Features("means", Means(), torch.device("cpu"))),
            "the reference set holds features random-conv-1, not means",
        ),
    ],
)
def test_evaluate_refuses(change, message):
    features = load_features()
    reference = evaluate.summarize(images(9), features, "set")
    with pytest.raises(InputError, match=message):
        evaluate.evaluate(**dict(images=images(9), reference=reference, features=features) | change)


def test_kernel_distance_refuses_subsets_larger_than_the_set():
    with pytest.raises(InputError, match="subset_size is 6, it must lie between 2 and the 5 images"):
        evaluate.kernel_distance(torch.zeros(5, 2), torch.zeros(9, 2), subset_size=6)
