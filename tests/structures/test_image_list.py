import pytest
import torch

from d2kit.structures import ImageList


def images(*sizes):
    return [torch.full((3, h, w), float(i + 1)) for i, (h, w) in enumerate(sizes)]


def test_padding_is_at_the_right_and_bottom():
    batch = ImageList.from_tensors(images((4, 6), (5, 3)), pad_value=-1)
    assert batch.tensor.shape == (2, 3, 5, 6)
    assert batch.image_sizes == [(4, 6), (5, 3)]
    assert len(batch) == 2
    assert (batch[0] == 1).all()
    assert batch[1].shape == (3, 5, 3)
    assert (batch.tensor[0, :, 4:] == -1).all()
    assert (batch.tensor[1, :, :, 3:] == -1).all()
    assert batch.to(torch.float64).tensor.dtype == torch.float64
    assert batch.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "divisor", "constraints", "expected"),
    [
        ([(4, 6)], 0, None, (4, 6)),
        ([(4, 6)], 4, None, (4, 8)),
        ([(4, 6), (9, 2)], 4, None, (12, 8)),
        ([(4, 6)], 0, {"size_divisibility": 5}, (5, 10)),
        ([(4, 6)], 0, {"square_size": 10}, (10, 10)),
        ([(4, 16), (8, 8)], 0, {"square_size": 10, "size_divisibility": 3}, (18, 18)),
    ],
)
def test_sizes(sizes, divisor, constraints, expected):
    batch = ImageList.from_tensors(images(*sizes), divisor, 0.0, constraints)
    assert batch.tensor.shape == (len(sizes), 3, *expected)
    assert batch.image_sizes == sizes
    assert batch.tensor.sum() == sum((i + 1) * 3 * h * w for i, (h, w) in enumerate(sizes))


def test_label_maps_and_errors():
    labels = [torch.ones(2, 3, dtype=torch.long), torch.ones(3, 2, dtype=torch.long)]
    batch = ImageList.from_tensors(labels, pad_value=255)
    assert batch.tensor.dtype == torch.long
    assert batch.tensor[0, 2, 0] == 255
    with pytest.raises(ValueError, match="got none"):
        ImageList.from_tensors([])
    with pytest.raises(ValueError, match="image 1"):
        ImageList.from_tensors([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)])
