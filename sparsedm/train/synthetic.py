"""A data set that needs no download: one bright shape on a dark two-colour gradient, the shape is the class.

It is small enough to be learnt by a 1M-parameter network in about a minute on two cores, and plain enough to judge by
eye: a good sample has one closed outline, straight or round where it should be, one flat colour of the palette, and a
smooth background. Every image is as likely as its mirror image, so flipping is harmless.

Image i is a function of (seed, i) alone, the same on every machine: the randomness is the raw output of PCG64 (which
numpy keeps stable), sines come from a rounded table, and the rest is + - * / and square root, which IEEE 754 rounds
exactly.
"""

import numpy as np
import torch

from sparsedm.errors import InputError

# What varies, and how much: lengths in units of half the image side, angles in degrees.
CLASSES = ("disk", "ring", "square", "triangle", "cross", "crescent")
COLOURS = ((255, 214, 64), (255, 84, 84), (72, 220, 255), (120, 235, 96), (255, 128, 224), (245, 245, 245))
BACKGROUNDS = (((12, 16, 48), (40, 56, 112)), ((36, 10, 44), (92, 40, 84)), ((6, 32, 32), (28, 84, 76)))
RADIUS = (0.50, 0.68)
SHIFT = 0.20  # of the centre from the middle, at most, along x and along y
TILT = {"square": 20, "triangle": 12, "cross": 20, "crescent": 40}  # at most, to either side


def synthetic(count, size=16, seed=0):
    """Draw the first `count` images of stream `seed`.

    Returns images uint8 (count, 3, size, size) in 0..255, labels int64 (count,), class names (tuple of str). A smaller
    count gives a prefix of a larger one. InputError: size < 8, count < 1.
    """
    if size < 8 or count < 1:
        raise InputError(f"synthetic images need size >= 8 and count >= 1, but these are {size} and {count}")
    raw = np.random.PCG64(seed).random_raw(count * 8).reshape(count, 8)
    images = np.concatenate([_draw(part, size) for part in np.array_split(raw, -(-count // 512))])  # bounds the memory
    return torch.from_numpy(images), torch.from_numpy(_label(raw)), CLASSES


def _label(raw):
    return (raw[:, 0] % len(CLASSES)).astype(np.int64)


def _draw(raw, size):
    """Images uint8 (n, 3, size, size) from random words uint64 (n, 8)."""
    label, colour, background = _label(raw), raw[:, 1] % len(COLOURS), raw[:, 2] % len(BACKGROUNDS)
    radius, shift_x, shift_y, tilt, direction = (raw[:, 3:] % 1024).astype(np.float32).T / 1024  # each (n,), in [0, 1)

    # pixel centres in [-1, 1], then in the frame of the shape: shifted, and rotated
    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    x, y = axis[None, None, :], axis[None, :, None]
    most = np.array([TILT.get(name, 0) for name in CLASSES], np.float32)[label]
    cos, sin = _turn((2 * tilt - 1) * most)
    u, v = x - (2 * shift_x - 1)[:, None, None] * SHIFT, y - (2 * shift_y - 1)[:, None, None] * SHIFT
    u, v = cos * u + sin * v, cos * v - sin * u  # (n, size, size)
    radius = (RADIUS[0] + radius * (RADIUS[1] - RADIUS[0]))[:, None, None]

    distance = np.empty_like(u)
    for index, name in enumerate(CLASSES):
        of = label == index
        distance[of] = _DISTANCES[name](u[of], v[of], radius[of])
    coverage = np.clip(0.5 - distance * (size / 2), 0, 1)[:, None]  # anti-aliased over one pixel

    cos, sin = _turn(direction * 360)
    mix = (0.5 + (cos * x + sin * y) * 0.35)[:, None]
    start, end = np.array(BACKGROUNDS, np.float32)[background].transpose(1, 0, 2)[..., None, None]  # (n, 3, 1, 1) each
    behind = start * (1 - mix) + end * mix
    front = np.array(COLOURS, np.float32)[colour][:, :, None, None]
    return np.rint(behind * (1 - coverage) + front * coverage).astype(np.uint8)


def _turn(degrees):
    """Cosine and sine, each (count, 1, 1), of angles rounded to whole degrees, themselves rounded to 12 bits: the last
    bit of the system's sine, which may differ between machines, does not matter."""
    table = np.rint(np.exp(2j * np.pi * np.arange(360) / 360) * 4096) / 4096
    turn = table[np.rint(degrees).astype(np.int64) % 360][:, None, None]
    return turn.real.astype(np.float32), turn.imag.astype(np.float32)


# Signed distances, negative inside, of the point (u, v) from the outline of a shape of radius r (outside the corners of
# square and triangle a lower bound, which keeps them crisp). The factors make all shapes look equally large.
def _disk(u, v, r):
    return np.sqrt(u * u + v * v) - r


def _ring(u, v, r):
    return np.abs(_disk(u, v, r * 0.8)) - r * 0.24


def _square(u, v, r):
    return np.maximum(np.abs(u), np.abs(v)) - r * 0.86


def _triangle(u, v, r):
    v = v - r * 0.25  # the middle of its bounding box, not of its weight
    return np.maximum(np.abs(u) * 0.866 - v * 0.5, v) - r * 0.62


def _cross(u, v, r):
    a, b = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(a - r * 1.04, b - r * 0.34)


def _crescent(u, v, r):
    return np.maximum(_disk(u, v, r), r * 0.82 - np.sqrt(u * u + (v + r * 0.55) * (v + r * 0.55)))


_DISTANCES = dict(zip(CLASSES, (_disk, _ring, _square, _triangle, _cross, _crescent)))
