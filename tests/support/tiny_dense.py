"""One-stage and segmentation models of a few thousand weights, and inputs for them."""

import torch

from d2kit.config import CfgNode
from d2kit.modeling import build_model
from tests.support.tiny_model import tiny_config, tiny_input

OPTIONS = {
    "RetinaNet": [
        "MODEL.RETINANET.IN_FEATURES", ["p2", "p3"],
        "MODEL.RETINANET.NUM_CLASSES", 3,
        "MODEL.RETINANET.NUM_CONVS", 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0,
    ],
    "FCOS": [
        "MODEL.FCOS.IN_FEATURES", ["p2", "p3"],
        "MODEL.FCOS.NUM_CLASSES", 3,
        "MODEL.FCOS.NUM_CONVS", 1,
        "MODEL.FCOS.NORM", "",
        "MODEL.FCOS.SCORE_THRESH_TEST", 0.0,
    ],
    "SemanticSegmentor": [],
    "PanopticFPN": ["MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 20],
}  # fmt: skip
SEMANTIC = [
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
]  # fmt: skip


def tiny_dense_config(name: str, *options) -> CfgNode:
    return tiny_config("MODEL.META_ARCHITECTURE", name, *SEMANTIC, *OPTIONS[name], *options)


def tiny_dense_model(name: str, *options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(tiny_dense_config(name, *options))


def labelled_input(seed: int, objects: int = 2, size: tuple[int, int] = (64, 80)) -> dict:
    """`tiny_input` with labels of pixels: 0 things, 1 above the middle, 2 below."""
    item = tiny_input(seed, objects, size)
    labels = torch.ones(size, dtype=torch.int64)
    labels[size[0] // 2 :] = 2
    item["image"][:, size[0] // 2 :] += 60
    for x0, y0, x1, y1 in item["instances"].gt_boxes.tensor.long().tolist():
        labels[y0:y1, x0:x1] = 0
    return {**item, "sem_seg": labels}
