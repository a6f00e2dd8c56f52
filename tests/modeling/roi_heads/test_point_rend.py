import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2kit.contrib.point_rend import add_pointrend_config
from d2kit.contrib.point_rend.mask_head import PointRendMaskHead, point_labels
from d2kit.contrib.point_rend.point_head import (
    generate_regular_grid_point_coords,
    get_uncertain_point_coords_on_grid,
    get_uncertain_point_coords_with_randomness,
    point_sample,
    point_sample_fine_grained_features,
    roi_mask_point_loss,
    sample_bitmaps,
)
from d2kit.modeling import build_model
from d2kit.modeling.sampling import SampledBitMasks, per_image_seeds
from d2kit.structures import BitMasks, Boxes, Instances, PolygonMasks
from tests.support.tiny_heads import SIZE
from tests.support.tiny_model import tiny_config, tiny_input

OPTIONS = [
    *("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead"),
    *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""),
    *("MODEL.ROI_MASK_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NUM_FC", 1),
    *("MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION", 4),
    *("MODEL.ROI_MASK_HEAD.IN_FEATURES", ["p2"]),
    *("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True),
    *("MODEL.POINT_HEAD.NUM_CLASSES", 3),
    *("MODEL.POINT_HEAD.IN_FEATURES", ["p2", "p3"]),
    *("MODEL.POINT_HEAD.FC_DIM", 8),
    *("MODEL.POINT_HEAD.NUM_FC", 2),
    *("MODEL.POINT_HEAD.TRAIN_NUM_POINTS", 16),
    *("MODEL.POINT_HEAD.SUBDIVISION_STEPS", 2),
    *("MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS", 24),
]


def config(*options):
    cfg = tiny_config()
    add_pointrend_config(cfg)
    cfg.merge_from_list([*OPTIONS, *options])
    return cfg


def model(*options):
    torch.manual_seed(0)
    return build_model(config(*options))


@pytest.mark.parametrize("objects", [(0, 0), (1,), (0, 3)])
def test_training_step(objects):
    detector = model()
    losses = detector([tiny_input(i, n) for i, n in enumerate(objects)])
    assert {"loss_mask", "loss_mask_point"} < set(losses)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    for name, p in detector.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    if sum(objects):
        assert losses["loss_mask_point"].item() == pytest.approx(math.log(2), rel=0.1)


@pytest.mark.parametrize("point_head", [True, False])
@torch.no_grad()
def test_inference(point_head):
    detector = model("MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", point_head).eval()
    (raw,) = detector.inference([tiny_input(0)], do_postprocess=False)
    side = 16 if point_head else 4
    assert raw.pred_masks.shape == (len(raw), 1, side, side)
    head = detector.roi_heads.mask_head
    features = detector.backbone(detector.preprocess_image([tiny_input(0)]).tensor)
    (none,) = head(features, [raw[:0]])
    assert none.pred_masks.shape[0] == 0
    (output,) = detector([tiny_input(0)])
    assert output["instances"].pred_masks.shape[1:] == SIZE


def test_state_dict_has_the_names_of_published_models():
    names = {n.removesuffix(".weight") for n in model().roi_heads.mask_head.state_dict()}
    assert {n for n in names if not n.endswith(".bias")} == {
        *(f"coarse_head.{n}" for n in ("reduce_channel_dim_conv", "reduce_spatial_dim_conv")),
        *(f"coarse_head.{n}" for n in ("fc1", "prediction")),
        *(f"point_head.{n}" for n in ("fc1", "fc2", "predictor")),
    }


def test_points_depend_on_the_seed_of_their_image_alone():
    detector = model()
    batch = [tiny_input(0), tiny_input(1, 3)]

    def loss():
        torch.rand(1)
        return detector(batch)["loss_mask_point"].item()

    assert loss() == loss()
    for item in batch:
        del item["sample_seed"]
    assert loss() != loss()


def test_learns_a_mask():
    torch.manual_seed(0)
    detector = model("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)
    head, item = detector.roi_heads.mask_head, tiny_input(0)
    target = item["instances"]
    target.proposal_boxes = target.gt_boxes
    features = {"p2": torch.randn(1, 16, 16, 20), "p3": torch.randn(1, 16, 8, 10)}
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        total = sum(head(features, [target]).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.4 * losses[0]


class Disc(nn.Module):
    """Coarse and point head that know a disc of a radius of 0.35 around the box's centre."""

    def forward(self, x, coarse=None):
        if coarse is None:  # the coarse head: the disc seen by 7 x 7 cells
            ticks = (torch.arange(7) + 0.5) / 7
            y, x0 = torch.meshgrid(ticks, ticks, indexing="ij")
            return disc(x0, y).view(1, 1, 7, 7).expand(len(x), -1, -1, -1)
        return disc(x[:, 0], x[:, 1]).unsqueeze(1)


def disc(x, y):
    """Logits: positive inside, 0 on the edge."""
    return 60 * (0.35 - ((x - 0.5) ** 2 + (y - 0.5) ** 2).sqrt())


@torch.no_grad()
def test_subdivision_sharpens_the_boundary():
    """Against the true shape, at 224 x 224, the refined mask is better than the enlarged one.

    The features are the coordinates themselves, the box is the whole image.
    """
    side = 64
    ticks = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    head = PointRendMaskHead(
        coarse_in_features=["p2"],
        point_in_features=["p2"],
        feature_scales={"p2": 1.0},
        coarse_side=14,
        coarse_head=Disc(),
        point_head=Disc(),
    ).eval()
    found = Instances(
        (side, side),
        pred_boxes=Boxes(torch.tensor([[0.0, 0, side, side]])),
        pred_classes=torch.zeros(1, dtype=torch.int64),
    )
    (result,) = head({"p2": torch.stack([x, y]).unsqueeze(0)}, [found])
    fine = (torch.arange(224) + 0.5) / 224
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    truth = disc(x, y) > 0
    coarse = F.interpolate(Disc()(torch.zeros(1)), size=(224, 224), mode="bilinear") > 0
    refined = result.pred_masks > 0.5
    assert result.pred_masks.shape == (1, 1, 224, 224)
    wrong_coarse = (coarse[0, 0] != truth).sum().item()
    wrong = (refined[0, 0] != truth).sum().item()
    assert wrong_coarse > 500
    assert wrong < 0.1 * wrong_coarse


class Counting(Disc):
    def __init__(self):
        super().__init__()
        self.points = []

    def forward(self, x, coarse=None):
        if coarse is not None:
            self.points.append(x.shape[2])
        return super().forward(x, coarse)


@pytest.mark.parametrize(
    ("steps", "points", "asked"),
    [
        (5, 784, [784, 784, 784, 784]),  # 14 x 14 is skipped: 28 x 28 is predicted whole
        (2, 784, [784]),
        (1, 784, [196]),
        (0, 784, []),
        (3, 100, [100, 100, 100]),
    ],
)
@torch.no_grad()
def test_points_per_step(steps, points, asked):
    head = PointRendMaskHead(
        coarse_in_features=["p2"], point_in_features=["p2"], feature_scales={"p2": 0.25},
        coarse_side=14, coarse_head=Disc(), point_head=Counting(),
        subdivision_steps=steps, subdivision_num_points=points,
    ).eval()  # fmt: skip
    found = Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])),
        pred_classes=torch.zeros(1, dtype=torch.int64),
    )
    (result,) = head({"p2": torch.rand(1, 2, 16, 20)}, [found])
    assert head.point_head.points == asked
    assert result.pred_masks.shape[-1] == 7 * 2**steps


# ---- points


@pytest.mark.parametrize("points", [0, 1, 5])
def test_point_sample_is_bilinear(points):
    maps = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    coords = torch.rand(2, points, 2, generator=torch.Generator().manual_seed(1))
    found = point_sample(maps, coords, align_corners=False)
    assert found.shape == (2, 3, points)
    wanted = F.grid_sample(
        torch.cat([maps, maps]), torch.cat([coords, coords])[:, None] * 2 - 1, align_corners=False
    ) if points else found  # fmt: skip
    if points:
        torch.testing.assert_close(found, wanted[:2, :, 0])
    found.sum().backward()
    assert maps.grad is not None
    assert point_sample(maps, coords.view(2, points, 1, 2)).shape == (2, 3, points, 1)


def test_a_cell_is_sampled_at_its_centre():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    grid = generate_regular_grid_point_coords(1, 4, "cpu")
    assert grid[0, :2].tolist() == [[0.125, 0.125], [0.375, 0.125]]
    wide = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False)
    inner = point_sample(maps, grid, padding_mode="border")
    torch.testing.assert_close(inner.view(4, 4), wide[0, 0])


def test_features_of_boxes_are_those_of_the_image():
    ramp = torch.arange(20.0).expand(16, 20) * 4 + 2  # x in pixels, at stride 4
    features = torch.stack([ramp, ramp + 100]).unsqueeze(1)
    boxes = [Boxes(torch.tensor([[8.0, 8, 40, 24]])), Boxes(torch.tensor([[20.0, 20, 30, 40]]))]
    points = torch.tensor([[[0.25, 0.5]], [[0.5, 0.5]]])
    sampled, places = point_sample_fine_grained_features([features], [0.25], boxes, points)
    assert places.tolist() == [[[16, 16]], [[25, 30]]]
    torch.testing.assert_close(sampled[:, 0, 0], torch.tensor([16.0, 125.0]))
    none, _ = point_sample_fine_grained_features(
        [features], [0.25], [Boxes(torch.zeros(0, 4))] * 2, torch.zeros(0, 5, 2)
    )
    assert none.shape == (0, 1, 5)


def test_uncertain_points():
    logits = torch.full((2, 1, 8, 8), 9.0)
    logits[0, 0, 2, 5] = logits[1, 0, 7, 0] = 0.1
    index, coords = get_uncertain_point_coords_on_grid(-logits.abs(), 1)
    assert index.tolist() == [[2 * 8 + 5], [7 * 8]]
    assert coords.tolist() == [[[5.5 / 8, 2.5 / 8]], [[0.5 / 8, 7.5 / 8]]]
    assert get_uncertain_point_coords_on_grid(logits, 1000)[0].shape == (2, 64)
    logits[:, 0, 2:5, 3:6] = 0.1  # a seventh of the area
    torch.manual_seed(0)
    found = get_uncertain_point_coords_with_randomness(logits, lambda x: -x.abs(), 40, 10, 0.75)
    assert found.shape == (2, 40, 2)
    assert found.min() >= 0
    assert found.max() <= 1
    cell = found * 8
    inside = (cell > torch.tensor([3.0, 2.0])) & (cell < torch.tensor([6.0, 5.0]))
    share = inside.all(dim=2).float()
    assert (share[:, :30].mean(dim=1) > 0.9).all()
    assert (share[:, 30:].mean(dim=1) < 0.6).all()
    for ratios in ((0.5, 0.5), (3, 1.5)):
        with pytest.raises(ValueError, match="importance_sample_ratio"):
            get_uncertain_point_coords_with_randomness(logits, lambda x: x, 4, *ratios)


def test_points_of_an_image_are_its_own():
    def draw(counts, seeds):
        with per_image_seeds(seeds):
            return get_uncertain_point_coords_with_randomness(
                torch.zeros(sum(counts), 1, 4, 4), lambda x: x, 6, 2, 0.5, regions_per_image=counts
            )

    both = draw([2, 3], [5, 6])
    assert torch.equal(both[2:], draw([3], [6]))
    assert not torch.equal(both[2:], draw([3], [7]))


def test_bitmaps_at_points():
    rng = torch.Generator().manual_seed(0)
    bits = torch.rand(3, 9, 11, generator=rng) > 0.5
    points = torch.rand(4, 50, 2, generator=rng) * torch.tensor([15.0, 13.0]) - 2
    index = torch.tensor([2, 0, 0, 1])
    wanted = F.grid_sample(
        bits[index, None].float(),
        (points / torch.tensor([11.0, 9.0]) * 2 - 1).unsqueeze(1),
        align_corners=False,
    )[:, 0, 0]
    torch.testing.assert_close(sample_bitmaps(bits, index, points), wanted)


def test_labels_of_polygons_and_bitmaps_agree():
    polygons = tiny_input(0, 3)["instances"].gt_masks
    bits = BitMasks.from_polygon_masks(polygons, *SIZE)
    picked = torch.tensor([0, 2, 2, 1, 0])
    points = torch.rand(5, 30, 2) * 60
    wanted = sample_bitmaps(bits.tensor, picked, points)
    for masks in (polygons[picked], bits[picked], SampledBitMasks(bits.tensor, picked)):
        one = Instances(SIZE, gt_masks=masks)
        none = Instances(SIZE, gt_classes=picked[:0])
        torch.testing.assert_close(point_labels([none, one, none], points), wanted)
    assert point_labels([none], points[:0]).shape == (0, 30)
    assert 0 < wanted.mean() < 1
    assert isinstance(polygons[picked], PolygonMasks)


@pytest.mark.parametrize("channels", [1, 3])
def test_point_loss_is_the_mean_cross_entropy_of_the_own_class(channels):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 4, generator=rng)
    labels = torch.rand(2, 4, generator=rng)
    classes = torch.tensor([2, 0])
    given = [Instances(SIZE, gt_classes=classes[:1]), Instances(SIZE, gt_classes=classes[1:])]
    own = logits[:, 0] if channels == 1 else logits[[0, 1], classes]
    wanted = F.binary_cross_entropy_with_logits(own, labels)
    torch.testing.assert_close(roi_mask_point_loss(logits, given, labels), wanted)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["MODEL.POINT_HEAD.NUM_CLASSES", 4], "NUM_CLASSES"),
        (["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2"], "POOLER_TYPE"),
        (["MODEL.ROI_MASK_HEAD.IN_FEATURES", ["p7"]], "ROI_MASK_HEAD.IN_FEATURES"),
        (["MODEL.POINT_HEAD.IN_FEATURES", ["p7"]], "POINT_HEAD.IN_FEATURES"),
    ],
)
def test_mistakes_in_the_config_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        build_model(config(*options))


def test_keys_must_be_added_first():
    cfg = tiny_config("MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead")
    with pytest.raises(ValueError, match="add_pointrend_config"):
        build_model(cfg)
