"""Targets of Panoptic-DeepLab, and the mapper that makes them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from d2kit.config import get_cfg
from d2kit.contrib.panoptic_deeplab import (
    PanopticDeeplabDatasetMapper,
    PanopticDeepLabTargetGenerator,
    add_panoptic_deeplab_config,
)
from d2kit.data import MetadataCatalog, build_detection_train_loader
from d2kit.data import transforms as T
from d2kit.data.catalog import _get_builtin_metadata
from d2kit.data.detection_utils import SizeMismatchError
from d2kit.solver import build_optimizer

THINGS = [1, 3]
OPTIONS = {
    "ignore_stuff_in_offset": True,
    "small_instance_area": 60,
    "small_instance_weight": 3,
    "ignore_crowd_in_semantic": True,
}


def picture():
    """Stuff, three instances (one at the border, one small), a crowd, and pixels of no segment."""
    ids = np.full((50, 60), 7)
    ids[0:12, 0:9] = 70000
    ids[20:33, 25:38] = 300
    ids[22:25, 40:44] = 5
    ids[40:, 30:] = 9
    ids[44:, :10] = 0
    segments = [
        {"id": 7, "category_id": 2, "iscrowd": 0},
        {"id": 70000, "category_id": 1, "iscrowd": 0},
        {"id": 300, "category_id": 3},
        {"id": 5, "category_id": 3, "iscrowd": 0},
        {"id": 9, "category_id": 1, "iscrowd": 1},
        {"id": 11, "category_id": 1, "iscrowd": 0},
    ]
    return ids, segments


def brute_force(ids, segments, sigma, options):
    """The targets of Cheng et al. (2020), section 3, pixel by pixel."""
    height, width = ids.shape
    info = {s["id"]: s for s in segments}
    inside = {}
    for y, x in np.ndindex(height, width):
        inside.setdefault(ids[y, x], []).append((y, x))
    centers = {
        s["id"]: np.mean(inside[s["id"]], axis=0)
        for s in segments
        if s["category_id"] in THINGS and not s.get("iscrowd") and s["id"] in inside
    }
    names = ("sem_seg", "center", "sem_seg_weights", "center_weights", "offset_weights")
    out = {name: np.zeros((height, width)) for name in names}
    out["offset"] = np.zeros((2, height, width))
    for y, x in np.ndindex(height, width):
        for cy, cx in centers.values():
            dy, dx = y - round(cy), x - round(cx)
            if max(abs(dy), abs(dx)) <= 3 * sigma + 1:
                value = math.exp(-(dy * dy + dx * dx) / (2 * sigma**2))
                out["center"][y, x] = max(out["center"][y, x], value)
        segment = info.get(ids[y, x])
        crowd = bool(segment and segment.get("iscrowd"))
        thing = bool(segment and segment["category_id"] in THINGS)
        unknown = not segment or (crowd and options.get("ignore_crowd_in_semantic"))
        out["sem_seg"][y, x] = 255 if unknown else segment["category_id"]
        out["sem_seg_weights"][y, x] = 1
        out["center_weights"][y, x] = bool(segment) and not crowd
        wanted = thing or not options.get("ignore_stuff_in_offset")
        out["offset_weights"][y, x] = bool(segment) and not crowd and wanted
        if ids[y, x] in centers:
            out["offset"][:, y, x] = centers[ids[y, x]] - (y, x)
            if len(inside[ids[y, x]]) < options.get("small_instance_area", 0):
                out["sem_seg_weights"][y, x] = options["small_instance_weight"]
    return out, [tuple(c) for c in centers.values()]


@pytest.mark.parametrize("sigma", [2, 8])
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_targets_are_those_of_every_pixel(sigma, options):
    ids, segments = picture()
    targets = PanopticDeepLabTargetGenerator(255, THINGS, sigma, **options)(ids, segments)
    expected, centers = brute_force(ids, segments, sigma, options)
    assert len(centers) == 3
    np.testing.assert_allclose(targets.pop("center_points"), centers)
    assert set(targets) == set(expected)
    for name, value in targets.items():
        assert value.dtype == (torch.int64 if name == "sem_seg" else torch.float32), name
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert targets["center"].max() == 1


@pytest.mark.parametrize("segments", [[], [{"id": 1, "category_id": 2}]])
def test_image_without_instances(segments):
    targets = PanopticDeepLabTargetGenerator(255, THINGS)(np.ones((4, 5), np.int32), segments)
    assert targets["center_points"] == []
    assert not targets["center"].any()
    assert (targets["sem_seg"] == (2 if segments else 255)).all()
    assert (targets["center_weights"] == len(segments)).all()
    assert not targets["offset"].any()


def test_sigma_is_checked():
    with pytest.raises(ValueError, match="GAUSSIAN_SIGMA"):
        PanopticDeepLabTargetGenerator(255, THINGS, 0)


NAME = "panoptic_deeplab_tests"


@pytest.fixture
def record(tmp_path):
    ids, segments = picture()
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    files = {"file_name": f"{tmp_path}/a.png", "pan_seg_file_name": f"{tmp_path}/a_segments.png"}
    Image.fromarray(colours).save(files["pan_seg_file_name"])
    Image.fromarray(colours // 2 + 40).save(files["file_name"])  # what is drawn is what is labelled
    MetadataCatalog.get(NAME).set(
        thing_dataset_id_to_contiguous_id={10: 1, 30: 3},
        stuff_dataset_id_to_contiguous_id={20: 2},
        ignore_label=255,
    )
    yield {**files, "image_id": 1, "height": 50, "width": 60, "segments_info": segments}
    MetadataCatalog.remove(NAME)


def config(*options):
    cfg = get_cfg()
    add_panoptic_deeplab_config(cfg)
    cfg.merge_from_list(
        ["DATASETS.TRAIN", (NAME,), "INPUT.MIN_SIZE_TRAIN", (100,), "INPUT.FORMAT", "RGB"]
        + ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 80]]
        + ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, *options]
    )
    return cfg


def test_mapper_keeps_image_and_targets_together(record):
    kept = dict(record)
    identity = PanopticDeeplabDatasetMapper(
        augmentations=[T.HFlipTransform(60)],
        image_format="RGB",
        panoptic_target_generator=PanopticDeepLabTargetGenerator(255, THINGS),
    )(record)
    assert record == kept
    ids, segments = picture()
    expected = PanopticDeepLabTargetGenerator(255, THINGS)(ids[:, ::-1], segments)
    assert identity["center_points"] == expected.pop("center_points")
    for name, value in expected.items():
        assert torch.equal(identity[name], value), name
    assert identity["segments_info"] == segments
    assert "pan_seg_file_name" not in identity


def test_mapper_of_a_config_in_a_loader(record):
    cfg = config()
    mapper = PanopticDeeplabDatasetMapper(cfg)
    kinds = [type(a) for a in mapper.augmentations.augs]
    assert kinds == [T.ResizeShortestEdge, T.RandomCrop, T.RandomFlip]
    generator = mapper.panoptic_target_generator
    assert (generator.sigma, generator.thing_ids) == (10, {1, 3})
    loader = build_detection_train_loader([record] * 4, mapper=mapper, total_batch_size=2)
    for item in next(iter(loader)):
        assert item["image"].shape == (3, 64, 80)
        assert item["offset"].shape == (2, 64, 80)
        assert item["sem_seg"].shape == item["center"].shape == (64, 80)
        assert set(item["sem_seg"].unique().tolist()) <= {1, 2, 3, 255}


def test_metadata_of_coco(record):
    metadata = MetadataCatalog.get(NAME + "_coco")
    metadata.set(ignore_label=255, **_get_builtin_metadata("coco_panoptic_standard"))
    try:
        mapper = PanopticDeeplabDatasetMapper(config("DATASETS.TRAIN", (NAME + "_coco",)))
    finally:
        MetadataCatalog.remove(NAME + "_coco")
    assert len(mapper.panoptic_target_generator.thing_ids) == 80


def test_mistakes_are_named(record):
    with pytest.raises(ValueError, match="add_panoptic_deeplab_config"):
        PanopticDeeplabDatasetMapper(get_cfg())
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        PanopticDeeplabDatasetMapper(config("DATASETS.TRAIN", ()))
    metadata = MetadataCatalog.get(NAME + "_separated")
    metadata.set(ignore_label=255, **_get_builtin_metadata("coco_panoptic_separated"))
    try:
        with pytest.raises(ValueError, match="_separated.*both a thing and stuff"):
            PanopticDeeplabDatasetMapper(config("DATASETS.TRAIN", (NAME + "_separated",)))
    finally:
        MetadataCatalog.remove(NAME + "_separated")
    Image.fromarray(np.zeros((50, 61, 3), np.uint8)).save(record["pan_seg_file_name"])
    with pytest.raises(SizeMismatchError, match="a_segments.png"):
        PanopticDeeplabDatasetMapper(config())(record)


def test_keys():
    cfg = config()
    assert (cfg.INPUT.GAUSSIAN_SIGMA, cfg.INPUT.SMALL_INSTANCE_WEIGHT) == (10, 3)
    assert cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS == [6, 12, 18]
    assert cfg.MODEL.INS_EMBED_HEAD.CENTER_LOSS_WEIGHT == 200.0
    assert cfg.MODEL.PANOPTIC_DEEPLAB.NMS_KERNEL == 7
    another = config("MODEL.PANOPTIC_DEEPLAB.NMS_KERNEL", 5)
    another.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS.append(24)
    assert config() == cfg
    assert isinstance(build_optimizer(cfg, torch.nn.Linear(2, 2)), torch.optim.Adam)
