"""Draw what the model is fed: images and annotations after augmentation, or as they are on disk.

d2kit visualize --config-file configs/X.yaml --source dataloader --output-dir output/look
d2kit visualize --json train.json --images photos --html look.html    (no config needed)

--html writes one page with thumbnails and class counts, complete in itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from d2kit.config import CfgNode, get_cfg
from d2kit.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    register_dataset,
    register_datasets,
)
from d2kit.engine import user_errors
from d2kit.utils.file_io import IMAGE_SUFFIXES, atomic_write
from d2kit.utils.text import file_name, one_line
from d2kit.visualization import ColorMode, Visualizer
from d2kit.visualization.labels import palette
from d2kit.visualization.page import make_page


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

    Raises:
        OSError: a picture cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        with atomic_write(folder / f"{flat}.jpg") as file:
            file.write(data.tobytes())


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


def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Write the pictures.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = argparse.ArgumentParser(
        prog="d2kit visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
