"""FAULTS 23, 30: damaged images, in a training that is strict and in one that skips them.

Fails without: what `docs/faults.md` names for 23 and 30. Upright by EXIF and the formats that are
no damage are tested in `tests/data/test_image_io.py`, in both tiers.
"""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2kit.data import DatasetCatalog, DatasetError, SampleError, build_detection_test_loader
from d2kit.data.detection_utils import read_image
from d2kit.engine import launch
from d2kit.engine.preflight import records as preflight_records
from d2kit.utils import comm
from d2kit.utils.logger import setup_logger
from tests.data.test_image_io import _png_of_size
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

SIZE = (tiny.SIZE + 8, tiny.SIZE)


def image(mode="RGB", kind="JPEG", size=SIZE, **options):
    pixels = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def upside(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image(size=SIZE if orientation < 5 else SIZE[::-1], exif=exif)


def sixteen_bits():
    values = np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values.reshape(SIZE[::-1])).save(buffer, "PNG")
    return buffer.getvalue()


def animation():
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


WHOLE = image()
DAMAGED = {
    **{f"cut at {share} %": (WHOLE[: len(WHOLE) * share // 100], "") for share in (10, 50, 90)},
    "empty": (b"", "empty"),
    "HTML": (b"<html><body>404 not found</body></html>", "not an image"),
    "of another size": (image(size=(50, 40)), "50x40 pixels"),
}
SOUND = [
    image("CMYK"),
    sixteen_bits(),
    image("P", "PNG", transparency=bytes(20)),
    animation(),
    *(upside(orientation) for orientation in range(1, 9)),
]


def write(folder, contents):
    """Register a dataset of these files, all of the same size according to their records."""
    tiny.register(folder)
    DatasetCatalog.remove(tiny.NAME)
    for i, content in enumerate(contents):
        (folder / f"{i}.jpg").write_bytes(content)
    box = {"bbox": [2, 3, 12, 12], "bbox_mode": 0, "category_id": 0}
    record = {"width": SIZE[0], "height": SIZE[1], "annotations": [box]}
    found = [
        {**record, "file_name": str(folder / f"{i}.jpg"), "image_id": i}
        for i in range(len(contents))
    ]
    DatasetCatalog.register(tiny.NAME, lambda: found)


@pytest.fixture
def no_look(monkeypatch):
    """The loader alone: a training of many files begins before all headers were looked at."""
    monkeypatch.setattr(preflight_records, "SECONDS", 0)


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize("name", ["empty", "HTML", "of another size"])
def test_the_look_before_the_training_names_the_file(tmp_path, name):
    content, reason = DAMAGED[name]
    write(tmp_path, [WHOLE, content])
    with pytest.raises(DatasetError, match=r"1 files: .*1\.jpg") as error:
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "run"))
    assert reason in str(error.value)


@pytest.mark.faults(23, fast=True)
@pytest.mark.parametrize("name", DAMAGED)
def test_strict_is_one_line_with_the_path(tmp_path, name, log, no_look):
    content, reason = DAMAGED[name]
    write(tmp_path, [WHOLE, content])
    with pytest.raises(SampleError, match=r"1\.jpg") as error:
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "run")).train()
    assert "\n" not in str(error.value)
    assert reason in str(error.value)
    assert "Traceback" not in log.text


@pytest.mark.faults(23)
def test_strict_is_one_line_from_a_worker_too(tmp_path, no_look):
    write(tmp_path, [WHOLE, DAMAGED["empty"][0]])
    with pytest.raises(SampleError, match=r"^cannot make a sample of .*1\.jpg.*$") as error:
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "run", "DATALOADER.NUM_WORKERS", 1)).train()
    assert "\n" not in str(error.value)


def skipping(folder, output, limit, workers=0):
    options = ("DATALOADER.MAX_SKIPPED_IMAGES", limit, "DATALOADER.NUM_WORKERS", workers)
    options += ("SOLVER.MAX_ITER", 30, "SOLVER.STEPS", (20,))
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / output, *options))
    trainer.train()


BAD = [content for content, _ in DAMAGED.values()]


@pytest.mark.faults(23)
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_are_counted_and_listed_at_the_end(tmp_path, workers, log):
    write(tmp_path, [*BAD, *SOUND])
    skipping(tmp_path, "run", len(BAD), workers)
    (end,) = (r.getMessage() for r in log.records if "images were skipped" in r.getMessage())
    count, *paths = end.splitlines()
    assert count == f"{len(BAD)} damaged images were skipped:"
    assert paths == [f"  file_name '{tmp_path / f'{i}.jpg'}'" for i in range(len(BAD))]
    if workers == 0:  # those of a worker go to its own handlers
        said = [r.getMessage() for r in log.records if "Skipped image" in r.getMessage()]
        assert [line.split(":")[0] for line in said] == [
            f"Skipped image {i + 1} of at most {len(BAD)}" for i in range(len(BAD))
        ]
        return
    skipping(tmp_path, "again", len(BAD) + 1)  # neither workers nor the bound change the result
    assert tiny.final_state(tmp_path / "run") == tiny.final_state(tmp_path / "again")


@pytest.mark.faults(23)
@pytest.mark.parametrize("workers", [0, 2])
def test_one_damaged_image_more_than_allowed(tmp_path, workers, log):
    write(tmp_path, [*BAD, *SOUND])
    limit = len(BAD) - 1
    with pytest.raises(SampleError, match=rf"number {len(BAD)} .*allows {limit}$") as error:
        skipping(tmp_path, "run", limit, workers)
    assert "\n" not in str(error.value)
    assert f"{len(BAD)} damaged images were skipped" in log.text


@pytest.mark.faults(23, fast=True)
def test_an_evaluation_never_skips(tmp_path):
    write(tmp_path, [WHOLE, b""])
    cfg = tiny.tiny_cfg(tmp_path / "run", "DATALOADER.MAX_SKIPPED_IMAGES", 9)
    with pytest.raises(SampleError, match=r"1\.jpg"):
        list(build_detection_test_loader(cfg, tiny.NAME))
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        skipping(tmp_path, "run", -1)


def of_two(folder):
    """Train in one of two processes."""
    folder = Path(folder)
    setup_logger(str(folder / "run"), distributed_rank=comm.get_rank())
    write(folder, [*BAD, *SOUND])
    skipping(folder, "run", len(BAD))


@pytest.mark.faults(23)
def test_the_list_is_that_of_all_processes(tmp_path):
    launch(of_two, 0, args=(str(tmp_path),), num_processes=2)
    logs = [path.read_text() for path in (tmp_path / "run").glob("log.txt*")]
    assert sum(f"{len(BAD)} damaged images were skipped" in text for text in logs) == 1


def open_a_bomb(path, outcome):
    """Report by how much memory grows, in bytes, when a bomb is opened.

    Pillow's own limit is off, as scripts with large images set it.
    """
    Image.MAX_IMAGE_PIXELS = None
    read_image(path.with_name("sound.jpg"), "BGR")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_image(path, "BGR")
    except (ValueError, OSError) as error:
        path.with_suffix(".txt").write_text(str(error))
    outcome.value = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.faults(30)
@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 8_948)])
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path, size):
    (tmp_path / "sound.jpg").write_bytes(WHOLE)
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_of_size(*size))
    grown = runs.CONTEXT.Value("q", -1)
    assert runs.finish(runs.start(open_a_bomb, path, grown)) == 0
    assert "refused as too large" in (tmp_path / "bomb.txt").read_text()
    assert 0 <= grown.value < 20 << 20  # as RGB it would be 512 MiB
