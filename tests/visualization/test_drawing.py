import numpy as np
import pytest
from PIL import Image

from d2kit.utils.visualizer import VisImage, Visualizer
from tests.support.drawn import GREY, META, changed, disc, image


# ------------------------------------------------------------------ pictures
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.2, 3.0])
def test_size_of_the_output(scale):
    picture = VisImage(image(61, 83), scale=scale).get_image()
    assert picture.shape == (round(61 * scale), round(83 * scale), 3)
    assert picture.dtype == np.uint8
    assert (picture == GREY).all()


def test_input_is_not_changed():
    original = image()
    Visualizer(original).draw_box((5, 5, 30, 30))
    assert (original == GREY).all()


@pytest.mark.parametrize("array", [np.zeros((4, 5)), np.zeros((4, 5, 1))])
def test_grey_images(array):
    assert VisImage(array).get_image().shape == (4, 5, 3)


@pytest.mark.parametrize("array", [np.zeros((4, 5, 5)), np.zeros((0, 5, 3)), np.zeros(3)])
def test_no_image(array):
    with pytest.raises(ValueError, match="RGB"):
        VisImage(array)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "plain"])
def test_save_is_rgb(tmp_path, name):
    picture = VisImage(image() * np.array([1, 0, 0], dtype=np.uint8))
    picture.save(tmp_path / name)
    path = tmp_path / (name if "." in name else name + ".png")
    red, green, blue = np.asarray(Image.open(path).convert("RGB")).mean(axis=(0, 1))
    assert red > 90
    assert max(green, blue) < 10
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_as_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        VisImage(image()).save(tmp_path / "a.xyz")


def test_matplotlib_axes_have_image_coordinates():
    output = VisImage(image(), scale=2)
    output.ax.fill([20, 40, 40, 20], [10, 10, 30, 30], color=(1, 0, 0), linewidth=0)
    picture = output.get_image()
    assert picture.shape == (120, 160, 3)
    rows, columns = np.nonzero(changed(picture))
    assert abs(rows.min() - 20) <= 1
    assert abs(rows.max() - 59) <= 1
    assert abs(columns.min() - 40) <= 1
    assert abs(columns.max() - 79) <= 1


# -------------------------------------------------------------------- shapes
@pytest.mark.parametrize("scale", [1, 2])
def test_box_lies_where_it_should(scale):
    picture = Visualizer(image(), scale=scale).draw_box((10, 20, 50, 40), alpha=1).get_image()
    rows, columns = np.nonzero(changed(picture))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert found == tuple(scale * v for v in (10, 20, 50, 40))
    assert not changed(picture)[30 * scale, 30 * scale]


@pytest.mark.parametrize(
    "box", [(0, 0, 80, 60), (-50, -50, 500, 500), (79.6, 59.6, 80, 60), (10, 10, 10, 10)]
)
@pytest.mark.parametrize("style", ["-", "--", ":"])
def test_boxes_at_and_over_the_border(box, style):
    picture = Visualizer(image()).draw_box(box, line_style=style).get_image()
    assert changed(picture).any()


def test_colours_are_rgb():
    visualizer = Visualizer(image())
    visualizer.draw_polygon([[10, 10], [50, 10], [50, 50], [10, 50]], color="red", alpha=1)
    visualizer.draw_circle((65, 30), color=(0.0, 0.0, 1.0), radius=8)
    picture = visualizer.get_output().get_image()
    assert picture[30, 30].tolist() == [255, 0, 0]
    assert picture[30, 65].tolist() == [0, 0, 255]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_opacity(alpha):
    visualizer = Visualizer(image())
    visualizer.draw_binary_mask(disc(), color=(1, 1, 1), alpha=alpha)
    expected = GREY * (1 - alpha) + 255 * alpha
    assert abs(visualizer.get_output().get_image()[30, 40].astype(float) - expected).max() <= 1


def test_mask_fills_its_pixels_only():
    mask = disc()
    mask[28:32, 38:42] = False
    picture = Visualizer(image()).draw_binary_mask(mask, color="g").get_image()
    assert changed(picture)[mask].all()
    assert not changed(picture)[30, 40]
    far = ~disc(radius=15)
    assert not changed(picture)[far].any()


def test_small_parts_of_a_mask_are_left_out():
    mask = disc()
    mask[2, 2] = True
    shown = changed(Visualizer(image()).draw_binary_mask(mask, color="r").get_image())
    assert shown[30, 40]
    assert not shown[2, 2]
    every = Visualizer(image()).draw_binary_mask(mask, color="r", area_threshold=0).get_image()
    assert changed(every)[2, 2]


def test_soft_mask():
    soft = np.zeros((60, 80), dtype=np.float32)
    soft[:, :40] = 0.5
    picture = Visualizer(image()).draw_soft_mask(soft, color=(1, 1, 1), alpha=1).get_image()
    assert picture[30, 10, 0] == pytest.approx((GREY + 255) / 2, abs=1)
    assert picture[30, 60, 0] == GREY


def test_line():
    picture = Visualizer(image()).draw_line([5, 75], [30, 30], color="b").get_image()
    rows, columns = np.nonzero(changed(picture))
    assert abs(rows - 29.5).max() < 4
    assert columns.max() - columns.min() >= 68


@pytest.mark.parametrize("angle", [0, 30, 90, 180, -135])
def test_rotated_box(angle):
    visualizer = Visualizer(image(100, 100))
    visualizer.draw_rotated_box_with_label((50, 50, 40, 20, angle), label="bed")
    assert changed(visualizer.get_output().get_image()).sum() > 50


def test_rotated_box_turns_counter_clockwise():
    visualizer = Visualizer(image(100, 100))
    visualizer.draw_rotated_box_with_label((50, 50, 80, 2, 45), alpha=1)
    shown = changed(visualizer.get_output().get_image())
    assert shown[15:35, 65:85].any()  # up on the right
    assert not shown[15:35, 15:35].any()


# --------------------------------------------------------------------- text
@pytest.mark.parametrize("position", [(0, 0), (80, 60), (-20, 30), (200, 200)])
@pytest.mark.parametrize("alignment", ["left", "center", "right"])
def test_text_is_shifted_inside(position, alignment):
    visualizer = Visualizer(image())
    visualizer.draw_text("abc", position, horizontal_alignment=alignment)
    ((x0, y0, x1, y1),) = visualizer._taken
    assert x0 >= 0
    assert y0 >= 0
    assert x1 <= 80
    assert y1 <= 60
    assert changed(visualizer.get_output().get_image())[y0:y1, x0:x1].mean() > 0.9


def test_unknown_alignment():
    with pytest.raises(ValueError, match="middle"):
        Visualizer(image()).draw_text("a", (1, 1), horizontal_alignment="middle")


def test_font_grows_with_size_and_scale():
    def height(size=None, **settings):
        visualizer = Visualizer(image(200, 300), **settings)
        visualizer.draw_text("abc", (100, 100), font_size=size)
        return visualizer._taken[0][3] - visualizer._taken[0][1]

    assert height(20) > 1.5 * height(10)
    assert height(10, scale=2) > 1.5 * height(10)
    assert height(font_size_scale=2) > 1.5 * height()


def test_labels_do_not_overlap_where_there_is_room():
    visualizer = Visualizer(image(480, 640), META)
    boxes = np.array([[200 + 3 * i, 200 + 3 * i, 320, 320] for i in range(6)])
    visualizer.overlay_instances(boxes=boxes, labels=["patient 90%"] * 6)
    taken = visualizer._taken
    assert len(taken) == 6
    for i, a in enumerate(taken):
        for b in taken[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


@pytest.mark.parametrize("size", [(20, 30), (96, 128), (480, 640)])
def test_long_labels_stay_inside_and_keep_the_score(size):
    visualizer = Visualizer(image(*size))
    visualizer.overlay_instances(boxes=[[5, 5, 15, 15]], labels=["very " * 30 + "98%"])
    ((x0, _, x1, _),) = visualizer._taken
    assert x0 >= 0
    assert x1 <= size[1]
