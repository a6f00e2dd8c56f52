"""Pictures of ground truth beside prediction, drawn at each evaluation of a training."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from d2kit.config import CfgNode
from d2kit.engine._preflight_data import pick_evenly
from d2kit.utils import comm
from d2kit.utils.events import get_event_storage, has_event_storage
from d2kit.utils.file_io import atomic_write

__all__ = ["build_evaluation_pictures", "side_by_side"]

logger = logging.getLogger(__name__)

FOLDER = "vis"
LINE, LETTER = 24, 15  # heights of the title's lines and letters, pixels
SCORE = 0.3
MOST = 50
PANE = 800
"""Longest side of each of the two pictures, pixels; small images are enlarged up to 3 times."""


def build_evaluation_pictures(
    cfg: CfgNode, model: nn.Module, done: int, build_loader: Callable[[CfgNode, str], Any]
) -> None:
    """Draw ``TEST.VIS_IMAGES`` images of each test set, ground truth left and prediction right.

    Rank 0 does it, beside the evaluation: the images run through the model once more. They are the
    same ones each time, evenly spaced over the test set. Files are
    ``OUTPUT_DIR/vis/<dataset>/<number>_<name>_iter<iterations done>.jpg``, so that a viewer that
    sorts by name flips through the iterations of an image; there are at most VIS_IMAGES x test sets
    x evaluations. The events get them as ``vis/<dataset>/<number>_<name>``.

    Args:
        cfg: a full config.
        model: with the weights that were evaluated.
        done: iterations so far.
        build_loader: config and name of a test set -> its loader.
    """
    if cfg.TEST.VIS_IMAGES <= 0 or not comm.is_main_process():
        return
    from d2kit.data import MetadataCatalog
    from d2kit.evaluation import inference_context

    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    for name in cfg.DATASETS.TEST:
        dataset = build_loader(cfg, name).dataset  # its loader is not started: no draw by chance
        folder = Path(cfg.OUTPUT_DIR) / FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in pick_evenly(len(dataset), cfg.TEST.VIS_IMAGES):
            sample = dataset[index]
            with inference_context(model), torch.no_grad(), comm.on_its_own():
                output = model([sample])[0]
            record = dataset.record(index) if hasattr(dataset, "record") else sample
            label = f"{index:06d}_{Path(record['file_name']).stem}"
            picture = side_by_side(record, output, MetadataCatalog.get(name), done)
            with atomic_write(folder / f"{label}_iter{done:07d}.jpg") as file:
                file.write(_jpeg(picture))
            if has_event_storage():
                shown = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
                get_event_storage().put_image(f"{FOLDER}/{name}/{label}", shown)
    logger.info("Pictures of ground truth beside prediction in %s/%s", cfg.OUTPUT_DIR, FOLDER)


def side_by_side(
    record: Mapping[str, Any], output: Mapping[str, Any], metadata: Any, done: int
) -> np.ndarray:
    """Draw one image twice, with its annotations and with what a model found.

    Args:
        record: in the standard format.
        output: of the model: ``instances`` (at most 50, with a score of at least 0.3, are drawn),
            ``sem_seg`` or ``panoptic_seg``.
        metadata: names and colours; a class has the same colour on both sides.
        done: iterations so far, for the title.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from d2kit.data.detection_utils import read_image
    from d2kit.visualization.visualizer import ColorMode, Visualizer

    image = read_image(record["file_name"], "RGB")
    scale = min(3.0, PANE / max(image.shape[:2]))
    known = _with_colors(metadata)
    panes = [
        Visualizer(image, known, scale=scale, instance_mode=ColorMode.SEGMENTATION)
        for _ in range(2)
    ]
    panes[0].draw_dataset_dict(dict(record))
    truth = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    found = _draw_output(panes[1], output)
    titles = (
        f"Ground truth: {len(truth)} objects",
        f"Iteration {done:,}: {found}",
    )
    pictures = [pane.output.get_image() for pane in panes]
    gap = np.full((pictures[0].shape[0], 6, 3), 255, dtype=np.uint8)
    body = np.concatenate([pictures[0], gap, pictures[1]], axis=1)
    name = "/".join(Path(record["file_name"]).parts[-2:])
    return np.concatenate([_title(body.shape[1], name, titles), body])


def _draw_output(pane: Any, output: Mapping[str, Any]) -> str:
    """Draw what a model found; say how much that is."""
    from d2kit.visualization._labels import _create_text_labels

    if "panoptic_seg" in output:
        segments, infos = output["panoptic_seg"]
        pane.draw_panoptic_seg(segments.cpu(), infos)
        return "panoptic segmentation"
    if "instances" not in output:
        if "sem_seg" in output:
            pane.draw_sem_seg(output["sem_seg"].argmax(dim=0).cpu())
            return "semantic segmentation"
        return "nothing that can be drawn"
    every = output["instances"].to("cpu")
    chosen = every[every.scores >= SCORE][:MOST]
    fields = chosen.get_fields()
    classes = chosen.pred_classes.tolist() if "pred_classes" in fields else None
    pane.overlay_instances(  # as transparent as the ground truth
        boxes=fields.get("pred_boxes"),
        masks=fields.get("pred_masks"),
        keypoints=fields.get("pred_keypoints"),
        labels=_create_text_labels(classes, chosen.scores, pane.metadata["thing_classes"]),
        assigned_colors=pane._class_colors(classes, True),
    )
    return f"{len(chosen)} detections with a score of {SCORE:.0%} or more"


def _with_colors(metadata: Any) -> dict[str, Any]:
    """Return metadata in which every class has a colour."""
    from d2kit.visualization._colors import palette

    known = dict(metadata.as_dict())
    names = known["thing_classes"] = list(known.get("thing_classes") or ())
    if not known.get("thing_colors"):
        known["thing_colors"] = [[255 * c for c in palette(i)] for i in range(len(names))]
    return known


def _title(width: int, name: str, titles: tuple[str, str]) -> np.ndarray:
    """Return the strip above two pictures: the file's name, and a line over each."""
    from d2kit.visualization import _text

    strip = np.full((2 * LINE, width, 3), 255, dtype=np.uint8)
    places = ((name, 0, 0), (titles[0], 0, LINE), (titles[1], width // 2 + 3, LINE))
    for text, x, y in places:
        room = width - x if y == 0 else width // 2 - 8
        line = _text.fitted(text, LETTER, room)
        _text.paste(strip, _text.plate(line, LETTER, (20, 20, 20), (255, 255, 255), 1.0), x, y)
    return strip


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done
    return data.tobytes()
