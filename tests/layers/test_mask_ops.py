import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2kit.layers import masks_to_rle, paste_masks_in_image
from d2kit.layers.mask_ops import _compress, _paste_masks_tensor_shape, bitmasks_to_rle
from d2kit.structures import Boxes
from tests.support.reference_files import reference_path


def random_masks(n, seed, size=28, extent=(60, 80)):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 1, 5, 5, generator=g) * 3
    masks = F.interpolate(noise, size=size, mode="bicubic")[:, 0].sigmoid()
    centre = torch.rand(n, 2, generator=g) * torch.tensor([extent[1], extent[0]])
    half = torch.exp(torch.rand(n, 2, generator=g) * 4.5 - 0.5) / 2
    return masks, torch.cat([centre - half, centre + half], dim=1)


def test_reference_values():
    vectors = np.load(reference_path("ops/masks.npz"))
    masks, boxes = torch.as_tensor(vectors["probs"]), torch.as_tensor(vectors["boxes"])
    pasted = paste_masks_in_image(masks, Boxes(boxes), (60, 80))
    assert pasted.dtype == torch.bool
    assert np.array_equal(pasted, vectors["pasted"])
    soft = paste_masks_in_image(masks, boxes, (60, 80), threshold=-1)
    assert soft.dtype == torch.uint8
    assert np.array_equal(soft, vectors["pasted_soft"])
    shape = (torch.tensor(60), torch.tensor(80))
    assert torch.equal(_paste_masks_tensor_shape(masks, boxes, shape), pasted)


def test_pasting_is_grid_sampling():
    masks, boxes = random_masks(50, 0)
    x0, y0, x1, y1 = boxes.split(1, dim=1)
    y = (torch.arange(60) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(80) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, 60, -1), y[..., None].expand(-1, -1, 80)], dim=3)
    expected = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
    assert torch.equal(paste_masks_in_image(masks, boxes, (60, 80)), expected)
    assert expected.any(dim=(1, 2)).sum() > 30


@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_rle_is_that_of_the_pasted_masks(seed, threshold):
    from pycocotools import mask as coco

    masks, boxes = random_masks(60, seed)
    boxes[0] = torch.tensor([-5.0, -5, 85, 65])  # the whole image: runs go through columns
    boxes[1] = torch.tensor([10.0, -5, 30, 65])
    boxes[2] = torch.tensor([200.0, 10, 220, 30])  # outside
    boxes[3] = torch.tensor([70.0, 50, 80, 60])  # in the last corner
    masks[:2] = 1
    masks[3] = 1
    masks[4] = 0
    rles = masks_to_rle(masks, Boxes(boxes), (60, 80), threshold)
    pasted = paste_masks_in_image(masks, boxes, (60, 80), threshold)
    assert rles == [coco.encode(np.asfortranarray(mask)) for mask in pasted.numpy()]
    assert coco.area(rles).tolist() == pasted.sum(dim=(1, 2)).tolist()


@pytest.mark.parametrize("size", [(60, 80), (37, 53), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("as_what", ["bool", "uint8 of 255", "float", "view"])
def test_rle_of_full_size_masks(size, as_what):
    from pycocotools import mask as coco

    random = np.random.default_rng(size[0])
    masks = np.zeros((30, *size), dtype=bool)
    for mask in masks[:20]:  # rectangles with holes, some of them up to the border
        (y0, y1), (x0, x1) = (np.sort(random.integers(0, side + 1, 2)) for side in size)
        mask[y0:y1, x0:x1] = random.random((y1 - y0, x1 - x0)) < 0.9
    masks[20:24] = random.random((4, *size)) < 0.5
    masks[24] = True
    masks[25, :, -1] = True
    masks[26, -1] = True
    masks[27, 0, 0] = masks[28, -1, -1] = True
    given = {
        "bool": torch.from_numpy(masks),
        "uint8 of 255": torch.from_numpy(masks * np.uint8(255)),
        "float": masks * 0.25,
        "view": torch.from_numpy(masks.transpose(0, 2, 1).copy()).transpose(1, 2),
    }[as_what]
    rles = bitmasks_to_rle(given)
    assert rles == [coco.encode(np.asfortranarray(mask)) for mask in masks]
    assert bitmasks_to_rle(given[:0]) == []


def test_rle_of_large_images():
    from pycocotools import mask as coco

    runs = [
        np.array([0, 70000, 1, 3, 5_000_000, 2]),
        np.array([12345678]),
        np.array([7, 1, 7, 900]),
    ]
    for lengths, string in zip(runs, _compress(runs), strict=True):
        height = int(lengths.sum())
        uncompressed = {"size": [height, 1], "counts": lengths.tolist()}
        assert coco.frPyObjects(uncompressed, height, 1)["counts"] == string


def test_nothing():
    empty = torch.zeros(0, 28, 28), torch.zeros(0, 4)
    assert paste_masks_in_image(*empty, (6, 8)).shape == (0, 6, 8)
    assert masks_to_rle(*empty, (6, 8)) == []
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert paste_masks_in_image(torch.zeros(1, 28, 28), point, (6, 8)).sum() == 0
    assert paste_masks_in_image(torch.ones(1, 28, 28), point, (6, 8), -1).shape == (1, 6, 8)


def test_a_full_mask_fills_its_box():
    pasted = paste_masks_in_image(torch.ones(1, 28, 28), torch.tensor([[2.0, 3, 5, 7]]), (9, 10))
    expected = torch.zeros(9, 10, dtype=torch.bool)
    expected[3:7, 2:5] = True
    assert torch.equal(pasted[0], expected)


def test_errors():
    with pytest.raises(ValueError, match="expected masks"):
        paste_masks_in_image(torch.zeros(2, 28, 28), torch.zeros(1, 4), (6, 8))
    with pytest.raises(ValueError, match="threshold"):
        masks_to_rle(torch.zeros(1, 28, 28), torch.zeros(1, 4), (6, 8), -1)


@pytest.mark.gpu
def test_same_on_the_gpu():
    masks, boxes = random_masks(50, 0)
    for threshold in (0.5, -1):
        cpu = paste_masks_in_image(masks, boxes, (60, 80), threshold)
        gpu = paste_masks_in_image(masks.cuda(), boxes.cuda(), (60, 80), threshold).cpu()
        assert (cpu.int() - gpu.int()).abs().max() <= (0 if threshold > 0 else 1)
    assert masks_to_rle(masks.cuda(), boxes.cuda(), (60, 80)) == masks_to_rle(
        masks, boxes, (60, 80)
    )
