"""Class names in any script; images and instances that are not as they should be."""

import matplotlib.font_manager
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from d2kit.tracking import Sighting
from d2kit.video.overlay import draw_tracks, track_color
from d2kit.visualization import Visualizer
from d2kit.visualization import canvas as _fonts

NAMES = "人車床"


def write_font(path):
    """Write a font of three characters, each a bar of another width."""

    def bar(width):
        pen = TTGlyphPen(None)
        pen.moveTo((50, 0))
        for point in ((50, 700), (50 + width, 700), (50 + width, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", "a", "b", "c"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): n for c, n in zip(NAMES, names[1:], strict=True)})
    font.setupGlyf({n: bar(w) for n, w in zip(names, (900, 150, 400, 700), strict=True)})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": f"Bars {path.parent.name}", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(str(path))
    return str(path)


def in_picture(name):
    visualizer = Visualizer(np.zeros((120, 160, 3), np.uint8), None)
    boxes = np.array([[20.0, 40, 120, 100]])
    out = visualizer.overlay_instances(boxes=boxes, labels=[name], assigned_colors=["white"])
    return out.get_image()


def in_video(name):
    image = np.zeros((120, 160, 3), np.uint8)
    sighting = Sighting(track_id=1, class_id=0, score=0.9, box=(20, 40, 120, 100), centroid=(9, 9))
    draw_tracks(image, [sighting], [name], 0.0)
    return image


@pytest.mark.parametrize("draw", [in_picture, in_video])
@pytest.mark.parametrize("way", ["variable", "sans-serif", "none"])
def test_names_of_a_script_look_different(tmp_path, monkeypatch, draw, way):
    path = write_font(tmp_path / "bars.ttf")
    if way == "variable":
        monkeypatch.setenv(_fonts.VARIABLE, path)
    elif way == "sans-serif":
        matplotlib.font_manager.fontManager.addfont(path)
        families = [f"Bars {tmp_path.name}", *matplotlib.rcParams["font.sans-serif"]]
        monkeypatch.setitem(matplotlib.rcParams, "font.sans-serif", families)
    pictures = [draw(name * 2 + " x") for name in NAMES]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(pictures[a], pictures[b])
    used = {p for _, p in _fonts.runs(NAMES + " x", _fonts.configured())}
    if way != "none":
        assert path in used
        assert len(used) == 2  # Latin letters are DejaVu's


@pytest.fixture
def anew():
    """Look for fonts anew in the test, and after it."""
    kept = (_fonts._packaged, _fonts._on_system, _fonts.runs)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.mark.usefixtures("anew")
def test_the_font_of_a_package_is_found(tmp_path, monkeypatch):
    """A folder as `pip install d2kit[fonts]` makes it, on the path; no system font is needed."""
    (tmp_path / "mplfonts/fonts").mkdir(parents=True)
    (tmp_path / "mplfonts/__init__.py").write_text("raise ImportError('only its file is read')")
    path = write_font(tmp_path / "mplfonts/fonts/NotoSansCJKsc-Regular.otf")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_fonts, "_sorted_files", list)  # nothing is installed
    assert _fonts.runs("a" + NAMES, _fonts.configured()) == (
        ("a", _fonts.configured()[-1]),
        (NAMES, path),
    )


def test_what_joins_stays_in_the_font_of_what_it_joins(tmp_path):
    """DejaVu has the joiner too: a family of emoji would fall apart into its members."""
    path = write_font(tmp_path / "bars.ttf")
    fonts = (path, *_fonts.configured())
    for text in ("人\u200d車", "人\ufe0f\u200d車\u200d床"):
        assert _fonts.runs(text, fonts) == ((text, path),)
    assert [p for _, p in _fonts.runs("a人", fonts)] == [fonts[-1], path]


def test_a_bitmap_font_is_scaled_to_the_size_of_the_others():
    """The strike of an outline font looks like the font at the wanted size."""
    path = _fonts.configured()[-1]
    plain = _fonts.font(path, 24)
    strike = _fonts.Strike(_fonts.font(path, 120), 24 / 120)
    assert strike.getlength("Ambulance") == pytest.approx(plain.getlength("Ambulance"), rel=0.03)
    assert strike.getbbox("Ag", "ls") == pytest.approx(plain.getbbox("Ag", anchor="ls"), abs=1.5)
    drawn = [Image.new("RGBA", (80, 40), (0, 0, 0, 0)) for _ in range(2)]
    strike.paste(drawn[0], 5, 28, "Ag")
    ImageDraw.Draw(drawn[1]).text((5, 28), "Ag", font=plain, fill="black", anchor="ls")
    boxes = [image.getchannel("A").point(lambda v: 255 * (v > 100)).getbbox() for image in drawn]
    assert boxes[0] == pytest.approx(boxes[1], abs=1)


def test_a_script_that_no_font_has_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(_fonts, "_TOLD", set())
    _fonts._on_system.cache_clear()
    _fonts.runs.cache_clear()
    for text in ("\U00012000\U00012001", "\U00012002 \U00012003"):  # cuneiform
        found = _fonts.runs(text, _fonts.configured())
        if any(char in piece for char in text.replace(" ", "") for piece, _ in found):
            pytest.skip("a font with cuneiform is installed")
    assert len(caplog.records) == 1
    assert "U+12000" in caplog.text


def test_colours_of_a_plate_are_those_of_the_identity():
    image = np.zeros((120, 160, 3), np.uint8)
    sighting = Sighting(track_id=1, class_id=0, score=0.9, box=(20, 40, 120, 100), centroid=(9, 9))
    draw_tracks(image, [sighting], ["x"], 0.0)
    assert (image[30, 21:24] == track_color(1)).all(axis=1).any()


def test_a_newline_and_escapes_in_a_name_are_drawn():
    for draw in (in_picture, in_video):
        assert draw("line1\nline2 \x1b[31m").any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_boxes_that_are_not_finite_are_left_out(value):
    image = np.full((60, 80, 3), 90, np.uint8)
    good = [10.0, 10, 30, 30]
    only = Visualizer(image).overlay_instances(
        boxes=np.array([good]), labels=["a"], assigned_colors=["r"]
    )
    both = Visualizer(image).overlay_instances(
        boxes=np.array([[value, 5, 20, 20], good]), labels=["b", "a"], assigned_colors=["g", "r"]
    )
    assert np.array_equal(only.get_image(), both.get_image())
    rotated = np.array([[value, 5, 20, 20, 0.0]])
    out = Visualizer(image).overlay_rotated_instances(rotated, labels=["b"])
    assert np.array_equal(out.get_image(), image)
    Visualizer(image).draw_polygon([(value, 1), (5, 5), (9, 1)], "r")
    Visualizer(image).draw_circle((value, 3), "r")
    Visualizer(image).draw_line([value, 3], [1, 2], "r")
    Visualizer(image).draw_text("x", (value, 3))


@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_grey_rgb_and_rgba(channels):
    shape = (60, 80, channels) if channels else (60, 80)
    visualizer = Visualizer(np.full(shape, 90, np.uint8))
    drawn = visualizer.draw_box((10, 10, 30, 30), edge_color="r").get_image()
    assert drawn.shape == (60, 80, 3)
    assert (drawn[0, 0] == 90).all()
    assert not (drawn[10, 12] == 90).all()


def test_masks_where_one_object_has_none():
    square = [[10.0, 10, 30, 10, 30, 30, 10, 30]]
    one = {"bbox": [10, 10, 30, 30], "bbox_mode": 0, "category_id": 0, "segmentation": square}
    other = {"bbox": [40, 10, 60, 30], "bbox_mode": 0, "category_id": 1}
    image = np.full((60, 80, 3), 90, np.uint8)
    for segmentation in ({}, {"segmentation": []}, {"segmentation": None}):
        dic = {"annotations": [one, other | segmentation]}
        drawn = Visualizer(image).draw_dataset_dict(dic).get_image()
        assert not (drawn[28, 20] == 90).all()  # filled
        assert (drawn[28, 50] == 90).all()  # a box alone
        assert not (drawn[10, 50] == 90).all()
