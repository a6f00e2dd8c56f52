"""Region proposal network.

Source: Faster R-CNN (Ren et al. 2015), section 3; on a pyramid: FPN (Lin et al. 2017), section 4.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import Conv2d, ShapeSpec, cat
from d2kit.layers.blocks import normal_fill
from d2kit.layers.losses import weighted, weights_per_loss
from d2kit.layers.wrappers import region_shape, shapes_of
from d2kit.modeling.anchor_generator import build_anchor_generator
from d2kit.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformRotated,
    Matcher,
    _dense_box_regression_loss,
    match_boxes,
    rows_or_zeros,
)
from d2kit.modeling.proposal_generator.proposal_utils import (
    find_top_rpn_proposals,
    suppress_and_pad,
    suppress_and_trim,
    top_of_level,
)
from d2kit.modeling.sampling import for_image, generator_of_image, subsample_masks
from d2kit.structures import Boxes, ImageList, Instances
from d2kit.utils.devices import Constants, shapes_are_fixed
from d2kit.utils.events import put_scalars
from d2kit.utils.registry import Registry, overrides

__all__ = [
    "PROPOSAL_GENERATOR_REGISTRY",
    "RPN",
    "RPN_HEAD_REGISTRY",
    "RRPN",
    "StandardRPNHead",
    "build_proposal_generator",
    "build_rpn_head",
    "find_top_rrpn_proposals",
]


PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
"""Proposal generators: called with ``(cfg, input_shape)``, they return an ``nn.Module``."""


def build_proposal_generator(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> Any:
    """Build the proposal generator that ``cfg.MODEL.PROPOSAL_GENERATOR.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape, as the backbone gives it.

    Returns:
        The module, or None for ``"PrecomputedProposals"``, where the data brings the proposals.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name == "PrecomputedProposals":
        return None
    return PROPOSAL_GENERATOR_REGISTRY.get(name)(cfg, input_shape)


RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
"""RPN heads: called with ``(cfg, input_shape: list[ShapeSpec])``.

The module maps a list of features (N, C, Hi, Wi) to two lists, one entry per level: objectness
logits (N, A, Hi, Wi) and box deltas (N, A*4, Hi, Wi), anchor-major.
"""


def build_rpn_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the RPN head that ``cfg.MODEL.RPN.HEAD_NAME`` names.

    Args:
        cfg: the config.
        input_shape: shape of each feature level.

    Returns:
        The head.
    """
    found: nn.Module = RPN_HEAD_REGISTRY.get(cfg.MODEL.RPN.HEAD_NAME)(cfg, input_shape)
    return found


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then two 1x1 convolutions for objectness and deltas, shared by all levels.

    Args:
        in_channels: C of every level.
        num_anchors: A, anchors per position, the same on every level.
        box_dim: numbers per box: 4 (XYXY) or 5 (rotated).
        conv_dims: output channels of each 3x3 convolution; -1 means its input's.

    Source: Faster R-CNN (Ren et al. 2015), section 3.1.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_anchors: int,
        box_dim: int = 4,
        conv_dims: Sequence[int] = (-1,),
    ) -> None:
        super().__init__()
        widths = [in_channels]
        for dim in conv_dims:
            if dim == 0 or dim < -1:
                raise ValueError(f"MODEL.RPN.CONV_DIMS: expected positive or -1, got {dim}")
            widths.append(widths[-1] if dim == -1 else dim)
        convs = {
            f"conv{k}": self._get_rpn_conv(before, after)
            for k, (before, after) in enumerate(pairwise(widths))
        }
        # a lone convolution has no number in the names of the published weights
        self.conv = convs["conv0"] if len(convs) == 1 else nn.Sequential(OrderedDict(convs))
        self.objectness_logits = nn.Conv2d(widths[-1], num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(widths[-1], num_anchors * box_dim, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                normal_fill(layer, std=0.01)

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Make one 3x3 convolution with its activation; user classes override it."""
        return Conv2d(in_channels, out_channels, 3, padding=1, activation=nn.ReLU())

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the levels' shapes.

        Raises:
            ValueError: if the levels differ in channels or in anchors per position.
        """
        channels = {region_shape(shape, "StandardRPNHead")[0] for shape in input_shape}
        generator: Any = build_anchor_generator(cfg, input_shape)
        anchors = set(generator.num_anchors)
        if len(channels) != 1 or len(anchors) != 1:
            raise ValueError(
                "the RPN head is shared by all levels of MODEL.RPN.IN_FEATURES, so all need the "
                f"same channels and anchors per position; got channels {sorted(channels)} and "
                f"anchors {sorted(anchors)} (see MODEL.ANCHOR_GENERATOR)"
            )
        return {
            "in_channels": channels.pop(),
            "num_anchors": anchors.pop(),
            "box_dim": generator.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict objectness and deltas on every level.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Per level: logits (N, A, Hi, Wi); deltas (N, A*4, Hi, Wi).
        """
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(t) for t in hidden], [self.anchor_deltas(t) for t in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Region proposal network: anchors, head, labelling, losses, and the choice of proposals.

    Args:
        in_features: names of the levels to use, finest first.
        head: see `RPN_HEAD_REGISTRY`.
        anchor_generator: features -> anchors of each level (`Boxes`).
        anchor_matcher: IoU matrix (G, A) -> matches and labels.
        box2box_transform: anchors + deltas <-> boxes.
        batch_size_per_image: anchors sampled per image for the losses.
        positive_fraction: largest share of positives among them.
        pre_nms_topk: (training, inference) boxes per level before suppression.
        post_nms_topk: (training, inference) boxes per image after it.
        nms_thresh: IoU.
        min_box_size: pixels; smaller proposals are dropped.
        anchor_boundary_thresh: anchors further outside the image than this many pixels are
            ignored in training; negative: none is.
        loss_weight: one factor, or one per loss (``loss_rpn_cls``, ``loss_rpn_loc``).
        box_reg_loss_type: ``smooth_l1``, ``giou``, ``diou`` or ``ciou``.
        smooth_l1_beta: where L1 begins; 0 is plain L1.
    """

    _constants: Constants | None = None  # of models that were stored whole before there were any

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[float, float],
        post_nms_topk: tuple[float, float],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        anchor_boundary_thresh: float = -1.0,
        loss_weight: float | dict[str, float] = 1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: int(pre_nms_topk[0]), False: int(pre_nms_topk[1])}
        self.post_nms_topk = {True: int(post_nms_topk[0]), False: int(post_nms_topk[1])}
        self.nms_thresh = nms_thresh
        self.min_box_size = float(min_box_size)
        self.anchor_boundary_thresh = anchor_boundary_thresh
        self.loss_weight = weights_per_loss(loss_weight, ("loss_rpn_cls", "loss_rpn_loc"))
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self._decodes_all = overrides(self, RPN, "_decode_proposals")
        self._constants = Constants()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        rpn = cfg.MODEL.RPN
        shapes = shapes_of(rpn.IN_FEATURES, input_shape, "MODEL.RPN.IN_FEATURES")
        return {
            "in_features": rpn.IN_FEATURES,
            "head": build_rpn_head(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": Matcher(
                rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True
            ),
            "box2box_transform": Box2BoxTransform(weights=rpn.BBOX_REG_WEIGHTS),
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        }

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors to ground truths and sample those that enter the losses.

        Args:
            anchors: per level.
            gt_instances: per image, with `gt_boxes`.

        Returns:
            Per image: labels (A,) int8, 1 positive, 0 negative, -1 ignored; and the matched
            ground-truth box of each anchor (A, 4), zeros where the image has none.

        Source: Faster R-CNN (Ren et al. 2015), section 3.1.2.
        """
        all_anchors = type(anchors[0]).cat(anchors)
        reach: Any = self.anchor_boundary_thresh
        labels, boxes = [], []
        for i, gt in enumerate(gt_instances):
            index, label = match_boxes(self.anchor_matcher, gt.gt_boxes, all_anchors)
            if reach >= 0:
                label = torch.where(all_anchors.inside_box(gt.image_size, reach), label, -1)
            with for_image(i):
                labels.append(self._subsample_labels(label))
            boxes.append(rows_or_zeros(gt.gt_boxes.tensor, index))
        return labels, boxes

    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Return `label` (A,) int8 with all but the sampled anchors of one image set to -1.

        User classes override it, or call it in their `label_and_sample_anchors`.
        """
        positive, negative = subsample_masks(
            label,
            self.batch_size_per_image,
            self.positive_fraction,
            0,
            generator=generator_of_image("rpn", label.device),
        )
        return torch.where(positive | negative, label, -1).to(torch.int8)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses over the sampled anchors.

        Both are sums divided by `batch_size_per_image` times the number of images, whatever the
        number of anchors really sampled.

        Args:
            anchors: per level.
            pred_objectness_logits: per level (N, Hi*Wi*A).
            gt_labels: per image (A,), see `label_and_sample_anchors`.
            pred_anchor_deltas: per level (N, Hi*Wi*A, 4).
            gt_boxes: per image (A, 4).

        Returns:
            ``loss_rpn_cls`` and ``loss_rpn_loc``, weighted.

        Source: Faster R-CNN (Ren et al. 2015), equation 1.
        """
        labels = torch.stack(gt_labels)
        positive, negative = labels == 1, labels == 0
        images = len(labels)
        put_scalars(
            "rpn",
            num_pos_anchors=positive.sum() / images,
            num_neg_anchors=negative.sum() / images,
        )
        logits = cat(pred_objectness_logits, dim=1).float()
        # Of all anchors, then masked: to select some, the host would have to wait for the device.
        entropy = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
        objectness = torch.where(positive | negative, entropy, 0.0).sum()
        location = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            positive,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        sampled = self.batch_size_per_image * images
        return weighted(
            self.loss_weight, loss_rpn_cls=objectness / sampled, loss_rpn_loc=location / sampled
        )

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose boxes and, in training, compute the losses.

        Args:
            images: the batch (only its image sizes are used).
            features: name -> (N, C, Hi, Wi).
            gt_instances: per image, with `gt_boxes`; needed in training.

        Returns:
            Per image `Instances` with `proposal_boxes` and `objectness_logits`; the losses (empty
            at inference).

        Raises:
            ValueError: in training without `gt_instances`.
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        maps, delta_maps = self.rpn_head(levels)
        box_dim = anchors[0].tensor.shape[1]
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in maps]
        deltas = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, box_dim) for x in delta_maps]
        losses: dict[str, Tensor] = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("the RPN needs gt_instances in training mode, got None")
            labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, labels, deltas, boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Choose the best anchors of each level, decode only those, and suppress overlaps.

        Decoding after the choice gives what decoding everything gives (the choice looks at the
        logits alone), for about 5 of 270 thousand boxes of an 800x1333 image.

        Args:
            anchors: per level.
            pred_objectness_logits: per level (N, Hi*Wi*A).
            pred_anchor_deltas: per level (N, Hi*Wi*A, 4).
            image_sizes: (height, width) per image.

        Returns:
            See `find_top_rpn_proposals`.
        """
        if self._decodes_all:
            return find_top_rpn_proposals(
                self._decode_proposals(anchors, pred_anchor_deltas),
                pred_objectness_logits,
                image_sizes,
                self.nms_thresh,
                self.pre_nms_topk[self.training],
                self.post_nms_topk[self.training],
                self.min_box_size,
                self.training,
            )
        scores, deltas, places = [], [], []
        for logits, delta in zip(pred_objectness_logits, pred_anchor_deltas, strict=True):
            top, index = top_of_level(logits, self.pre_nms_topk[self.training])
            scores.append(top)
            deltas.append(delta.gather(1, index.unsqueeze(-1).expand(-1, -1, delta.shape[2])))
            places.append(index)
        every, delta = torch.cat([one.tensor for one in anchors]), torch.cat(deltas, dim=1)
        levels, finer = self._columns(places, anchors)
        source = every[torch.cat(places, dim=1) + finer]
        boxes = self.box2box_transform.apply_deltas(delta.flatten(0, 1), source.flatten(0, 1))
        boxes, joined = boxes.view_as(source), torch.cat(scores, dim=1)
        limits: Any = {
            "nms_thresh": self.nms_thresh,
            "post_nms_topk": self.post_nms_topk[self.training],
            "min_box_size": self.min_box_size,
        }
        if shapes_are_fixed():
            counts = [x.shape[1] for x in scores]
            return suppress_and_pad(boxes, joined, counts, image_sizes, **limits)
        return suppress_and_trim(
            boxes, joined, levels, image_sizes, training=self.training, **limits
        )

    def _columns(self, places: list[Tensor], anchors: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Return of each of the P chosen boxes the level, and how many anchors finer levels have.

        Args:
            places: per level, int64 (N, Pi).
            anchors: per level.

        Returns:
            Two int64 (P,).
        """
        # `len` would make the numbers of one picture constants of a trace
        starts = list(accumulate((one.tensor.shape[0] for one in anchors[:-1]), initial=0))

        def make() -> tuple[Tensor, Tensor]:
            rows = [place[0] for place in places]
            levels = [torch.full_like(row, level) for level, row in enumerate(rows)]
            finer = [torch.zeros_like(row) + s for row, s in zip(rows, starts, strict=True)]
            return torch.cat(levels), torch.cat(finer)

        chosen = tuple(place.shape[1] for place in places)
        constants = Constants() if self._constants is None else self._constants
        return constants.kept((places[0].device, chosen, tuple(starts)), make)

    def _decode_proposals(
        self, anchors: list[Boxes], pred_anchor_deltas: list[Tensor]
    ) -> list[Tensor]:
        """Decode all anchors; where a subclass overrides it, its boxes are the candidates.

        Args:
            anchors: per level.
            pred_anchor_deltas: per level (N, Hi*Wi*A, 4).

        Returns:
            Per level (N, Hi*Wi*A, 4) XYXY pixels.
        """
        boxes = []
        for anchor, delta in zip(anchors, pred_anchor_deltas, strict=True):
            source = anchor.tensor.expand_as(delta)
            decoded = self.box2box_transform.apply_deltas(delta.flatten(0, 1), source.flatten(0, 1))
            boxes.append(decoded.view_as(delta))
        return boxes


find_top_rrpn_proposals = find_top_rpn_proposals
"""The same rules: boxes of five numbers are clipped, measured and suppressed as rotated ones."""


@PROPOSAL_GENERATOR_REGISTRY.register()
class RRPN(RPN):
    """An `RPN` with rotated anchors (`RotatedAnchorGenerator`) and rotated ground truth.

    Args:
        **kwargs: as of `RPN`; `box2box_transform` is a `Box2BoxTransformRotated`.

    Raises:
        ValueError: upright anchors, or a loss that has no rotated form.

    Source: Ma et al. (2018), section III.
    """

    @configurable
    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        if getattr(self.anchor_generator, "box_dim", 5) != 5:
            raise ValueError(
                "RRPN needs rotated anchors: set MODEL.ANCHOR_GENERATOR.NAME to "
                f"RotatedAnchorGenerator, got {type(self.anchor_generator).__name__}"
            )
        check_rotated_loss(self.box_reg_loss_type, "MODEL.RPN")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        weights = rotated_weights(cfg.MODEL.RPN.BBOX_REG_WEIGHTS, "MODEL.RPN")
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": Box2BoxTransformRotated(weights=weights),
        }


def rotated_weights(weights: Any, section: str) -> tuple[float, float, float, float, float]:
    """Return the five weights of rotated box deltas.

    Args:
        weights: as the config has them.
        section: of the config, for the message.

    Raises:
        ValueError: if they are not five.
    """
    if len(weights) != 5:
        raise ValueError(
            f"{section}.BBOX_REG_WEIGHTS: rotated boxes need five weights (dx, dy, dw, dh, "
            f"da), for example (10.0, 10.0, 5.0, 5.0, 1.0), got {tuple(weights)}"
        )
    dx, dy, dw, dh, da = weights
    return dx, dy, dw, dh, da


def check_rotated_loss(box_reg_loss_type: str, section: str) -> None:
    """Raise ValueError unless the box loss has a rotated form.

    Args:
        box_reg_loss_type: as the config has it.
        section: of the config, for the message.
    """
    if box_reg_loss_type != "smooth_l1":
        raise ValueError(
            f"{section}.BBOX_REG_LOSS_TYPE must be smooth_l1 for rotated boxes, got "
            f"{box_reg_loss_type!r}"
        )
