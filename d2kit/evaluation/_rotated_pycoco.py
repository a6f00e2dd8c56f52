"""pycocotools' matching by the overlap of rotated boxes.

Imported only where that backend is asked for: pycocotools is not loaded before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from d2kit.evaluation._pycoco import COCOevalMaxDets
from d2kit.layers.rotated_boxes import pairwise_iou_rotated


class RotatedCOCOeval(COCOevalMaxDets):
    """`COCOeval` of boxes whose annotations and results have `obb`.

    `obb` is centre x and y, width, height in pixels and radians clockwise as seen in the image.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803 - pycocotools' names
        """Return the overlap of each detection with each ground truth of one image and class.

        Args:
            imgId: image id.
            catId: category id; not used without `params.useCats`.

        Returns:
            (D, G) float64, detections by falling score; for crowd regions the share of the
            detection's area. An empty list where there is neither.
        """
        categories = [catId] if self.params.useCats else self.params.catIds
        truths = [t for c in categories for t in self._gts[imgId, c]]
        found = [d for c in categories for d in self._dts[imgId, c]]
        if not truths and not found:
            return []
        order = np.argsort([-d["score"] for d in found], kind="stable")[: self.params.maxDets[-1]]
        boxes, regions = _boxes([found[i] for i in order]), _boxes(truths)
        iou = pairwise_iou_rotated(boxes, regions).double().numpy()
        area = (boxes[:, 2] * boxes[:, 3]).numpy()[:, None]
        region_area = (regions[:, 2] * regions[:, 3]).numpy()[None, :]
        shared = iou * (area + region_area) / (1 + iou)
        crowd = np.array([bool(t.get("iscrowd", 0)) for t in truths], dtype=bool)[None, :]
        of_detection = np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)
        return np.where(crowd, of_detection, iou)


def _boxes(entries: list[dict[str, Any]]) -> torch.Tensor:
    """Return boxes (R, 5) float64 XYWHA in degrees counter-clockwise."""
    rows = torch.tensor([entry["obb"] for entry in entries], dtype=torch.float64).reshape(-1, 5)
    rows[:, 4] *= -180 / math.pi
    return rows
