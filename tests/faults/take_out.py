"""Takes protections out of a copy of the tree, one at a time, and tells whether a test notices.

``python -m tests.faults.take_out [NUMBER ...]``: all, or those of some items of docs/faults.md.
Prints a row of a table for each: caught, or NOT CAUGHT.
"""

import ast
import io
import os
import shutil
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("D2KIT_TAKE_OUT_SECONDS", "900"))
"""A test that takes longer hangs without the protection, which counts as noticed. On a busy machine
look how long it takes with it."""


class Protection(NamedTuple):
    """One thing that holds, and how to break it.

    Args:
        item: of docs/faults.md.
        what: holds, in words.
        symbol: ``module:function`` below d2kit, e.g. ``engine.launch:launch``.
        old: code that the function has once, however it is laid out.
        new: what it becomes.
        test: fails then.
    """

    item: int
    what: str
    symbol: str
    old: str
    new: str
    test: str


KILLS = "tests/faults/test_kills.py"
RESTORED = "tests/faults/test_restored.py"
WRITING = "tests/faults/test_writing.py"
PICTURES = "tests/faults/test_images.py"
STUCK = "tests/faults/test_stuck.py"
DIGEST = "tests/checkpoint/test_digest.py"
MADE_UP = "tests/engine/test_made_up.py"
HOSTILE = (
    "tests/checkpoint/test_hostile_files.py::test_refused_with_the_reason_and_nothing_executed"
)

RESUME = (
    Protection(
        *(1, "the loader starts at the step", "engine.default_trainer:DefaultTrainer.train"),
        "start_loader_at(self._trainer.data_loader, self.start_iter)",
        "pass",
        f"{KILLS}::test_twenty_kills_at_random_moments",
    ),
    Protection(
        *(1, "each step has its own seed", "engine.trainer_base:TrainerBase._iterate"),
        "if self.seed is not None:",
        "if False:",
        f"{KILLS}::test_twenty_kills_at_random_moments",
    ),
    Protection(
        2,
        "chance depends on the position, not on the worker",
        "data.loader:SeededDataset.__getitem__",
        "with rng_scope(self.seed, position):",
        "with rng_scope(self.seed, position, getattr(torchdata.get_worker_info(), 'id', 9)):",
        f"{KILLS}::test_other_numbers_of_workers",
    ),
    Protection(
        *(3, "a process takes its slice of the global batch", "data.common:GlobalBatches.__iter__"),
        "mine = slice(self.rank * share, (self.rank + 1) * share)",
        "mine = slice(0, share)",
        f"{KILLS}::test_two_processes_one_two",
    ),
    Protection(
        *(4, "each step has its own seed", "engine.trainer_base:TrainerBase._iterate"),
        "if self.seed is not None:",
        "if False:",
        f"{RESTORED}::test_kills_inside_gradient_accumulation",
    ),
    Protection(
        *(5, "the scale of mixed precision is saved", "engine.trainers:AMPTrainer.state_dict"),
        'return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}',
        "return super().state_dict()",
        f"{RESTORED}::test_everything_is_restored",
    ),
    Protection(
        5,
        "early stopping goes on counting",
        "engine.hooks.evaluation:EarlyStopping.load_state_dict",
        'self.without_gain = state_dict["without_gain"]',
        "pass",
        f"{RESTORED}::test_everything_is_restored",
    ),
    Protection(
        39,
        "a missed evaluation is repeated",
        "engine.default_trainer:DefaultTrainer.before_train",
        "repeat_missed_evaluation(self)",
        "pass",
        f"{MADE_UP}::test_metrics_are_those_of_the_undisturbed_run",
    ),
    Protection(
        7,
        "no image is decoded to find the place",
        "engine.default_trainer:DefaultTrainer.train",
        "start_loader_at(self._trainer.data_loader, self.start_iter)",
        "[self._trainer._next_batch() for _ in range(300)]",
        "tests/faults/test_far_resume.py::test_first_step_at_90000",
    ),
    Protection(
        *(8, "the newest checkpoint, not the best", "checkpoint.files:newest_checkpoint"),
        "sorted(candidates, reverse=True)",
        'sorted(candidates, key=lambda c: ("best" in c[1].name, c), reverse=True)',
        "tests/engine/test_selection.py::test_resume_takes_the_newest_and_not_the_best",
    ),
    Protection(
        *(9, "old checkpoints are deleted", "engine.hooks.checkpoint:PeriodicCheckpointer.step"),
        "self._delete_oldest(self.max_to_keep)",
        "pass",
        f"{KILLS}::test_ten_crashes_with_three_checkpoints_kept",
    ),
    Protection(
        10,
        "the config of a checkpoint is compared",
        "engine.default_trainer:DefaultTrainer.__init__",
        "config=ConfigRecord(self.cfg.dump(), allow=cfg.RESUME_CHANGED),",
        "",
        "tests/faults/test_changed_config.py",
    ),
)

WRITES = (
    Protection(
        11,
        "a checkpoint gets its name when it is complete",
        "checkpoint.detection_checkpoint:DetectionCheckpointer.save",
        "with atomic_write(path) as file:",
        'with open(path, "wb") as file:',
        f"{WRITING}::test_fifty_kills_inside_a_save",
    ),
    Protection(
        *(12, "a damaged file is passed over", "checkpoint.files:newest_checkpoint"),
        'reason = f"{type(error).__name__}: {_first_line(error)}"',
        "raise",
        f"{WRITING}::test_the_newest_checkpoint_is_cut",
    ),
    Protection(
        *(12, "checksums are checked", "checkpoint.files:newest_checkpoint"),
        "problem = damage(path)",
        'problem = ""',
        "tests/checkpoint/test_saving.py::test_a_flipped_bit_is_noticed",
    ),
    Protection(
        13,
        "the pointer file is never read",
        "checkpoint.detection_checkpoint:DetectionCheckpointer.get_checkpoint_file",
        "found = newest_checkpoint(Path(self.save_dir), self._trusted)",
        'found = Path(self.save_dir, Path(self.save_dir, "last_checkpoint").read_text())',
        "tests/checkpoint/test_saving.py::test_the_pointer_file_is_never_believed",
    ),
    Protection(
        *(14, "half a file is removed", "utils.file_io:atomic_write"),
        "temporary.unlink(missing_ok=True)\nsystem",
        "system",
        f"{WRITING}::test_a_write_that_the_system_refuses",
    ),
    Protection(
        15,
        "the folder is tried before data are read",
        "engine.default_trainer:DefaultTrainer.__init__",
        "check_output_dir(cfg.OUTPUT_DIR)\nhold_output_dir(cfg.OUTPUT_DIR)",
        "pass",
        f"{WRITING}::test_a_folder_that_cannot_be_written",
    ),
    Protection(
        *(16, "a run holds its folder", "engine.default_trainer:DefaultTrainer.__init__"),
        "hold_output_dir(cfg.OUTPUT_DIR)",
        "pass",
        "tests/faults/test_run_lock.py::test_the_second_process_names_the_first_and_changes_nothing",
    ),
)

PROCESSES = (
    Protection(
        17,
        "signals wait for the end of the step",
        "engine.default_trainer:DefaultTrainer.train",
        "add_preemption(self, self.checkpointer)",
        "pass",
        "tests/faults/test_signals.py::test_a_signal_within_a_step",
    ),
    Protection(
        18,
        "processes agree on the step to stop at",
        "engine.safety.stopping:Preemption.after_step",
        "asked = int(self._answer.item())",
        "pass",
        "tests/faults/test_signals.py::test_one_of_two_processes",
    ),
    Protection(
        *(19, "restarted processes have a store of their own", "engine.launch:torchrun_store"),
        "return fresh_store(store, rank, world_size, timeout)",
        "return store",
        # test_torchrun_restarts tells too where torch gives no life a part of its own: not 2.14.1
        "tests/engine/test_rendezvous.py::test_processes_of_torchrun_have_a_store_of_their_life",
    ),
    Protection(
        *(20, "the others are not waited for after an error", "engine.launch:_spawn"),
        "started.join(grace_period=GRACE)",
        "started.join(grace_period=60)",
        "tests/faults/test_stuck.py::test_a_child_that_raises_ends_the_parent",
    ),
    Protection(
        *(21, "BatchNorm is put back", "engine.safety.failure:guarded_step"),
        "keeper.restore()",
        "pass",
        "tests/faults/test_not_finite.py::test_one_process",
    ),
    Protection(
        *(21, "the losses of all processes are looked at", "engine.trainers:StepMetrics.start"),
        "dist.all_reduce(values)",
        "pass",
        "tests/faults/test_not_finite.py::test_all_ranks_stop_at_the_same_step_which_can_be_replayed",
    ),
    Protection(
        *(22, "boxes are matched with anchors in parts", "modeling.box_regression:match_boxes"),
        "rows = max(1, max_pairs // max(1, len(boxes)))",
        "rows = len(gt_boxes)",
        "tests/faults/test_boxes.py",
    ),
)

DATA = (
    Protection(
        *(23, "what is missing of an image is not made up", "data.detection_utils:load_upright"),
        "image.load()",
        '__import__("PIL.ImageFile").ImageFile.LOAD_TRUNCATED_IMAGES = True; image.load()',
        "tests/data/test_image_io.py::test_truncated_files_are_refused",
    ),
    Protection(
        *(23, "images are set upright", "data.detection_utils:load_upright"),
        "return _apply_exif_orientation(image)",
        "return image",
        "tests/data/test_image_io.py::test_exif_orientation_is_always_upright",
    ),
    Protection(
        *(23, "the size is compared", "data.dataset_mapper:DatasetMapper.__call__"),
        "utils.check_image_size(result, image)",
        "pass",
        f"{PICTURES}::test_strict_is_one_line_with_the_path",
    ),
    Protection(
        *(23, "the line of a worker's traceback is found", "data.loader:NamingLoader._named"),
        "raise SampleError(_own_line(str(error))) from error",
        "raise",
        f"{PICTURES}::test_strict_is_one_line_from_a_worker_too",
    ),
    Protection(
        *(23, "skipped images are bounded", "data.common:SkippedRecords.add"),
        "if number > self.limit:",
        "if False:",
        f"{PICTURES}::test_one_damaged_image_more_than_allowed",
    ),
    Protection(
        *(23, "skipped images are listed", "engine.default_trainer:DefaultTrainer.build_hooks"),
        "SkippedImages() if cfg.DATALOADER.MAX_SKIPPED_IMAGES else None,",
        "",
        f"{PICTURES}::test_skipped_are_counted_and_listed_at_the_end",
    ),
    Protection(
        *(24, "ids are used once", "data.datasets.validate:_id_problem"),
        'return "used twice" if entry["id"] in seen else None',
        "return None",
        "tests/data/test_validate.py::test_annotation_defect_is_one_line",
    ),
    Protection(
        *(25, "image files are looked for", "data.records:get_detection_dataset_dicts"),
        "check_image_files(name, records)",
        "pass",
        "tests/faults/test_before_training.py",
    ),
    Protection(
        *(26, "no region counts as one", "modeling.roi_heads.fast_rcnn:region_count"),
        "return comm.mean_over_ranks(count).clamp(min=1)",
        "return comm.mean_over_ranks(count)",
        "tests/faults/test_nothing_there.py",
    ),
    Protection(
        *(27, "a dead worker's image is named", "data.loader:WatchedDataset.__getitem__"),
        "self._in_work[worker.id] = index",
        "pass",
        "tests/data/test_loader.py::test_killed_worker_is_an_error_that_names_images",
    ),
    Protection(
        *(28, "file names stay in their folder", "data.datasets.validate:path_problem"),
        'if not os.path.isabs(name) and ".." not in name.split(os.sep):',
        "if True:",
        "tests/data/test_validate.py::test_image_defect",
    ),
)

FILES = (
    Protection(
        *(29, "pickles name numpy's arrays only", "utils.safe_pickle:SafeUnpickler.find_class"),
        "if key in _ALLOWED:\nreturn _ALLOWED[key]",
        "return super().find_class(module, name)",
        HOSTILE,
    ),
    Protection(
        *(29, "torch reads tensors only", "checkpoint.files:read_torch"),
        "weights_only=True, mmap",
        "weights_only=False, mmap",
        HOSTILE,
    ),
    Protection(
        *(29, "bases of configs are local", "config.yaml:_resolve_base"),
        'if "://" in base:',
        "if False:",
        HOSTILE,
    ),
    Protection(
        *(30, "archives with bombs are refused", "utils.file_io:extract_zip"),
        "max_ratio: float = 200,",
        "max_ratio: float = 1e12,",
        "tests/project/test_datasets.py::test_hostile_archives_are_refused",
    ),
    Protection(
        *(30, "large images are refused", "data.deep_pictures:_check_pixels"),
        "if width * height > MAX_IMAGE_PIXELS:",
        "if False:",
        f"{PICTURES}::test_a_bomb_is_refused_before_memory_is_taken",
    ),
    Protection(
        *(30, "downloads are compared with their hash", "checkpoint.catalog:_copy_answer"),
        "if not digest.hexdigest().startswith(expected):",
        "if False:",
        "tests/checkpoint/test_catalog.py::test_wrong_hash_keeps_nothing",
    ),
)

ADDED = (
    Protection(
        *(17, "an evaluation looks for signals", "evaluation.evaluator:_run_batches"),
        "leave_if_asked()",
        "pass",
        f"{MADE_UP}::test_an_evaluation_looks_between_two_images",
    ),
    Protection(
        *(20, "a single process is watched", "engine.launch:launch"),
        "with watchdog(timeout):",
        "if True:",
        f"{STUCK}::test_a_single_process_whose_loader_is_stuck_ends",
    ),
    Protection(
        *(20, "an evaluation is watched", "evaluation.evaluator:inference_on_dataset"),
        'stack.enter_context(in_progress("an evaluation", data_loader))',
        "pass",
        f"{STUCK}::test_a_stuck_evaluation_ends",
    ),
    Protection(
        *(31, "results of other options are removed", "video.outputs:clear_results"),
        "path.unlink()",
        "pass",
        "tests/video/test_results.py::test_nothing_of_an_unblurred_run_stays_beside_a_blurred_one",
    ),
    Protection(
        *(33, "safetensors have a digest", "checkpoint.files:_read_safetensors"),
        "promised is not None and promised != digest_of(weights)",
        "False",
        f"{DIGEST}::test_no_flipped_bit_loads_other_weights",
    ),
    Protection(
        *(33, "zip archives have checksums", "checkpoint.files:_from_torch"),
        "problem = damage(path)",
        'problem = ""',
        f"{DIGEST}::test_no_flipped_bit_loads_other_weights",
    ),
    Protection(
        *(33, "a hash in a name is compared", "checkpoint.files:_check_name"),
        "not check_hash(path, named.group(1))",
        "False",
        f"{DIGEST}::test_the_hash_in_a_name_is_checked",
    ),
    Protection(
        *(34, "metrics.json does not end a training", "utils.logger:auxiliary"),
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        f"{WRITING}::test_metrics_on_a_full_disk_come_later",
    ),
    Protection(
        *(35, "what cannot be sent is told", "data.loader:_telling"),
        "{CONTEXT: telling_context(options.get(CONTEXT))}",
        "{}",
        "tests/data/test_transport.py::test_a_field_that_cannot_be_sent_is_named",
    ),
    Protection(
        *(35, "an evaluation's loader tells too", "data.build:build_detection_test_loader"),
        "return TestLoader(dataset, **options)",
        "return torchdata.DataLoader(dataset, **options)",
        "tests/data/test_transport.py::test_an_evaluation_names_what_cannot_be_sent",
    ),
    Protection(
        *(36, "shapes of safetensors are bounded", "checkpoint.files:_check_header"),
        "if not sound or",
        "if False and",
        f"{DIGEST}::test_headers_of_safetensors_that_lie",
    ),
    Protection(
        *(37, "no cell is a formula", "utils.text:csv_cell"),
        'line.startswith((*FORMULA, "\'"))',
        "False",
        "tests/utils/test_text.py::test_a_csv_cell_is_no_formula_and_read_back",
    ),
    Protection(
        *(38, "trainings of a folder are counted", "checkpoint.files:_age"),
        "run if isinstance(run, int) else 0",
        "0",
        f"{DIGEST}::test_a_later_training_is_newer_whatever_the_clock_says",
    ),
    Protection(
        *(39, "a made-up line has its losses", "utils.events:EventStorage.load_state_dict"),
        "self._latest_scalars[name] = (value, iteration)",
        "pass",
        f"{MADE_UP}::test_metrics_are_those_of_the_undisturbed_run",
    ),
    Protection(
        *(39, "a whole line without its end stays", "utils.events:JSONWriter.continue_from"),
        'kept[-1] += b"\\n"',
        "pass",
        f"{MADE_UP}::test_a_whole_line_without_its_end_stays",
    ),
    Protection(
        *(40, "results of others are checked", "evaluation.coco_results:read_coco_results"),
        "if problem:",
        "if False:",
        "tests/evaluation/test_coco_json.py::test_wrong_results_of_a_file_are_named",
    ),
)

PROTECTIONS = (*RESUME, *WRITES, *PROCESSES, *DATA, *FILES, *ADDED)


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


_LAYOUT = {
    *(tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.COMMENT, tokenize.ENDMARKER),
}
Token = tuple[str, int, int]


def _tokens(text: str) -> list[Token]:
    """Return (text, start, end) of each token that is not layout."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            (row, column), (last, end) = token.start, token.end
            found.append((token.string, starts[row - 1] + column, starts[last - 1] + end))
    return found


def _function(text: str, name: str) -> ast.AST:
    """Return the function or method ``name`` of a module."""
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        inner = [n for n in ast.walk(node) if getattr(n, "name", "") == part]
        if not inner:
            raise ValueError(f"there is no {name}")
        node = inner[0]
    return node


def place(protection: Protection, tree: Path = ROOT) -> tuple[Path, str, int, int]:
    """Return file, its text, and start and end of what is to be replaced.

    Raises:
        ValueError: the function is not there, or has the code not once.
    """
    module, _, name = protection.symbol.partition(":")
    path = tree / "d2kit" / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    node = _function(text, name)
    lines = text.splitlines(keepends=True)
    first, last = (len("".join(lines[:n])) for n in (node.lineno - 1, node.end_lineno))
    tokens = [t for t in _tokens(text) if first <= t[1] < last]
    wanted = [t[0] for t in _tokens(protection.old)]
    size = len(wanted)
    found = [i for i in range(len(tokens)) if [t[0] for t in tokens[i : i + size]] == wanted]
    if len(found) != 1:
        raise ValueError(f"{protection.symbol} has {len(found)} of {protection.old}")
    return path, text, tokens[found[0]][1], tokens[found[0] + size - 1][2]


def take_out(protection: Protection, tree: Path) -> None:
    """Break one protection in a tree."""
    path, text, start, end = place(protection, tree)
    path.write_text(text[:start] + protection.new + text[end:], encoding="utf-8")


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
