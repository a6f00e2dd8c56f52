"""Two-stage detectors: backbone, proposals, per-region heads.

Source: Faster R-CNN (Ren et al. 2015), Mask R-CNN (He et al. 2017).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.modeling.backbone import Backbone, build_backbone
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY
from d2kit.modeling.meta_arch.common import (
    ImageNormalizer,
    seeded_by_sample,
    show_boxes,
    to_input_size,
)
from d2kit.modeling.proposal_generator import RPN, build_proposal_generator
from d2kit.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads, build_roi_heads
from d2kit.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from d2kit.structures import Boxes, ImageList, Instances, ROIMasks
from d2kit.utils.devices import fixed_shapes
from d2kit.utils.events import picture_due
from d2kit.utils.registry import overrides

__all__ = ["GeneralizedRCNN", "ProposalNetwork"]


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(ImageNormalizer):
    """Image -> features -> proposals -> per-region heads.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        proposal_generator: see `RPN`; None where the inputs bring `proposals`.
        roi_heads: see `ROIHeads`.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
        input_format: ``BGR`` or ``RGB``; needed where pictures are published.
        vis_period: publish a training picture every this many steps; 0: never.
        whole_pixel_masks: lay masks on boxes of whole pixels, see `ROIMasks`.

    Raises:
        ValueError: if `vis_period` is positive without `input_format`.
    """

    roi_heads: Any
    replayed: Callable[[Tensor, list[tuple[int, int]]], Any] | None = None
    """Detects by CUDA graphs, see `compile_trunk`; None: no graphs."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        input_format: str | None = None,
        vis_period: int = 0,
        whole_pixel_masks: bool = False,
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        if vis_period > 0 and input_format is None:
            raise ValueError("input_format (BGR or RGB) is needed where vis_period is above 0")
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.input_format = input_format
        self.vis_period = vis_period
        self.whole_pixel_masks = whole_pixel_masks

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`."""
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "whole_pixel_masks": cfg.MODEL.ROI_MASK_HEAD.WHOLE_PIXELS,
        }

    def visualize_training(
        self, batched_inputs: list[dict[str, Any]], proposals: list[Instances]
    ) -> None:
        """Publish a picture of ground truths and proposals to the event storage.

        Args:
            batched_inputs: see `forward`.
            proposals: per image, with `proposal_boxes`.
        """
        show_boxes(batched_inputs, proposals, self.input_format or "BGR")

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the detections.

        Args:
            batched_inputs: per image a dict with

                * `image`: (C, H, W), values in 0..255.
                * `instances`: ground truth with `gt_boxes`, `gt_classes`, `gt_masks`; in training.
                * `height`, `width`: size of the wanted result, by default the image's.
                * `proposals`: with `proposal_boxes`, where there is no proposal generator.
                * `sample_seed`: int, decides the random choices on this image.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"instances": Instances}`` with
            `pred_boxes`, `scores`, `pred_classes` and, with masks, `pred_masks` (R, H, W) bool.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        return self._losses(batched_inputs, images, self.backbone(images.tensor))

    def _losses(
        self, batched_inputs: list[dict[str, Any]], images: ImageList, features: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the losses of heads and proposals."""
        targets = self.ground_truth(batched_inputs)
        with seeded_by_sample(batched_inputs):
            proposals, losses = self._propose(batched_inputs, images, features, targets)
            _, head_losses = self.roi_heads(images, features, proposals, targets)
        if picture_due(self.vis_period):
            self.visualize_training(batched_inputs, proposals)
        return {**head_losses, **losses}

    def _propose(
        self,
        batched_inputs: list[dict[str, Any]],
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return the proposals of each image, generated or brought by the input, and the losses."""
        if self.proposal_generator is not None:
            found: tuple[list[Instances], dict[str, Tensor]] = self.proposal_generator(
                images, features, targets
            )
            return found
        for i, item in enumerate(batched_inputs):
            if "proposals" not in item:
                raise ValueError(
                    "a model without proposal generator (MODEL.PROPOSAL_GENERATOR.NAME "
                    "PrecomputedProposals) needs 'proposals' in every input; "
                    f"input {i} of the batch has {sorted(item)}"
                )
        return [item["proposals"].to(self.device) for item in batched_inputs], {}

    def inference(
        self,
        batched_inputs: list[dict[str, Any]],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Detect.

        Args:
            batched_inputs: see `forward`.
            detected_instances: per image, with `pred_boxes` and `pred_classes` in the size the
                network sees; then only masks and keypoints are predicted for them.
            do_postprocess: scale the results to `height` and `width` and paste the masks.

        Returns:
            As `forward` at inference; without post-processing per image `Instances`, with
            `pred_masks` (R, 1, M, M) probabilities.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("GeneralizedRCNN.inference needs evaluation mode: call model.eval()")
        images = self.preprocess_image(batched_inputs)
        results = None
        if detected_instances is None and self.replayed is not None:
            padded = self.replayed(images.tensor, images.image_sizes)
            results = None if padded is None else without_padding(padded, images.image_sizes)
        if results is None:
            features = self.backbone(images.tensor)
            if detected_instances is None:
                results = self._detect(batched_inputs, images, features)
            else:
                detected = [x.to(self.device) for x in detected_instances]
                results = self.roi_heads.forward_with_given_boxes(features, detected)
        if not do_postprocess:
            return results
        return self._to_input_size(results, batched_inputs, images.image_sizes)

    def _detect(
        self, batched_inputs: list[dict[str, Any]], images: ImageList, features: dict[str, Tensor]
    ) -> list[Instances]:
        """Return the detections of each image, in the size the network saw."""
        proposals, _ = self._propose(batched_inputs, images, features)
        found: list[Instances] = self.roi_heads(images, features, proposals, None)[0]
        return found

    @property
    def can_detect_padded(self) -> bool:
        """Whether all parts are those that know `fixed_shapes`, and no subclass has its own."""
        heads, rpn = self.roi_heads, self.proposal_generator
        known = type(rpn) is RPN and not overrides(rpn, RPN, "_decode_proposals")
        known = known and type(heads) is StandardROIHeads and not heads.keypoint_on
        known = known and type(heads.box_predictor) is FastRCNNOutputLayers
        known = known and heads.box_predictor.test_topk_per_image > 0
        if known and heads.mask_on:
            known = type(heads.mask_head) is MaskRCNNConvUpsampleHead
            known = known and heads.mask_pooler is not None
        return known and not overrides(self, GeneralizedRCNN, "_detect", "_propose", "inference")

    def detect_padded(
        self, images: Tensor, image_sizes: list[tuple[int, int]]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Detect with tensors of sizes that do not depend on what is found: the host never waits.

        Args:
            images: (N, C, H, W), normalised and padded.
            image_sizes: (height, width) of the N images.

        Returns:
            `pred_boxes` (N, D, 4), `scores` (N, D), `pred_classes` (N, D), with masks `pred_masks`
            (N, D, 1, M, M); `facts` (N + 1,): how many of the D rows are detections, in each image,
            and whether these are all that there are. And the anchors that were read.
        """
        rpn: Any = self.proposal_generator
        features = self.backbone(images)
        batch = ImageList(images, image_sizes)
        with fixed_shapes() as exact:
            proposals, _ = rpn(batch, features)
            found = self.roi_heads(batch, features, proposals, None)[0]
        padded = {
            name: torch.stack([x.get(name) for x in found])
            for name in found[0].get_fields()
            if name != "pred_boxes"
        }
        padded["pred_boxes"] = torch.stack([x.pred_boxes.tensor for x in found])
        counts = (padded["scores"] > -math.inf).sum(dim=1)
        padded["facts"] = torch.cat([counts, torch.stack(exact).all().long().reshape(1)])
        return padded, [
            x.tensor for x in rpn.anchor_generator([features[n] for n in rpn.in_features])
        ]

    def _to_input_size(
        self,
        results: list[Instances],
        batched_inputs: list[dict[str, Any]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Scale the detections to the size each input asks for, and paste their masks."""
        if self.whole_pixel_masks:
            for result in results:
                if result.has("pred_masks"):
                    result.pred_masks = ROIMasks(result.pred_masks[:, 0], whole_pixels=True)
        return self._postprocess(results, batched_inputs, image_sizes)

    @staticmethod
    def _postprocess(
        instances: list[Instances],
        batched_inputs: list[dict[str, Any]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """See `to_input_size`; user classes call or override it."""
        return to_input_size(instances, batched_inputs, image_sizes)


def without_padding(
    padded: dict[str, Tensor], image_sizes: list[tuple[int, int]]
) -> list[Instances] | None:
    """Return the detections of each image, which is one wait; None where they are not all.

    Args:
        padded: see `GeneralizedRCNN.detect_padded`.
        image_sizes: (height, width) of the N images.
    """
    *counts, exact = padded["facts"].tolist()
    if not exact:
        return None
    results = []
    for i, (count, size) in enumerate(zip(counts, image_sizes, strict=True)):
        fields = {name: value[i, :count] for name, value in padded.items() if name != "facts"}
        results.append(Instances(size, **{**fields, "pred_boxes": Boxes(fields["pred_boxes"])}))
    return results


@META_ARCH_REGISTRY.register()
class ProposalNetwork(ImageNormalizer):
    """Backbone and proposal generator alone.

    Args:
        backbone: images (N, C, H, W) -> name -> features.
        proposal_generator: see `RPN`.
        pixel_mean: per channel, in the order of the input, values in 0..255.
        pixel_std: per channel.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.backbone = backbone
        self.proposal_generator = proposal_generator

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg`.

        Raises:
            ValueError: if the config names no proposal generator.
        """
        backbone = build_backbone(cfg)
        generator = build_proposal_generator(cfg, backbone.output_shape())
        if generator is None:
            raise ValueError(
                "ProposalNetwork needs a proposal generator, MODEL.PROPOSAL_GENERATOR.NAME is "
                f"'{cfg.MODEL.PROPOSAL_GENERATOR.NAME}'; the usual one is 'RPN'"
            )
        return {
            "backbone": backbone,
            "proposal_generator": generator,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses in training mode, or the proposals.

        Args:
            batched_inputs: see `GeneralizedRCNN.forward`.

        Returns:
            In training, name -> 0-dim loss. Else per image ``{"proposals": Instances}`` with
            `proposal_boxes` and `objectness_logits`, best first.
        """
        images = self.preprocess_image(batched_inputs)
        targets = self.ground_truth(batched_inputs) if self.training else None
        features = self.backbone(images.tensor)
        with seeded_by_sample(batched_inputs):
            proposals, losses = self.proposal_generator(images, features, targets)
        if self.training:
            return losses
        return to_input_size(proposals, batched_inputs, images.image_sizes, "proposals")
