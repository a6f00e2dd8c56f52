"""Draw what the model is fed, and results of COCO's format beside the ground truth."""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from d2kit.cli import verb_parser
from d2kit.config import CfgNode, get_cfg
from d2kit.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    register_dataset,
    register_datasets,
)
from d2kit.data.detection_utils import read_image
from d2kit.engine import user_errors
from d2kit.evaluation.coco_evaluation import instances_from_coco_json
from d2kit.evaluation.coco_results import read_coco_results
from d2kit.evaluation.evaluator import stale_results
from d2kit.utils.file_io import IMAGE_SUFFIXES, atomic_write
from d2kit.utils.text import file_name, html_text, one_line
from d2kit.visualization import ColorMode, Visualizer
from d2kit.visualization.drawing import palette

NOTE = b"drawn by d2kit visualize"
DRAWN = b"\xff\xfe" + (2 + len(NOTE)).to_bytes(2, "big") + NOTE
"""Comment behind the first two bytes of each JPEG, by which a later run knows it and removes it."""

SIDE = 360
"""Longest side of a thumbnail, in pixels: some 15 to 30 kB each."""

MAX_BYTES = 50_000_000
"""No picture is added beyond this size of the page."""

STYLE = """:root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:1.5em}
h1{font-size:1.5em;margin:0 0 .3em}table{border-collapse:collapse;margin:1em 0}
td,th{padding:2px 12px;text-align:left;overflow-wrap:anywhere}
td+td,th+th{text-align:right;white-space:nowrap}
i{display:inline-block;width:.9em;height:.9em;margin-right:.6em;border-radius:2px}
main{display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start}figure{margin:0}
img{display:block;max-width:100%}figcaption{max-width:360px;margin-top:3px;overflow-wrap:anywhere;
opacity:.75;font-size:12px}"""


def make_page(
    pictures: Iterable[tuple[str, np.ndarray]],
    counts: Sequence[tuple[str, int, int]] = (),
    title: str = "Dataset",
    summary: str = "",
    colors: Mapping[str, str] | None = None,
) -> str:
    """Make a page of pictures.

    Args:
        pictures: (name, (H, W, 3) uint8 RGB).
        counts: (class, instances, images).
        title: of the page.
        summary: a line below it.
        colors: class -> "#rrggbb", shown beside the class.

    Returns:
        HTML with the pictures inside, at most `MAX_BYTES` and one picture long.
    """
    figures, size, left_out = [], 0, 0
    for name, picture in pictures:
        if size > MAX_BYTES:
            left_out += 1
            continue
        text = html_text(name)
        data = base64.b64encode(_thumbnail(picture)).decode()
        figures.append(
            f'<figure><img loading="lazy" alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
        size += len(figures[-1])
    rows = "".join(
        f"<tr><td>{_swatch((colors or {}).get(name))}{html_text(name)}</td>"
        f"<td>{n}</td><td>{k}</td></tr>"
        for name, n, k in counts
    )
    head = "<tr><th>class</th><th>instances</th><th>images</th></tr>"
    more = f"<p>{left_out} more pictures left out</p>" if left_out else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html_text(title)}</title>"
        f"<style>{STYLE}</style><h1>{html_text(title)}</h1><div>{html_text(summary, None)}</div>"
        f"{f'<table>{head}{rows}</table>' if rows else ''}<main>{''.join(figures)}</main>"
        f"{more}</html>\n"
    )


def _swatch(color: str | None) -> str:
    return f'<i style="background:{html_text(color)}"></i>' if color else ""


def _thumbnail(picture: np.ndarray) -> bytes:
    """Return a JPEG of at most `SIDE` pixels."""
    import cv2

    scale = min(1.0, SIDE / max(picture.shape[:2]))
    size = [max(1, round(s * scale)) for s in picture.shape[1::-1]]
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return data.tobytes()


ABOUT_VISUALIZE = """\
Draw what the model is fed: images and annotations after augmentation, or as they are on disk.

d2kit visualize --config-file configs/X.yaml --source dataloader --output-dir output/look
d2kit visualize --json train.json --images photos --html look.html    (no config needed)

--html writes one page with thumbnails and class counts, complete in itself.
"""


def from_loader(cfg: CfgNode, scale: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of the training stream, as the model sees it."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    position = itertools.count()
    for batch in build_detection_train_loader(cfg):
        for sample in batch:
            image = sample["image"].permute(1, 2, 0).numpy()
            image = detection_utils.convert_image_to_rgb(image, cfg.INPUT.FORMAT)
            instances = sample["instances"]
            fields = instances.get_fields()
            classes = [metadata.thing_classes[i] for i in instances.gt_classes]
            picture = Visualizer(image, metadata, scale=scale).overlay_instances(
                boxes=instances.gt_boxes,
                labels=classes,
                masks=fields.get("gt_masks"),
                keypoints=fields.get("gt_keypoints"),
            )
            yield f"{next(position):05d}_{Path(sample['file_name']).stem}", picture.get_image()


def from_dataset(
    cfg: CfgNode, scale: float, count: int, bad: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of images spread over the training sets, as they lie on disk.

    What cannot be read is appended to `bad`, one line each.
    """
    found = [(name, r) for name in cfg.DATASETS.TRAIN for r in DatasetCatalog.get(name)]
    for i in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int):
        name, record = found[i]
        metadata = MetadataCatalog.get(name)
        try:
            image = detection_utils.read_image(record["file_name"], "RGB")
            detection_utils.check_image_size(record, image)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        mode = ColorMode.SEGMENTATION if metadata.get("thing_colors") else ColorMode.IMAGE
        drawn = Visualizer(image, metadata, scale=scale, instance_mode=mode)
        drawn.draw_dataset_dict(record)
        root = metadata.get("image_root")
        path = os.path.relpath(record["file_name"], root) if root else record["file_name"]
        yield path, drawn.output.get_image()


def read_config(args: argparse.Namespace, register: Callable[[], None] | None = None) -> CfgNode:
    """Return the config, or one whose training set is the file of ``--json``."""
    cfg = get_cfg()
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0])
    if args.json:
        name = str(args.json)
        register_dataset(name, args.json, args.images)
        DatasetCatalog.get(name)  # reads the classes
        metadata = MetadataCatalog.get(name)
        metadata.thing_colors = [
            [round(255 * v) for v in palette(i)] for i in range(len(metadata.thing_classes))
        ]
        cfg.merge_from_list(["DATASETS.TRAIN", (name,)])
        args.source = "annotation"
    else:
        if register is not None:
            register()
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    register_datasets(cfg.DATASETS.REGISTER_COCO)
    return cfg


def count_classes(cfg: CfgNode) -> list[tuple[str, int, int]]:
    """Return (class, instances, images with it) of the training sets, crowds left out."""
    instances: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for name in cfg.DATASETS.TRAIN:
        records = DatasetCatalog.get(name)
        names = MetadataCatalog.get(name).thing_classes
        instances.update(dict.fromkeys(names, 0))
        for record in records:
            found = [
                names[a["category_id"]] for a in record["annotations"] if not a.get("iscrowd", 0)
            ]
            instances.update(found)
            images.update(set(found))
    return [(name, count, images[name]) for name, count in instances.most_common()]


def page_of(cfg: CfgNode, pictures: Iterable[tuple[str, np.ndarray]], count: int) -> str:
    """Return the HTML page, with one colour per class where the dataset has some."""
    counts = count_classes(cfg)
    colors = {}
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        for label, color in zip(
            metadata.thing_classes, metadata.get("thing_colors") or [], strict=False
        ):
            colors[label] = "#{:02x}{:02x}{:02x}".format(*color)
    total = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
    objects = sum(number for _, number, _ in counts)
    summary = f"{total} images, {objects} instances; pictures of {min(count, total)} images below"
    title = ", ".join(Path(name).name for name in cfg.DATASETS.TRAIN)
    return make_page(pictures, counts, title, summary, colors)


def write_pictures(folder: Path, pictures: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write (name, RGB picture) as JPEG; names that are equal without their endings keep them.

    The pictures of an earlier run are removed first.

    Raises:
        OSError: a picture cannot be written.
        ValueError: a file of others has the name of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jpg"):
        if _is_ours(old):
            old.unlink()
    taken: set[str] = set()
    for name, rgb in pictures:
        path = Path(name)
        whole = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
        flat = whole.as_posix().strip("/").replace("/", "_")
        if flat in taken:
            flat = f"{flat}_{path.suffix.lstrip('.')}"
        flat = file_name(flat if flat not in taken else f"{len(taken)}_{flat}")
        taken.add(flat)
        done, data = cv2.imencode(".jpg", rgb[..., ::-1])
        if not done:
            raise OSError(f"{one_line(name)}: a picture of {rgb.shape} is no JPEG")
        target, content = folder / f"{flat}.jpg", data.tobytes()
        if os.path.lexists(target):
            raise ValueError(
                f"{target} exists and was not written by this tool; choose another folder for the "
                "output"
            )
        with atomic_write(target) as file:
            file.write(content[:2] + DRAWN + content[2:])


def _is_ours(picture: Path) -> bool:
    """Tell whether `write_pictures` has written a file."""
    if not picture.is_file():
        return False
    with picture.open("rb") as file:
        return file.read(2 + len(DRAWN)).endswith(DRAWN)


def tell_bad(bad: list[str]) -> None:
    """List what could not be drawn.

    Raises:
        SystemExit: with code 1, if there is something.
    """
    if bad:
        print(f"\n{len(bad)} images could not be drawn:", file=sys.stderr)
        for text in bad:
            print(f"  {one_line(text)}", file=sys.stderr)
        raise SystemExit(1)


def visualize_main(
    argv: list[str] | None = None, register: Callable[[], None] | None = None
) -> None:
    """Write the pictures.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = verb_parser("visualize", ABOUT_VISUALIZE)
    parser.add_argument("--config-file")
    parser.add_argument("--json", type=Path, help="COCO annotations, instead of a config")
    parser.add_argument("--images", type=Path, help="image folder of --json")
    parser.add_argument("--html", type=Path, help="write one page instead of pictures")
    parser.add_argument("--source", choices=("dataloader", "annotation"), default="dataloader")
    parser.add_argument("--output-dir", type=Path, default=Path("output/visualize_data"))
    parser.add_argument("--count", type=int, default=20, help="number of pictures (default 20)")
    parser.add_argument("--scale", type=float, default=2.0, help="enlargement (default 2)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args(argv)
    if (args.config_file is None) == (args.json is None) or (args.json and not args.images):
        parser.error("give either --config-file, or --json and --images")
    bad: list[str] = []
    with user_errors():
        cfg = read_config(args, register)
        drawn = (
            from_loader(cfg, args.scale)
            if args.source == "dataloader"
            else from_dataset(cfg, args.scale, args.count, bad)
        )
        pictures = tqdm(itertools.islice(drawn, args.count), total=args.count, desc="drawing")
        if args.html:
            with atomic_write(args.html, "w") as file:
                file.write(page_of(cfg, pictures, args.count))
            print(f"page in {args.html}")
        else:
            write_pictures(args.output_dir, pictures)
            print(f"pictures in {args.output_dir}")
        tell_bad(bad)


ABOUT_VISUALIZE_RESULTS = """\
Draw results of COCO's format beside the ground truth: predictions left, annotations right.

d2kit visualize-results --input output/run/inference/coco_instances_results.json \
                        --output output/look [--conf-threshold 0.5] \
                        (--dataset coco_2017_val | --config-file output/run/config.yaml)
"""


def read_results(path: Path, threshold: float) -> dict[Any, list[dict[str, Any]]]:
    """Return the results of each image whose score is at least `threshold`."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in read_coco_results(path):
        if result.get("score", 1.0) >= threshold:
            found[result["image_id"]].append(result)
    return found


def pictures(
    dataset: str, found: dict[Any, list[dict[str, Any]]], scale: float, bad: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, RGB picture) of each image: predictions, and what is true.

    What cannot be read is appended to `bad`, one line each.
    """
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    unknown = set(found) - {record["image_id"] for record in records}
    if unknown:
        raise ValueError(
            f"image {min(unknown, key=str)!r} of the results is not in dataset '{dataset}'"
        )
    for record in records:
        try:
            image = read_image(record["file_name"], "RGB")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        results = found.get(record["image_id"], [])
        instances = instances_from_coco_json(
            results, image.shape[:2], metadata.get("thing_dataset_id_to_contiguous_id")
        )
        predicted = Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances)
        true = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
        both = np.concatenate([predicted.get_image(), true.get_image()], axis=1)
        yield f"{record['image_id']}_{Path(record['file_name']).stem}", both


def visualize_results_main(
    argv: list[str] | None = None, register: Callable[[], None] | None = None
) -> None:
    """Write the pictures.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = verb_parser("visualize-results", ABOUT_VISUALIZE_RESULTS)
    parser.add_argument("--input", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--dataset", help="default: the config's test set, else coco_2017_val")
    parser.add_argument("--config-file", help="registers datasets of your own, e.g. of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--conf-threshold", type=float, default=0.5, help="default 0.5")
    parser.add_argument("--count", type=int, help="number of pictures; default all")
    parser.add_argument("--scale", type=float, default=1.0, help="enlargement (default 1)")
    args = parser.parse_args(argv)
    with user_errors():
        if register is not None:
            register()
        dataset = args.dataset or "coco_2017_val"
        if args.config_file:
            cfg = get_cfg()
            cfg.merge_from_file(args.config_file)
            register_datasets(cfg.DATASETS.REGISTER_COCO)
            dataset = args.dataset or cfg.DATASETS.TEST[0]
        found = read_results(args.input, args.conf_threshold)
        truth = MetadataCatalog.get(dataset).get("json_file")
        stale = stale_results(args.input, truth) if truth else ""
        if stale:
            print(f"warning: {stale}", file=sys.stderr)
        bad: list[str] = []
        drawn = itertools.islice(pictures(dataset, found, args.scale, bad), args.count)
        write_pictures(args.output, tqdm(drawn, desc="drawing", unit="image"))
        print(f"pictures in {args.output}")
        tell_bad(bad)
