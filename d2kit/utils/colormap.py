"""Colours that are easy to tell apart, computed once and the same everywhere."""

import functools

import numpy as np
from numpy.typing import NDArray

__all__ = ["colormap", "random_color", "random_colors"]

_COUNT = 80
_LIGHTNESS = (0.45, 0.92)  # of OKLab: neither near black nor near white
_draws = np.random.default_rng(0)  # our own: pictures must not move anybody's random numbers


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return OKLab coordinates, in which distance is about what the eye sees.

    Args:
        rgb: (N, 3) sRGB in [0, 1].

    Returns:
        (N, 3) lightness, green-red, blue-yellow.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cones.T) @ to_lab.T


@functools.cache
def _palette() -> NDArray[np.float32]:
    """Return (80, 3) RGB colours in [0, 1]; each is the one farthest from all before it."""
    steps = np.linspace(0, 1, 16)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(rgb)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > _LIGHTNESS[0]) & (lab[:, 0] < _LIGHTNESS[1]) & (chroma > 0.06)
    rgb, lab = rgb[usable], lab[usable]
    chosen = [int(np.hypot(lab[:, 1], lab[:, 2]).argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < _COUNT:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return rgb[chosen].astype(np.float32)


def colormap(rgb: bool = False, maximum: int = 255) -> NDArray[np.float32]:
    """Return the whole palette.

    Args:
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        (80, 3) float32 in [0, maximum]; the first ones differ most.

    Raises:
        ValueError: if `maximum` is another number.
    """
    if maximum not in (255, 1):
        raise ValueError(f"colormap: maximum must be 255 or 1, got {maximum}")
    colours = _palette() * np.float32(maximum)
    return colours if rgb else np.ascontiguousarray(colours[:, ::-1])


def random_color(rgb: bool = False, maximum: int = 255) -> NDArray[np.float32]:
    """Return a colour of the palette; the sequence of calls is the same in every process.

    Args:
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        (3,) float32 in [0, maximum].
    """
    return colormap(rgb, maximum)[int(_draws.integers(_COUNT))]


def random_colors(
    N: int,  # noqa: N803 the documented name
    rgb: bool = False,
    maximum: int = 255,
) -> list[NDArray[np.float32]]:
    """Return `N` different colours of the palette, repeated where it has fewer.

    Args:
        N: how many.
        rgb: order of the channels: RGB or, by default, BGR.
        maximum: 255 or 1, the value of a full channel.

    Returns:
        `N` arrays (3,) float32 in [0, maximum].
    """
    colours = colormap(rgb, maximum)
    order = _draws.permutation(_COUNT)
    return [colours[order[i % _COUNT]] for i in range(N)]
