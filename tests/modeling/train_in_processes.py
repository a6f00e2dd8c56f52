"""Worker of test_processes: trains the tiny model, writes its losses of every step."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from d2kit.modeling import build_model
from tests.modeling.tiny import tiny_config, tiny_input

BATCH = 4
OBJECTS = (0, 3, 1, 5)  # the two halves have different counts of foreground


def train(rank: int, world: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Train and return name of the loss -> its value at each step."""
    torch.manual_seed(0)
    model = build_model(tiny_config())
    torch.manual_seed(rank)  # what is drawn later must not depend on it
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    share = BATCH // world
    curves = {}
    for step in range(steps):
        batch = [tiny_input(BATCH * (step % 5) + i, OBJECTS[i]) for i in range(BATCH)]
        for i, item in enumerate(batch):
            item["sample_seed"] = BATCH * step + i
        losses = model(batch[rank * share : (rank + 1) * share])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for name, value in losses.items():
            curves.setdefault(name, []).append(value.item())
    if world > 1:
        dist.destroy_process_group()
    return curves


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank, place = int(sys.argv[1]), Path(sys.argv[4])
    result = train(own_rank, int(sys.argv[2]), int(sys.argv[3]), place)
    (place / f"{own_rank}.json").write_text(json.dumps(result))
