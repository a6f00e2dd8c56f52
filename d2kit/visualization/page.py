"""One HTML page of thumbnails, complete in itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from d2kit.utils.text import html_text

__all__ = ["make_page"]

SIDE = 360
"""Longest side of a thumbnail, in pixels: some 15 to 30 kB each."""

MAX_BYTES = 50_000_000
"""No picture is added beyond this size of the page."""

STYLE = """:root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:1.5em}
h1{font-size:1.5em;margin:0 0 .3em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:2px 12px;text-align:left;overflow-wrap:anywhere}
td+td,th+th{text-align:right;white-space:nowrap}
i{display:inline-block;width:.9em;height:.9em;margin-right:.6em;border-radius:2px}
main{display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start}figure{margin:0}
img{display:block;max-width:100%}figcaption{max-width:360px;margin-top:3px;overflow-wrap:anywhere;
opacity:.75;font-size:12px}"""


def make_page(
    pictures: Iterable[tuple[str, np.ndarray]],
    counts: Sequence[tuple[str, int, int]] = (),
    title: str = "Dataset",
    summary: str = "",
    colors: Mapping[str, str] | None = None,
) -> str:
    """Make a page of pictures.

    Args:
        pictures: (name, (H, W, 3) uint8 RGB).
        counts: (class, instances, images).
        title: of the page.
        summary: a line below it.
        colors: class -> "#rrggbb", shown beside the class.

    Returns:
        HTML with the pictures inside, at most `MAX_BYTES` and one picture long.
    """
    figures, size, left_out = [], 0, 0
    for name, picture in pictures:
        if size > MAX_BYTES:
            left_out += 1
            continue
        text = html_text(name)
        data = base64.b64encode(_thumbnail(picture)).decode()
        figures.append(
            f'<figure><img loading="lazy" alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
        size += len(figures[-1])
    rows = "".join(
        f"<tr><td>{_swatch((colors or {}).get(name))}{html_text(name)}</td>"
        f"<td>{n}</td><td>{k}</td></tr>"
        for name, n, k in counts
    )
    head = "<tr><th>class</th><th>instances</th><th>images</th></tr>"
    more = f"<p>{left_out} more pictures left out</p>" if left_out else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html_text(title)}</title>"
        f"<style>{STYLE}</style><h1>{html_text(title)}</h1><div>{html_text(summary, None)}</div>"
        f"{f'<table>{head}{rows}</table>' if rows else ''}<main>{''.join(figures)}</main>"
        f"{more}</html>\n"
    )


def _swatch(color: str | None) -> str:
    return f'<i style="background:{html_text(color)}"></i>' if color else ""


def _thumbnail(picture: np.ndarray) -> bytes:
    """Return a JPEG of at most `SIDE` pixels."""
    import cv2

    scale = min(1.0, SIDE / max(picture.shape[:2]))
    size = [max(1, round(s * scale)) for s in picture.shape[1::-1]]
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return data.tobytes()
