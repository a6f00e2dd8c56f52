"""Augmentations: their draws, their protocol and their mistakes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2kit.data.transforms as T  # noqa: N812
from d2kit.data.transforms.augmentation import _transform_to_aug
from tests.support.reference_files import reference_path

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
BOXES = np.array([[3.0, 4, 30, 20], [10, 10, 50, 39]])

GEOMETRIC = {
    "flip": T.RandomFlip(1.0),
    "vflip": T.RandomFlip(1.0, horizontal=False, vertical=True),
    "resize": T.Resize((33, 71)),
    "shortest": T.ResizeShortestEdge((20, 70), 90),
    "choice": T.ResizeShortestEdge([20, 45], 90, "choice"),
    "scale": T.ResizeScale(0.3, 2.0, 50, 50),
    "sizes": T.RandomResize([(20, 30), (50, 40)]),
    "rotation": T.RandomRotation([-180, 180]),
    "rotation_about": T.RandomRotation([-40, 40], expand=False, center=[[0.2, 0.2], [0.8, 0.8]]),
    "extent": T.RandomExtent((0.7, 1.5), (0.3, 0.3)),
    "crop": T.RandomCrop("relative_range", (0.3, 0.3)),
    "crop_pixels": T.RandomCrop("absolute", (25, 30)),
    "crop_pixel_range": T.RandomCrop("absolute_range", (15, 50)),
    "fixed": T.FixedSizeCrop((30, 80), seg_pad_value=0),
    "iou": T.MinIoURandomCrop(),
    "apply": T.RandomApply(T.RandomCrop("relative", (0.5, 0.5)), 0.5),
}


def _augment(aug, seed, **inputs):
    np.random.seed(seed)
    aug_input = T.AugInput(IMAGE, **inputs)
    return aug_input, aug(aug_input)


def test_shortest_edge_equals_reference():
    reference = np.load(reference_path("ops/transforms.npz"))
    for row, expected in zip(
        reference["shortest_edge_in"], reference["shortest_edge"], strict=True
    ):
        assert T.ResizeShortestEdge.get_output_shape(*row.tolist()) == tuple(expected)


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(GEOMETRIC)))
def test_masks_boxes_and_image_agree(seed, name):
    """The mask of a box, transformed, fills the transformed box up to a pixel."""
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, 40), rng.integers(0, 25)
    x1, y1 = rng.integers(x0 + 8, 60, endpoint=True), rng.integers(y0 + 8, 40, endpoint=True)
    mask = np.zeros((40, 60), np.uint8)
    mask[y0:y1, x0:x1] = 1
    boxes = np.array([[x0, y0, x1, y1]], dtype=float)
    aug_input, _ = _augment(GEOMETRIC[name], seed, boxes=boxes.copy(), sem_seg=mask)
    height, width = aug_input.image.shape[:2]
    assert aug_input.sem_seg.shape == (height, width)
    box = aug_input.boxes[0]
    rows, columns = np.nonzero(aug_input.sem_seg)
    if len(rows):
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        clipped = box.clip(0, [width, height, width, height])
        assert (found[:2] >= clipped[:2] - 1).all()
        assert (found[2:] <= clipped[2:] + 1).all()
        if "rotation" not in name:
            np.testing.assert_allclose(found, clipped, atol=1)


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(GEOMETRIC)))
def test_polygons_and_boxes_agree(seed, name):
    aug_input, transform = _augment(GEOMETRIC[name], seed, boxes=BOXES.copy())
    height, width = aug_input.image.shape[:2]
    x0, y0, x1, y1 = BOXES[1]
    polygon = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    points = np.concatenate([*transform.apply_polygons([polygon]), np.empty((0, 2))])
    if len(points):
        limits = (width, height)
        found = (points.min(0).clip(0, limits), points.max(0).clip(0, limits))
        box = aug_input.boxes[1]
        np.testing.assert_allclose(found[0], box[:2].clip(0, limits), atol=1e-6)
        np.testing.assert_allclose(found[1], box[2:].clip(0, limits), atol=1e-6)


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_draws_depend_on_numpys_generator_only(name):
    first, _ = _augment(GEOMETRIC[name], 5, boxes=BOXES.copy())
    second, _ = _augment(GEOMETRIC[name], 5, boxes=BOXES.copy())
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes, second.boxes)


@pytest.mark.parametrize(
    ("aug", "sizes"),
    [
        (T.Resize(24), {(24, 24)}),
        (T.ResizeShortestEdge(20), {(20, 30)}),
        (T.ResizeShortestEdge((20, 22)), {(20, 30), (21, 32), (22, 33)}),
        (T.ResizeShortestEdge([20, 80], 90, "choice"), {(20, 30), (60, 90)}),
        (T.ResizeShortestEdge(0), {(40, 60)}),
        (T.RandomResize([(5, 6), (7, 8)]), {(5, 6), (7, 8)}),
        (T.RandomCrop("relative", (0.5, 0.25)), {(20, 15)}),
        (T.RandomCrop("absolute", (100, 10)), {(40, 10)}),
        (T.FixedSizeCrop((30, 80)), {(30, 80)}),
        (T.FixedSizeCrop((30, 80), pad=False), {(30, 60)}),
        (T.ResizeScale(1.0, 1.0, 80, 90), {(60, 90)}),
        (T.RandomRotation(90), {(60, 40)}),
        (T.RandomRotation([0, 360], sample_style="choice"), {(40, 60)}),
    ],
)
def test_sizes(aug, sizes):
    results = {_augment(aug, seed)[0].image.shape[:2] for seed in range(30)}
    assert results == sizes


def test_draws_are_detectron2s():
    """The order and kind of draws are part of the contract: seeded runs give the same crops."""
    np.random.seed(7)
    share = np.float32((0.4, 0.6)) + np.random.rand(2) * (1 - np.float32((0.4, 0.6)))
    h, w = int(40 * share[0] + 0.5), int(60 * share[1] + 0.5)
    y, x = np.random.randint(40 - h + 1), np.random.randint(60 - w + 1)
    _, crop = _augment(T.RandomCrop("relative_range", (0.4, 0.6)), 7)
    assert (crop.x0, crop.y0, crop.w, crop.h) == (x, y, w, h)
    np.random.seed(7)
    size = np.random.randint(20, 61)
    flipped = np.random.uniform(0, 1) < 0.5
    augs = T.AugmentationList([T.ResizeShortestEdge((20, 60)), T.RandomFlip()])
    _, transforms = _augment(augs, 7)
    assert transforms[0].new_h == size
    assert isinstance(transforms[1], T.HFlipTransform) == flipped


@pytest.mark.parametrize(
    ("aug", "expected"),
    [
        (T.RandomBrightness(0, 0), np.zeros_like),
        (T.RandomBrightness(0.5, 0.5), lambda x: x * 0.5),
        (T.RandomContrast(0, 0), lambda x: np.full(x.shape, x.mean())),
        (T.RandomSaturation(0, 0), lambda x: (x @ [0.299, 0.587, 0.114])[..., None] + 0 * x),
        (T.RandomSaturation(1, 1), lambda x: x),
        (T.RandomLighting(0.0), lambda x: x),
    ],
)
def test_colours(aug, expected):
    aug_input, _ = _augment(aug, 0, boxes=BOXES)
    np.testing.assert_allclose(aug_input.image, expected(IMAGE.astype(float)), atol=1.01)
    np.testing.assert_array_equal(aug_input.boxes, BOXES)


def test_lighting_shifts_along_principal_axes():
    np.random.seed(3)
    transform = T.RandomLighting(50.0).get_transform(IMAGE)
    shift = transform.apply_image(np.zeros((1, 1, 3), np.float32))[0, 0]
    np.random.seed(3)
    weights = np.random.normal(scale=50.0, size=3) * [0.2175, 0.0188, 0.0045]
    axes = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    np.testing.assert_allclose(shift, axes @ weights)


def test_random_apply():
    aug = T.RandomApply(T.HFlipTransform(60), 0.3)
    flipped = [(_augment(aug, s)[0].image == IMAGE[:, ::-1]).all() for s in range(300)]
    assert 60 < sum(flipped) < 120
    assert isinstance(T.RandomApply(T.RandomFlip(), 0.0).get_transform(IMAGE), T.NoOpTransform)
    assert isinstance(T.RandomApply(T.RandomFlip(1.0), 1.0).get_transform(IMAGE), T.HFlipTransform)


def test_category_area_constraint():
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20), 0.9)
    shares = []
    for seed in range(40):
        aug_input, _ = _augment(aug, seed, sem_seg=labels)
        shares.append(abs(aug_input.sem_seg.mean() - 0.5))
    assert np.mean(np.array(shares) < 0.4) > 0.9
    free = T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20))
    assert _augment(free, 0, sem_seg=labels)[0].image.shape == (20, 20, 3)
    ignoring = T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20), 0.9, ignored_category=1)
    assert _augment(ignoring, 0, sem_seg=labels)[0].image.shape == (20, 20, 3)
    with pytest.raises(ValueError, match="sem_seg"):
        _augment(aug, 0)


def test_min_iou_crop_without_boxes_keeps_the_image():
    aug_input, transform = _augment(T.MinIoURandomCrop(), 0, boxes=np.zeros((0, 4)))
    assert isinstance(transform, T.NoOpTransform)
    assert aug_input.image is IMAGE
    sizes = {
        _augment(T.MinIoURandomCrop(), seed, boxes=BOXES.copy())[0].image.shape
        for seed in range(20)
    }
    assert len(sizes) > 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: T.RandomFlip(horizontal=True, vertical=True), ValueError, "exactly one"),
        (lambda: T.RandomFlip(1.5), ValueError, "between 0 and 1"),
        (lambda: T.ResizeShortestEdge([1, 2, 3]), ValueError, "min, max"),
        (lambda: T.ResizeShortestEdge(9, sample_style="all"), ValueError, "'all'"),
        (lambda: T.Resize((0, 4)), ValueError, "height, width"),
        (lambda: T.ResizeScale(2.0, 1.0, 9, 9), ValueError, "min_scale"),
        (lambda: T.RandomResize([]), ValueError, "at least one"),
        (lambda: T.RandomRotation([1, 2, 3]), ValueError, "range"),
        (lambda: T.RandomCrop("half", (1, 1)), ValueError, "'half'"),
        (lambda: T.RandomCrop("relative", (10, 10)), ValueError, "share"),
        (lambda: T.RandomCrop("absolute_range", (9, 5)), ValueError, "min, max"),
        (lambda: T.RandomCrop("absolute", (5,)), ValueError, "two positive"),
        (lambda: T.FixedSizeCrop((0, 5)), ValueError, "crop_size"),
        (lambda: T.RandomContrast(2, 1), ValueError, "intensity_min"),
        (lambda: T.AugInput([[1]]), ValueError, "numpy array"),
        (lambda: T.AugInput(IMAGE.astype(np.int32)), ValueError, "int32"),
        (lambda: T.AugInput(IMAGE[None]), ValueError, "shape"),
        (lambda: T.AugmentationList([3]), TypeError, "int"),
        (lambda: T.RandomSaturation(0, 1).get_transform(IMAGE[..., 0]), ValueError, "RGB"),
        (lambda: T.RandomLighting(1).get_transform(IMAGE[..., 0]), ValueError, "RGB"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


class _UserAug(T.Augmentation):
    def __init__(self, share=0.5):
        super().__init__()
        self._init(locals())

    def get_transform(self, image, extra):
        return T.CropTransform(0, 0, int(image.shape[1] * self.share), extra)


class _UserInput:
    def __init__(self):
        self.image, self.extra = IMAGE, 7

    def transform(self, tfm):
        self.image = tfm.apply_image(self.image)


def test_users_augmentations_and_inputs():
    user_input = _UserInput()
    transforms = T.AugmentationList([_UserAug(), T.HFlipTransform(30)])(user_input)
    assert isinstance(transforms, T.TransformList)
    assert len(transforms) == 2
    np.testing.assert_array_equal(user_input.image, IMAGE[:7, :30][:, ::-1])
    with pytest.raises(AttributeError, match="extra.*image"):
        _UserAug()(T.AugInput(IMAGE))

    class Old(T.Augmentation):
        def get_transform(self, img):
            return T.HFlipTransform(img.shape[1])

    flipped = T.AugInput(IMAGE)
    Old()(flipped)
    np.testing.assert_array_equal(flipped.image, IMAGE[:, ::-1])

    class Vague(T.Augmentation):
        def get_transform(self, *args):
            return T.NoOpTransform()

    with pytest.raises(TypeError, match="input_args"):
        Vague()(T.AugInput(IMAGE))

    class Wrong(T.Augmentation):
        def get_transform(self, image):
            return 3

    with pytest.raises(TypeError, match="must return a Transform"):
        Wrong()(T.AugInput(IMAGE))
    with pytest.raises(NotImplementedError):
        T.Augmentation().get_transform()


def test_representation():
    assert repr(_UserAug(0.25)) == "_UserAug(share=0.25)"
    assert repr(T.RandomFlip()) == "RandomFlip()"
    assert repr(T.ResizeShortestEdge(short_edge_length=(3, 4), max_size=9)) == (
        "ResizeShortestEdge(short_edge_length=(3, 4), max_size=9)"
    )
    text = repr(
        T.AugmentationList([T.RandomApply(T.RandomFlip(0.25), prob=0.5), T.HFlipTransform(4)])
    )
    assert text == (
        "AugmentationList[RandomApply(RandomFlip(prob=0.25), prob=0.5), HFlipTransform(width=4)]"
    )


def test_apply_augmentations():
    image, transforms = T.apply_augmentations([T.RandomFlip(1.0), T.Resize(9)], IMAGE)
    assert image.shape == (9, 9, 3)
    assert len(transforms) == 2
    aug_input = T.StandardAugInput(IMAGE, boxes=BOXES.copy())
    same, _ = T.apply_transform_gens([T.RandomFlip(1.0)], aug_input)
    assert same is aug_input
    np.testing.assert_allclose(aug_input.boxes, [[30, 4, 57, 20], [10, 10, 50, 39]])
    assert T.TransformGen is T.Augmentation
    aug = _transform_to_aug(T.NoOpTransform())
    assert _transform_to_aug(aug) is aug
