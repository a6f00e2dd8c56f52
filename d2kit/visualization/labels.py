"""Colours, texts and segments of a picture's objects."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2kit.utils.text import drawn

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


Color = tuple[float, float, float]

_OFF_WHITE: Color = (1.0, 1.0, 240.0 / 255)
_BLACK: Color = (0.0, 0.0, 0.0)
_RED: Color = (1.0, 0.0, 0.0)
_GOLDEN = 0.618033988749895  # hue step: any run of neighbours is spread over the circle
_SHADES = ((0.85, 1.0), (0.60, 1.0), (1.0, 0.82))  # (saturation, value)


def palette(index: int) -> Color:
    """Return colour `index` of an endless list whose neighbours differ clearly.

    Args:
        index: >= 0; the same index always gives the same colour.
    """
    saturation, value = _SHADES[index % len(_SHADES)]
    return colorsys.hsv_to_rgb((0.02 + index * _GOLDEN) % 1.0, saturation, value)


def to_rgb(color: Any) -> Color:
    """Return any colour notation as (r, g, b) in [0, 1].

    Args:
        color: a name or hex string of matplotlib's (``"g"``, ``"tab:blue"``, ``"#ff8800"``), or
            3 or 4 numbers in [0, 1], or in [0, 255] where one exceeds 1. Opacity is dropped.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(color, str):
        from matplotlib.colors import to_rgb as named

        return named(color)
    values = [float(value) for value in color]
    if len(values) not in (3, 4) or min(values) < 0 or max(values) > 255:
        raise ValueError(f"A colour is a name or 3 numbers in [0, 1] or [0, 255], got {color!r}")
    scale = 255.0 if max(values) > 1 else 1.0
    return (values[0] / scale, values[1] / scale, values[2] / scale)


def to_bytes(color: Any) -> tuple[int, int, int]:
    """Return a colour as three integers in [0, 255]."""
    red, green, blue = to_rgb(color)
    return round(red * 255), round(green * 255), round(blue * 255)


def change_brightness(color: Any, factor: float) -> Color:
    """Scale the lightness of a colour.

    Args:
        color: see `to_rgb`.
        factor: in [-1, 1]; -0.5 halves the lightness, 0.5 makes it half as much again.

    Raises:
        ValueError: `factor` is outside its range.
    """
    if not -1.0 <= factor <= 1.0:
        raise ValueError(f"brightness_factor must be in [-1, 1], got {factor}")
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    lightness = min(max(lightness * (1.0 + factor), 0.0), 1.0)
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def luminance(color: Color) -> float:
    """Return the relative luminance in [0, 1] (ITU-R BT.709, linearised by a power of 2.2)."""
    red, green, blue = (channel**2.2 for channel in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def text_color_on(background: Color) -> Color:
    """Return black or white, whichever contrasts more with `background` (WCAG 2.1)."""
    return _BLACK if (luminance(background) + 0.05) ** 2 > 1.05 * 0.05 else (1.0, 1.0, 1.0)


def lightened(color: Any, least: float = 0.3) -> Color:
    """Mix in white until the luminance is at least `least`, so that text shows on black."""
    rgb = to_rgb(color)
    for step in range(21):
        mixed = _mix(rgb, step / 20)
        if luminance(mixed) >= least:
            return mixed
    return (1.0, 1.0, 1.0)


def jitter(color: Any, index: int) -> Color:
    """Vary a colour a little, so that instances of one class can be told apart.

    Args:
        color: see `to_rgb`.
        index: the instance; the same index always varies a colour the same way, 0 not at all.
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    steps = ((index * _GOLDEN) % 1.0, (index * _GOLDEN * _GOLDEN) % 1.0)
    shift = [2 * s - 1 if index else 0.0 for s in steps]
    lightness = min(max(lightness + 0.14 * shift[0], 0.1), 0.9)
    return colorsys.hls_to_rgb((hue + 0.03 * shift[1]) % 1.0, lightness, saturation)


def _mix(color: Color, white: float) -> Color:
    mixed: Sequence[float] = [channel + (1.0 - channel) * white for channel in color]
    return (mixed[0], mixed[1], mixed[2])


def create_text_labels(
    classes: Sequence[int] | None,
    scores: Any,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[Any] | None = None,
) -> list[str] | None:
    """Write one label per instance: class, score in percent, whether it is a crowd.

    Args:
        classes: R class indices; None: no class in the label.
        scores: R scores in [0, 1], or None.
        class_names: names by index; where it is None or too short, the index is shown.
        is_crowd: R flags, or None.

    Returns:
        R labels such as ``"person 98%"`` or ``"person|crowd"``; None if there is nothing to say.
    """
    parts: list[list[str]] = []
    if classes is not None:
        names = class_names or ()
        indices = [int(c) for c in classes]
        parts.append([drawn(names[c]) if 0 <= c < len(names) else str(c) for c in indices])
    if scores is not None:
        parts.append([f"{float(score):.0%}" for score in scores])
    if not parts:
        return None
    labels = [" ".join(words) for words in zip(*parts, strict=True)]
    if is_crowd is None:
        return labels
    marks = {True: "|crowd", False: ""}
    return [label + marks[bool(crowd)] for label, crowd in zip(labels, is_crowd, strict=True)]


class _PanopticPrediction:
    """The segments of a panoptic prediction, stuff and things apart.

    Args:
        panoptic_seg: (H, W) integer tensor of segment ids.
        segments_info: per segment a dict with ``id``, ``isthing``, ``category_id``; None: ids are
            class * `metadata.label_divisor` + instance, negative ids are void.
        metadata: needed where `segments_info` is None.
    """

    def __init__(
        self,
        panoptic_seg: torch.Tensor | np.ndarray,
        segments_info: Sequence[dict[str, Any]] | None,
        metadata: Any = None,
    ) -> None:
        self._seg = np.asarray(
            panoptic_seg.cpu() if isinstance(panoptic_seg, torch.Tensor) else panoptic_seg
        )
        ids, areas = np.unique(self._seg, return_counts=True)
        self._areas = {int(i): int(a) for i, a in zip(ids, areas, strict=True)}
        if segments_info is None:
            segments_info = self._infos_from_ids(metadata)
        self._infos = {int(info["id"]): info for info in segments_info}
        # large ones first, so that small ones are drawn on top
        order = sorted(self._areas, key=lambda i: -self._areas[i])
        self._ids = [i for i in order if i in self._infos]

    def _infos_from_ids(self, metadata: Any) -> list[dict[str, Any]]:
        divisor = None if metadata is None else metadata.get("label_divisor")
        if not divisor:
            raise ValueError("Without segments_info, the metadata must have label_divisor")
        things = set((metadata.get("thing_dataset_id_to_contiguous_id") or {}).values())
        return [
            {"id": i, "category_id": i // divisor, "isthing": i // divisor in things}
            for i in self._areas
            if i >= 0 and i // divisor != metadata.get("ignore_label", -1)
        ]

    def non_empty_mask(self) -> np.ndarray:
        """Return (H, W) bool: pixels that belong to a segment."""
        return np.isin(self._seg, list(self._ids))

    def semantic_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each stuff segment, large ones first."""
        yield from self._masks(things=False)

    def instance_masks(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield mask (H, W) bool and info of each thing, large ones first."""
        yield from self._masks(things=True)

    def _masks(self, things: bool) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        for index in self._ids:
            if bool(self._infos[index]["isthing"]) == things:
                yield self._seg == index, self._infos[index]
