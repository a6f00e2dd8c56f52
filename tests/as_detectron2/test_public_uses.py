"""What nine public code bases do with Detectron2's inside, each in its smallest form."""

import importlib
import logging

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.contrib.deeplab import DeepLabV3PlusHead
from d2kit.contrib.panoptic_deeplab import (
    PanopticDeepLabSemSegHead,
    PanopticDeepLabTargetGenerator,
    add_panoptic_deeplab_config,
)
from d2kit.contrib.panoptic_deeplab.panoptic_seg import get_panoptic_segmentation
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import register_pascal_voc
from d2kit.layers import get_norm
from d2kit.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model
from d2kit.modeling.meta_arch.retinanet import RetinaNet
from d2kit.modeling.roi_heads import (
    ROI_MASK_HEAD_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import EventStorage
from d2kit.utils.registry import Registry


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    for registry in (META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def config(*options):
    cfg = get_cfg()
    tiny = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    tiny += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    tiny += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8]
    tiny += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    tiny += ["MODEL.RPN.IN_FEATURES", ["p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"]]
    tiny += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    tiny += ["MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    tiny += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]
    cfg.merge_from_list([*tiny, *options])
    return cfg


def losses(cfg):
    torch.manual_seed(0)
    truth = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[5.0, 5, 40, 40], [30, 20, 90, 60]])))
    truth.gt_classes = torch.tensor([0, 1])
    item = {"image": torch.rand(3, 64, 96) * 255, "instances": truth}
    model = build_model(cfg).train()
    with EventStorage():
        found = model([item])
    assert all(torch.isfinite(loss) for loss in found.values())
    return model, found


def test_unbiased_teacher_samples_proposals_itself():
    class AllProposals(StandardROIHeads):
        seen: list[tuple[int, ...]] = []

        def _sample_proposals(self, matched_idxs, matched_labels, gt_classes):
            index, classes = super()._sample_proposals(matched_idxs, matched_labels, gt_classes)
            self.seen.append(tuple(index.shape))
            return index[:3], classes[:3]

    ROI_HEADS_REGISTRY.register(AllProposals)
    losses(config("MODEL.ROI_HEADS.NAME", "AllProposals"))
    assert len(AllProposals.seen) == 1


def test_centernet2_replaces_steps_of_the_cascade():
    class OwnCascade(CascadeROIHeads):
        calls: list[str] = []

        def _create_proposals_from_boxes(self, boxes, image_sizes):
            self.calls.append("proposals")
            return super()._create_proposals_from_boxes(boxes, image_sizes)

        def _match_and_label_boxes(self, proposals, stage, targets):
            self.calls.append(f"match {stage}")
            return super()._match_and_label_boxes(proposals, stage, targets)

        def _run_stage(self, features, proposals, stage):
            self.calls.append(f"run {stage}")
            return super()._run_stage(features, proposals, stage)

    ROI_HEADS_REGISTRY.register(OwnCascade)
    options = [
        "MODEL.ROI_HEADS.NAME",
        "OwnCascade",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        True,
    ]
    losses(config(*options))
    later = [["proposals", f"match {k}", f"run {k}"] for k in (1, 2)]
    assert OwnCascade.calls == ["run 0", *later[0], *later[1]]


def test_yolo_transposes_predictions_itself():
    class Own(RetinaNet):
        dims: list[list[int]] = []

        def _transpose_dense_predictions(self, predictions, dims_per_anchor):
            self.dims.append(dims_per_anchor)
            return super()._transpose_dense_predictions(predictions, dims_per_anchor)

    META_ARCH_REGISTRY.register(Own)
    options = ["MODEL.META_ARCHITECTURE", "Own", "MODEL.RETINANET.NUM_CLASSES", 2]
    options += ["MODEL.RETINANET.IN_FEATURES", ["p4", "p5"], "MODEL.RETINANET.NUM_CONVS", 1]
    model, _ = losses(config(*options))
    assert Own.dims == [[2, 4]]
    with torch.no_grad():
        model.eval()([{"image": torch.rand(3, 64, 96)}])
    assert len(Own.dims) == 2


def test_moco_builds_res5_in_an_instance_method():
    class WithNorm(Res5ROIHeads):
        def _build_res5_block(self, cfg):
            block, channels = super()._build_res5_block(cfg)
            block.add_module("norm", get_norm("BN", channels))
            return block, channels

    ROI_HEADS_REGISTRY.register(WithNorm)
    options = ["MODEL.ROI_HEADS.NAME", "WithNorm", "MODEL.RESNETS.DEPTH", 50]
    options += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 2]
    options += [
        "MODEL.BACKBONE.NAME",
        "build_resnet_backbone",
        "MODEL.ROI_HEADS.IN_FEATURES",
        ["res4"],
    ]
    options += ["MODEL.RESNETS.OUT_FEATURES", ["res4"], "MODEL.RPN.IN_FEATURES", ["res4"]]
    model, _ = losses(config(*options))
    assert "roi_heads.res5.norm.weight" in model.state_dict()


def test_pointrend_vendored_registers_its_own_heads(caplog):
    importlib.import_module("d2kit.contrib.point_rend")
    own = type("PointRendMaskHead", (torch.nn.Module,), {"__module__": "point_rend.heads"})
    with caplog.at_level(logging.INFO):
        ROI_MASK_HEAD_REGISTRY.register(own)
    assert ROI_MASK_HEAD_REGISTRY.get("PointRendMaskHead") is own
    assert len(caplog.records) == 1
    again = type("PointRendMaskHead", (), {"__module__": "another"})
    with pytest.raises(AssertionError, match="already registered"):
        ROI_MASK_HEAD_REGISTRY.register(again)
    with pytest.raises(ValueError, match="already registered"):
        META_ARCH_REGISTRY.register(type("RetinaNet", (), {"__module__": "another"}))


def test_ours_imported_later_leaves_theirs():
    registry = Registry("SOME")
    theirs = type("Head", (), {"__module__": "theirs"})
    registry.register(theirs)
    registry.register(type("Head", (), {"__module__": "d2kit.late"}))
    assert registry.get("Head") is theirs


def test_adaptive_teacher_sets_its_evaluator_type():
    register_pascal_voc("water", "x", "train", 2012)
    MetadataCatalog.get("water").evaluator_type = "pascal_voc_water"
    assert MetadataCatalog.get("water").evaluator_type == "pascal_voc_water"


def panoptic_config():
    MetadataCatalog.get("panoptic").set(
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1}, label_divisor=1000, ignore_label=255
    )
    cfg = config()
    add_panoptic_deeplab_config(cfg)
    cfg.DATASETS.TRAIN = ("panoptic",)
    cfg.MODEL.META_ARCHITECTURE = "PanopticDeepLab"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deeplab_backbone"
    cfg.MODEL.RESNETS.update(
        DEPTH=50, RES2_OUT_CHANNELS=8, WIDTH_PER_GROUP=2, NORM="BN", RES5_DILATION=2
    )
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    for node in (cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.INS_EMBED_HEAD):
        node.update(NORM="BN", ASPP_CHANNELS=8, CONVS_DIM=8, HEAD_CHANNELS=8)
        node.update(IN_FEATURES=["res2", "res3", "res5"], PROJECT_CHANNELS=[4, 8])
    cfg.MODEL.SEM_SEG_HEAD.update(NAME="PanopticDeepLabSemSegHead", NUM_CLASSES=4)
    return cfg


def test_panoptic_deeplab_trains_and_detects():
    cfg = panoptic_config()
    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert isinstance(model.sem_seg_head, PanopticDeepLabSemSegHead | DeepLabV3PlusHead)
    assert model.sem_seg_head.decoder_only
    segments = torch.zeros(64, 96, dtype=torch.int64)
    segments[5:20, 5:30] = 1
    kinds = [{"id": 0, "category_id": 3}, {"id": 1, "category_id": 1}]
    targets = PanopticDeepLabTargetGenerator(255, {0, 1})(segments.numpy(), kinds)
    item = {"image": torch.rand(3, 64, 96) * 255}
    with EventStorage():
        found = model([{**item, **targets}, {**item, **targets}])
    assert set(found) == {"loss_sem_seg", "loss_center", "loss_offset"}
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.ins_embed_head.parameters())
    with torch.no_grad():
        (result,) = model.eval()([{**item, "height": 32, "width": 48}])
    assert result["sem_seg"].shape == (4, 32, 48)
    assert result["panoptic_seg"][0].shape == (32, 48)
    assert result["instances"].pred_masks.shape[1:] == (32, 48)


def test_true_targets_give_the_true_segments():
    segments = torch.zeros(40, 60, dtype=torch.int64)
    segments[4:14, 4:24] = 1
    segments[20:38, 30:56] = 2
    kinds = [{"id": i, "category_id": c} for i, c in ((0, 3), (1, 1), (2, 1))]
    targets = PanopticDeepLabTargetGenerator(255, {0, 1}, sigma=2)(segments.numpy(), kinds)
    merged, centers = get_panoptic_segmentation(
        targets["sem_seg"][None],
        targets["center"][None],
        targets["offset"],
        thing_ids=[0, 1],
        label_divisor=1000,
        stuff_area=10,
        void_label=-1,
    )
    assert centers.shape == (1, 2, 2)
    assert torch.equal(merged[0], torch.tensor([3000, 1001, 1002])[segments])
    nothing, _ = get_panoptic_segmentation(
        targets["sem_seg"][None],
        targets["center"][None] * 0,
        targets["offset"],
        [0, 1],
        1000,
        10**4,
        -1,
    )
    assert (nothing == -1).all()
