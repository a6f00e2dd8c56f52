import numpy as np
import pytest
import torch

from d2kit.structures import Boxes, Instances
from d2kit.utils.video_visualizer import VideoVisualizer

META = {"thing_classes": ["patient", "nurse"], "stuff_classes": ["floor"]}
FRAME = np.full((100, 140, 3), 90, dtype=np.uint8)
BASE = np.array([[10.0, 20, 50, 60], [80, 30, 130, 90]])


def frame_of(boxes, classes=None, masks=False, **fields):
    boxes = np.asarray(boxes, dtype=np.float32)
    instances = Instances((100, 140), pred_boxes=Boxes(torch.from_numpy(boxes)), **fields)
    instances.pred_classes = torch.tensor(classes or [0] * len(boxes))
    if masks:
        stack = torch.zeros(len(boxes), 100, 140, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(stack, boxes.astype(int).tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_masks = stack
    return instances


def colors(video, instances):
    """Draw a frame; return each instance's colour, read from its box's lower right corner."""
    picture = video.draw_instance_predictions(FRAME, instances).get_image()
    corners = instances.pred_boxes.tensor[:, 2:].int() - 1
    return [tuple(picture[y, x].tolist()) for x, y in corners.tolist()]


@pytest.mark.parametrize("masks", [False, True])
def test_colours_follow_overlap(masks):
    video = VideoVisualizer(META)
    first = colors(video, frame_of(BASE, masks=masks))
    assert first[0] != first[1]
    second = colors(video, frame_of((BASE + 3)[::-1].copy(), masks=masks))
    assert second == first[::-1]


def test_colour_survives_a_gap_but_not_a_long_one():
    video = VideoVisualizer(META)
    first = colors(video, frame_of(BASE))
    for _ in range(3):
        video.draw_instance_predictions(FRAME, frame_of(BASE[:0]))
    assert colors(video, frame_of(BASE)) == first
    for _ in range(20):
        video.draw_instance_predictions(FRAME, frame_of(BASE[:0]))
    assert not set(colors(video, frame_of(BASE))) & set(first)


def test_another_class_is_another_object():
    video = VideoVisualizer(META)
    first = colors(video, frame_of(BASE, [0, 0]))
    second = colors(video, frame_of(BASE, [1, 0]))
    assert second[0] != first[0]
    assert second[1] == first[1]


def test_identities_decide():
    video = VideoVisualizer(META)
    first = colors(video, frame_of(BASE, ID=torch.tensor([4, 9])))
    second = colors(video, frame_of(BASE, ID=torch.tensor([9, 4])))
    assert second == first[::-1]


def test_frame_is_not_changed():
    before = FRAME.copy()
    VideoVisualizer(META).draw_instance_predictions(FRAME, frame_of(BASE))
    assert (before == FRAME).all()


def test_segmentations():
    video = VideoVisualizer(META)
    seg = np.zeros((100, 140), dtype=np.int64)
    assert (video.draw_sem_seg(FRAME, seg).get_image() != FRAME).any()
    pan = torch.ones(100, 140, dtype=torch.int64)
    pan[20:60, 10:50] = 5
    infos = [
        {"id": 1, "isthing": False, "category_id": 0},
        {"id": 5, "isthing": True, "category_id": 1},
    ]
    pictures = [
        video.draw_panoptic_seg_predictions(FRAME, pan, infos).get_image() for _ in range(2)
    ]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0][55, 45] != pictures[0][90, 130]).any()
