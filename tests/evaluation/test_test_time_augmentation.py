import numpy as np
import pytest
import torch
from torch import nn

from d2kit.data.transforms import HFlipTransform
from d2kit.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA, build_model
from d2kit.modeling import test_time_augmentation as documented_place
from d2kit.structures import Boxes, Instances, pairwise_iou
from tests.support.tiny_model import tiny_config, tiny_input

SIZE = (64, 80)


def config(*options):
    return tiny_config(
        *("TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.MAX_SIZE", 200, "TEST.AUG.FLIP", False),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 10, *options),
    )


def model(*options):
    torch.manual_seed(0)
    return build_model(config(*options)).eval()


def item(seed=0, **changes):
    return {**{k: v for k, v in tiny_input(seed).items() if k != "instances"}, **changes}


def check_equal(found, wanted):
    assert found.image_size == wanted.image_size
    assert torch.equal(found.pred_classes, wanted.pred_classes)
    torch.testing.assert_close(found.scores, wanted.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor)


@pytest.mark.parametrize(("height", "width"), [(64, 80), (128, 160), (100, 90)])
@torch.no_grad()
def test_the_identity_alone_changes_nothing(height, width):
    detector = model()
    batch = [item(0, height=height, width=width), item(1, height=height, width=width)]
    plain = [detector([one])[0]["instances"] for one in batch]
    found = GeneralizedRCNNWithTTA(config(), detector)(batch)
    for output, wanted in zip(found, plain, strict=True):
        check_equal(output["instances"], wanted)
        different = (output["instances"].pred_masks != wanted.pred_masks).float().mean()
        assert different < 1e-3
    assert detector.roi_heads.mask_on


@torch.no_grad()
def test_mirrored_versions_are_mirrored_back():
    """The mirrored version of a mirrored image is the image: its boxes, seen in the mirror."""
    detector = model("MODEL.MASK_ON", False)
    one = item(0)
    mirror = {**one, "image": one["image"].flip(2)}
    (plain,) = detector.inference([one], do_postprocess=False)

    class OnlyMirror(DatasetMapperTTA):
        def __call__(self, dataset_dict):
            return super().__call__(dataset_dict)[1:]

    mapper = OnlyMirror([64], 200, True)
    (found,) = GeneralizedRCNNWithTTA(config("MODEL.MASK_ON", False), detector, mapper)([mirror])
    plain.pred_boxes.tensor[:, [0, 2]] = SIZE[1] - plain.pred_boxes.tensor[:, [2, 0]]
    check_equal(found["instances"], plain)


@torch.no_grad()
def test_masks_are_averaged_in_the_same_direction():
    detector = model()
    one = item(0)
    tta = GeneralizedRCNNWithTTA(config("TEST.AUG.FLIP", True), detector)
    versions = tta.tta_mapper(tta._with_image(one))
    transforms = [v.pop("transforms") for v in versions]
    merged = _merged(tta, versions, transforms)
    mean = tta._mean_masks(versions, transforms, merged)
    alone = [tta._mean_masks([v], [t], merged) for v, t in zip(versions, transforms, strict=True)]
    torch.testing.assert_close(mean, (alone[0] + alone[1]) / 2)
    given = tta._batch_inference([versions[1]], [_on(versions[1], transforms[1], merged)])
    torch.testing.assert_close(alone[1], given[0].pred_masks.flip(3))


def _merged(tta, versions, transforms):
    return tta._merge_detections(*tta._get_augmented_boxes(versions, transforms), SIZE)


def _on(version, transform, merged):
    boxes = torch.as_tensor(transform.apply_box(merged.pred_boxes.tensor.numpy()))
    size = tuple(version["image"].shape[1:])
    return Instances(size, pred_boxes=Boxes(boxes), pred_classes=merged.pred_classes)


@torch.no_grad()
def test_versions_are_joined():
    """Two sizes and their mirrors: the best box of each version is there, or suppressed by one."""
    detector = model("MODEL.MASK_ON", False)
    cfg = config("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.FLIP", True, "MODEL.MASK_ON", False)
    (output,) = GeneralizedRCNNWithTTA(cfg, detector, batch_size=3)([item(0)])
    found = output["instances"]
    (plain,) = detector.inference([item(0)], do_postprocess=False)
    assert len(found) == 10
    assert (found.scores.diff() <= 0).all()
    assert found.scores[0] >= plain.scores[0] - 1e-6
    overlap = pairwise_iou(found.pred_boxes, plain.pred_boxes[:1])[:, 0]
    assert (overlap[found.pred_classes == plain.pred_classes[0]] > 0.4).any()


def test_an_image_without_detections():
    detector = model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999)
    (output,) = GeneralizedRCNNWithTTA(config("TEST.AUG.FLIP", True), detector)([item(0)])
    assert len(output["instances"]) == 0
    assert output["instances"].pred_masks.shape == (0, *SIZE)


@torch.no_grad()
def test_an_input_may_be_a_file(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    detector = model()
    (from_file,) = GeneralizedRCNNWithTTA(config(), detector)(
        [{"file_name": str(tmp_path / "a.png")}]
    )
    image = torch.as_tensor(np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1)))
    (plain,) = detector([{"image": image}])
    check_equal(from_file["instances"], plain["instances"])


@pytest.mark.parametrize(("flip", "count"), [(False, 2), (True, 4)])
def test_mapper(flip, count):
    image = torch.arange(3 * 20 * 30, dtype=torch.uint8).view(3, 20, 30)
    given = {"image": image, "height": 40, "width": 60, "file_name": "x"}
    versions = DatasetMapperTTA([10, 20], 25, flip)(given)
    assert len(versions) == count
    sizes = [tuple(v["image"].shape) for v in versions]
    assert sizes == [size for size in ((3, 10, 15), (3, 17, 25)) for _ in range(count // 2)]
    box = np.array([[0.0, 0, 60, 20]])
    for version in versions:
        h, w = version["image"].shape[1:]
        moved = version["transforms"].apply_box(box)
        np.testing.assert_allclose(moved, [[0, 0, w, h / 2]])
        np.testing.assert_allclose(version["transforms"].inverse().apply_box(moved), box)
        assert version["file_name"] == "x"
    if flip:
        assert torch.equal(versions[1]["image"], versions[0]["image"].flip(2))
        assert isinstance(versions[1]["transforms"].transforms[-1], HFlipTransform)
    assert given["image"] is image
    assert "transforms" not in given


def test_mapper_of_the_config():
    mapper = DatasetMapperTTA(config("TEST.AUG.FLIP", True))
    assert (mapper.min_sizes, mapper.max_size, mapper.flip) == ([64], 200, True)


@pytest.mark.parametrize(
    ("options", "match"),
    [(["MODEL.KEYPOINT_ON", True], "KEYPOINT_ON"), (["MODEL.LOAD_PROPOSALS", True], "LOAD_PROP")],
)
def test_what_is_not_augmented(options, match):
    with pytest.raises(ValueError, match=match):
        GeneralizedRCNNWithTTA(config(*options), model())


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="GeneralizedRCNN"):
        GeneralizedRCNNWithTTA(config(), nn.Linear(1, 1))


def test_documented_place():
    assert documented_place.GeneralizedRCNNWithTTA is GeneralizedRCNNWithTTA
    with pytest.raises(ImportError):
        from d2kit.modeling import NoSuchName  # noqa: F401
