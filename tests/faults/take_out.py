"""Takes protections out of a copy of the tree, one at a time, and tells whether a test notices.

``python -m tests.faults.take_out [NUMBER ...]``: all, or those of some items of docs/faults.md.
Prints a row of a table for each: caught, or NOT CAUGHT.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 900
"""A test that takes longer hangs without the protection, which counts as noticed."""


class Protection(NamedTuple):
    """One thing that holds, and how to break it: `old`, which `file` has once, becomes `new`."""

    item: int
    what: str
    file: str
    old: str
    new: str
    test: str


TRAINER = "d2kit/engine/default_trainer.py"
BASE = "d2kit/engine/trainer_base.py"
SAVING = "d2kit/checkpoint/detection_checkpoint.py"
IMAGES = "d2kit/data/detection_utils.py"
VALIDATE = "d2kit/data/datasets/validate.py"

KILLS = "tests/faults/test_kills.py"
RESTORED = "tests/faults/test_restored.py"
WRITING = "tests/faults/test_writing.py"
PICTURES = "tests/faults/test_images.py"
HOSTILE = (
    "tests/checkpoint/test_hostile_files.py::test_refused_with_the_reason_and_nothing_executed"
)

AT_PLACE = "            start_loader_at(self._trainer.data_loader, self.start_iter)\n"
NOTHING = "            pass\n"
SEEDED = "if self.seed is not None:\n            seed_all"
UNSEEDED = "if False:\n            seed_all"
TRIED = "        check_output_dir(cfg.OUTPUT_DIR)\n"
HELD = "        hold_output_dir(cfg.OUTPUT_DIR)\n"

RESUME = (
    Protection(1, "the loader starts at the step", TRAINER, AT_PLACE, NOTHING,
               f"{KILLS}::test_twenty_kills_at_random_moments"),
    Protection(1, "each step has its own seed", BASE, SEEDED, UNSEEDED,
               f"{KILLS}::test_twenty_kills_at_random_moments"),
    Protection(2, "chance depends on the position, not on the worker", "d2kit/data/loader.py",
               "with rng_scope(self.seed, position):",
               "with rng_scope(self.seed, position, worker.id if worker else 9):",
               f"{KILLS}::test_other_numbers_of_workers"),
    Protection(3, "a process takes its slice of the global batch", "d2kit/data/common.py",
               "mine = slice(self.rank * share, (self.rank + 1) * share)", "mine = slice(0, share)",
               f"{KILLS}::test_two_processes_one_two"),
    Protection(4, "each step has its own seed", BASE, SEEDED, UNSEEDED,
               f"{RESTORED}::test_kills_inside_gradient_accumulation"),
    Protection(5, "the scale of mixed precision is saved", "d2kit/engine/trainers.py",
               'return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}',
               "return super().state_dict()", f"{RESTORED}::test_everything_is_restored"),
    Protection(5, "early stopping goes on counting", "d2kit/engine/hooks/evaluation.py",
               'self.without_gain = state_dict["without_gain"]', "pass",
               f"{RESTORED}::test_everything_is_restored"),
    Protection(5, "a missed evaluation is repeated", TRAINER,
               "        repeat_missed_evaluation(self)\n", "",
               f"{RESTORED}::test_everything_is_restored"),
    Protection(7, "no image is decoded to find the place", TRAINER, AT_PLACE,
               "            [self._trainer._next_batch() for _ in range(300)]\n",
               "tests/faults/test_far_resume.py::test_first_step_at_90000"),
    Protection(8, "the newest checkpoint, not the best", "d2kit/checkpoint/files.py",
               "sorted(candidates, reverse=True)",
               'sorted(candidates, key=lambda c: ("best" in c.path.name, c), reverse=True)',
               "tests/engine/test_selection.py::test_resume_takes_the_newest_and_not_the_best"),
    Protection(9, "old checkpoints are deleted", "d2kit/engine/hooks/checkpoint.py",
               "                self._delete_oldest(self.max_to_keep)\n", "                pass\n",
               f"{KILLS}::test_ten_crashes_with_three_checkpoints_kept"),
    Protection(10, "the config of a checkpoint is compared", TRAINER,
               "            config=ConfigRecord(self.cfg.dump(), allow=cfg.RESUME_CHANGED),\n", "",
               "tests/faults/test_changed_config.py"),
)  # fmt: skip

WRITES = (
    Protection(11, "a checkpoint gets its name when it is complete", SAVING,
               "with atomic_write(path) as file:", 'with open(path, "wb") as file:',
               f"{WRITING}::test_fifty_kills_inside_a_save"),
    Protection(12, "a damaged file is passed over", "d2kit/checkpoint/files.py",
               '            reason = f"{type(error).__name__}: {_first_line(error)}"\n',
               "            raise\n", f"{WRITING}::test_the_newest_checkpoint_is_cut"),
    Protection(12, "checksums are checked", "d2kit/checkpoint/files.py",
               "problem = damage(path)  # torch itself does not look", 'problem = ""',
               "tests/checkpoint/test_saving.py::test_a_flipped_bit_is_noticed"),
    Protection(13, "the pointer file is never read", SAVING,
               "found = newest_checkpoint(Path(self.save_dir), self._trusted)",
               'found = Path(self.save_dir, Path(self.save_dir, "last_checkpoint").read_text())',
               "tests/checkpoint/test_saving.py::test_the_pointer_file_is_never_believed"),
    Protection(14, "half a file is removed", "d2kit/utils/file_io.py",
               "        temporary.unlink(missing_ok=True)\n        system", "        system",
               f"{WRITING}::test_a_write_that_the_system_refuses"),
    Protection(15, "the folder is tried before data are read", TRAINER,
               TRIED + HELD, "", f"{WRITING}::test_a_folder_that_cannot_be_written"),
    Protection(16, "a run holds its folder", TRAINER,
               TRIED + HELD, TRIED,
               "tests/faults/test_run_lock.py::"
               "test_the_second_process_names_the_first_and_changes_nothing"),
)  # fmt: skip

PROCESSES = (
    Protection(17, "signals wait for the end of the step", TRAINER,
               "        add_preemption(self, self.checkpointer)\n", "",
               "tests/faults/test_signals.py::test_a_signal_within_a_step"),
    Protection(18, "processes agree on the step to stop at", "d2kit/engine/safety/preemption.py",
               "asked = int(self._answer.item())", "pass",
               "tests/faults/test_signals.py::test_one_of_two_processes"),
    Protection(19, "restarted processes have a store of their own", "d2kit/engine/launch.py",
               "return fresh_store(store, rank, world_size, timeout)", "return store",
               f"{KILLS}::test_torchrun_restarts"),
    Protection(20, "the others are not waited for after an error", "d2kit/engine/launch.py",
               "started.join(grace_period=GRACE)", "started.join(grace_period=60)",
               "tests/faults/test_stuck.py::test_a_child_that_raises_ends_the_parent"),
    Protection(21, "BatchNorm is put back", "d2kit/engine/safety/failure.py",
               "            keeper.restore()\n", "            pass\n",
               "tests/faults/test_not_finite.py::test_one_process"),
    Protection(21, "the losses of all processes are looked at", "d2kit/engine/trainers.py",
               "            dist.all_reduce(values)\n", "            pass\n",
               "tests/faults/test_not_finite.py::"
               "test_all_ranks_stop_at_the_same_step_which_can_be_replayed"),
    Protection(22, "boxes are matched with anchors in parts",
               "d2kit/modeling/box_regression.py",
               "rows = max(1, max_pairs // max(1, len(boxes)))", "rows = len(gt_boxes)",
               "tests/faults/test_boxes.py"),
)  # fmt: skip

DATA = (
    Protection(23, "what is missing of an image is not made up", IMAGES, "        image.load()\n",
               '        __import__("PIL.ImageFile").ImageFile.LOAD_TRUNCATED_IMAGES = True\n'
               "        image.load()\n",
               "tests/data/test_image_io.py::test_truncated_files_are_refused"),
    Protection(23, "images are set upright", IMAGES,
               "        ) from error\n    return _apply_exif_orientation(image)\n",
               "        ) from error\n    return image\n",
               "tests/data/test_image_io.py::test_exif_orientation_is_always_upright"),
    Protection(23, "the size is compared", "d2kit/data/dataset_mapper.py",
               "        utils.check_image_size(result, image)\n", "",
               f"{PICTURES}::test_strict_is_one_line_with_the_path"),
    Protection(23, "the line of a worker's traceback is found", "d2kit/data/loader.py",
               "raise SampleError(_own_line(str(error))) from error", "raise",
               f"{PICTURES}::test_strict_is_one_line_from_a_worker_too"),
    Protection(23, "skipped images are bounded", "d2kit/data/common.py",
               "if number > self.limit:", "if False:",
               f"{PICTURES}::test_one_damaged_image_more_than_allowed"),
    Protection(23, "skipped images are listed", TRAINER,
               "            SkippedImages() if cfg.DATALOADER.MAX_SKIPPED_IMAGES else None,\n", "",
               f"{PICTURES}::test_skipped_are_counted_and_listed_at_the_end"),
    Protection(24, "ids are used once", VALIDATE,
               'return "used twice" if entry["id"] in seen else None', "return None",
               "tests/data/test_validate.py::test_annotation_defect_is_one_line"),
    Protection(25, "image files are looked for", "d2kit/data/records.py",
               "            check_image_files(name, records)\n", "            pass\n",
               "tests/faults/test_before_training.py"),
    Protection(26, "no region counts as one", "d2kit/modeling/roi_heads/fast_rcnn.py",
               "    return comm.mean_over_ranks(count).clamp(min=1)\n",
               "    return comm.mean_over_ranks(count)\n",
               "tests/faults/test_nothing_there.py"),
    Protection(27, "a dead worker's image is named", "d2kit/data/loader.py",
               "            self._in_work[worker.id] = index\n", "            pass\n",
               "tests/data/test_loader.py::test_killed_worker_is_an_error_that_names_images"),
    Protection(28, "file names stay in their folder", VALIDATE,
               'if not os.path.isabs(name) and ".." not in name.split(os.sep):', "if True:",
               "tests/data/test_validate.py::test_image_defect"),
)  # fmt: skip

FILES = (
    Protection(29, "pickles name numpy's arrays only", "d2kit/utils/safe_pickle.py",
               "        if key in _ALLOWED:\n            return _ALLOWED[key]\n",
               "        if True:\n            return super().find_class(module, name)\n", HOSTILE),
    Protection(29, "torch reads tensors only", "d2kit/checkpoint/files.py",
               "weights_only=True, mmap", "weights_only=False, mmap", HOSTILE),
    Protection(29, "bases of configs are local", "d2kit/config/yaml.py", 'if "://" in base:',
               "if False:", HOSTILE),
    Protection(30, "archives with bombs are refused", "d2kit/utils/archives.py",
               "max_ratio: float = 200,", "max_ratio: float = 1e12,",
               "tests/project/test_datasets.py::test_hostile_archives_are_refused"),
    Protection(30, "large images are refused", IMAGES, "if width * height > MAX_IMAGE_PIXELS:",
               "if False:", f"{PICTURES}::test_a_bomb_is_refused_before_memory_is_taken"),
    Protection(30, "downloads are compared with their hash", "d2kit/checkpoint/catalog.py",
               "if not digest.hexdigest().startswith(expected):", "if False:",
               "tests/checkpoint/test_catalog.py::test_wrong_hash_keeps_nothing"),
)  # fmt: skip

PROTECTIONS = (*RESUME, *WRITES, *PROCESSES, *DATA, *FILES)


def run(test: str, tree: Path) -> tuple[bool, str]:
    """Run a test in a tree; return whether it passes, and the first error."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "faults", "--tb=line", test]
    command += ["-p", "no:cacheprovider", "--show-capture=no"]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"hangs for {SECONDS} s"
    errors = [line for line in done.stdout.splitlines() if line.startswith(("E ", "/"))]
    return done.returncode == 0, (errors or done.stdout.splitlines()[-1:] or [""])[0][-90:]


def take_out(protection: Protection, tree: Path) -> None:
    """Break one protection in a tree."""
    path = tree / protection.file
    text = path.read_text(encoding="utf-8")
    if text.count(protection.old) != 1:
        raise ValueError(f"{protection.file} has {text.count(protection.old)} of {protection.old}")
    path.write_text(text.replace(protection.old, protection.new), encoding="utf-8")


def main(numbers: list[str]) -> int:
    chosen = [p for p in PROTECTIONS if not numbers or str(p.item) in numbers]
    missed = 0
    print("| item | taken out | test | outcome |\n|---|---|---|---|")
    for protection in chosen:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "d2kit"
            left_out = shutil.ignore_patterns(".git", "output", "build", "__pycache__", ".venv")
            shutil.copytree(ROOT, tree, ignore=left_out)
            take_out(protection, tree)
            passes, error = run(protection.test, tree)
        missed += passes
        outcome = "**NOT CAUGHT**" if passes else f"caught: {error}".replace("|", "/")
        name = protection.test.rpartition("/")[2]
        print(f"| {protection.item} | {protection.what} | `{name}` | {outcome} |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
