"""Each suffix that is taken for a picture is read, drawn on and tracked, in every mode it holds."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, features

from d2kit.data.detection_utils import read_image
from d2kit.tracking import Sighting
from d2kit.utils.file_io import IMAGE_SUFFIXES
from d2kit.video import Selection, open_source
from d2kit.video.overlay import draw_tracks
from d2kit.visualization import Visualizer

MODES = ("RGB", "L", "P", "RGBA", "I;16", "CMYK", "1")
PARTS = {"webp": "webp", "avif": "avif", "jp2": "jpg_2000"}


def picture(path, mode, turned=False):
    """Write a picture of 40 x 30 with a bright left half; False where the format lacks the mode."""
    pixels = np.full((30, 40), 20, np.uint8)
    pixels[:, :20] = 230
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif mode != "L":
        image = image.convert("RGB").convert(mode)
    settings = {}
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6
        settings["exif"] = exif.tobytes()
    try:
        image.save(path, **settings)
    except (OSError, KeyError, ValueError, TypeError):
        return False
    with Image.open(path) as written:  # some formats take a mode or a tag and lose it in writing
        if turned:
            return written.getexif().get(0x0112) == 6
        grey = np.asarray(written.convert("RGB" if mode == "CMYK" else written.mode)).astype(float)
    return mode not in {"I;16", "CMYK"} or _is_halves(grey)


def _is_halves(pixels):
    """Tell whether the left half of what was written is bright and the right one is dark."""
    grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(2)
    left, right = grey[:, :18].mean(), grey[:, 22:].mean()
    return left > 3 * right and left < 255 * 257


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_it_is_read_drawn_on_and_tracked(tmp_path, suffix, mode):
    part = PARTS.get(suffix[1:])
    if part and not features.check(part):
        pytest.skip(f"Pillow without {part}")
    path = tmp_path / f"000{suffix}"
    if not picture(path, mode):
        pytest.skip(f"{suffix} holds no {mode}")
    for form in ("BGR", "RGB", "L", "YUV-BT.601", None):
        image = read_image(path, form)
        assert image.flags.writeable
        assert image.flags.c_contiguous
    image = read_image(path, "BGR")
    assert image.shape == (30, 40, 3)
    assert image[:, :18].mean() > 200
    assert image[:, 22:].mean() < 60
    cv2.rectangle(image, (2, 2), (9, 9), (0, 0, 255), 1)
    visualizer = Visualizer(read_image(path, "RGB"))
    visualizer.draw_box((2.0, 2, 30, 20))
    [frame] = open_source(str(tmp_path), Selection(), 25.0)
    sighting = Sighting(track_id=1, class_id=0, score=0.9, box=(2, 2, 9, 9), centroid=(5, 5))
    before = frame.image.copy()
    draw_tracks(frame.image, [sighting], ["x"], 0.0)
    assert (frame.image != before).any()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_a_turned_picture_is_upright_and_drawn_on(tmp_path, suffix):
    path = tmp_path / f"000{suffix}"
    assert picture(path, "RGB", turned=True)
    image = read_image(path, "BGR")
    assert image.shape == (40, 30, 3)
    cv2.rectangle(image, (2, 2), (9, 9), (0, 0, 255), 1)
    source = open_source(str(tmp_path), Selection(), 25.0)
    assert (source.info.height, source.info.width) == (40, 30)
    assert next(iter(source)).image.shape == (40, 30, 3)


def test_what_is_left_out_is_named(tmp_path, caplog):
    assert picture(tmp_path / "000.jpg", "RGB")
    (tmp_path / "._000.jpg").write_bytes(b"\0\5\x16\7")  # of macOS
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert len(list(open_source(str(tmp_path), Selection(), 25.0))) == 1
    assert "2 entries of the folder left out: folder.jpg, phone.heic" in caplog.text
    assert "pillow-heif" in caplog.text


def test_arrays_are_no_views_of_pillow():
    from d2kit.data.detection_utils import convert_PIL_to_numpy

    data = io.BytesIO()
    Image.new("RGB", (4, 3)).save(data, "png")
    for form in ("BGR", "RGB", "L", None):
        assert convert_PIL_to_numpy(Image.open(data), form).flags.writeable
