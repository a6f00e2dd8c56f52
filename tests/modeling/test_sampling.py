import pytest
import torch

from d2kit.modeling.sampling import (
    generator_for,
    per_image_seeds,
    subsample_labels,
    subsample_masks,
)

BACKGROUND = 3


def labels(positives: int, negatives: int, ignored: int) -> torch.Tensor:
    return torch.tensor(
        [i % 3 for i in range(positives)] + [BACKGROUND] * negatives + [-1] * ignored
    )


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        ((10, 100, 5), (16, 0.25), (4, 12)),  # the positives are too many
        ((2, 100, 5), (16, 0.25), (2, 14)),  # negatives fill up
        ((10, 3, 5), (16, 0.25), (4, 3)),  # positives do not
        ((10, 3, 0), (100000, 0.5), (10, 3)),
        ((0, 0, 4), (16, 0.5), (0, 0)),
        ((0, 0, 0), (16, 0.5), (0, 0)),
        ((5, 5, 0), (3, 0.5), (1, 2)),  # rounded down
        ((5, 5, 0), (4, 1.0), (4, 0)),
        ((5, 5, 0), (0, 0.5), (0, 0)),
    ],
)
def test_numbers_and_kinds(have, want, expected):
    x = labels(*have)
    positive, negative = subsample_labels(x, *want, BACKGROUND)
    assert (len(positive), len(negative)) == expected
    assert ((x[positive] != -1) & (x[positive] != BACKGROUND)).all()
    assert (x[negative] == BACKGROUND).all()
    assert len(set(positive.tolist())) == len(positive)
    assert len(set(negative.tolist())) == len(negative)
    assert positive.dtype == negative.dtype == torch.int64


def test_masks_say_the_same_as_indices():
    x = labels(10, 30, 5)
    positive, negative = subsample_labels(
        x, 16, 0.25, BACKGROUND, generator=torch.Generator().manual_seed(3)
    )
    is_positive, is_negative = subsample_masks(
        x, 16, 0.25, BACKGROUND, generator=torch.Generator().manual_seed(3)
    )
    assert is_positive.nonzero()[:, 0].tolist() == sorted(positive.tolist())
    assert is_negative.nonzero()[:, 0].tolist() == sorted(negative.tolist())


def test_every_candidate_is_equally_likely():
    x = labels(8, 8, 2)
    counts = torch.zeros(18)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        for mask in subsample_masks(x, 8, 0.5, BACKGROUND, generator=generator):
            counts += mask
    assert counts[16:].tolist() == [0, 0]
    assert (counts[:16] - 500).abs().max() < 80  # five standard deviations of 16


def test_a_choice_depends_on_the_seed_of_its_image_alone():
    x = labels(50, 500, 50)

    def draw(seeds, index, stage="rpn"):
        with per_image_seeds(seeds):
            generator = generator_for(index, stage)
            positive, negative = subsample_labels(x, 64, 0.25, BACKGROUND, generator=generator)
        return positive.tolist(), negative.tolist()

    alone = draw([7], 0)
    torch.rand(5)
    assert draw([1, 7, 2], 1) == alone
    assert draw([8], 0) != alone
    assert draw([7], 0, "roi_heads") != alone


def test_outside_the_context_the_global_generator_is_used():
    assert generator_for(0, "rpn") is None
    with per_image_seeds(None):
        assert generator_for(0, "rpn") is None
    with per_image_seeds([1]), per_image_seeds(None):
        assert generator_for(0, "rpn") is None
    x = labels(50, 500, 50)
    torch.manual_seed(4)
    first = subsample_labels(x, 64, 0.25, BACKGROUND)[1].tolist()
    torch.manual_seed(4)
    assert subsample_labels(x, 64, 0.25, BACKGROUND)[1].tolist() == first


def test_seeds_are_restored_after_an_error():
    with pytest.raises(RuntimeError), per_image_seeds([1]):
        raise RuntimeError
    assert generator_for(0, "rpn") is None


def test_too_few_seeds_are_reported():
    with per_image_seeds([1]), pytest.raises(ValueError, match="1 seeds"):
        generator_for(1, "rpn")
