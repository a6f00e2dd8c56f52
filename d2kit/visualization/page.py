"""One HTML page of thumbnails, complete in itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["make_page"]

SIDE = 360
"""Longest side of a thumbnail, in pixels: some 15 to 30 kB each."""

MAX_BYTES = 50_000_000
"""No picture is added beyond this size of the page."""

STYLE = """body{font:14px sans-serif;margin:1.5em;background:#fafafa}
table{border-collapse:collapse;margin-bottom:1.5em}td,th{padding:2px 12px;text-align:left}
td+td,th+th{text-align:right}figure{display:inline-block;margin:6px;vertical-align:top}
figcaption{max-width:360px;overflow-wrap:anywhere;color:#555;font-size:12px}"""


def make_page(
    pictures: Iterable[tuple[str, np.ndarray]],
    counts: Sequence[tuple[str, int, int]] = (),
    title: str = "Dataset",
) -> str:
    """Make a page of pictures.

    Args:
        pictures: (name, (H, W, 3) uint8 RGB).
        counts: (class, instances, images).
        title: of the page.

    Returns:
        HTML with the pictures inside, at most `MAX_BYTES` and one picture long.
    """
    figures, size, left_out = [], 0, 0
    for name, picture in pictures:
        if size > MAX_BYTES:
            left_out += 1
            continue
        text = html.escape(name, quote=True)
        data = base64.b64encode(_thumbnail(picture)).decode()
        figures.append(
            f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
        size += len(figures[-1])
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{n}</td><td>{k}</td></tr>" for name, n, k in counts
    )
    head = "<tr><th>class</th><th>instances</th><th>images</th></tr>"
    more = f"<p>{left_out} more pictures left out</p>" if left_out else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"{f'<table>{head}{rows}</table>' if rows else ''}{''.join(figures)}{more}</html>\n"
    )


def _thumbnail(picture: np.ndarray) -> bytes:
    """Return a JPEG of at most `SIDE` pixels."""
    import cv2

    scale = min(1.0, SIDE / max(picture.shape[:2]))
    size = [max(1, round(s * scale)) for s in picture.shape[1::-1]]
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return data.tobytes()
