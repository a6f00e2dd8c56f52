"""Transforms against Detectron2's figures, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import d2kit.data.transforms as T  # noqa: N812
from d2kit.data.transforms.transform import clip_polygon_to_rect, nearest_indices
from tests.support.reference_files import reference_path

CASES = {
    "resize": T.ResizeTransform(40, 60, 25, 33, 2),
    "resize_up": T.ResizeTransform(40, 60, 80, 100, 2),
    "hflip": T.HFlipTransform(60),
    "vflip": T.VFlipTransform(40),
    "crop": T.CropTransform(5, 6, 30, 20),
    "rotate30": T.RotationTransform(40, 60, 30),
    "rotate30_noexpand": T.RotationTransform(40, 60, 30, expand=False),
    "rotate_m90": T.RotationTransform(40, 60, -90),
    "extent": T.ExtentTransform((5, 5, 50, 35), (30, 45)),
    "pad": T.PadTransform(2, 3, 4, 5),
}


@pytest.fixture(scope="module")
def reference():
    return np.load(reference_path("ops/transforms.npz"))


@pytest.mark.parametrize("name", [*CASES, "blend"])
def test_equals_reference(reference, name):
    image = reference["image"]
    transform = CASES.get(name) or T.BlendTransform(np.zeros_like(image), 0.3, 0.7)
    segmentation = (image[:, :, 0] > 127).astype(np.uint8)
    np.testing.assert_array_equal(transform.apply_image(image.copy()), reference[f"{name}.image"])
    np.testing.assert_array_equal(
        transform.apply_segmentation(segmentation), reference[f"{name}.segmentation"]
    )
    coords = transform.apply_coords(reference["coords"].copy())
    np.testing.assert_allclose(coords, reference[f"{name}.coords"], rtol=1e-5, atol=1e-5)
    boxes = transform.apply_box(reference["boxes"].copy())
    np.testing.assert_allclose(boxes, reference[f"{name}.boxes"], rtol=1e-5, atol=1e-5)


@given(old=st.integers(1, 2000), new=st.integers(1, 2000))
def test_nearest_is_pillows(old, new):
    row = np.arange(old, dtype=np.int32)[None]
    expected = np.asarray(Image.fromarray(row).resize((new, 1), Image.Resampling.NEAREST))[0]
    np.testing.assert_array_equal(nearest_indices(old, new), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.bool_, np.float32])
def test_segmentation_of_any_dtype_is_resized_alike(dtype):
    labels = np.random.default_rng(0).integers(0, 2, (17, 23))
    expected = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize((31, 11), 0))
    result = T.ResizeTransform(17, 23, 11, 31).apply_segmentation(labels.astype(dtype))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_resize_treats_channels_alone(channels):
    image = np.random.default_rng(0).integers(0, 256, (12, 10, channels), dtype=np.uint8)
    result = T.ResizeTransform(12, 10, 20, 15).apply_image(image)
    for c in range(channels):
        expected = np.asarray(Image.fromarray(image[..., c]).resize((15, 20), 2))
        np.testing.assert_array_equal(result[..., c], expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.int16, 0.51)])
def test_resize_of_other_dtypes_is_torch_interpolation(dtype, tolerance):
    image = np.random.default_rng(0).uniform(0, 255, (6, 8, 2)).astype(dtype)
    result = T.ResizeTransform(6, 8, 9, 12).apply_image(image)
    tensor = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (9, 12), mode="bilinear")[0]
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected.permute(1, 2, 0), atol=tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T.ResizeTransform(4, 5, 0, 5), "at least 1 pixel"),
        (
            lambda: T.ResizeTransform(4, 5, 8, 8).apply_image(np.zeros((5, 4, 3), np.uint8)),
            r"4x5.*\(5, 4, 3\)",
        ),
        (
            lambda: T.ResizeTransform(4, 5, 8, 8, 1).apply_image(np.zeros((4, 5), np.float32)),
            "interp",
        ),
        (lambda: T.RotationTransform(4, 5, 9).apply_image(np.zeros((5, 4))), "4x5"),
        (lambda: T.ColorTransform(3), "callable"),
        (lambda: T.CropTransform(0, 0, 2, 2).inverse(), "orig_w"),
        (lambda: T.PadTransform(0, 0, 2, 2).inverse(), "orig_w"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name", ["resize", "resize_up", "hflip", "vflip", "rotate30", "rotate_m90"]
)
def test_inverse_brings_points_back(reference, name):
    transform = CASES[name]
    coords = transform.apply_coords(reference["coords"].copy())
    # a crop is by whole pixels, so that going back after a rotation may be off by half of one
    tolerance = 0.51 if name == "rotate30" else 1e-9
    back = transform.inverse().apply_coords(coords)
    np.testing.assert_allclose(back, reference["coords"], atol=tolerance)


def test_inverse_of_crop_and_pad():
    image = np.arange(48, dtype=np.uint8).reshape(6, 8)
    crop = T.CropTransform(2, 1, 4, 3, orig_w=8, orig_h=6)
    back = crop.inverse().apply_image(crop.apply_image(image))
    assert back.shape == image.shape
    np.testing.assert_array_equal(back[1:4, 2:6], image[1:4, 2:6])
    assert back.sum() == image[1:4, 2:6].sum()
    pad = T.PadTransform(1, 2, 3, 4, orig_w=8, orig_h=6)
    np.testing.assert_array_equal(pad.inverse().apply_image(pad.apply_image(image)), image)


def test_colour_transforms_leave_geometry():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    invert = T.ColorTransform(lambda x: 255 - x)
    np.testing.assert_array_equal(invert.apply_image(image), 255 - image)
    coords = np.ones((2, 2))
    assert invert.apply_coords(coords) is coords
    assert invert.apply_segmentation(image) is image
    assert isinstance(invert.inverse(), T.NoOpTransform)
    black = T.PILColorTransform(lambda x: ImageEnhance.Brightness(x).enhance(0.0))
    assert black.apply_image(image).sum() == 0


@given(w=st.integers(1, 50), h=st.integers(1, 50), seed=st.integers(0, 1000))
def test_two_flips_are_none(w, h, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    boxes = np.sort(rng.uniform(0, min(w, h), (3, 2, 2)), axis=1).reshape(3, 4)
    for flip in (T.HFlipTransform(w), T.VFlipTransform(h)):
        twice = T.TransformList([flip, flip])
        np.testing.assert_array_equal(twice.apply_image(image), image)
        np.testing.assert_allclose(twice.apply_box(boxes.copy()), boxes, atol=1e-12)


@given(*[st.integers(1, 500)] * 4)
def test_resize_maps_corners_to_corners(h, w, new_h, new_w):
    corners = np.array([(0.0, 0.0), (w, 0), (0, h), (w, h)])
    result = T.ResizeTransform(h, w, new_h, new_w).apply_coords(corners)
    np.testing.assert_allclose(result, [(0, 0), (new_w, 0), (0, new_h), (new_w, new_h)])


@given(h=st.integers(2, 40), w=st.integers(2, 40), angle=st.integers(0, 3))
def test_rotation_by_right_angles_moves_pixels_like_points(h, w, angle):
    rng = np.random.default_rng(0)
    mask = np.zeros((h, w), np.uint8)
    y, x = rng.integers(0, h), rng.integers(0, w)
    mask[y, x] = 1
    rotation = T.RotationTransform(h, w, 90 * angle, expand=True)
    rows, columns = np.nonzero(rotation.apply_segmentation(mask))
    center = rotation.apply_coords(np.array([(x + 0.5, y + 0.5)]))[0]
    np.testing.assert_allclose((columns[0] + 0.5, rows[0] + 0.5), center, atol=1e-9)


def _inside(points, polygon):
    """Even-odd rule for (M, 2) points and one (P, 2) polygon."""
    start, end = polygon, np.roll(polygon, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = start[:, 0] + (y - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end - start)[:, 0]
    return (crosses & (x < at)).sum(axis=1) % 2 == 1


@given(seed=st.integers(0, 10**6), vertices=st.integers(3, 14), jump=st.booleans())
def test_clipped_polygon_is_the_intersection(seed, vertices, jump):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    radii = rng.uniform(2, 60, vertices)
    polygon = 50 + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    if jump:  # whole numbers: vertices and edges fall onto the window's edges
        polygon = np.round(polygon / 10) * 10
    window = np.round(np.sort(rng.uniform(0, 100, (2, 2)), axis=0) / 10).ravel() * 10
    parts = clip_polygon_to_rect(polygon, *window)
    points = rng.uniform(0, 100, (400, 2))
    in_window = ((points > window[:2]) & (points < window[2:])).all(axis=1)
    got = sum((_inside(points, part).astype(int) for part in parts), np.zeros(400, int)) % 2 == 1
    np.testing.assert_array_equal(got, _inside(points, polygon) & in_window)
    for part in parts:
        assert (part >= window[:2]).all()
        assert (part <= window[2:]).all()


def test_concave_polygon_falls_into_parts_without_spurs():
    comb = np.array([(0, 0), (10, 0), (10, 10), (8, 10), (8, 2), (2, 2), (2, 10), (0, 10)], float)
    parts = T.CropTransform(0, 4, 20, 20).apply_polygons([comb])
    assert sorted(tuple(p.min(0)) + tuple(p.max(0)) for p in parts) == [
        (0, 0, 2, 6),
        (8, 0, 10, 6),
    ]
    # passes around the window's corner without touching it
    corner = np.array([(5, 5), (20, 5), (20, 20), (5, 20), (5, 18), (18, 18), (18, 7), (5, 7)])
    (part,) = T.CropTransform(0, 0, 10, 10).apply_polygons([corner.astype(float)])
    np.testing.assert_array_equal((part.min(0), part.max(0)), ((5, 5), (10, 7)))
    assert T.CropTransform(30, 30, 10, 10).apply_polygons([comb]) == []


def test_rotated_boxes():
    box = np.array([[10.0, 20.0, 8.0, 4.0, 30.0]])
    np.testing.assert_allclose(T.HFlipTransform(50).apply_rotated_box(box), [[40, 20, 8, 4, -30]])
    np.testing.assert_allclose(T.VFlipTransform(50).apply_rotated_box(box), [[10, 30, 8, 4, -30]])
    np.testing.assert_allclose(
        T.CropTransform(3, 4, 9, 9).apply_rotated_box(box), [[7, 16, 8, 4, 30]]
    )
    for colours in (T.ColorTransform(np.abs), T.BlendTransform(np.zeros(1), 0.5, 0.5)):
        np.testing.assert_array_equal(colours.apply_rotated_box(box), box)
    double = T.TransformList([T.NoOpTransform(), T.ResizeTransform(40, 50, 80, 100)])
    np.testing.assert_allclose(double.apply_rotated_box(box), [[20, 40, 16, 8, 30]])
    wide = T.ResizeTransform(40, 50, 40, 100).apply_rotated_box(np.array([[0.0, 0, 8, 4, 90]]))
    np.testing.assert_allclose(wide, [[0, 0, 8, 8, 90]], atol=1e-9)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("angle", [0, 30, -75, 180, 270])
def test_rotated_boxes_turn_with_their_corners(angle, expand):
    """The box of the turned corners is the turned box."""
    transform = T.TransformList(
        [T.RotationTransform(40, 60, angle, expand), T.PadTransform(3, 5, 0, 0)]
    )
    boxes = np.array([[10.0, 20.0, 8.0, 4.0, 30.0], [50, 3, 4, 9, -160]])

    def corners(rows):
        cos, sin = np.cos(np.deg2rad(rows[:, 4])), np.sin(np.deg2rad(rows[:, 4]))
        along = np.stack([cos, -sin], axis=1) * rows[:, 2:3] / 2
        down = np.stack([sin, cos], axis=1) * rows[:, 3:4] / 2
        centre = rows[:, :2]
        return np.concatenate([centre - along - down, centre + along - down, centre + along + down])

    turned = transform.apply_rotated_box(boxes)
    np.testing.assert_allclose(corners(turned), transform.apply_coords(corners(boxes)), atol=1e-9)
    assert ((turned[:, 4] >= -180) & (turned[:, 4] < 180)).all()


def test_extent_fills_what_lies_outside():
    image = np.full((4, 4, 3), 200, np.uint8)
    result = T.ExtentTransform((-4, 0, 4, 4), (4, 8), fill=7).apply_image(image)
    assert (result[:, :3] == 7).all()
    assert (result[:, 5:] == 200).all()
    floats = T.ExtentTransform((-4, 0, 4, 4), (4, 8), fill=7).apply_image(image[..., 0] / 400)
    np.testing.assert_allclose(floats[:, 5:], 0.5)
