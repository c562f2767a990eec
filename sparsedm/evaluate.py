"""How close generated images are to a reference set: distances between the features of a fixed network.

A Fréchet distance is called FID only with the features of the original Inception network ("inception"). With other
features the distance still ranks models, if all use the same features, the same reference set and the same number of
images.
Images are uint8 (n, C, h, w), or floating point in [-1, 1]; features are float64 (n, d).
"""

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sparsedm.errors import InputError
from sparsedm.features import to_uint8
from sparsedm.files import atomic_file, checksum, regular_file

# ---- distances


def moments(features):
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), float64."""
    return features.mean(0, dtype=torch.float64), torch.atleast_2d(features.double().T.cov())


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982; FID, arXiv 1706.08500, eq. 6).

    |μ_a - μ_b|² + tr(A + B - 2 (A B)^(1/2)). tr (A B)^(1/2) is the sum of the roots of the eigenvalues of the symmetric
    A^(1/2) B A^(1/2). This is stable for singular covariances, the result of few images.
    Raises: InputError for NaN or infinity.
    """
    if not all(torch.as_tensor(x, device="cpu").isfinite().all() for x in (mean_a, covariance_a, mean_b, covariance_b)):
        raise InputError("the mean or covariance of features is not finite: so is a feature, or it is too large")
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    squared = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, squared.item())


def kernel_distance(a, b, *, subsets=100, subset_size=None, seed=0, progress=False):
    """KID: unbiased squared MMD with the kernel (x·y / d + 1)³ over random subsets (arXiv 1801.01401, eq. 4).

    a (n, d), b (m, d): features, floating point. Returns (mean, standard deviation) over the subsets.
    subset_size: None: 1000, or half of the smaller set if that is less (larger subsets would be too much alike to show
    a spread). Raises: InputError if subset_size is less than 2 or more than n or m, and for NaN or infinity.
    """
    for name, features in (("a", a), ("b", b)):
        if not features.isfinite().all():
            raise InputError(f"the features {name} hold NaN or infinity")
    subset_size = subset_size or default_subset_size(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise InputError(f"subset_size is {subset_size}, it must lie between 2 and the {min(len(a), len(b))} images")
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(subsets), desc="kernel distance", disable=None if progress else True)
    pairs = ([_subset(x, subset_size, generator) for x in (a, b)] for _ in bar)
    values = torch.stack([_squared_mmd(x, y) for x, y in pairs])
    return values.mean().item(), values.std(correction=0).item()


def default_subset_size(a, b):
    return min(1000, max(2, min(len(a), len(b)) // 2))


def _subset(features, size, generator):
    return features[torch.randperm(len(features), generator=generator, device="cpu")[:size].to(features.device)]


def _squared_mmd(a, b):
    m, d = a.shape
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
    return within / (m * (m - 1)) - 2 * ab.mean()


def precision_recall(generated, reference, *, neighbours=3, radii=None):
    """Improved precision and recall (arXiv 1904.06991, eq. 1-2).

    generated (n, d), reference (m, d): features, floating point. Returns (share of generated images inside the
    reference set, share of reference images inside the generated set). A point counts as inside a set if, for at least
    one member, it is no farther away than that member's k-th nearest neighbour, k = neighbours.
    radii: `_radii` of the reference, if the caller has them.
    Raises: InputError if a set has no more than k images.
    """
    smaller = min(len(generated), len(reference))
    if smaller <= neighbours:
        raise InputError(f"neighbours is {neighbours}, it must be less than the {smaller} images")
    radii = _radii(reference, neighbours) if radii is None else radii
    precision = _share_inside(generated, reference, radii)
    return precision, _share_inside(reference, generated, _radii(generated, neighbours))


def _radii(members, k):
    """The squared distance of each member to its k-th nearest neighbour."""
    nearest = [_squared_distances(chunk, members).topk(k + 1, largest=False).values for chunk in members.split(1024)]
    return torch.cat(nearest)[:, -1]  # the nearest of all is the member itself


def _share_inside(points, members, radii):
    inside = [(_squared_distances(chunk, members) <= radii).any(1) for chunk in points.split(1024)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(a, b):
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = (a @ b.T).mul_(-2).add_(lengths)
    # what is left of two duplicates is rounding, which must not put one outside of the other
    return squared.where(squared > lengths.mul_(1e-12), 0)


def ssim(a, b):
    """Structural similarity (n,) of the pairs a[i], b[i] (Wang et al. 2004, eq. 13; K1 = .01, K2 = .03, L = 255).

    a, b: images (n, C, H, W), uint8 or floating point in [-1, 1]. Gaussian window of ssim_window(...) pixels with
    σ = 1.5, inside the image only. The mean over colour channels and places, float64.
    Raises: InputError for different shapes.
    """
    if a.shape != b.shape:
        raise InputError(f"SSIM compares pairs, but the shapes are {tuple(a.shape)} and {tuple(b.shape)}")
    size = ssim_window(a.shape)
    offsets = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    weights = torch.softmax(-offsets.square() / (2 * 1.5**2), 0)
    # the window at every place, as one row each of a matrix: (places, pixels), for both axes
    rows, columns = (torch.stack([F.pad(weights, (i, n - size - i)) for i in range(n - size + 1)]) for n in a.shape[2:])

    def blur(z):
        return rows @ z @ columns.T

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    out = []
    for x, y in zip(to_uint8(a).split(256), to_uint8(b).split(256)):
        x, y = x.double(), y.double()
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        out.append((luminance * structure).mean((1, 2, 3)))
    return torch.cat(out)


def ssim_window(shape):
    """11 pixels; for a smaller image the largest odd number that fits."""
    smaller = min(*shape[-2:], 11)
    return smaller - 1 + smaller % 2


# ---- a reference set, and the whole comparison

KEPT = 10_000  # features stored of a set, for the distances that need individual features


@dataclass(frozen=True)
class Summary:
    """Features of a set of images: mean and covariance over all images, and the features of at most 10,000 (`kept`)."""

    name: str
    features: str
    count: int
    shape: tuple[int, ...]
    mean: torch.Tensor
    covariance: torch.Tensor
    kept: torch.Tensor
    _radii: dict = field(default_factory=dict, repr=False)

    def radii(self, neighbours, device):
        """Of `kept`, for `precision_recall`: computed once, for all networks that are compared with this set."""
        if neighbours not in self._radii:
            self._radii[neighbours] = _radii(self.kept.to(device), neighbours)
        return self._radii[neighbours].to(device)


def summarize(images, features, name, *, cache=None, batch_size=250, progress=False):
    """The Summary of a set of images.

    cache: a folder where the summary is stored. The file name is a hash of the images and the name of the features.
    Raises InputError for fewer than 2 images, NaN, or images that the features cannot read.
    """
    images = to_uint8(images)
    if len(images) < 2:
        raise InputError(f"{name} holds {len(images)} image{'s' * (len(images) != 1)}, at least 2 are needed")
    facts = dict(name=name, features=features.name, count=len(images), shape=tuple(images.shape[1:]))
    path = None
    if cache is not None:
        digest = hashlib.sha256(f"{features.name} {tuple(images.shape)} {KEPT} ".encode())
        digest.update(images.cpu().contiguous().numpy())
        path = Path(cache) / f"features-{digest.hexdigest()[:32]}.safetensors"
        if path.exists():
            try:
                with safe_open(regular_file(path), framework="pt") as file:
                    found = {key: file.get_tensor(key) for key in ("mean", "covariance", "kept")}
                    known = file.metadata() or {}
                d = found["mean"].numel()
                shapes = {"mean": (d,), "covariance": (d, d), "kept": (min(KEPT, len(images)), d)}
                if any(tuple(found[key].shape) != shape for key, shape in shapes.items()):
                    raise InputError("its tensors have other shapes")
                if any(checksum(value) != known.get(key) for key, value in found.items()):
                    raise InputError("it is damaged, or older than the checksums")
                return Summary(**facts, **{key: value.double() for key, value in found.items()})
            except (SafetensorError, InputError) as error:
                warnings.warn(f"{path} cannot be read ({error}): it is computed anew", stacklevel=2)
    every = features(images, batch_size=batch_size, progress=progress)
    mean, covariance = moments(every)
    kept = _subset(every, KEPT, torch.Generator().manual_seed(0))
    if path is not None:
        try:
            tensors = dict(mean=mean, covariance=covariance, kept=kept.contiguous())
            with atomic_file(path) as partial:
                save_file(tensors, partial, {key: checksum(value) for key, value in tensors.items()})
        except (InputError, SafetensorError) as error:  # a full disk, for instance
            warnings.warn(f"the features of {name} are not kept for the next run: {error}", stacklevel=2)
    return Summary(**facts, mean=mean, covariance=covariance, kept=kept)


def check_sets(shape, count, reference_shape, reference_count, neighbours=3):
    """Raise InputError if two sets of images cannot be compared. shapes: (C, h, w)."""
    if shape[0] not in (1, 3):
        raise InputError(f"images of {shape[0]} channels are latents: distances need images of 1 or 3 channels")
    if tuple(shape) != tuple(reference_shape):
        raise InputError(f"the images are {tuple(shape)}, but the reference images {tuple(reference_shape)}")
    if min(count, reference_count) <= neighbours:
        raise InputError(
            f"{count} generated and {reference_count} real images to compare them with: precision and recall look for "
            f"{neighbours} neighbours of each, so at least {neighbours + 1} of both are needed"
        )


def evaluate(images, reference, features, *, paired=None, neighbours=3, seed=0, batch_size=250, progress=False):
    """Compare images with a reference Summary made by the same features. Returns a dict that JSON can hold.

    "rank_deficient" is true if a set has no more images than the features have dimensions. Its covariance is then
    singular. Do not compare Fréchet distances of different image counts in that case.
    paired: the dense model's samples from the same noise. "ssim" (with "ssim_window") is then the mean over the pairs
    images[i], paired[i].
    Raises: InputError if the reference has other features or images of another shape, or a set has too few images.
    """
    if reference.features != features.name:
        raise InputError(f"the reference {reference.name} holds features {reference.features}, not {features.name}")
    check_sets(images.shape[1:], len(images), reference.shape, reference.count, neighbours)
    own = summarize(images, features, "the generated set", batch_size=batch_size, progress=progress)
    mean, covariance, kept, *theirs = (
        tensor.to(features.device) for side in (own, reference) for tensor in (side.mean, side.covariance, side.kept)
    )
    kernel_mean, kernel_std = kernel_distance(kept, theirs[2], seed=seed, progress=progress)
    radii = reference.radii(neighbours, features.device)
    precision, recall = precision_recall(kept, theirs[2], neighbours=neighbours, radii=radii)
    result = dict(
        features=features.name,
        dimension=len(mean),
        reference=reference.name,
        reference_count=reference.count,
        count=own.count,
        rank_deficient=min(own.count, reference.count) <= len(mean),
        frechet_distance=frechet_distance(mean, covariance, theirs[0], theirs[1]),
        kernel_distance=kernel_mean,
        kernel_distance_std=kernel_std,
        kernel_subset_size=default_subset_size(kept, theirs[2]),
        precision=precision,
        recall=recall,
        neighbours=neighbours,
    )
    if paired is not None:
        result |= dict(ssim=ssim(images, paired).mean().item(), ssim_window=ssim_window(images.shape))
    return result
