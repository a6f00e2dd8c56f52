import copy
import pickle

import numpy as np
import pytest
import torch

from d2kit.structures import Boxes, Instances, PolygonMasks

TRIANGLE = np.array([0.0, 0, 4, 0, 4, 4])


def make(n=3):
    return Instances(
        (20, 30),
        pred_boxes=Boxes(torch.arange(4 * n).view(n, 4)),
        scores=torch.arange(n) / 10,
        names=[f"i{k}" for k in range(n)],
        masks=PolygonMasks([[TRIANGLE + k] for k in range(n)]),
    )


def test_fields():
    x = make()
    assert len(x) == 3
    assert x.image_size == (20, 30)
    assert x.has("scores")
    assert not x.has("score")
    assert x.get("scores") is x.scores
    x.labels = torch.ones(3)
    assert list(x.get_fields()) == ["pred_boxes", "scores", "names", "masks", "labels"]
    x.remove("labels")
    assert not x.has("labels")


def test_errors_say_what_is_there():
    x = make()
    with pytest.raises(ValueError, match="'labels' has length 2"):
        x.labels = torch.ones(2)
    with pytest.raises(AttributeError, match="nearest: scores"):
        _ = x.score
    with pytest.raises(AttributeError, match="method or property"):
        x.image_size = (1, 1)
    for method in (x.get, x.remove):
        with pytest.raises(KeyError, match="no field 'missing'"):
            method("missing")
    with pytest.raises(NotImplementedError, match="without fields"):
        len(Instances((1, 1)))


def test_the_only_field_may_change_its_length():
    x = Instances((4, 4), scores=torch.ones(2))
    x.scores = torch.ones(5)
    assert len(x) == 5


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (0, ["i0"]),
        (-1, ["i2"]),
        (slice(1, None), ["i1", "i2"]),
        (torch.tensor([True, False, True]), ["i0", "i2"]),
        (torch.tensor([2, 0]), ["i2", "i0"]),
        (torch.tensor([False, False, False]), []),
        (np.array([1]), ["i1"]),
    ],
)
def test_indexing(item, expected):
    chosen = make()[item]
    assert chosen.names == expected
    assert len(chosen.pred_boxes) == len(chosen.scores) == len(chosen.masks) == len(expected)
    assert chosen.image_size == (20, 30)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="3 instances"):
        make()[3]


def test_iteration():
    assert [x.names for x in make()] == [["i0"], ["i1"], ["i2"]]


def test_cat():
    joined = Instances.cat([make(), make(0), make(1)])
    assert joined.names == ["i0", "i1", "i2", "i0"]
    assert len(joined.pred_boxes) == len(joined.masks) == len(joined) == 4
    single = make()
    assert Instances.cat([single]) is single


def test_cat_errors():
    other = make()
    other.remove("scores")
    with pytest.raises(ValueError, match="fields differ"):
        Instances.cat([make(), other])
    with pytest.raises(ValueError, match="image sizes differ"):
        Instances.cat([make(), Instances((1, 2))])
    with pytest.raises(ValueError, match="empty list"):
        Instances.cat([])
    with pytest.raises(TypeError, match="'a' of type tuple"):
        Instances.cat([Instances((1, 1), a=(1,)), Instances((1, 1), a=(2,))])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate):
    x = make()
    y = duplicate(x)
    assert torch.equal(y.scores, x.scores)
    assert y.scores.data_ptr() != x.scores.data_ptr()


def test_to_and_str():
    x = make().to("cpu")
    assert x.names == ["i0", "i1", "i2"]
    assert str(x).startswith("Instances(num_instances=3, image_height=20, image_width=30, fields=[")
    assert "num_instances=0" in str(Instances((1, 1)))
