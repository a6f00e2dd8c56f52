"""Reading images: formats, orientation, and files that are no images."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from d2kit.data import deep_pictures
from d2kit.data import detection_utils as _image_io
from d2kit.data import detection_utils as utils


@pytest.fixture
def rgb():
    y, x = np.mgrid[0:37, 0:53]
    return np.stack([x * 4, y * 6, (x * y) % 256], axis=2).astype(np.uint8)


def _save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return str(path)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_pillows(tmp_path, rgb, subsampling, progressive, mode):
    image = Image.fromarray(rgb).convert(mode)
    path = _save(tmp_path / "a.jpg", image, subsampling=subsampling, progressive=progressive)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), expected)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), expected[:, :, ::-1])


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_always_upright(tmp_path, orientation, suffix):
    quarters = np.zeros((32, 48, 3), np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24] = (255, 0, 0), (0, 255, 0), 255
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](quarters)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif)
    for image in (utils.read_image(path, "RGB"), utils.read_image(path, "BGR")[:, :, ::-1]):
        assert image.shape == (32, 48, 3)
        assert np.abs(image[::31, ::47].astype(int) - quarters[::31, ::47]).max() < 12


def test_formats(tmp_path, rgb):
    path = _save(tmp_path / "a.png", rgb)
    np.testing.assert_array_equal(utils.read_image(path), rgb)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), rgb[:, :, ::-1])
    grey = utils.read_image(path, "L")
    assert grey.shape == (37, 53, 1)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert utils.read_image(path, "HSV").shape == (37, 53, 3)
    yuv = utils.read_image(path, "YUV-BT.601")
    np.testing.assert_allclose(yuv[..., 0], rgb / 255 @ [0.299, 0.587, 0.114])
    with pytest.raises(ValueError, match="'XYZ'.*'BGR'"):
        utils.read_image(path, "XYZ")


@pytest.mark.parametrize("format", ["BGR", "RGB", "YUV-BT.601", "L", "HSV"])
def test_convert_image_to_rgb(tmp_path, rgb, format):
    if format == "L":
        rgb = np.repeat(rgb[:, :, :1], 3, axis=2)
    image = utils.read_image(_save(tmp_path / "a.png", rgb), format)
    back = utils.convert_image_to_rgb(image, format)
    assert back.dtype == np.uint8
    tolerance = {"YUV-BT.601": 1, "HSV": 12}.get(format, 0)
    assert np.abs(back.astype(int) - rgb).max() <= tolerance


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize(
    "make",
    [
        lambda image: (image.convert("RGBA"), "png", {}),
        lambda image: (image.quantize(200), "png", {"transparency": b"\0" * 20}),
        lambda image: (image.quantize(200), "gif", {}),
        lambda image: (image, "bmp", {}),
        lambda image: (image, "webp", {"lossless": True}),
        lambda image: (image.convert("CMYK"), "tif", {}),
        lambda image: (image.convert("CMYK"), "jpg", {"quality": 98, "subsampling": 0}),
    ],
)
def test_unusual_files_become_rgb(tmp_path, rgb, make):
    image, suffix, options = make(Image.fromarray(rgb))
    result = utils.read_image(_save(tmp_path / f"a.{suffix}", image, **options), "RGB")
    assert result.shape == rgb.shape
    assert result.dtype == np.uint8
    assert np.abs(result.astype(int) - rgb).mean() < 12  # 200 colours of a palette


@pytest.mark.faults(23, fast=True)
def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "green", "blue")]
    path = _save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), np.asarray(frames[0]))


@pytest.mark.faults(23, fast=True)
def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    path = _save(tmp_path / "a.png", values)
    image = utils.read_image(path, "BGR")
    np.testing.assert_array_equal(image[..., 0], np.rint(values / 257).astype(np.uint8))
    np.testing.assert_array_equal(utils.read_image(path, "L")[..., 0], image[..., 0])


RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize(
    ("suffix", "dtype", "white", "said"),
    [
        ("tiff", np.uint16, 4095, "0..4095"),
        ("png", np.uint16, 4095, "0..4095"),
        ("tiff", np.uint16, 65535, "0..65535"),
        ("tiff", np.float32, 1, "0..1 "),
        ("tiff", np.float32, 255, "0..255 "),
        ("tiff", np.float32, 4095, "0..4095"),
        ("tiff", np.float64, 1, "0..1 "),
    ],
)
def test_deep_pictures_are_scaled_by_their_white(
    tmp_path, caplog, monkeypatch, suffix, dtype, white, said, colours
):
    monkeypatch.setattr(deep_pictures, "_TOLD", set())
    caplog.set_level("INFO", deep_pictures.__name__)
    values = (RAMP * white).astype(dtype)
    pixels = np.stack([values, values / 2, values * 0], -1).astype(dtype) if colours else values
    path = str(tmp_path / f"a.{suffix}")
    assert cv2.imwrite(path, pixels)
    first = utils.read_image(path, "BGR")
    assert first.dtype == np.uint8
    np.testing.assert_allclose(first[..., 0], RAMP * 255, atol=1)
    if colours:
        np.testing.assert_allclose(first[..., 1], RAMP * 127.5, atol=1)
        assert not first[..., 2].any()
    utils.read_image(path, "RGB")
    lines = [r.getMessage() for r in caplog.records]
    # of 16 bits of colours Pillow gives the upper 8, which is no guess
    assert len(lines) == (0 if colours and white == 65535 else 1), lines
    assert all(said in line and path in line for line in lines)


def test_what_is_no_brightness_is_black(tmp_path):
    values = np.array([[0.0, 1.0, np.nan, np.inf, -np.inf, -3.0, 0.5]], np.float32)
    image = utils.read_image(_save(tmp_path / "a.tiff", values), "L")
    assert image[..., 0].tolist() == [[0, 255, 0, 0, 0, 0, 128]]


def test_a_deep_tiff_that_is_turned_is_upright(tmp_path):
    for dtype, white in ((np.uint16, 4095), (np.float32, 1)):
        pixels = np.repeat((RAMP * white).astype(dtype)[..., None], 3, -1)
        data = cv2.imencode(".tiff", pixels)[1].tobytes()
        path = tmp_path / "a.tiff"
        path.write_bytes(with_tag(data, 274, 6))
        image = utils.read_image(path, "RGB")
        assert image.shape == (64, 48, 3)
        np.testing.assert_allclose(image[..., 0], RAMP.T * 255, atol=1)


def with_tag(data, tag, value):
    """Add a short tag to a little-endian TIFF, in a table at its end."""
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    entries = [data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    entries.append(struct.pack("<HHII", tag, 3, 1, value))
    entries.sort(key=lambda e: int.from_bytes(e[:2], "little"))
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + table


def test_a_tiff_that_nothing_reads_says_what_it_is(tmp_path):
    data = cv2.imencode(".tiff", RAMP.astype(np.float32), [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1]
    path = tmp_path / "a.tiff"
    entry = struct.pack("<HHI", 258, 3, 1)
    path.write_bytes(data.tobytes().replace(entry + b"\x20", entry + b"\x18"))  # 24-bit floats
    with pytest.raises(ValueError, match=r"a.tiff: a TIFF of 64x48 pixels.*bits \(24,\)"):
        utils.read_image(path)


def test_label_maps_keep_their_numbers(tmp_path):
    labels = np.arange(48).reshape(6, 8)
    np.testing.assert_array_equal(
        utils.read_label_map(_save(tmp_path / "a.png", labels.astype(np.uint8))), labels
    )
    wide = utils.read_label_map(_save(tmp_path / "b.png", (labels * 1000).astype(np.uint16)))
    np.testing.assert_array_equal(wide, labels * 1000)
    palette = Image.fromarray(labels.astype(np.uint8)).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    np.testing.assert_array_equal(utils.read_label_map(_save(tmp_path / "c.png", palette)), labels)
    bits = utils.read_label_map(_save(tmp_path / "d.png", labels > 20))
    np.testing.assert_array_equal(bits > 0, labels > 20)
    with pytest.raises(ValueError, match="label map.*RGB"):
        utils.read_label_map(_save(tmp_path / "e.png", np.zeros((4, 4, 3), np.uint8)))


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    _save(path, noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises((OSError, ValueError), match=rf"a\.{suffix}: ") as caught:
        utils.read_image(str(path), "BGR")
    assert "\n" not in str(caught.value)


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", ValueError, "empty"),
        (b"<html><body>404 not found</body></html>", ValueError, "not an image.*<html>"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ValueError, "not an image"),
        (b"\xff\xd8\xff\xe0", (ValueError, OSError), "bad.jpg"),
        (b"\xff\xd8\xff\xd9", (ValueError, OSError), "bad.jpg"),
        (b"GIF89a\x01", (ValueError, OSError), "bad.jpg"),
        (b"II*\0\x08", OSError, "damaged TIFF header"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, data, error, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        utils.read_image(str(path), "BGR")
    assert "\n" not in str(caught.value)
    assert "bad.jpg" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        utils.read_image(str(tmp_path / "none.jpg"), "BGR")


def _png_of_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.faults(30, fast=True)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60000, 60000), (20000, 8948)])
def test_image_bombs_are_refused(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_of_size(*size))
    with pytest.raises(ValueError, match=r"bomb\.png: refused as too large.*178956970"):
        utils.read_image(str(path), "BGR")


def test_large_files_are_refused(tmp_path, monkeypatch, rgb):
    path = _save(tmp_path / "a.png", rgb)
    monkeypatch.setattr(_image_io, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="limit of 100 bytes"):
        utils.read_image(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_counts_as_none(tmp_path, rgb):
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\x01")
    path = tmp_path / "a.jpg"
    path.write_bytes(buffer.getvalue())
    assert utils.read_image(str(path), "BGR").shape == rgb.shape


def test_apply_exif_orientation():
    image = Image.new("RGB", (4, 6))
    assert utils._apply_exif_orientation(image) is image
    image.getexif()[0x0112] = 6
    assert utils._apply_exif_orientation(image).size == (6, 4)


@pytest.mark.slow
def test_plugins_loaded_by_others_do_not_hide_formats(tmp_path):
    """Matplotlib imports Pillow's PNG plugin alone; a JPEG must be read after that, too."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 6)).save(path)
    code = (
        "import PIL.PngImagePlugin; from d2kit.data.detection_utils import read_image;"
        f"print(read_image({str(path)!r}, 'RGB').shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(6, 8, 3)", done.stderr


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI"])
def test_only_formats_that_are_named_reach_their_parsers(tmp_path, kind, monkeypatch):
    """By a size too, which reads the header alone."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 6)).save(path, kind)
    Image.init()
    opened = []
    factory, accept = Image.OPEN[kind]
    spy = (lambda *a: opened.append(kind) or factory(*a), accept)
    monkeypatch.setitem(Image.OPEN, kind, spy)
    for read in (utils.upright_size, utils.read_image):
        with pytest.raises(ValueError, match="not an image"):
            read(path)
    assert not opened
