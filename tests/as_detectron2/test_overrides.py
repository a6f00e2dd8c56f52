"""A subclass that replaces one protected method of Detectron2's classes is obeyed.

Each method is replaced alone, so that no faster path may pass it by.
"""

import importlib

import numpy as np
import pytest
import torch

from d2kit.as_detectron2.redirect import real_name
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import get_cfg
from d2kit.contrib.point_rend import add_pointrend_config
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from d2kit.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from d2kit.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from d2kit.structures import BitMasks, Boxes, Instances, RotatedBoxes
from d2kit.utils.events import EventStorage
from d2kit.utils.visualizer import ColorMode

REGISTRIES = (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def counting(base, name, calls):
    """Return a subclass of `base` that notes the calls of one method, of whatever kind it is."""
    found = next(cls.__dict__[name] for cls in base.__mro__ if name in cls.__dict__)
    if isinstance(found, staticmethod | classmethod):

        def replaced(first, *args, **kwargs):
            calls.append(name)
            own = () if isinstance(found, classmethod) else (first,)
            return getattr(base, name)(*own, *args, **kwargs)

        member = type(found)(replaced)
    else:

        def member(self, *args, **kwargs):
            calls.append(name)
            return getattr(base, name)(self, *args, **kwargs)

    return type(f"Own{base.__name__}", (base,), {name: member, "__module__": "somebody"})


def config(**changes):
    cfg = get_cfg()
    tiny = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    tiny += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    tiny += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 8]
    tiny += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    tiny += ["MODEL.RPN.IN_FEATURES", ["p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"]]
    tiny += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    tiny += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    tiny += ["MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    tiny += ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"]
    tiny += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 4, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
    tiny += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]
    tiny += ["MODEL.RPN.PRE_NMS_TOPK_TEST", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 5]
    tiny += ["TEST.DETECTIONS_PER_IMAGE", 3, "VIS_PERIOD", 0]
    tiny += ["MODEL.RETINANET.NUM_CLASSES", 2, "MODEL.RETINANET.IN_FEATURES", ["p4", "p5"]]
    tiny += ["MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    tiny += ["MODEL.FCOS.NUM_CLASSES", 2, "MODEL.FCOS.IN_FEATURES", ["p4", "p5"]]
    tiny += ["MODEL.FCOS.NORM", "", "MODEL.FCOS.NUM_CONVS", 1, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0]
    cfg.merge_from_list(tiny)
    add_pointrend_config(cfg)
    cfg.merge_from_list([x for k, v in changes.items() for x in (k.replace("__", "."), v)])
    return cfg


def item(masks=False):
    truth = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[5.0, 5, 40, 40], [30, 20, 90, 60]])))
    truth.gt_classes = torch.tensor([0, 1])
    if masks:
        bits = torch.zeros(2, 64, 96, dtype=torch.bool)
        bits[0, 5:40, 5:40] = bits[1, 20:60, 30:90] = True
        truth.gt_masks = BitMasks(bits)
    return {"image": torch.rand(3, 64, 96) * 255, "instances": truth, "height": 64, "width": 96}


def train_and_detect(cfg, masks=False):
    model = build_model(cfg).train()
    with EventStorage():
        losses = model([item(masks)])
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        model.eval()([item(masks)])
    return model


def by_config(registry, key, masks=False, **more):
    """Register the subclass, name it in the config, train a step and detect."""

    def run(own):
        registry.register(own)
        changes = {key: own.__name__, "MODEL__MASK_ON": masks, **more}
        train_and_detect(config(**changes), masks)

    return run


def point_rend(**more):
    settings = {
        "MODEL__ROI_MASK_HEAD__POOLER_TYPE": "",
        "MODEL__ROI_MASK_HEAD__IN_FEATURES": ["p3"],
        "MODEL__POINT_HEAD__IN_FEATURES": ["p3"],
        "MODEL__ROI_MASK_HEAD__FC_DIM": 8,
        "MODEL__ROI_MASK_HEAD__NUM_FC": 1,
        "MODEL__ROI_MASK_HEAD__OUTPUT_SIDE_RESOLUTION": 7,
        "MODEL__ROI_MASK_HEAD__POINT_HEAD_ON": True,
        "MODEL__POINT_HEAD__NUM_CLASSES": 2,
        "MODEL__POINT_HEAD__FC_DIM": 8,
        "MODEL__POINT_HEAD__SUBDIVISION_STEPS": 2,
    }
    name = "MODEL__ROI_MASK_HEAD__NAME"
    return by_config(ROI_MASK_HEAD_REGISTRY, name, masks=True, **settings, **more)


def panoptic(own):
    META_ARCH_REGISTRY.register(own)
    cfg = config(
        MODEL__META_ARCHITECTURE=own.__name__,
        MODEL__MASK_ON=True,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
        MODEL__SEM_SEG_HEAD__CONVS_DIM=4,
        MODEL__SEM_SEG_HEAD__NORM="",
    )
    model = build_model(cfg)
    one = {**item(masks=True), "sem_seg": torch.zeros(64, 96, dtype=torch.int64)}
    with EventStorage():
        model.train()([one])
    with torch.no_grad():
        model.eval()([one])


def augmented(own):
    cfg = config(MODEL__MASK_ON=True, TEST__AUG__MIN_SIZES=(64,), TEST__AUG__MAX_SIZE=96)
    torch.manual_seed(0)
    own(cfg, build_model(cfg).eval())([item()])


def drawn(own):
    metadata = MetadataCatalog.get("overrides_drawn")
    metadata.set(thing_classes=["a", "b"], thing_colors=[(200, 30, 30), (30, 200, 30)])
    metadata.set(stuff_classes=["c", "d"])
    for mode in (ColorMode.SEGMENTATION, ColorMode.IMAGE_BW):
        found = Instances((64, 96), pred_boxes=item()["instances"].gt_boxes)
        found.scores, found.pred_classes = torch.ones(2), torch.tensor([0, 1])
        found.pred_masks = torch.ones(2, 64, 96, dtype=torch.bool)
        found.pred_keypoints = torch.ones(2, 17, 3)
        picture = own(np.zeros((64, 96, 3), np.uint8), metadata, instance_mode=mode)
        picture.draw_instance_predictions(found)
        picture.draw_sem_seg(torch.zeros(64, 96, dtype=torch.int64))


def drawn_video(own):
    metadata = MetadataCatalog.get("overrides_drawn").set(thing_classes=["a", "b"])
    video = own(metadata)
    for ids in (False, True):
        found = Instances((64, 96), pred_boxes=item()["instances"].gt_boxes)
        found.scores, found.pred_classes = torch.ones(2), torch.tensor([0, 1])
        if ids:
            found.ID = [1, 2]
        video.draw_instance_predictions(np.zeros((64, 96, 3), np.uint8), found)


def tracked(own):
    settings = {"max_num_instances": 20, "max_lost_frame_count": 3, "min_box_rel_dim": 0.02}
    settings |= {"video_height": 64, "video_width": 96, "min_instance_period": 1}
    tracker = own(**settings, track_iou_threshold=0.3)
    for rows in ([[5.0, 5, 40, 40], [50, 20, 90, 60]], [[6.0, 5, 41, 40]], [[60.0, 5, 80, 30]]):
        found = Instances((64, 96), pred_boxes=Boxes(torch.tensor(rows)))
        found.scores = torch.ones(len(rows))
        found.pred_classes = torch.zeros(len(rows), dtype=torch.int64)
        tracker.update(found)


def dataset():
    DatasetCatalog.register("overrides", lambda: [dict(RECORD)])
    MetadataCatalog.get("overrides").set(thing_classes=["a", "b"])


RECORD = {
    "file_name": "a.png",
    "image_id": 1,
    "height": 64,
    "width": 96,
    "annotations": [{"bbox": [5, 5, 40, 40], "bbox_mode": 0, "category_id": 0, "iscrowd": 0}],
}


def detections(rotated=False):
    found = Instances((64, 96), scores=torch.ones(1), pred_classes=torch.zeros(1, dtype=torch.long))
    box = torch.tensor([[22.5, 22.5, 35, 35, 10] if rotated else [5.0, 5, 40, 40]])
    found.pred_boxes = (RotatedBoxes if rotated else Boxes)(box)
    return found


def evaluated(own, rotated=False):
    dataset()
    evaluator = own("overrides", distributed=False)
    evaluator.reset()
    evaluator.process([RECORD], [{"instances": detections(rotated)}])
    assert evaluator.evaluate()["bbox"]["AP"] >= 0


def proposals_evaluated(own):
    dataset()
    evaluator = own("overrides", distributed=False)
    found = Instances((64, 96), proposal_boxes=detections().pred_boxes)
    found.objectness_logits = torch.ones(1)
    evaluator.reset()
    evaluator.process([RECORD], [{"proposals": found}])
    evaluator.evaluate()


def segmented(own):
    DatasetCatalog.register("overrides_stuff", lambda: [{**RECORD, "sem_seg_file_name": "b.png"}])
    MetadataCatalog.get("overrides_stuff").set(stuff_classes=["c", "d"], ignore_label=255)
    labels = np.zeros((64, 96), np.int32)
    labels[20:40, 20:50] = 1
    load = {"sem_seg_loading_fn": lambda file, dtype: labels.astype(dtype)}
    results = []
    for cls in (own.__mro__[1], own):
        evaluator = cls("overrides_stuff", distributed=False, **load)
        moved = torch.as_tensor(np.roll(labels, 3, axis=1))
        evaluator.process([RECORD], [{"sem_seg": moved}])
        results.append(evaluator.evaluate()["sem_seg"])
    assert results[0] == results[1]


def sampled(own):
    own_sampler = own(torch.ones(5)) if "Repeat" in own.__name__ else own(5)
    assert len([x for x, _ in zip(own_sampler, range(4), strict=False)]) == 4


def anchored(own):
    settings = {"sizes": [[32]], "aspect_ratios": [[1.0]], "strides": [8]}
    if "Rotated" in own.__name__:
        settings["angles"] = [[0.0]]
    own(**settings)([torch.zeros(1, 1, 4, 4)])


def loaded(own, tmp_path):
    model = torch.nn.Linear(2, 2)
    DetectionCheckpointer(model, str(tmp_path)).save("w")
    own(torch.nn.Linear(2, 2), str(tmp_path)).load(str(tmp_path / "w.pth"))


def scheduled(own):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    own(optimizer, [3, 5] if "MultiStep" in own.__name__ else 6).step()


def vit(own):
    own(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2)


def mvit(own):
    own(img_size=32, embed_dim=8, depth=4, last_block_indexes=(0, 1, 2, 3))


def swin(own):
    own(embed_dim=8, depths=(1, 1), num_heads=(1, 1), out_indices=(0, 1), frozen_stages=2)


def mapped(own, tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 96, 3), np.uint8))
    mapper = own(is_train=True, augmentations=[], image_format="BGR")
    mapper({**RECORD, "file_name": str(tmp_path / "a.png")})


STEP = "modeling.roi_heads"
ROI = "MODEL__ROI_HEADS__NAME"
ARCH = "MODEL__META_ARCHITECTURE"
TABLE = [
    ("modeling.GeneralizedRCNN", by_config(META_ARCH_REGISTRY, ARCH),
     "preprocess_image inference _postprocess"),
    ("modeling.RetinaNet", by_config(META_ARCH_REGISTRY, ARCH),
     "preprocess_image _transpose_dense_predictions label_anchors losses forward_training "
     "forward_inference _ema_update"),
    ("modeling.FCOS", by_config(META_ARCH_REGISTRY, ARCH),
     "_transpose_dense_predictions label_anchors losses forward_training forward_inference "
     "_match_anchors compute_ctrness_targets _ema_update"),
    ("modeling.PanopticFPN", panoptic, "inference preprocess_image"),
    ("modeling.proposal_generator.RPN",
     by_config(PROPOSAL_GENERATOR_REGISTRY, "MODEL__PROPOSAL_GENERATOR__NAME"),
     "_subsample_labels label_and_sample_anchors losses predict_proposals _decode_proposals"),
    ("modeling.proposal_generator.StandardRPNHead",
     by_config(RPN_HEAD_REGISTRY, "MODEL__RPN__HEAD_NAME"), "_get_rpn_conv"),
    (f"{STEP}.StandardROIHeads", by_config(ROI_HEADS_REGISTRY, ROI, masks=True),
     "_sample_proposals label_and_sample_proposals _init_box_head _init_mask_head "
     "_init_keypoint_head _forward_box _forward_mask _forward_keypoint forward_with_given_boxes"),
    (f"{STEP}.CascadeROIHeads",
     by_config(ROI_HEADS_REGISTRY, ROI, MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True),
     "_init_box_head _forward_box _match_and_label_boxes _run_stage _create_proposals_from_boxes"),
    (f"{STEP}.Res5ROIHeads",
     by_config(
         ROI_HEADS_REGISTRY, ROI, MODEL__BACKBONE__NAME="build_resnet_backbone",
         MODEL__RESNETS__DEPTH=50, MODEL__RESNETS__RES2_OUT_CHANNELS=8,
         MODEL__RESNETS__WIDTH_PER_GROUP=2, MODEL__ROI_HEADS__IN_FEATURES=["res4"],
         MODEL__RESNETS__OUT_FEATURES=["res4"], MODEL__RPN__IN_FEATURES=["res4"],
     ),
     "_build_res5_block _shared_roi_transform"),
    ("projects.point_rend.PointRendMaskHead", point_rend(),
     "_init_roi_head _init_point_head _roi_pooler _sample_train_points _get_point_logits "
     "_subdivision_inference"),
    ("projects.point_rend.ImplicitPointRendMaskHead",
     point_rend(MODEL__POINT_HEAD__NAME="ImplicitPointHead"),
     "_init_point_head _roi_pooler _uniform_sample_train_points _get_point_logits "
     "_subdivision_inference"),
    ("modeling.GeneralizedRCNNWithTTA", augmented,
     "_turn_off_roi_heads _batch_inference _inference_one_image _get_augmented_inputs "
     "_get_augmented_boxes _merge_detections _rescale_detected_boxes _reduce_pred_masks"),
    ("utils.visualizer.Visualizer", drawn,
     "_jitter _create_grayscale_image _convert_boxes _convert_masks _convert_keypoints "
     "overlay_instances draw_and_connect_keypoints draw_binary_mask draw_text draw_box "
     "draw_polygon draw_circle"),
    ("utils.video_visualizer.VideoVisualizer", drawn_video, "_assign_colors _assign_colors_by_id"),
    ("tracking.BBoxIOUTracker", tracked,
     "_create_prediction_pairs _initialize_extra_fields _reset_fields _assign_new_id "
     "_merge_untracked_instances"),
    ("tracking.VanillaHungarianBBoxIOUTracker", tracked,
     "_initialize_extra_fields _process_matched_idx _process_unmatched_idx "
     "_process_unmatched_prev_idx build_cost_matrix assign_cost_matrix_values"),
    ("evaluation.COCOEvaluator", evaluated,
     "_tasks_from_predictions _eval_predictions _derive_coco_results"),
    ("evaluation.COCOEvaluator", proposals_evaluated, "_eval_box_proposals"),
    ("evaluation.RotatedCOCOEvaluator", lambda own: evaluated(own, rotated=True),
     "instances_to_json _eval_predictions _evaluate_predictions_on_coco"),
    ("evaluation.SemSegEvaluator", segmented, "_mask_to_boundary"),
    ("data.samplers.TrainingSampler", sampled, "_infinite_indices"),
    ("data.samplers.RepeatFactorTrainingSampler", sampled, "_infinite_indices _get_epoch_indices"),
    ("data.samplers.InferenceSampler", sampled, "_get_local_indices"),
    ("data.DatasetMapper", mapped, "_transform_annotations"),
    ("modeling.anchor_generator.DefaultAnchorGenerator", anchored,
     "_calculate_anchors generate_cell_anchors _grid_anchors"),
    ("modeling.anchor_generator.RotatedAnchorGenerator", anchored,
     "_calculate_anchors generate_cell_anchors _grid_anchors"),
    ("checkpoint.DetectionCheckpointer", loaded, "_torch_load _load_file _load_model"),
    ("solver.lr_scheduler.WarmupMultiStepLR", scheduled, "get_lr"),
    ("solver.lr_scheduler.WarmupCosineLR", scheduled, "get_lr"),
    ("modeling.backbone.ViT", vit, "_init_weights"),
    ("modeling.backbone.MViT", mvit, "_init_weights"),
    ("modeling.backbone.SwinTransformer", swin, "_init_weights _freeze_stages"),
]  # fmt: skip
LIGHT = (anchored, vit, mvit, swin)
"""The other classes of models are built, trained for a step and run: half a second each."""


def cases():
    for path, run, names in TABLE:
        models = path.startswith(("modeling.", "projects.")) and run not in LIGHT
        for name in names.split():
            marks = [pytest.mark.slow] if models else []
            yield pytest.param(path, run, name, marks=marks, id=f"{path.split('.')[-1]}.{name}")


@pytest.mark.parametrize(("path", "run", "name"), cases())
def test_an_override_is_called(path, run, name, tmp_path):
    module, _, cls = real_name(path).rpartition(".")
    calls: list[str] = []
    own = counting(getattr(importlib.import_module(module), cls), name, calls)
    torch.manual_seed(0)
    if "tmp_path" in run.__code__.co_varnames[: run.__code__.co_argcount]:
        run(own, tmp_path)
    else:
        run(own)
    assert calls
