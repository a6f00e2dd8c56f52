"""One-stage detectors: a class and a box at every place of every level, no proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode
from d2kit.layers import batched_nms, cat
from d2kit.layers.losses import focal_loss_of_labels
from d2kit.modeling.backbone import Backbone
from d2kit.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
    finite_rows,
)
from d2kit.modeling.meta_arch.common import ImageNormalizer, show_detections, to_input_size
from d2kit.modeling.proposal_generator.proposal_utils import top_of_level
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils import comm
from d2kit.utils.events import picture_due, put_scalars
from d2kit.utils.registry import overrides

__all__ = ["DenseDetector", "permute_to_N_HWA_K"]


_MOMENTUM = 0.9


class RunningCount(nn.Module):
    """Exponential average over the steps of a count, such as that of the positive anchors.

    A loss over the positives of a few images divides by it: the count of a single batch varies too
    much. The average is not part of the weights (no key in the state dict), but a checkpoint of the
    training holds it: see `training_state`.

    Args:
        initial: value before the first step, for a whole batch.
    """

    average: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        start = torch.full((), float(initial))
        self.register_buffer("average", start, persistent=False)

    def forward(self, count: Tensor) -> Tensor:
        """Take in the count of this step, and return the average, for one process.

        Args:
            count: 0-dim, of this process; at least 1 is taken for the whole batch.

        Returns:
            0-dim float, on the device: the average of the whole batch over the number of processes,
            so that the mean of the processes' losses is the loss of one on the whole batch.
        """
        world = comm.get_world_size()
        total = (comm.mean_over_ranks(count.float()) * world).clamp(min=1)
        # Not in place: the loss of a step before, whose gradient may be due, has the old value.
        self.average = _MOMENTUM * self.average + (1 - _MOMENTUM) * total
        return self.average / world

    def training_state(self) -> dict[str, Any]:
        """Return what a resumed training must know."""
        return {"average": self.average.clone()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` returned."""
        self.average = state["average"].to(self.average)


def permute_to_N_HWA_K(tensor: Tensor, K: int) -> Tensor:  # noqa: N802, N803
    """Bring the output of a convolutional head into one row per anchor.

    Args:
        tensor: (N, A * K, H, W), anchor-major.
        K: numbers per anchor.

    Returns:
        (N, H * W * A, K), in the order of the anchor generators.
    """
    if tensor.dim() != 4:
        raise ValueError(f"expected a tensor (N, A * K, H, W), got shape {tuple(tensor.shape)}")
    return tensor.permute(0, 2, 3, 1).reshape(tensor.shape[0], -1, K)


class DenseDetector(ImageNormalizer):
    """Image -> features -> head -> losses or detections; base of `RetinaNet` and `FCOS`.

    Subclasses write `forward_training` and `forward_inference`.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        head: list of features -> for each kind of prediction a list with one tensor
            (N, A * numbers, Hi, Wi) per level.
        head_in_features: names of the levels, fine to coarse; by default all of the backbone's.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
    """

    vis_period = 0
    input_format = "BGR"

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str] | None = None,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.head = head
        if head_in_features is None:
            shapes = backbone.output_shape()
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride or 0)
        self.head_in_features = list(head_in_features)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the detections.

        Args:
            batched_inputs: per image a dict with

                * `image`: (C, H, W), values in 0..255.
                * `instances`: ground truth with `gt_boxes`, `gt_classes`; in training.
                * `height`, `width`: size of the wanted result, by default the image's.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"instances": Instances}`` with
            `pred_boxes`, `scores`, `pred_classes`, best first.
        """
        images = self.preprocess_image(batched_inputs)
        targets = self.ground_truth(batched_inputs) if self.training else None
        features = self.backbone(images.tensor)
        levels = [features[name] for name in self.head_in_features]
        predictions = self.head(levels)
        if targets is None:
            results = self.forward_inference(images, levels, predictions)
            return to_input_size(results, batched_inputs, images.image_sizes)
        if picture_due(self.vis_period):
            with torch.no_grad():
                results = self.forward_inference(images, levels, predictions)
            self.visualize_training(batched_inputs, results)
        return self.forward_training(images, levels, predictions, targets)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Compute the losses; written by subclasses.

        Args:
            images: the batch.
            features: per level (N, C, Hi, Wi).
            predictions: what the head gave.
            gt_instances: per image, with `gt_boxes` and `gt_classes`.

        Returns:
            Name -> 0-dim loss.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_training")

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Detect; written by subclasses.

        Args:
            images: the batch.
            features: per level (N, C, Hi, Wi).
            predictions: what the head gave.

        Returns:
            Per image `pred_boxes`, `scores`, `pred_classes`, in the size the network saw.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_inference")

    def _transpose_dense_predictions(
        self, predictions: Sequence[Sequence[Tensor]], dims_per_anchor: Sequence[int]
    ) -> list[list[Tensor]]:
        """Bring each kind of prediction into one row per anchor; user classes override it.

        Args:
            predictions: per kind and level (N, A * numbers, Hi, Wi).
            dims_per_anchor: the numbers of each kind.

        Returns:
            Per kind and level (N, Hi*Wi*A, numbers).
        """
        return [
            [permute_to_N_HWA_K(level, dims) for level in kind]
            for kind, dims in zip(predictions, dims_per_anchor, strict=True)
        ]

    def _ema_update(
        self, name: str, value: float, initial_value: float, momentum: float = 0.9
    ) -> float:
        """Return the moving average of a number over the calls under one name.

        Args:
            name: of the average.
            value: the new number.
            initial_value: the average before the first call.
            momentum: weight of the old average, in [0, 1].
        """
        averages: dict[str, float] = self.__dict__.setdefault("_averages", {})
        old = averages.get(name, initial_value)
        averages[name] = old * momentum + value * (1 - momentum)
        return averages[name]

    def _decode_per_level_predictions(
        self,
        anchors: Boxes,
        pred_scores: Tensor,
        pred_deltas: Tensor,
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the best candidates of one level of one image, decoded, before suppression.

        Args:
            anchors: (A,).
            pred_scores: (A, K) in [0, 1].
            pred_deltas: (A, 4).
            score_thresh: only scores above it count.
            topk_candidates: pairs of anchor and class kept.
            image_size: (height, width).

        Returns:
            `pred_boxes`, `scores`, `pred_classes`, best first.
        """
        transform: Any = self.box2box_transform
        flat = pred_scores.flatten()
        count = min(topk_candidates, int((flat > score_thresh).sum()))
        scores, index = flat.topk(count)
        rows, classes = index // pred_scores.shape[1], index % pred_scores.shape[1]
        boxes = transform.apply_deltas(pred_deltas[rows], anchors.tensor[rows])
        found = {"pred_boxes": Boxes(boxes), "scores": scores, "pred_classes": classes}
        return Instances(image_size, **found)

    def _decode_multi_level_predictions(
        self,
        anchors: Sequence[Boxes],
        pred_scores: Sequence[Tensor],
        pred_deltas: Sequence[Tensor],
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the candidates of all levels of one image, see `_decode_per_level_predictions`."""
        levels = zip(anchors, pred_scores, pred_deltas, strict=True)
        return Instances.cat(
            [
                self._decode_per_level_predictions(
                    anchor, score, delta, score_thresh, topk_candidates, image_size
                )
                for anchor, score, delta in levels
            ]
        )

    def visualize_training(
        self, batched_inputs: list[dict[str, Any]], results: list[Instances]
    ) -> None:
        """Publish the first image with its ground truths and with its best detections.

        Args:
            batched_inputs: see `forward`.
            results: per image, as `forward_inference` gives them.
        """
        show_detections(batched_inputs, results, self.input_format)


def build_shared_arguments(cfg: CfgNode, node: CfgNode) -> dict[str, Any]:
    """Return the arguments whose keys `node`, of the detector, and `cfg` name alike for all."""
    return {
        "head_in_features": node.IN_FEATURES,
        "num_classes": node.NUM_CLASSES,
        "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
        "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        "test_score_thresh": node.SCORE_THRESH_TEST,
        "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": node.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "vis_period": cfg.VIS_PERIOD,
        "input_format": cfg.INPUT.FORMAT,
    }


class OneStageDetector(DenseDetector):
    """A `DenseDetector` with anchors, a focal loss, and one suppression for all levels.

    Args:
        anchor_generator: features -> anchors of each level (`Boxes`).
        box2box_transform: anchors + deltas <-> boxes.
        num_classes: K, background not counted.
        focal_loss_alpha: weight of positives in the focal loss, in [0, 1].
        focal_loss_gamma: exponent of the focal loss.
        test_score_thresh: only scores above it are detections.
        test_topk_candidates: candidates kept per level before suppression.
        test_nms_thresh: IoU.
        max_detections_per_image: detections kept.
        test_clip_boxes: clip candidates to the image before suppression, not only at the end.
        vis_period: publish a training picture every this many steps; 0: never.
        input_format: ``BGR`` or ``RGB``.
        initial_positives: positive places of a batch, before any is counted.
        **kwargs: as of `DenseDetector`.
    """

    def __init__(
        self,
        *,
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform | Box2BoxTransformLinear,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        test_clip_boxes: bool = False,
        vis_period: int = 0,
        input_format: str = "BGR",
        initial_positives: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.num_classes = num_classes
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.test_clip_boxes = test_clip_boxes
        self.vis_period = vis_period
        self.input_format = input_format
        self.loss_normalizer = RunningCount(initial_positives)
        self._initial_positives = initial_positives
        self._own_average = overrides(self, DenseDetector, "_ema_update")
        self._image_by_image = overrides(
            self,
            OneStageDetector,
            "inference_single_image",
            "_decode_multi_level_predictions",
            "_decode_per_level_predictions",
        )

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Turn the scores and deltas of one image into detections.

        Args:
            anchors: per level.
            box_cls: per level (Hi*Wi*A, K), scores in [0, 1].
            box_delta: per level (Hi*Wi*A, 4).
            image_size: (height, width).

        Returns:
            `pred_boxes`, `scores`, `pred_classes`, best first.
        """
        found = self._decode_multi_level_predictions(
            anchors,
            box_cls,
            box_delta,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        boxes, scores = found.pred_boxes.tensor[None], found.scores[None]
        return self._detections(boxes, scores, found.pred_classes[None], [image_size])[0]

    def _detect(
        self,
        anchors: list[Boxes],
        scores: list[Tensor],
        deltas: list[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        *,
        logits: bool,
    ) -> list[Instances]:
        """Detect on all images at once; image by image, where a subclass has its own step.

        Args:
            anchors: per level.
            scores: per level (N, A, K), in [0, 1] or `logits` of it.
            deltas: per level (N, A, 4).
            image_sizes: (height, width) per image.
            logits: whether the scores are still to be brought into [0, 1].
        """

        def unit(values: Tensor) -> Tensor:
            return values.float().sigmoid() if logits else values

        if self._image_by_image:
            return [
                self.inference_single_image(
                    anchors, [unit(x[i]) for x in scores], [x[i] for x in deltas], image_size
                )
                for i, image_size in enumerate(image_sizes)
            ]
        boxes, best, classes = self._best_candidates(anchors, scores, deltas)
        return self._detections(boxes, unit(best), classes, image_sizes)

    def _common_losses(
        self,
        anchors: Sequence[Boxes],
        logits: Sequence[Tensor],
        labels: Tensor,
        deltas: Sequence[Tensor],
        boxes: Sequence[Tensor],
        box_loss: str,
        smooth_l1_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute what both detectors lose.

        Args:
            anchors: per level.
            logits: per level (N, Hi*Wi*A, K).
            labels: (N, A) int64; K is background, -1 ignored.
            deltas: per level (N, Hi*Wi*A, 4).
            boxes: per image (A, 4), the matched ground truths.
            box_loss: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
            smooth_l1_beta: where L1 begins.

        Returns:
            Loss of the classes, loss of the boxes; which labels are positive (N, A); the running
            count of them, by which both losses are divided.
        """
        positive = (labels >= 0) & (labels != self.num_classes)
        count = positive.sum()
        put_scalars("", num_pos_anchors=count / len(labels))
        normalizer: Any
        if self._own_average:
            start = self._initial_positives
            normalizer = self._ema_update("loss_normalizer", max(int(count), 1), start)
        else:
            normalizer = self.loss_normalizer(count)
        of_classes = focal_loss_of_labels(
            cat(list(logits), dim=1), labels, self.focal_loss_alpha, self.focal_loss_gamma
        )
        of_boxes = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            [x.float() for x in deltas],
            boxes,
            positive,
            box_loss,
            smooth_l1_beta,
        )
        return of_classes / normalizer, of_boxes / normalizer, positive, normalizer

    def _best_candidates(
        self, anchors: Sequence[Boxes], scores: Sequence[Tensor], deltas: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the best pairs of anchor and class of each level and image; decode only those.

        The best k anchors by their best class hold the best k pairs: so one pass over all anchors
        and classes is enough, and the sort sees one number per anchor (6 ms where sorting all pairs
        takes 84, for 120,000 anchors and 80 classes on one core).

        Args:
            anchors: per level (A,).
            scores: per level (N, A, K), the higher the better, of any unit.
            deltas: per level (N, A, 4).

        Returns:
            boxes (N, P, 4); their scores (N, P), as given; their classes (N, P) int64.

        Source: Focal Loss for Dense Object Detection (Lin et al. 2017), section 4, Inference.
        """
        best, columns, chosen, sources = [], [], [], []
        for anchor, score, delta in zip(anchors, scores, deltas, strict=True):
            _, rows = top_of_level(score.amax(dim=2), self.test_topk_candidates)
            by_class = rows.unsqueeze(-1).expand(-1, -1, score.shape[2])
            pairs = score.gather(1, by_class).flatten(1)
            values, index = top_of_level(pairs, self.test_topk_candidates)
            rows = rows.gather(1, index // score.shape[2])
            best.append(values)
            columns.append(index)
            chosen.append(delta.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)))
            sources.append(anchor.tensor[rows])
        source, delta = torch.cat(sources, dim=1), torch.cat(chosen, dim=1)
        boxes = self.box2box_transform.apply_deltas(delta.flatten(0, 1), source.flatten(0, 1))
        classes = torch.cat(columns, dim=1) % scores[0].shape[2]
        return boxes.view_as(source), torch.cat(best, dim=1), classes

    def _detections(
        self,
        boxes: Tensor,
        scores: Tensor,
        classes: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Filter and suppress the candidates of each image.

        Args:
            boxes: (N, P, 4) XYXY pixels; those that are not finite are dropped.
            scores: (N, P) in [0, 1].
            classes: (N, P) int64.
            image_sizes: (height, width) per image.

        Returns:
            Per image `pred_boxes` (clipped only if `test_clip_boxes`), `scores` and
            `pred_classes`, best first.
        """
        usable = (scores > self.test_score_thresh) & finite_rows(boxes)
        # in one table, as each choice by a mask is a wait of the host for CUDA
        numbers = (scores.unsqueeze(2), classes.unsqueeze(2).to(boxes.dtype))
        table = torch.cat((boxes, *numbers), dim=2)
        results = []
        for i, image_size in enumerate(image_sizes):
            rows = table[i][usable[i]]
            box, score, label = rows[:, :4], rows[:, 4], rows[:, 5].long()
            if self.test_clip_boxes:
                clipped = Boxes(box)
                clipped.clip(image_size)
                box = clipped.tensor
            keep = batched_nms(box, score, label, self.test_nms_thresh)
            keep = keep[: self.max_detections_per_image]
            found = {"pred_boxes": Boxes(box[keep]), "scores": score[keep]}
            results.append(Instances(image_size, **found, pred_classes=label[keep]))
        return results
