import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS as Theirs
from torchvision.models.detection.image_list import ImageList

from d2kit.modeling.meta_arch.fcos import centerness, smallest_box_around
from d2kit.structures import Boxes, Instances
from d2kit.structures import ImageList as Batch
from tests.support.tiny_dense import tiny_dense_model

STRIDES = [4, 8]


def ground_truth(seed, count, size):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * torch.tensor([size[1] * 0.6, size[0] * 0.6])
    side = 6 + torch.rand(count, 2, generator=rng) * 40
    boxes = Boxes(torch.cat([corner, corner + side], dim=1))
    boxes.clip(size)
    classes = torch.randint(0, 3, (count,), generator=rng)
    return Instances(size, gt_boxes=boxes, gt_classes=classes)


class Nothing(torch.nn.Module):
    out_channels = 32

    def forward(self, x):
        return {"0": x}


@pytest.fixture(scope="module")
def theirs():
    """torchvision's model: the same method, written by others."""
    generator = AnchorGenerator(sizes=((4,), (8,)), aspect_ratios=((1.0,),) * 2)
    return Theirs(Nothing(), 3, anchor_generator=generator)


def test_losses_are_those_of_torchvision(theirs):
    size, grids = (96, 128), [(24, 32), (12, 16)]
    images = ImageList(torch.zeros(2, 3, *size), [size] * 2)
    features = [torch.zeros(2, 32, *grid) for grid in grids]
    anchors = theirs.anchor_generator(images, features)
    rng = torch.Generator().manual_seed(0)
    levels = [h * w for h, w in grids]
    logits = torch.randn(2, sum(levels), 3, generator=rng)
    deltas = torch.rand(2, sum(levels), 4, generator=rng) * 6
    centers = torch.randn(2, sum(levels), 1, generator=rng)
    truths = [ground_truth(1, 6, size), ground_truth(2, 0, size)]
    targets = [{"boxes": t.gt_boxes.tensor, "labels": t.gt_classes} for t in truths]
    outputs = {"cls_logits": logits, "bbox_regression": deltas, "bbox_ctrness": centers}
    wanted = theirs.compute_loss(targets, outputs, anchors, levels)

    model = tiny_dense_model("FCOS")
    ours = [Boxes(x) for x in anchors[0].split(levels)]
    labels, boxes = model.label_anchors(ours, truths)
    positives = sum(int((x != 3).sum()) for x in labels)
    assert positives > 20
    model.loss_normalizer.average.fill_(positives)
    got = model.losses(
        ours,
        list(logits.split(levels, dim=1)),
        labels,
        list(deltas.split(levels, dim=1)),
        boxes,
        list(centers.split(levels, dim=1)),
    )
    torch.testing.assert_close(got["loss_fcos_cls"], wanted["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["loss_fcos_loc"], wanted["bbox_regression"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["loss_fcos_ctr"], wanted["bbox_ctrness"], rtol=1e-5, atol=0)


def places(stride, rows, columns):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corner = torch.stack([x, y], dim=-1).view(-1, 2) * stride
    return torch.cat([corner, corner + stride], dim=1).float()


LEVELS = [places(4, 16, 16), places(8, 8, 8)]  # of an image of 64 x 64


@pytest.mark.parametrize(
    ("box", "radius", "level", "count"),
    [
        ([16.0, 16, 32, 32], 0.0, 0, 16),  # farthest side at most 14 < 32: fine, all inside
        ([16.0, 16, 32, 32], 1.6, 0, 16),  # nearer than 6.4 pixels to (24, 24)
        ([16.0, 16, 32, 32], 1.5, 0, 4),  # nearer than 6: 22 and 26, not 18 and 30
        ([0.0, 0, 64, 64], 1.5, 1, 4),  # 36 to 44 pixels to the farthest side: coarse
        ([10.0, 10, 10, 30], 0.0, 0, 0),  # no area
    ],
)
def test_places_of_a_box(box, radius, level, count):
    index, positive = smallest_box_around(LEVELS, Boxes(torch.tensor([box])), radius)
    on_level = positive.split([256, 64])
    assert on_level[level].sum() == count
    assert on_level[1 - level].sum() == 0
    assert not index.any()


def test_the_smallest_box_wins_and_parts_change_nothing():
    boxes = Boxes(torch.tensor([[4.0, 4, 36, 36], [16, 16, 28, 28], [60, 60, 62, 62.0]]))
    index, positive = smallest_box_around(LEVELS, boxes, 0.0)
    center = 5 * 16 + 5  # (22, 22)
    assert index[center] == 1
    assert index[2 * 16 + 2] == 0  # (10, 10), in the large box only
    assert positive[2 * 16 + 2]
    for pairs in (1, 700):
        parts = smallest_box_around(LEVELS, boxes, 0.0, max_pairs=pairs)
        assert torch.equal(parts[0], index)
        assert torch.equal(parts[1], positive)


def test_without_boxes_nothing_is_positive():
    index, positive = smallest_box_around(LEVELS, Boxes(torch.zeros(0, 4)), 1.5)
    assert len(index) == len(positive) == 320
    assert not positive.any()


@pytest.mark.parametrize(
    ("box", "value"),
    [
        ([0.0, 0, 8, 8], 1.0),
        ([2.0, 0, 10, 8], (2 / 6) ** 0.5),
        ([0.0, 0, 16, 16], 4 / 12),
        ([5.0, 0, 9, 8], 0.0),
        ([0.0, 0, 0, 0], 0.0),
    ],
)
def test_centerness_at_4_4(box, value):
    place = torch.tensor([[2.0, 2, 6, 6]])
    assert centerness(place, torch.tensor([[box]])).item() == pytest.approx(value)


@torch.no_grad()
def test_scores_are_geometric_means_and_boxes_lie_around_their_places():
    model = tiny_dense_model("FCOS").eval()
    logits = [torch.full((1, 3, 2, 2), -9.0), torch.full((1, 3, 1, 1), -9.0)]
    deltas = [torch.ones(1, 4, 2, 2), torch.ones(1, 4, 1, 1)]
    centers = [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)]
    logits[0][0, 1, 0, 1] = 2.0
    batch = Batch(torch.zeros(1, 3, 8, 8), [(8, 8)])
    (found,) = model.forward_inference(batch, [x[:, :1] for x in logits], [logits, deltas, centers])
    score = (torch.tensor(2.0).sigmoid() * 0.5).sqrt()
    torch.testing.assert_close(found.scores[0], score)
    assert found.pred_classes[0] == 1
    assert found.pred_boxes.tensor[0].tolist() == [2, -2, 10, 6]  # around (6, 2), 4 to each side


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"FCOS\.IN_FEATURES"):
        tiny_dense_model("FCOS", "MODEL.FCOS.IN_FEATURES", ["p9"])
