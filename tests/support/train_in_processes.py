"""Worker of test_processes: trains tiny models, writes their losses of every step."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from d2kit.contrib.point_rend import add_pointrend_config
from d2kit.modeling import build_model
from tests.modeling.roi_heads.test_point_rend import OPTIONS as POINTREND_OPTIONS
from tests.support.tiny_dense import labelled_input, tiny_dense_config
from tests.support.tiny_heads import CASCADE_OPTIONS, KEYPOINT_OPTIONS, with_keypoints
from tests.support.tiny_model import tiny_config

BATCH = 4
OBJECTS = (0, 3, 1, 5)  # the two halves have different counts of foreground
HEADS = {
    "GeneralizedRCNN": [],
    "cascade with keypoints": [*CASCADE_OPTIONS, *KEYPOINT_OPTIONS],
    "PointRend": POINTREND_OPTIONS,
    "class weights": ["MODEL.ROI_HEADS.CLASS_WEIGHTS", [5.0, 0.2, 1.0, 0.5]],
}
NAMES = (*HEADS, "RetinaNet", "SemanticSegmentor")
HEADS["compiled"] = ["MODEL.COMPILE", "trunk"]


def config(name):
    if name not in HEADS:
        return tiny_dense_config(name)
    cfg = tiny_config()
    add_pointrend_config(cfg)
    cfg.merge_from_list(HEADS[name])
    return cfg


def train(name: str, rank: int, world: int, steps: int) -> dict[str, list[float]]:
    """Train model `name` and return name of the loss -> its value at each step."""
    torch.manual_seed(0)
    model = build_model(config(name))
    torch.manual_seed(rank)  # what is drawn later must not depend on it
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    share = BATCH // world
    curves = {}
    for step in range(steps):
        batch = [labelled_input(BATCH * (step % 5) + i, OBJECTS[i]) for i in range(BATCH)]
        batch = [with_keypoints(item) for item in batch]
        for i, item in enumerate(batch):
            item["sample_seed"] = BATCH * step + i
            if i == 0:
                item["sem_seg"][:40] = 255  # and of labelled pixels
        losses = model(batch[rank * share : (rank + 1) * share])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for key, value in losses.items():
            curves.setdefault(key, []).append(value.item())
    return curves


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank, processes, count = (int(x) for x in sys.argv[1:4])
    place = Path(sys.argv[4])
    store = dist.FileStore(str(place / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=own_rank, world_size=processes)
    names = sys.argv[5:] or NAMES
    result = {name: train(name, own_rank, processes, count) for name in names}
    dist.destroy_process_group()
    (place / f"{own_rank}.json").write_text(json.dumps(result))
