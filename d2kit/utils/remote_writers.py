"""Writers to tracking services: nothing that happens to the service can end or block a training."""

import functools
import importlib
import importlib.util
import json
import logging
import queue
import re
import secrets
import sys
import threading
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from d2kit.utils.events import EventWriter, get_event_storage
from d2kit.utils.file_io import atomic_write
from d2kit.utils.names import flatten

__all__ = ["MLflowWriter", "RemoteWriter", "WandbWriter", "require_package"]

logger = logging.getLogger(__name__)

WAITING = 500
"""Writes that may wait for the service; what comes when it is full is left out."""

START_SECONDS = 20
"""Longest wait of the thread for the server of Weights & Biases to take a run."""

CLOSE_SECONDS = 30
"""Longest wait at the end of the training for what is still to be sent."""

Picture = tuple[str, np.ndarray, int]
"""Name, (H, W, 3) uint8 RGB, iteration."""


def require_package(package: str, key: str) -> None:
    """Make sure that a package that a config key asks for is installed, without importing it.

    Args:
        package: its name, which is also that of d2kit's extra.
        key: the config key.

    Raises:
        ValueError: if it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{key} needs the package {package}, which is not installed: "
            f"pip install d2kit[{package}], or set {key} False"
        )


class RemoteWriter(EventWriter):
    """Sends scalars and pictures to a service from a thread of its own.

    A failure is logged once; the training goes on without what could not be sent. Which run of the
    service it was, and up to which iteration it was written, is kept in
    ``<folder>/<service>_run.json``: a resumed training goes on with that run and sends each
    iteration once (`continue_from`), a new one begins a new run.

    Args:
        folder: OUTPUT_DIR.
        config: nested config, stored with a new run.
        window_size: iterations of the median for scalars with a smoothing hint.
    """

    service = ""

    def __init__(
        self, folder: str, *, config: Mapping[str, Any] | None = None, window_size: int = 20
    ) -> None:
        self._folder = Path(folder)
        self._config = dict(config or {})
        self._window_size = window_size
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._run_id: str | None = None
        self._started = self._complained = False
        self._last = -1

    # ---- the training's side

    def continue_from(self, iteration: int) -> None:
        """Go on with the run in the output folder, or from iteration 0 begin a new one."""
        known = self._read_state() if iteration > 0 else {}
        self._run_id, self._last = known.get("run"), int(known.get("last", -1))
        self._thread = threading.Thread(target=self._work, name=self.service, daemon=True)
        self._thread.start()
        self._submit(self._ensure_started)

    def write(self) -> None:
        """Queue the scalars and pictures that came since the last call."""
        if self._thread is None:
            self.continue_from(0)
        storage = get_event_storage()
        steps: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, step) in storage.latest_with_smoothing_hint(self._window_size).items():
            if step > self._last:
                steps[step][name] = value
        found = [p for p in storage.images() if p[2] > self._last]
        pictures = [(name, _to_rgb(image), step) for name, image, step in found]
        for step in sorted({*steps, *(step for _, _, step in pictures)}):
            own = [picture for picture in pictures if picture[2] == step]
            self._submit(functools.partial(self._pass_on, step, steps.get(step, {}), own))
            self._last = step

    def close(self) -> None:
        """Send what waits, for at most half a minute; an exception under way marks the run."""
        if self._thread is None:
            return
        failed = sys.exc_info()[0] is not None
        self._submit(lambda: self._finish(failed) if self._started else None)
        self._submit(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s: not everything was sent in time; going on without", self.service)
        self._thread = None

    def _submit(self, job: Callable[[], None] | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._complain("it does not take the values as fast as they come")

    # ---- the thread's side

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except (Exception, SystemExit) as error:
                self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, what: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning(
                "%s: %s\nThe training goes on; later failures are not logged", self.service, what
            )

    def _ensure_started(self) -> None:
        if not self._started:
            self._run_id = self._start(self._run_id)
            self._started = True
            self._write_state(self._read_state().get("last", -1))

    def _pass_on(self, step: int, scalars: dict[str, float], pictures: list[Picture]) -> None:
        self._ensure_started()
        self._write_state(step)  # before it: rather a gap than a value twice
        self._send(step, scalars, pictures)

    def _state_path(self) -> Path:
        return self._folder / f"{self.service.lower()}_run.json"

    def _read_state(self) -> dict[str, Any]:
        try:
            found = json.loads(self._state_path().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write_state(self, last: int) -> None:
        with atomic_write(self._state_path(), "w") as file:
            json.dump({"run": self._run_id, "last": last}, file)

    # ---- the service's side

    @abstractmethod
    def _start(self, run_id: str | None) -> str:
        """Go on with a run, or begin one where it is None or gone; return its id."""

    @abstractmethod
    def _send(self, step: int, scalars: dict[str, float], pictures: list[Picture]) -> None:
        """Send what belongs to one iteration."""

    @abstractmethod
    def _finish(self, failed: bool) -> None:
        """End the run."""


def _to_rgb(image: Tensor | np.ndarray) -> np.ndarray:
    """Return a picture of an `EventStorage` as (H, W, 3) uint8."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8:
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


class WandbWriter(RemoteWriter):
    """Sends to Weights & Biases (``pip install d2kit[wandb]``).

    Where the service is not reached at the start the run is kept in ``<folder>/wandb``, for
    ``wandb sync``.

    Args:
        folder: OUTPUT_DIR.
        project: name.
        name: of the run; empty: that of the folder.
        entity: user or team; empty: the default one.
        mode: ``online`` or ``offline``.
        kwargs: of `RemoteWriter`.
    """

    service = "wandb"

    def __init__(
        self,
        folder: str,
        *,
        project: str,
        name: str = "",
        entity: str = "",
        mode: str = "online",
        **kwargs: Any,
    ) -> None:
        super().__init__(folder, **kwargs)
        if mode not in ("online", "offline"):
            raise ValueError(f"WRITERS.WANDB.MODE: expected online or offline, got '{mode}'")
        name = name or self._folder.resolve().name
        self._options = {"project": project, "name": name, "entity": entity or None}
        self._mode = mode
        self._run: Any = None

    def _start(self, run_id: str | None) -> str:
        wandb = importlib.import_module("wandb")
        run_id = run_id or secrets.token_hex(4)
        wanted = {
            "login_timeout": START_SECONDS,
            "finish_timeout": CLOSE_SECONDS,
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
        }
        known = wandb.Settings.model_fields  # older versions lack some
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in known})

        def begin(mode: str) -> Any:
            settings.init_timeout = START_SECONDS if mode == "online" else 90
            return wandb.init(
                **self._options,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(self._folder),
                config=self._config,
                allow_val_change=True,
                reinit="create_new",
                settings=settings,
            )

        try:
            self._run = begin(self._mode)
        except Exception as error:
            if self._mode == "offline":
                raise
            self._complain(f"{error}; kept in {self._folder}/wandb, for `wandb sync`")
            wandb.teardown()  # else the id stays in use
            self._run = begin("offline")
        return run_id

    def _send(self, step: int, scalars: dict[str, float], pictures: list[Picture]) -> None:
        wandb = importlib.import_module("wandb")
        images = {name: wandb.Image(pixels) for name, pixels, _ in pictures}
        self._run.log({**scalars, **images}, step=step)

    def _finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflowWriter(RemoteWriter):
    """Sends to MLflow (``pip install d2kit[mlflow]``); pictures are artifacts of the run.

    Args:
        folder: OUTPUT_DIR.
        tracking_uri: ``http://...``, ``sqlite:///FILE``; empty: MLflow's choice
            (``MLFLOW_TRACKING_URI``).
        experiment: name; made if need be.
        name: of the run; empty: that of the folder.
        kwargs: of `RemoteWriter`.
    """

    service = "mlflow"

    def __init__(
        self,
        folder: str,
        *,
        tracking_uri: str = "",
        experiment: str = "d2kit",
        name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(folder, **kwargs)
        self._uri = tracking_uri or None
        self._experiment = experiment
        self._name = name or self._folder.resolve().name
        self._client: Any = None

    def _start(self, run_id: str | None) -> str:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._uri)
        if run_id is not None:
            try:
                client.update_run(run_id, status="RUNNING")
                return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        run_id = str(client.create_run(experiment, run_name=self._name).info.run_id)
        self._log_config(run_id)
        return run_id

    def _log_config(self, run_id: str) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:500]) for key, value in flatten(self._config).items()]
        for start in range(0, len(flat), 100):  # the service takes no more at once
            self._client.log_batch(run_id, params=flat[start : start + 100])

    def _send(self, step: int, scalars: dict[str, float], pictures: list[Picture]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), value, now, step) for name, value in scalars.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
        for name, pixels, _ in pictures:
            path = f"{_plain(name)}/iter_{step:07d}.png"
            self._client.log_image(self._run_id, pixels, artifact_file=path)

    def _finish(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _plain(name: str) -> str:
    """Return a name without the characters that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", name)
