"""Pictures of ground truth beside prediction, drawn at each evaluation of a training."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from d2kit.config import CfgNode
from d2kit.engine.preflight.data import pick_evenly
from d2kit.engine.trainer_base import HookBase
from d2kit.utils import comm
from d2kit.utils.events import EventStorage, get_event_storage, has_event_storage
from d2kit.utils.file_io import atomic_write
from d2kit.utils.text import drawn, file_name

logger = logging.getLogger(__name__)


class EvalHook(HookBase):
    """Evaluates at intervals and after the last iteration; all processes must have it.

    Args:
        eval_period: iterations between two evaluations; 0: only at the end.
        eval_function: returns a nested dict of numbers, which are put into the storage as
            ``task/metric``, or None.
        eval_after_train: whether to evaluate after the last iteration.
        remember: keep in the checkpoint when the last evaluation was; `DefaultTrainer` then
            repeats one that a checkpoint just before it does not know of.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
        *,
        remember: bool = False,
    ) -> None:
        self._period = eval_period
        self._func: Callable[[], Mapping[str, Any] | None] | None = eval_function
        self._eval_after_train = eval_after_train
        self._remember = remember
        self.evaluated = self._done_here = -1

    def after_step(self) -> None:
        """Evaluate, if it is time; after the last iteration `after_train` does."""
        steps = self.trainer.iter + 1
        if steps == self.trainer.max_iter or not self._is_due(steps):
            return
        self._do_eval()
        self.evaluated = self._done_here = steps

    def _is_due(self, steps: int) -> bool:
        """Tell whether so many iterations are a multiple of the interval."""
        return self._period > 0 and steps > 0 and steps % self._period == 0

    def missed(self, start_iter: int) -> bool:
        """Tell whether a run that resumes at an iteration should have evaluated just before it."""
        return self._remember and self._is_due(start_iter) and self.evaluated != start_iter

    def after_train(self) -> None:
        """Evaluate, unless the training failed; then forget the function."""
        ended = self.trainer.iter >= self.trainer.max_iter
        if self._eval_after_train and ended and self._done_here != self.trainer.iter:
            self._do_eval()
        self._func = None  # it usually refers to the trainer

    def _do_eval(self) -> None:
        from d2kit.evaluation.evaluator import flatten_results_dict

        assert self._func is not None
        results = self._func()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(
                    f"EvalHook: eval_function must return a dict, got {type(results).__name__}"
                )
            flat = flatten_results_dict(results)
            for name, value in flat.items():
                try:
                    flat[name] = float(value)
                except (TypeError, ValueError):
                    raise ValueError(
                        f"EvalHook: results must be a nested dict of numbers, got {name}={value!r}"
                    ) from None
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # evaluations may take different times

    def state_dict(self) -> dict[str, Any]:
        """Return the number of iterations before the last evaluation, if it is to be kept."""
        return {"evaluated": self.evaluated} if self._remember else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._remember:
            self.evaluated = state_dict["evaluated"]


class PreciseBN(HookBase):
    """Replaces BatchNorm's running statistics by means over many batches, before evaluations.

    Register it before the `EvalHook`. Source: Wu and Johnson 2021, section 3 (arXiv 2105.07576).

    Args:
        period: iterations between two updates; 0: only after the last iteration.
        model: whose BatchNorm layers in train mode are updated.
        data_loader: yields batches; its own, so that the training's order stays.
        num_iter: number of batches.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        from fvcore.nn.precise_bn import get_bn_modules

        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN does nothing: the model has no BatchNorm in train mode")
        self._data_iter: Iterator[Any] | None = None

    def after_step(self) -> None:
        """Update, if it is time."""
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if last or (self._period > 0 and done % self._period == 0):
            self.update_stats()

    def update_stats(self) -> None:
        """Run `num_iter` batches through the model and set the statistics."""
        if self._disabled:
            return
        from fvcore.nn.precise_bn import update_bn_stats

        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        logger.info("PreciseBN: statistics from %d batches", self._num_iter)
        batches = itertools.islice(self._data_iter, self._num_iter)
        with EventStorage():  # what the model puts here is not about the training
            update_bn_stats(self._model, batches, self._num_iter)


class EarlyStopping(HookBase):
    """Ends the training when several evaluations in a row have not improved a metric.

    Register it behind the `EvalHook` that produces the metric and before a `BestCheckpointer`,
    on all processes: rank 0, which has the results, decides for all.

    Args:
        eval_period: that of the `EvalHook`, at least 1.
        metric: name in the storage, e.g. ``"bbox/AP"``.
        patience: so many evaluations in a row without a new best value end the training.
        mode: "max" or "min", which of two values is better.
        min_delta: a value must be better than the best by more than this; in the metric's unit.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        eval_period: int,
        metric: str,
        patience: int,
        *,
        mode: str = "max",
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"EarlyStopping: mode must be 'max' or 'min', got '{mode}'")
        if eval_period < 1 or patience < 1 or min_delta < 0:
            raise ValueError(
                "EarlyStopping (SOLVER.EARLY_STOPPING) needs evaluations at intervals "
                "(TEST.EVAL_PERIOD at least 1), a PATIENCE of at least 1 and a MIN_DELTA of at "
                f"least 0, got {eval_period}, {patience} and {min_delta}"
            )
        self._period = eval_period
        self._metric = metric
        self._patience = patience
        self._sign = 1 if mode == "max" else -1
        self._min_delta = min_delta
        self.best: float | None = None
        self.without_gain = 0

    def before_train(self) -> None:
        """End at once, if the resumed run had ended."""
        if self.without_gain >= self._patience:
            self.trainer.max_iter = self.trainer.start_iter

    def after_step(self) -> None:
        """Compare, if an evaluation just happened."""
        done = self.trainer.iter + 1
        if done % self._period or done >= self.trainer.max_iter:
            return
        own = self.trainer.storage.latest().get(self._metric) if comm.is_main_process() else None
        value = comm.all_gather(None if own is None else float(own[0]))[0]
        if value is None:
            logger.warning("No value of '%s' to stop early by", self._metric)
            return
        if math.isfinite(value) and (self.best is None or self._gain(value, self.best)):
            self.best, self.without_gain = value, 0
            return
        self.without_gain += 1
        if self.without_gain >= self._patience:
            logger.info(
                "%s has not improved on %s in %d evaluations: the training ends at iteration %d",
                self._metric,
                self.best,
                self.without_gain,
                self.trainer.iter,
            )
            self.trainer.max_iter = done

    def _gain(self, value: float, best: float) -> bool:
        return self._sign * (value - best) > self._min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of evaluations since."""
        return {"best": self.best, "without_gain": self.without_gain}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best = state_dict["best"]
        self.without_gain = state_dict["without_gain"]


FOLDER = "vis"
LINE, LETTER = 24, 15  # heights of the title's lines and letters, pixels
SCORE = 0.3
MOST = 50
PANE = 800
"""Longest side of each of the two pictures, pixels; small images are enlarged up to 3 times."""


def draw_evaluation_pictures(
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

    model = comm.unwrap_model(model)
    for name in cfg.DATASETS.TEST:
        dataset = build_loader(cfg, name).dataset  # its loader is not started: no draw by chance
        folder = Path(cfg.OUTPUT_DIR) / FOLDER / file_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        for index in pick_evenly(len(dataset), cfg.TEST.VIS_IMAGES):
            sample = dataset[index]
            with inference_context(model), torch.no_grad(), comm.on_its_own():
                output = model([sample])[0]
            record = dataset.record(index) if hasattr(dataset, "record") else sample
            label = f"{index:06d}_{file_name(Path(record['file_name']).stem)}"
            picture = side_by_side(record, output, MetadataCatalog.get(name), done)
            with atomic_write(folder / f"{label}_iter{done:07d}.jpg") as file:
                file.write(_jpeg(picture))
            if has_event_storage():
                shown = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
                get_event_storage().put_image(f"{FOLDER}/{name}/{label}", shown)
    logger.info("Pictures of ground truth beside prediction in %s/%s", cfg.OUTPUT_DIR, FOLDER)


def side_by_side(
    record: Mapping[str, Any], output: Mapping[str, Any], metadata: object, done: int
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
    name = drawn("/".join(Path(record["file_name"]).parts[-2:]))
    return np.concatenate([_title(body.shape[1], name, titles), body])


def _draw_output(pane: Any, output: Mapping[str, Any]) -> str:
    """Draw what a model found; say how much that is."""
    from d2kit.visualization.instances import create_text_labels

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
        labels=create_text_labels(classes, chosen.scores, pane.metadata["thing_classes"]),
        assigned_colors=pane._class_colors(classes, True),
    )
    return f"{len(chosen)} detections with a score of {SCORE:.0%} or more"


def _with_colors(metadata: Any) -> dict[str, Any]:
    """Return metadata in which every class has a colour."""
    from d2kit.visualization.drawing import palette

    known = dict(metadata.as_dict())
    names = known["thing_classes"] = list(known.get("thing_classes") or ())
    if not known.get("thing_colors"):
        known["thing_colors"] = [[255 * c for c in palette(i)] for i in range(len(names))]
    return known


def _title(width: int, name: str, titles: tuple[str, str]) -> np.ndarray:
    """Return the strip above two pictures: the file's name, and a line over each."""
    from d2kit.visualization import canvas as _text

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


class ReportHook(HookBase):
    """Writes ``report.html`` and ``README.md`` after the last iteration; never ends a training.

    Only the main process needs it; it belongs behind the hook that writes ``metrics.json``.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str) -> None:
        self._output_dir = output_dir

    def after_train(self) -> None:
        """Write the page, unless the training ended early; a failure is a warning."""
        if self.trainer.iter < self.trainer.max_iter:
            return
        from d2kit.evaluation.report import write_report

        try:
            write_report(self._output_dir)
        except Exception as error:  # weights and results are there: the page can be made again
            logger.warning(
                "No results page: %s. The training is complete; to try again: d2kit report %s",
                error,
                self._output_dir,
            )
