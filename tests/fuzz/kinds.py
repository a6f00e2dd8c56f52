"""Readers of files of others: what writes sound files for each, and what reads them."""

import gzip
import json
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2kit.checkpoint.files import read_checkpoint, write_safetensors
from d2kit.cli.data import split_main
from d2kit.cli.evaluate import evaluate_groups_main
from d2kit.cli.visualize import pictures as drawn_results
from d2kit.cli.visualize import read_results
from d2kit.config import LazyConfig, get_cfg
from d2kit.curate.checking import check_dataset, repair_coco
from d2kit.curate.conversion import READERS, WRITERS
from d2kit.curate.prepare import prepare
from d2kit.data.catalog import DatasetCatalog
from d2kit.data.datasets import load_coco_json, register_coco_instances
from d2kit.data.datasets.builtin import ade20k_classes
from d2kit.data.datasets.cityscapes import load_cityscapes_instances
from d2kit.data.datasets.coco_panoptic import load_coco_panoptic_json
from d2kit.data.datasets.lvis import load_lvis_json, read_categories
from d2kit.data.datasets.pascal_voc import load_voc_instances
from d2kit.data.datasets.validate import read_json
from d2kit.data.detection_utils import read_image
from d2kit.data.records import load_proposals_into_dataset
from d2kit.engine.safety.run_lock import NAME as LOCK
from d2kit.engine.safety.run_lock import RunLock
from d2kit.evaluation.report import write_report
from d2kit.evaluation.track_evaluation import evaluate_tracks, read_mot_text
from d2kit.export.backends import METADATA, load_exported, sha256
from d2kit.utils.events import JSONWriter
from d2kit.utils.file_io import extract_zip
from d2kit.video.detections import DetectionStore
from d2kit.video.outputs import clear_results
from d2kit.video.sources import open_source
from d2kit.video.video_file import Selection
from d2kit.visualization.plots import read_metrics
from tests.support.cityscapes_synthetic import write as write_city

COUNT = 3
"""Images of a set."""


def content() -> dict[str, Any]:
    outline = [[4, 4, 24, 4, 24, 20, 4, 20]]
    entry = {"category_id": 1, "bbox": [4, 4, 20, 16], "area": 320, "iscrowd": 0}
    ids = range(1, COUNT + 1)
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in ids],
        "annotations": [{"id": i, "image_id": i, **entry, "segmentation": outline} for i in ids],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def pictures(folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for place in (folder, folder / "images"):
        for i in range(1, COUNT + 1):
            Image.new("RGB", (40, 30)).save(place / f"{i}.png")


def made_by(kind: str) -> Callable[[Path], object]:
    """Return what writes the good files of a format of annotations."""
    target = {"cvat": "annotations.xml", "coco": "train.json"}.get(kind, "")
    return lambda folder: WRITERS[kind](content(), folder / target)


def text(name: str, body: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)

    return make


def data(name: str, value: object) -> Callable[[Path], object]:
    return text(name, json.dumps(value))


def converted(kind: str) -> Callable[[Path], object]:
    return lambda folder: READERS[kind](folder, None, None)


VIA_SHAPE = {"name": "polygon", "all_points_x": [4, 24, 24], "all_points_y": [4, 4, 20]}
VIA = {
    "1": {
        "filename": "1.png",
        "regions": [{"shape_attributes": VIA_SHAPE, "region_attributes": {"class": "cat"}}],
    }
}
VIA_ROW = '1.png,9,"{}",1,0,"{""name"":""rect"",""x"":4,""y"":4,""width"":9,""height"":9}"'
VIA_CSV = (
    "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
    f'region_attributes\n{VIA_ROW},"{{""class"":""cat""}}"\n'
)
TABLE = "filename,width,height,class,xmin,ymin,xmax,ymax\n" + 2 * "1.png,40,30,cat,4,4,24,20\n"
STUDIO = [
    {
        "id": 7,
        "data": {"image": "/data/upload/3/0a1b2c3d-1.png"},
        "annotations": [
            {
                "result": [
                    {
                        "type": "rectanglelabels",
                        "value": {"x": 10, "y": 20, "width": 50, "height": 40, "rotation": 0}
                        | {"rectanglelabels": ["cat"]},
                    }
                ]
            }
        ],
    }
]
MOT = "1,1,10,10,20,20,1,1,1\n1,2,50,10,20,20,1,1,1\n2,1,12,10,20,20,1,1,1\n"
TRACKS = {
    "videos": [{"name": "a.mp4", "stride": 1, "first_frame": 0, "last_frame": 3}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": i, "frame": i, "track_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9, "category_id": 1}
        for i in range(3)
    ],
}
RESULTS = [
    {"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 16], "score": 0.5},
    {"image_id": 1, "category_id": 2, "bbox": [4, 4, 9, 9], "score": 0.25},
]
PROPOSALS = {"ids": [1], "boxes": [[[0, 0, 9, 9], [1, 1, 5, 5]]], "objectness_logits": [[1, 2]]}
YAML = "MODEL:\n  MASK_ON: true\n  PIXEL_MEAN: [1.0, 2.0, 3.0]\nSOLVER: &s\n  STEPS: (1, 2)\n"
LAZY = "model:\n  depth: 50\n  name: ${train.name}\ntrain: {name: a, steps: [1, 2]}\n"
LINES = "".join(
    json.dumps({"iteration": i, "total_loss": 0.5, "bbox/AP": 3.0, "lr": 0.1}) + "\n"
    for i in range(3)
)
PANOPTIC = {
    "images": [{"id": 4, "file_name": "b.jpg", "height": 9, "width": 8}],
    "annotations": [
        {
            "image_id": 4,
            "file_name": "b.png",
            "segments_info": [{"id": 7, "category_id": 1, "iscrowd": 0, "area": 9}],
        }
    ],
}
PANOPTIC_META = {
    "thing_dataset_id_to_contiguous_id": {1: 0},
    "stuff_dataset_id_to_contiguous_id": {193: 0},
}
CITY = {
    "imgHeight": 96,
    "imgWidth": 160,
    "objects": [
        {"label": "car", "polygon": [[4, 4], [60, 4], [60, 40], [4, 40]]},
        {"label": "person", "polygon": [[30, 4], [50, 4], [50, 30]]},
    ],
}
HEADER = {
    "source": "clip.mp4",
    "bytes": 1,
    "width": 40,
    "height": 30,
    "fps": 25.0,
    "selection": {"stride": 1, "start": 0.0, "end": None},
    "classes": ["person"],
    "model": "truth",
}
FRAMES = [
    {"frame": i, "time": i / 25, "boxes": [[1, 2, 9, 9]], "scores": [0.5], "classes": [0]}
    for i in range(3)
]
OWNER = {"pid": 2**22 + 5, "host": socket.gethostname(), "start": "12"}


def lvis() -> dict[str, Any]:
    found = content()
    for entry in found["categories"]:
        entry |= {"frequency": "c", "image_count": 9, "synset": "a.n.01", "synonyms": ["a"]}
    found["images"][0] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    found["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/1.png"
    return found


def voc_dataset(folder: Path) -> None:
    WRITERS["voc"](content(), folder)
    text("ImageSets/Main/train.txt", "1\n")(folder)


def city(folder: Path) -> None:
    write_city(folder, np.zeros((96, 160), np.int32), "a")
    data("gtFine/val/aachen/a_gtFine_polygons.json", CITY)(folder)


def numpy_proposals(folder: Path) -> None:
    values = {"ids": np.array([1]), "boxes": np.zeros((1, 2, 4)), "bbox_mode": np.array(0)}
    np.savez(folder / "a.npz", **values, objectness_logits=np.zeros((1, 2)))


def pickled_proposals(folder: Path) -> None:
    values = {"ids": [1], "boxes": [np.zeros((2, 4))], "objectness_logits": [np.zeros(2)]}
    (folder / "a.pkl").write_bytes(pickle.dumps({**values, "bbox_mode": 0}))


def add_proposals(file: Path) -> object:
    return load_proposals_into_dataset([{"image_id": 1}], str(file))


def store(folder: Path, compress: Callable[[bytes], bytes] = gzip.compress) -> None:
    rows = [{"format": "d2kit detections 1", **HEADER}, *FRAMES, {"end": {"frames": 3}}]
    members = [compress(f"{json.dumps(row)}\n".encode()) for row in rows]
    (folder / "d.gz").write_bytes(b"".join(members))


def stored_lines(folder: Path) -> list[object]:
    """Compress text that was damaged: checksums are right, and what they cover is not."""
    packed = gzip.compress((folder / "d.gz").read_bytes())
    (folder / "d.gz").write_bytes(packed)
    return list(DetectionStore(folder / "d.gz"))


def archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("a/b.txt", b"hello " * 50)
        bundle.writestr("c.txt", b"x")


def weights() -> dict[str, Any]:
    return {"conv.weight": torch.rand(4, 3, 3, 3), "conv.bias": torch.rand(4)}


def pickled_weights(folder: Path) -> None:
    arrays = {name: value.numpy() for name, value in weights().items()}
    (folder / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))


def safetensors_of_others(folder: Path) -> None:
    """Without the digest that ours have."""
    from safetensors.torch import save_file

    save_file(weights(), folder / "a.safetensors")


def header_of_safetensors(folder: Path) -> object:
    """Put the length of the damaged header before it: what comes after the length is read."""
    file = folder / "header.json"
    header = file.read_bytes()
    target = folder / "a.safetensors"
    target.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    return read_checkpoint(target)


def picture(place: str, suffix: str, **options: object) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / place).mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / place / f"damaged{suffix}", **options)

    return make


def exif() -> Any:
    found = Image.Exif()
    found[0x0112] = 6
    return found


def video(suffix: str, codec: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        from tests.support.clips import write_video

        images = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(6)]
        write_video(folder / f"damaged{suffix}", images, codec=codec)

    return make


def frames_of(file: Path) -> list[Any]:
    return list(open_source(str(file), Selection()))


def exported(folder: Path) -> None:
    (folder / "model.torchscript").write_bytes(b"no model")
    (folder / "model.onnx").write_bytes(b"no model")
    facts = {"format": "onnx", "sha256": {"model.onnx": sha256(folder / "model.onnx")}}
    data(METADATA, facts)(folder)


def run_folder(folder: Path) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    WRITERS["coco"](content(), folder / "whole.json")
    cfg.DATASETS.REGISTER_COCO = (("fuzz_run", str(folder / "whole.json"), str(folder)),)
    cfg.DATASETS.TEST = ("fuzz_run",)
    text("config.yaml", cfg.dump())(folder)
    text("metrics.json", LINES)(folder)
    data("inference/coco_instances_results.json", RESULTS)(folder)
    data("report.json", {"machine": {"date": "x"}, "datasets": {}})(folder)


def fix(folder: Path) -> None:
    path = str(folder / "train.json")
    repair_coco(read_json(path, path), path, None, folder)


def groups(folder: Path) -> None:
    options = ["--results", str(folder / "results.json"), "--group", "id", "--samples", "3"]
    evaluate_groups_main(["--dataset", str(folder / "train.json"), *options])


def truth_and_results(folder: Path) -> None:
    made_by("coco")(folder)
    data("results.json", RESULTS)(folder)


def draw_results(folder: Path) -> None:
    if "fuzz_results" in DatasetCatalog:
        DatasetCatalog.remove("fuzz_results")
    register_coco_instances("fuzz_results", {}, str(folder / "whole.json"), str(folder))
    for _ in drawn_results("fuzz_results", read_results(folder / "results.json", 0.1), 1.0, []):
        pass


def results_alone(folder: Path) -> None:
    WRITERS["coco"](content(), folder / "whole.json")
    data("results.json", RESULTS)(folder)


def split(folder: Path) -> None:
    options = ["--parts", "a=0.5", "b=0.5", "--group", "id", "--output", str(folder / "out")]
    split_main([str(folder / "train.json"), *options])


def voc_read(folder: Path) -> object:
    return load_voc_instances(str(folder), "train", ["cat", "dog"])


def city_read(folder: Path) -> object:
    sides = folder / "leftImg8bit/val", folder / "gtFine/val"
    return load_cityscapes_instances(str(sides[0]), str(sides[1]))


def lvis_read(folder: Path) -> object:
    read_categories.cache_clear()
    read_categories(str(folder / "lvis.json"))
    return load_lvis_json(str(folder / "lvis.json"), str(folder))


def panoptic_read(folder: Path) -> object:
    sides = str(folder), str(folder)
    return load_coco_panoptic_json(str(folder / "p.json"), *sides, PANOPTIC_META)


SUMMARY = {
    "frames_from_store": 0,
    "files": {"tracks.csv": {"bytes": 1, "sha256": "0"}},
    "frames": 3,
}
FORMATS = ("voc", "yolo", "labelme", "cvat", "coco")
Kind = tuple[Callable[[Path], object], Callable[[Path], object], str]
"""What writes sound files, what reads the folder, and the pattern of the files to damage."""
KINDS: dict[str, Kind] = {
    **{kind: (made_by(kind), converted(kind), "*") for kind in FORMATS},
    "masks": (made_by("masks"), converted("masks"), "*"),
    "pictures of masks": (made_by("masks"), converted("masks"), "*.png"),
    "via": (data("via.json", VIA), converted("via"), "*"),
    "via csv": (text("via.csv", VIA_CSV), converted("via"), "*"),
    "csv": (text("a.csv", TABLE), converted("csv"), "*"),
    "label studio": (data("p.json", STUDIO), converted("labelstudio"), "*"),
    "class folders": (
        picture("cat", ".png"),
        converted("folders"),
        "damaged.png",
    ),
    "format found": (
        made_by("coco"),
        lambda f: prepare(f, f / "prepared", test=0.5, split="random"),
        "*",
    ),
    "COCO JSON": (made_by("coco"), lambda f: load_coco_json(f / "train.json", f), "*"),
    "check": (made_by("coco"), lambda f: check_dataset(f / "train.json"), "*"),
    "fix": (made_by("coco"), fix, "*"),
    "split": (made_by("coco"), split, "*"),
    "voc dataset": (voc_dataset, voc_read, "*"),
    "lvis": (data("lvis.json", lvis()), lvis_read, "*"),
    "panoptic": (data("p.json", PANOPTIC), panoptic_read, "*"),
    "cityscapes": (city, city_read, "*.json"),
    "ade20k": (
        text("objectInfo150.txt", "Idx\tName\n1\twall, w\n2\tsky\n"),
        lambda f: ade20k_classes(str(f)),
        "*",
    ),
    "MOT text": (text("a.txt", MOT), lambda f: read_mot_text(f / "a.txt"), "*"),
    "tracks": (
        data("a.json", TRACKS),
        lambda f: evaluate_tracks(f / "a.json", f / "a.json", classes=["cat"]),
        "*",
    ),
    "results by group": (truth_and_results, groups, "*"),
    "results drawn": (results_alone, draw_results, "results.json"),
    "proposals": (data("a.json", PROPOSALS), lambda f: add_proposals(f / "a.json"), "*"),
    "proposals npz": (numpy_proposals, lambda f: add_proposals(f / "a.npz"), "*"),
    "proposals pkl": (pickled_proposals, lambda f: add_proposals(f / "a.pkl"), "*"),
    "detections": (store, lambda f: list(DetectionStore(f / "d.gz")), "*"),
    "lines of detections": (lambda f: store(f, bytes), stored_lines, "*"),
    "summary of tracks": (
        data("summary.json", SUMMARY),
        lambda f: clear_results(f, str(f / "in.mp4"), frames=True),
        "*",
    ),
    "YAML": (text("a.yaml", YAML), lambda f: get_cfg().merge_from_file(str(f / "a.yaml")), "*"),
    "lazy YAML": (text("a.yaml", LAZY), lambda f: LazyConfig.load(str(f / "a.yaml")), "*"),
    "metrics.json": (
        text("metrics.json", LINES),
        lambda f: JSONWriter(str(f / "metrics.json")).continue_from(2),
        "*",
    ),
    "metrics drawn": (text("m.json", LINES), lambda f: read_metrics(f / "m.json"), "*"),
    "run folder": (run_folder, lambda f: write_report(f, f / "page.html"), "*"),
    "lock": (data(LOCK, OWNER), lambda f: RunLock(f).release(), "*"),
    "archive": (archive, lambda f: extract_zip(f / "a.zip", f / "out"), "*"),
    "pth": (
        lambda f: torch.save({"model": weights(), "iteration": 3}, f / "a.pth"),
        lambda f: read_checkpoint(f / "a.pth"),
        "*",
    ),
    "safetensors": (
        lambda f: (f / "a.safetensors").write_bytes(write_safetensors(weights())),
        lambda f: read_checkpoint(f / "a.safetensors"),
        "*",
    ),
    "safetensors of others": (
        safetensors_of_others,
        lambda f: read_checkpoint(f / "a.safetensors"),
        "*",
    ),
    "header of safetensors": (
        data("header.json", {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}),
        header_of_safetensors,
        "*",
    ),
    "pkl": (pickled_weights, lambda f: read_checkpoint(f / "a.pkl"), "*"),
    **{
        f"picture {suffix}": (
            picture("", suffix, **options),
            lambda f, suffix=suffix: read_image(f / f"damaged{suffix}", "BGR"),
            "damaged*",
        )
        for suffix, options in (
            *((".jpg", {"exif": exif()}), (".png", {}), (".tif", {"compression": "tiff_lzw"})),
            *((".gif", {}), (".bmp", {}), (".webp", {})),
        )
    },
    **{
        f"video {suffix}": (
            video(suffix, codec),
            lambda f, suffix=suffix: frames_of(f / f"damaged{suffix}"),
            "damaged*",
        )
        for suffix, codec in ((".mp4", "libx264"), (".avi", "mpeg4"))
    },
    "exported model": (exported, load_exported, "*.json"),
}
SPARED = {
    "whole.json",
    *(f"{place}{i}.png" for place in ("", "images/") for i in range(1, COUNT + 1)),
}
"""Files that are never damaged."""
UNREADABLE = ("exported model",)
"""Kinds whose sound files end in an error too: what they name is no model."""
