import numpy as np
import pytest
import torch

from d2kit.modeling.box_regression import Matcher
from tests.support.reference_files import reference_path

SETTINGS = [
    ([0.3, 0.7], [0, -1, 1], True),
    ([0.5], [0, 1], False),
    ([0.4, 0.5], [0, -1, 1], True),
]


@pytest.mark.parametrize("case", range(3))
def test_equals_the_reference(case):
    reference = np.load(reference_path("ops/matcher.npz"))
    matches, labels = Matcher(*SETTINGS[case])(torch.from_numpy(reference["quality"]))
    assert labels.dtype == torch.int8
    np.testing.assert_array_equal(matches.numpy(), reference[f"matches{case}"])
    np.testing.assert_array_equal(labels.numpy(), reference[f"labels{case}"])


@pytest.mark.parametrize(
    ("quality", "label"), [(0.0, 0), (0.29, 0), (0.3, -1), (0.69, -1), (0.7, 1), (1.0, 1)]
)
def test_a_bound_belongs_to_the_upper_label(quality, label):
    _, labels = Matcher([0.3, 0.7], [0, -1, 1])(torch.tensor([[quality]], dtype=torch.float64))
    assert labels.tolist() == [label]


@pytest.mark.parametrize("low_quality", [True, False])
def test_no_ground_truth(low_quality):
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], low_quality)(torch.zeros(0, 4))
    assert matches.tolist() == [0, 0, 0, 0]
    assert labels.tolist() == [0, 0, 0, 0]
    assert (matches.dtype, labels.dtype) == (torch.int64, torch.int8)


def test_no_prediction():
    matches, labels = Matcher([0.5], [0, 1], True)(torch.zeros(3, 0))
    assert matches.shape == labels.shape == (0,)


def test_low_quality_matches_include_ties_and_keep_the_better_ground_truth():
    quality = torch.tensor([[0.2, 0.2, 0.1], [0.25, 0.1, 0.0]])
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], True)(quality)
    assert labels.tolist() == [1, 1, 0]
    assert matches.tolist() == [1, 0, 0]


def test_a_ground_truth_that_nothing_touches_makes_nothing_foreground():
    quality = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.4, 0.1]])
    assert Matcher([0.5], [0, 1], True)(quality)[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("thresholds", "labels"),
    [([0.7, 0.3], [0, -1, 1]), ([0.5], [0, 2]), ([0.5], [0, -1, 1]), ([0.0], [0, 1]), ([], [0])],
)
def test_bad_settings_are_refused(thresholds, labels):
    with pytest.raises(ValueError, match="Matcher"):
        Matcher(thresholds, labels)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matrix"):
        Matcher([0.5], [0, 1])(torch.zeros(4))
