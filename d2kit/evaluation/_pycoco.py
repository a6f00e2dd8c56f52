"""pycocotools' evaluation with a free limit of detections per image.

Imported only where that backend is asked for: pycocotools is not loaded before.
"""

from __future__ import annotations

import numpy as np
from pycocotools.cocoeval import COCOeval


class COCOevalMaxDets(COCOeval):
    """`COCOeval` whose summary takes the last entry of ``params.maxDets`` instead of 100."""

    def summarize(self) -> None:
        """Fill and print `stats` (12 figures, keypoints 10) at the limits in ``params.maxDets``.

        Raises:
            RuntimeError: `accumulate` has not been called.
        """
        if not self.eval:
            raise RuntimeError("Call evaluate() and accumulate() before summarize()")
        last = len(self.params.maxDets) - 1
        if self.params.iouType == "keypoints":
            areas = ("all", "medium", "large")
            rows = [(True, None, "all"), (True, 0.5, "all"), (True, 0.75, "all")]
            rows += [(True, None, area) for area in areas[1:]]
            rows += [(False, iou, area) for _, iou, area in rows]
            limits = [last] * 10
        else:
            areas = ("small", "medium", "large")
            rows = [(True, None, "all"), (True, 0.5, "all"), (True, 0.75, "all")]
            rows += [(True, None, area) for area in areas]
            rows += [(False, None, "all")] * 3 + [(False, None, area) for area in areas]
            limits = [last] * 6 + [0, 1, last] + [last] * 3
        self.stats = np.array(
            [self._figure(*row, limit) for row, limit in zip(rows, limits, strict=True)]
        )

    def _figure(self, precision: bool, iou: float | None, area: str, limit: int) -> float:
        """Mean of the defined entries of precision or recall; -1 where none is; printed too."""
        values = self.eval["precision" if precision else "recall"]
        if iou is not None:
            values = values[np.isclose(self.params.iouThrs, iou)]
        values = values[..., self.params.areaRngLbl.index(area), limit]
        values = values[values > -1]
        figure = float(np.mean(values)) if values.size else -1.0
        name = "AP" if precision else "AR"
        shown = "0.50:0.95" if iou is None else f"{iou:.2f}"
        limit_text = self.params.maxDets[limit]
        print(
            f" {name} @[ IoU={shown:<9} | area={area:>6} | maxDets={limit_text:>3} ] = {figure:.3f}"
        )
        return figure
