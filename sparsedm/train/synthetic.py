"""A data set without download: one bright shape on a dark ground. The shape is the class.

A network with 1M parameters learns it in about a minute on two cores. It is easy to judge by eye: a good sample has one
closed outline, straight or round where it should be, and one flat colour of the palette. An image and its mirror image
are equally likely, so flipping is harmless.

Image i is a function of (seed, i), the same on every machine: random numbers are raw output of PCG64 (which numpy keeps
stable), and the rest is + - * / and square root, which IEEE 754 rounds exactly.
"""

import numpy as np
import torch

from sparsedm.errors import InputError

# The ranges of the parameters; lengths in units of half the image side.
CLASSES = ("disk", "ring", "square", "triangle", "cross")
COLOURS = ((255, 214, 64), (255, 84, 84), (72, 220, 255), (120, 235, 96), (255, 128, 224), (245, 245, 245))
GROUNDS = ((12, 16, 48), (36, 10, 44), (6, 32, 32))
RADIUS = (0.66, 0.72)
LEAST = 8  # pixels of a side
SHIFT = 0.08  # of the centre from the middle, at most, along x and along y


def synthetic(count, size=12, seed=0):
    """Draw the first `count` images of stream `seed`.

    Returns images uint8 (count, 3, size, size) in 0..255, labels int64 (count,), class names (tuple of str). A smaller
    count gives a prefix of a larger one. InputError: size < 8, count < 1.
    """
    if size < LEAST or count < 1:
        raise InputError(f"synthetic images need size >= {LEAST} and count >= 1, but these are {size} and {count}")
    raw = np.random.PCG64(seed).random_raw(count * 6).reshape(count, 6)
    images = np.concatenate([_draw(part, size) for part in np.array_split(raw, -(-count // 512))])  # bounds the memory
    return torch.from_numpy(images), torch.from_numpy(_label(raw)), CLASSES


def _label(raw):
    return (raw[:, 0] % len(CLASSES)).astype(np.int64)


def _draw(raw, size):
    """Images uint8 (n, 3, size, size) from random words uint64 (n, 6)."""
    label, colour, ground = _label(raw), raw[:, 1] % len(COLOURS), raw[:, 2] % len(GROUNDS)
    radius, shift_x, shift_y = (raw[:, 3:] % 1024).astype(np.float32).T[..., None, None] / 1024  # (n, 1, 1), in [0, 1)

    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1  # pixel centres in [-1, 1]
    u = axis[None, None, :] - (2 * shift_x - 1) * SHIFT
    v = axis[None, :, None] - (2 * shift_y - 1) * SHIFT
    u, v = np.broadcast_arrays(u, v)  # (n, size, size)
    radius = RADIUS[0] + radius * (RADIUS[1] - RADIUS[0])

    distance = np.empty_like(u)
    for index, name in enumerate(CLASSES):
        of = label == index
        distance[of] = _DISTANCES[name](u[of], v[of], radius[of])
    coverage = np.clip(0.5 - distance * (size / 2), 0, 1)[:, None]  # anti-aliased over one pixel

    front, behind = (np.array(c, np.float32)[i][:, :, None, None] for c, i in ((COLOURS, colour), (GROUNDS, ground)))
    return np.rint(behind * (1 - coverage) + front * coverage).astype(np.uint8)


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


_DISTANCES = dict(zip(CLASSES, (_disk, _ring, _square, _triangle, _cross)))
