import numpy as np
import pytest
import torch

from d2kit.structures import Keypoints, heatmaps_to_keypoints
from tests.support.reference_files import reference_path


def test_reference_values():
    vectors = np.load(reference_path("ops/keypoints.npz"))
    t = {name: torch.as_tensor(vectors[name]) for name in vectors}
    found = heatmaps_to_keypoints(t["maps"], t["boxes"])
    torch.testing.assert_close(found, t["keypoints"], rtol=1e-5, atol=1e-5)
    index, valid = Keypoints(t["gt"]).to_heatmap(t["gt_boxes"], 56)
    assert torch.equal(index, t["heatmap_index"])
    assert torch.equal(valid, t["valid"])


def test_a_peak_comes_back_where_it_was():
    box = torch.tensor([[10.0, 20.0, 66.0, 132.0]])
    keypoints = torch.tensor([[[30.5, 60.5, 2.0], [11.0, 131.0, 2.0]]])
    index, valid = Keypoints(keypoints).to_heatmap(box, 56)
    assert valid.tolist() == [[1, 1]]
    maps = torch.zeros(1, 2, 56 * 56).scatter_(2, index[..., None], 10.0).view(1, 2, 56, 56)
    found = heatmaps_to_keypoints(maps, box)
    # one cell is 1 x 2 pixels
    assert (found[0, :, 0] - keypoints[0, :, 0]).abs().max() <= 1
    assert (found[0, :, 1] - keypoints[0, :, 1]).abs().max() <= 2


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ((0, 0, 2), 0),
        ((10, 10, 1), 15),  # the far corner belongs to the last cell
        ((10, 2.5, 2), 7),
        ((10.1, 5, 2), None),
        ((-0.1, 5, 2), None),
        ((5, 5, 0), None),  # not labelled
    ],
)
def test_cells(point, cell):
    index, valid = Keypoints([[point]]).to_heatmap(torch.tensor([[0.0, 0, 10, 10]]), 4)
    assert valid.item() == (cell is not None)
    assert index.item() == (cell or 0)


def test_score_is_the_softmax_where_cells_are_pixels():
    maps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = heatmaps_to_keypoints(maps, torch.tensor([[1.0, 2, 9, 10], [0, 0, 8, 8]]))
    best, at = maps.flatten(2).softmax(dim=2).max(dim=2)
    torch.testing.assert_close(found[..., 3], best)
    torch.testing.assert_close(found[1, :, 0], at[1] % 8 + 0.5)
    torch.testing.assert_close(found[0, :, 1], at[0].div(8, rounding_mode="floor") + 2.5)


def test_no_keypoints():
    assert heatmaps_to_keypoints(torch.zeros(0, 17, 8, 8), torch.zeros(0, 4)).shape == (0, 17, 4)
    empty = Keypoints(torch.zeros(0, 17, 3))
    assert empty.to_heatmap(torch.zeros(0, 4), 8)[0].shape == (0, 17)
    tiny = heatmaps_to_keypoints(torch.zeros(1, 2, 8, 8), torch.tensor([[3.0, 3, 3, 3]]))
    assert torch.isfinite(tiny).all()


def test_container():
    keypoints = Keypoints(np.zeros((3, 17, 3)))
    assert len(keypoints) == 3
    assert keypoints[1].tensor.shape == (1, 17, 3)
    assert len(keypoints[torch.tensor([True, False, True])]) == 2
    assert len(Keypoints.cat([keypoints, keypoints[:1]])) == 4
    assert keypoints.to("cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="expected shape"):
        Keypoints(torch.zeros(3, 17))
    with pytest.raises(ValueError, match="empty list"):
        Keypoints.cat([])
