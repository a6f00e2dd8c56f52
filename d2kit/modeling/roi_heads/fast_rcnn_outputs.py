"""`FastRCNNOutputs`, which Detectron2 removed and published code still calls."""

from torch import Tensor

from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Box2BoxTransform
from d2kit.modeling.proposal_generator.proposal_utils import fast_rcnn_inference
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.structures import Instances

__all__ = ["FastRCNNOutputs"]


class FastRCNNOutputs:
    """Predictions of the second stage with their proposals; new code calls the predictor itself.

    Args:
        box2box_transform: proposals + deltas <-> boxes.
        pred_class_logits: (R, K+1), R over all images in order.
        pred_proposal_deltas: (R, K*4) or (R, 4).
        proposals: per image, with `proposal_boxes` and, for the losses, `gt_classes`, `gt_boxes`.
        smooth_l1_beta: where L1 begins; 0 is plain L1.
        box_reg_loss_type: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
    """

    def __init__(
        self,
        box2box_transform: Box2BoxTransform,
        pred_class_logits: Tensor,
        pred_proposal_deltas: Tensor,
        proposals: list[Instances],
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
    ) -> None:
        box_dim = len(box2box_transform.weights)
        self._rules = FastRCNNOutputLayers(  # its two small layers are not used
            ShapeSpec(channels=1, height=1, width=1),
            box2box_transform=box2box_transform,
            num_classes=pred_class_logits.shape[1] - 1,
            cls_agnostic_bbox_reg=pred_proposal_deltas.shape[1] == box_dim,
            smooth_l1_beta=smooth_l1_beta,
            box_reg_loss_type=box_reg_loss_type,
        )
        self._predictions = (pred_class_logits, pred_proposal_deltas)
        self._proposals = proposals

    def losses(self) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_box_reg``, see `FastRCNNOutputLayers.losses`."""
        found: dict[str, Tensor] = self._rules.losses(self._predictions, self._proposals)
        return found

    def softmax_cross_entropy_loss(self) -> Tensor:
        """Return ``loss_cls`` alone."""
        return self.losses()["loss_cls"]

    def box_reg_loss(self) -> Tensor:
        """Return ``loss_box_reg`` alone."""
        return self.losses()["loss_box_reg"]

    smooth_l1_loss = box_reg_loss

    def predict_boxes(self) -> tuple[Tensor, ...]:
        """Return per image all decoded boxes, (R, K*4) or (R, 4)."""
        found: tuple[Tensor, ...] = self._rules.predict_boxes(self._predictions, self._proposals)
        return found

    def predict_probs(self) -> tuple[Tensor, ...]:
        """Return per image the probabilities, (R, K+1)."""
        found: tuple[Tensor, ...] = self._rules.predict_probs(self._predictions, self._proposals)
        return found

    def inference(
        self, score_thresh: float, nms_thresh: float, topk_per_image: int
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return detections per image, and the rows of the proposals that they come from.

        Args:
            score_thresh: detections need a higher score.
            nms_thresh: IoU.
            topk_per_image: detections per image.
        """
        return fast_rcnn_inference(
            self.predict_boxes(),
            self.predict_probs(),
            [p.image_size for p in self._proposals],
            score_thresh,
            nms_thresh,
            topk_per_image,
        )
