"""Counts the modules of d2kit that one iteration, one prediction, one drawing pass through.

    python -m tests.support.rooms

A module counts where one of its functions is entered (`sys.setprofile`) after everything was built
and one round has warmed the caches. CONTRIBUTING.md states the figures.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"


def modules_entered(call: Callable[[], Any]) -> list[str]:
    """Return the modules of d2kit that are entered while `call` runs, in this thread."""
    entered: set[str] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_globals.get("__name__", ""))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(name for name in entered if name.split(".")[0] == "d2kit")


def rooms() -> dict[str, list[str]]:
    """Return the modules of an iteration, a prediction and a drawing of the demo's model."""
    import numpy as np

    from d2kit.config import get_cfg
    from d2kit.data import DatasetCatalog, MetadataCatalog
    from d2kit.engine import DefaultPredictor, DefaultTrainer
    from d2kit.visualization import Visualizer
    from project import patient_video
    from project.patient_video.dataset import WardSpec

    with tempfile.TemporaryDirectory() as place:
        spec = WardSpec(train_videos=1, test_videos=1, seconds=1.0, stride=5, train_stride=5)
        patient_video.generate(Path(place) / "patient_video", spec, workers=1)
        patient_video.register(place)
        cfg = get_cfg()
        cfg.merge_from_file(str(DEMO))
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", False])
        cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", f"{place}/run"])
        trainer = DefaultTrainer(cfg)
        trainer.max_iter = 10
        found: dict[str, list[str]] = {}
        steps = iter(range(3))

        def iteration() -> None:
            trainer.iter = next(steps)
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()

        from d2kit.utils.events import EventStorage

        with EventStorage(0) as trainer.storage:
            trainer.before_train()
            iteration()
            found["iteration"] = modules_entered(iteration)
        predictor = DefaultPredictor(trainer.cfg)
        image = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
        predictor(image)
        found["prediction"] = modules_entered(lambda: predictor(image))
        record = DatasetCatalog.get(patient_video.TEST)[0]
        metadata = MetadataCatalog.get(patient_video.TEST)
        picture = np.zeros((record["height"], record["width"], 3), np.uint8)

        def draw() -> None:
            Visualizer(picture, metadata).draw_dataset_dict(record).get_image()

        draw()
        found["drawing"] = modules_entered(draw)
        for name in (patient_video.TRAIN, patient_video.TEST):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    return found


def main() -> None:
    """Print the counts, and the modules behind them."""
    sys.path.insert(0, str(ROOT))
    for name, modules in rooms().items():
        print(f"{name}: {len(modules)} modules\n  " + "\n  ".join(modules))


if __name__ == "__main__":
    main()
