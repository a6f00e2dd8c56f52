"""Cropping and padding, and the clipping of polygons to a rectangle without a geometry library."""

import numpy as np
from fvcore.transforms import transform as fvcore_transform

_MIN_AREA = 1e-9  # square pixels


class CropTransform(fvcore_transform.CropTransform):
    """Crop to a window; fvcore's, with polygons clipped here instead of by shapely.

    Args:
        x0: left edge of the window, pixels.
        y0: upper edge.
        w: width of the window.
        h: height of the window.
        orig_w: width of the image before cropping; only the inverse needs it.
        orig_h: height of the image before cropping.
    """

    def apply_polygons(self, polygons: list) -> list:
        """Crop polygons, each (P, 2); one may vanish, or fall into several parts."""
        window = (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h)
        parts = [part for p in polygons for part in clip_polygon_to_rect(p, *window)]
        return [part - (self.x0, self.y0) for part in parts]

    def inverse(self) -> "PadTransform":
        """Return the padding to the former size.

        Raises:
            ValueError: where the former size was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise ValueError("CropTransform has an inverse only if made with orig_w and orig_h")
        right, bottom = self.orig_w - self.x0 - self.w, self.orig_h - self.y0 - self.h
        return PadTransform(self.x0, self.y0, right, bottom, orig_w=self.w, orig_h=self.h)


class PadTransform(fvcore_transform.PadTransform):
    """Add a border; fvcore's, with an inverse that crops polygons without shapely.

    Args:
        x0: columns added at the left, pixels.
        y0: rows added at the top.
        x1: columns added at the right.
        y1: rows added at the bottom.
        orig_w: width of the image before padding; only the inverse needs it.
        orig_h: height of the image before padding.
        pad_value: value of the border in images.
        seg_pad_value: value of the border in segmentations.
    """

    def inverse(self) -> CropTransform:
        """Return the crop to the former size.

        Raises:
            ValueError: where the former size was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise ValueError("PadTransform has an inverse only if made with orig_w and orig_h")
        width, height = self.orig_w + self.x0 + self.x1, self.orig_h + self.y0 + self.y1
        return CropTransform(self.x0, self.y0, self.orig_w, self.orig_h, width, height)


def clip_polygon_to_rect(
    polygon: np.ndarray, x0: float, y0: float, x1: float, y1: float
) -> list[np.ndarray]:
    """Intersect a polygon with a rectangle; a concave polygon may fall into several parts.

    Args:
        polygon: (P, 2) floating point vertices (x, y), in order, not closed.
        x0: left edge of the rectangle, in the polygon's coordinates.
        y0: upper edge.
        x1: right edge.
        y1: lower edge.

    Returns:
        The parts, each a (Q, 2) float64 array with Q >= 3; empty where nothing is left. Parts
        without area are dropped. A polygon that crosses itself keeps its area but is not split.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    if len(points) < 3:
        return []
    parts = [points]
    for axis, sign, limit in ((0, 1.0, x0), (0, -1.0, x1), (1, 1.0, y0), (1, -1.0, y1)):
        parts = [piece for part in parts for piece in _clip_half_plane(part, axis, sign, limit)]
    return [part for part in parts if len(part) >= 3 and abs(_signed_area(part)) > _MIN_AREA]


def _signed_area(points: np.ndarray) -> float:
    """Return the shoelace area of (P, 2) `points`, in square pixels."""
    x, y = (points - points[0]).T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _clip_half_plane(points: np.ndarray, axis: int, sign: float, limit: float) -> list[np.ndarray]:
    """Keep of `points` what satisfies ``sign * (coordinate - limit) >= 0`` along `axis`.

    The line cuts the outline into chains that lie inside. Along the line, inside and outside of
    a simple polygon alternate, so that the sorted crossings pair up into the segments which close
    the chains again.
    """
    distance = sign * (points[:, axis] - limit)
    inside = distance >= 0
    if inside.all():
        return [points]
    if not inside.any():
        return []
    after = np.roll(inside, -1)
    edges = np.flatnonzero(inside != after)
    if inside[edges[0]]:  # start with an edge that enters
        edges = np.roll(edges, -1)
    ends = (edges + 1) % len(points)
    fraction = distance[edges] / (distance[edges] - distance[ends])
    crossings = points[edges] + fraction[:, None] * (points[ends] - points[edges])
    crossings[:, axis] = limit

    chains = []
    for enter in range(0, len(edges), 2):
        count = (edges[enter + 1] - ends[enter]) % len(points) + 1
        members = (ends[enter] + np.arange(count)) % len(points)
        chains.append(
            np.concatenate([crossings[enter, None], points[members], crossings[enter + 1, None]])
        )
    return _close_chains(chains, crossings[:, 1 - axis])


def _close_chains(chains: list[np.ndarray], positions: np.ndarray) -> list[np.ndarray]:
    """Join `chains` along the line; crossing 2k enters and 2k+1 leaves at chain k."""
    pairs = np.argsort(positions, kind="stable").reshape(-1, 2)
    if ((pairs[:, 0] + pairs[:, 1]) % 2 == 0).any():  # the outline crosses itself: keep it whole
        return [np.concatenate(chains)]
    partner = {int(a): int(b) for a, b in pairs} | {int(b): int(a) for a, b in pairs}
    polygons, left = [], set(range(len(chains)))
    while left:
        chain, members = min(left), []
        while chain in left:
            left.remove(chain)
            members.append(chains[chain])
            chain = partner[2 * chain + 1] // 2
        polygons.append(np.concatenate(members))
    return polygons
