"""`HookBase` and `TrainerBase`: iterations with hooks around them."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from d2kit.utils import comm
from d2kit.utils.env import derive_seed, seed_all_rng
from d2kit.utils.events import EventStorage
from d2kit.utils.stopping import StopAsked, in_progress

__all__ = ["HookBase", "TrainerBase"]

logger = logging.getLogger(__name__)


class HookBase:
    """Something that a trainer calls at six places of its loop.

    In each method `trainer` is the trainer, whose `iter`, `start_iter`, `max_iter` and `storage`
    may be read. Order: ``before_train, (before_step, after_backward, after_step) per iteration,
    after_train``, the last one also after an exception.
    """

    trainer: Any = None  # a weak proxy of a TrainerBase

    def before_train(self) -> None:
        """Called before the first iteration."""

    def after_train(self) -> None:
        """Called after the last iteration; `trainer.iter` is `max_iter` only if all went well."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_backward(self) -> None:
        """Called after the gradients were computed, before the optimizer uses them."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def leave_evaluation(self) -> None:
        """Called where a signal has ended an evaluation ; `Preemption` saves and leaves."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, text and containers of them."""
        return {}


class TrainerBase:
    """Iterates from `start_iter` to `max_iter`; what an iteration is, `run_step` says.

    If `seed` is set, all random generators are seeded from (seed, iteration, rank) before each
    iteration, so that an iteration does not depend on those that ran in the same process.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter: int = 0
        self.start_iter: int = 0
        self.max_iter: int = 0
        self.seed: int | None = None
        self.storage: EventStorage

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """Append hooks; they run in this order.

        Args:
            hooks: None entries are left out.

        Raises:
            TypeError: if one is not a `HookBase`.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"a hook must be a HookBase, got {type(hook).__name__}")
            hook.trainer = weakref.proxy(self)  # a strong one would be a reference cycle
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations `start_iter`, ..., `max_iter - 1`.

        A hook that lowers the attribute `max_iter` ends the training there.

        Args:
            start_iter: index of the first one.
            max_iter: number of iterations from 0.

        Raises:
            SystemExit: with 128 + the signal's number, where a `Preemption` was asked to stop.
        """
        try:
            self._train(start_iter, max_iter)
        except StopAsked as asked:  # before the first step or after the last one is saved
            logger.warning("%s: stopped; --resume makes up for what was in progress", asked)
            raise SystemExit(128 + asked.number) from None

    def _train(self, start_iter: int, max_iter: int) -> None:
        logger.info("Training from iteration %d to %d", start_iter, max_iter)
        self.start_iter, self.max_iter = start_iter, max_iter
        self.iter = start_iter
        self.storage = EventStorage(start_iter)
        with self.storage:
            try:
                self.before_train()
                for iteration in range(start_iter, max_iter):
                    if iteration >= self.max_iter:  # a hook has ended the training
                        break
                    self._iterate(iteration)
                self.iter = max(self.max_iter, start_iter)
            except Exception as error:
                from d2kit.data import SampleError  # not at the top: slow to import

                trace = not isinstance(error, SampleError)  # its one line says it all
                logger.error(
                    "Training stopped in iteration %d: %s", self.iter, error, exc_info=trace
                )
                raise
            finally:
                self.after_train()

    def _iterate(self, iteration: int) -> None:
        """Do one iteration, with the hooks around it."""
        self.iter = iteration
        if self.seed is not None:
            seed_all_rng(derive_seed(self.seed, iteration, comm.get_rank()))
        self.before_step()
        with in_progress(f"iteration {iteration}", getattr(self, "data_loader", None)):
            try:
                self.run_step()
            except StopAsked:  # while it waited for a batch: the one before is the last
                if iteration > self.start_iter:
                    self.iter = self.storage.iter = iteration - 1
                    for hook in self._hooks:
                        hook.leave_evaluation()
                raise
        self.after_step()

    def before_train(self) -> None:
        """Call the hooks."""
        for hook in self._hooks:
            hook.before_train()

    def after_train(self) -> None:
        """Call the hooks."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.after_train()

    def before_step(self) -> None:
        """Call the hooks."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            hook.before_step()

    def after_backward(self) -> None:
        """Call the hooks; `run_step` does this between gradients and update."""
        for hook in self._hooks:
            hook.after_backward()

    def after_step(self) -> None:
        """Call the hooks; a signal that comes during an evaluation stops the run there."""
        try:
            for hook in self._hooks:
                hook.after_step()
        except StopAsked:
            for hook in self._hooks:
                hook.leave_evaluation()
            raise

    def run_step(self) -> None:
        """Do one iteration; implemented by subclasses."""
        raise NotImplementedError(f"{type(self).__name__} must implement run_step()")

    def _hook_names(self) -> list[tuple[str, HookBase]]:
        """Return hooks with their class names, numbered from the second of a class on."""
        named: list[tuple[str, HookBase]] = []
        seen: dict[str, int] = {}
        for hook in self._hooks:
            name = type(hook).__qualname__
            seen[name] = seen.get(name, 0) + 1
            named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", hook))
        return named

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration done last, the seed, and the states of the hooks that have one."""
        states = {name: hook.state_dict() for name, hook in self._hook_names()}
        # After the training `iter` is one beyond the iteration done last.
        done = self.iter if self.iter < self.max_iter else max(self.max_iter - 1, 0)
        return {
            "iteration": done,
            "hooks": {name: state for name, state in states.items() if state},
            **({} if self.seed is None else {"seed": self.seed}),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; states of hooks that do not exist are named."""
        self.iter = state_dict["iteration"]
        hooks = dict(self._hook_names())
        for name, state in state_dict.get("hooks", {}).items():
            hook = hooks.get(name)
            if hook is None:
                if comm.is_main_process():  # some hooks are those of rank 0 only
                    logger.warning("The state of hook '%s' is not used: no such hook", name)
            elif hasattr(hook, "load_state_dict"):
                hook.load_state_dict(state)
