"""Crude triggers the frequency detector learns from (Zeng et al. 2021; method card 3.3).

Each takes uint8 images ``[n, c, h, w]`` and numpy's generator, and returns changed copies.
Lengths are the source's on 32 pixels, scaled to the image's smaller side.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]

SIDES = (2, 7)
MARGINS = (0, 5)
NOISE_MEAN = 25.0
NOISE_VARIANCES = (10.0, 70.0)
BLEND = 0.3
SHADE = 0.5
SHADOW_CORNERS = (3, 5)


def _rectangles(pixels: Pixels, rng: np.random.Generator) -> Iterator[tuple[int, slice, slice]]:
    """Draw one rectangle in a corner of every image: its number, rows and columns."""
    height, width = pixels.shape[2:]
    scale = min(height, width) / 32
    for number in range(len(pixels)):
        sides = np.maximum(1, np.rint(scale * rng.integers(SIDES[0], SIDES[1] + 1, 2)))
        margin = int(scale * rng.integers(MARGINS[0], MARGINS[1] + 1))
        places = []
        for length, side in zip((height, width), sides.astype(int), strict=True):
            start = margin if rng.random() < 0.5 else max(length - margin - side, 0)
            places.append(slice(start, start + side))
        yield number, places[0], places[1]


def white_rectangle(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Put a white rectangle in a corner."""
    out = pixels.copy()
    for number, rows, columns in _rectangles(pixels, rng):
        out[number, :, rows, columns] = 255
    return out


def noise_rectangle(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Put a rectangle of uniform noise in a corner."""
    out = pixels.copy()
    for number, rows, columns in _rectangles(pixels, rng):
        patch = out[number, :, rows, columns]
        patch[...] = rng.integers(0, 256, patch.shape)
    return out


def gaussian_noise(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Add bright Gaussian noise."""
    deviations = np.sqrt(rng.uniform(*NOISE_VARIANCES, (len(pixels), 1, 1, 1)))
    noise = NOISE_MEAN + deviations * rng.standard_normal(pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def shadow(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Darken a random polygon."""
    height, width = pixels.shape[2:]
    out = pixels.copy()
    for number in range(len(pixels)):
        count = int(rng.integers(SHADOW_CORNERS[0], SHADOW_CORNERS[1] + 1))
        corners = (rng.random((count, 2)) * (width, height)).tolist()
        canvas = Image.new("L", (width, height))
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=1)
        inside = np.asarray(canvas, dtype=bool)
        out[number][:, inside] = (SHADE * out[number][:, inside]).astype(np.uint8)
    return out


def blend(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Blend with another image of the set."""
    others = pixels[rng.permutation(len(pixels))]
    mixed = pixels + BLEND * others.astype(np.float32)
    return np.clip(mixed, 0, 255).astype(np.uint8)


CORRUPTIONS: tuple[Callable[[Pixels, np.random.Generator], Pixels], ...] = (
    white_rectangle,
    noise_rectangle,
    gaussian_noise,
    shadow,
    blend,
)


def corrupt(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Corrupt every image in one of the five ways, drawn evenly."""
    out = np.empty_like(pixels)
    ways = rng.integers(len(CORRUPTIONS), size=len(pixels))
    for number, way in enumerate(CORRUPTIONS):
        chosen = ways == number
        if chosen.any():
            out[chosen] = way(pixels[chosen], rng)
    return out
