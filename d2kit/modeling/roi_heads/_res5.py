"""C4 heads: the last stage of the ResNet runs on every region, shared by boxes and masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads._base import ROI_HEADS_REGISTRY, TwoPhaseHeads
from d2kit.modeling.roi_heads._build import build_pooler, build_res5_stage
from d2kit.modeling.roi_heads._selection import select_foreground_proposals
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.modeling.roi_heads.mask_head import build_mask_head
from d2kit.structures import Boxes, Instances


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(TwoPhaseHeads):
    """Pool from one level, run res5 on each region, predict boxes from its mean and masks from it.

    Args:
        in_features: name of the level, in a list.
        pooler: level and boxes -> (R, C, H, W).
        res5: the stage, or its blocks in order.
        box_predictor: see `FastRCNNOutputLayers`.
        mask_head: see `BaseMaskRCNNHead`; None: no masks.
        **kwargs: see `ROIHeads`.

    Source: Mask R-CNN (He et al. 2017), figure 4, left.
    """

    box_predictor: Any
    mask_head: Any

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        pooler: ROIPooler,
        res5: nn.Module | Sequence[nn.Module],
        box_predictor: nn.Module,
        mask_head: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.in_features = in_features
        self.pooler = pooler
        self.res5 = res5 if isinstance(res5, nn.Module) else nn.Sequential(*res5)
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if mask_head is not None:
            self.mask_head = mask_head

    @classmethod
    def from_config(  # type: ignore[override]
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes.

        Raises:
            ValueError: if more than one level is named, or keypoints are wanted.
        """
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "MODEL.KEYPOINT_ON True: Res5ROIHeads has no keypoint head; set "
                "MODEL.ROI_HEADS.NAME StandardROIHeads"
            )
        names, pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        if len(names) != 1:
            raise ValueError(
                f"Res5ROIHeads pools from one level, MODEL.ROI_HEADS.IN_FEATURES names {names}"
            )
        res5, channels = cls._build_res5_block(cfg)
        arguments = {
            **super().from_config(cfg),
            "in_features": names,
            "pooler": pooler,
            "res5": res5,
            "box_predictor": FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels)),
        }
        if cfg.MODEL.MASK_ON:
            side = shape.height
            arguments["mask_head"] = build_mask_head(
                cfg, ShapeSpec(channels=channels, height=side, width=side)
            )
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Module, int]:
        """Return the stage and its output channels; user classes override it."""
        return build_res5_stage(cfg)

    def _losses(
        self, features: dict[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        del targets
        regions = self._shared_features(features, [p.proposal_boxes for p in sampled])
        losses = self.box_predictor.losses(self._predict(regions), sampled)
        if not self.mask_on:
            return losses
        chosen, kept = select_foreground_proposals(sampled, self.num_classes)
        return {**losses, **self.mask_head(regions[torch.cat(kept)], chosen)}

    def _detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        regions = self._shared_features(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor.inference(self._predict(regions), proposals)[0]

    def _refine(self, features: dict[str, Tensor], instances: list[Instances]) -> list[Instances]:
        if not self.mask_on:
            return instances
        regions = self._shared_features(features, [one.pred_boxes for one in instances])
        return self.mask_head(regions, instances)

    def _shared_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Return res5's features of each box (R, C, H/2, W/2)."""
        return self.res5(self.pooler([features[name] for name in self.in_features], boxes))

    def _predict(self, regions: Tensor) -> Any:
        """Return scores and deltas from the mean of each region's features (R, C, H, W)."""
        return self.box_predictor(regions.mean(dim=(2, 3)))
