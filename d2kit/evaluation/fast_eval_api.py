"""COCO evaluation in Rust (hotcoco) behind pycocotools' interface."""

from __future__ import annotations

from typing import Any


def to_hotcoco(coco: Any) -> Any:
    """Turn a pycocotools ``COCO`` (or anything with its ``dataset`` dict) into a hotcoco one.

    Args:
        coco: a pycocotools or hotcoco ``COCO``, or None.

    Returns:
        A ``hotcoco.COCO``: the object itself where it is one, else a converted copy.
    """
    import hotcoco

    if coco is None or isinstance(coco, hotcoco.COCO):
        return coco
    dataset = dict(coco.dataset)
    dataset.setdefault("annotations", [])
    return hotcoco.COCO(dataset)


class COCOeval_opt:  # noqa: N801 - Detectron2's name
    """``pycocotools.cocoeval.COCOeval`` computed by hotcoco: same interface, same numbers.

    Args:
        cocoGt: ground truth; pycocotools or hotcoco ``COCO``.
        cocoDt: detections, as ``cocoGt.loadRes`` gives them.
        iouType: ``bbox``, ``segm`` or ``keypoints``.
    """

    def __init__(
        self,
        cocoGt: Any = None,  # noqa: N803 - pycocotools' names
        cocoDt: Any = None,  # noqa: N803
        iouType: str = "segm",  # noqa: N803
    ) -> None:
        import hotcoco

        self._impl = hotcoco.COCOeval(to_hotcoco(cocoGt), to_hotcoco(cocoDt), iouType)

    @property
    def params(self) -> Any:
        """Live evaluation settings; assign whole lists (reads give copies)."""
        return self._impl.params

    @params.setter
    def params(self, value: Any) -> None:
        self._impl.params = value

    @property
    def eval(self) -> dict[str, Any]:
        """The result of `accumulate`: ``precision`` (T, R, K, A, M), ``recall`` (T, K, A, M), ...

        T IoU thresholds, R recall thresholds, K categories, A area ranges, M detection limits.
        """
        return self._impl.eval or {}

    @property
    def evalImgs(self) -> list[dict[str, Any] | None]:  # noqa: N802
        """Per category, area range and image: matches, as pycocotools lists them."""
        return self._impl.eval_imgs

    @property
    def stats(self) -> Any:
        """The twelve (keypoints: ten) summary figures, in [0, 1], -1 where undefined."""
        return self._impl.stats

    @property
    def cocoGt(self) -> Any:  # noqa: N802
        """The ground truth."""
        return self._impl.coco_gt

    @property
    def cocoDt(self) -> Any:  # noqa: N802
        """The detections."""
        return self._impl.coco_dt

    def evaluate(self) -> None:
        """Match detections to ground truth, image by image."""
        self._impl.evaluate()

    def accumulate(self, p: Any = None) -> None:
        """Turn the matches into precision and recall.

        Args:
            p: settings to use instead of `params`, as in pycocotools.
        """
        if p is not None:
            self._impl.params = p
        self._impl.accumulate()

    def summarize(self) -> None:
        """Fill `stats` and print the summary table."""
        self._impl.summarize()
