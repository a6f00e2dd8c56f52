import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.data import MetadataCatalog
from d2kit.engine import (
    DefaultPredictor,
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    user_errors,
)
from d2kit.engine import defaults as defaults_module
from d2kit.engine.evaluate import table_of_results
from tests.support import tiny_run as tiny


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


def arguments(*words):
    return default_argument_parser().parse_args(list(words))


# ---- arguments and set-up


def test_arguments():
    args = arguments("--config-file", "x.yaml", "--num-processes", "2", "--resume", "A.B", "1")
    assert (args.config_file, args.num_processes, args.resume) == ("x.yaml", 2, True)
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 1, 0)
    assert (args.eval_only, args.dist_url, args.debug, args.opts) == (
        False,
        "auto",
        False,
        ["A.B", "1"],
    )
    assert "torchrun" in default_argument_parser().format_help()


def test_setup_writes_config_and_log_and_seeds(tmp_path):
    cfg = tiny.tiny_cfg(tmp_path / "run", "SOLVER.GAMMA", 0.25)
    cfg.freeze()
    draws = []
    for _ in range(2):
        default_setup(cfg, arguments())
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    again = get_cfg()
    again.merge_from_file(tmp_path / "run" / "config.yaml")
    assert again == cfg
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "SOLVER.GAMMA: 0.25" in log
    assert "SOLVER.MOMENTUM" not in log


def test_setup_draws_a_seed_and_takes_it_from_the_checkpoint(tmp_path):
    cfg = tiny.tiny_cfg(tmp_path, "SEED", -1)
    cfg.freeze()
    default_setup(cfg, arguments())
    assert cfg.SEED >= 0
    assert cfg.is_frozen()
    saved = {"model": {"w": torch.ones(1)}, "iteration": 3, "trainer": {"seed": 77}}
    torch.save(saved, tmp_path / "model_3.pth")
    cfg = tiny.tiny_cfg(tmp_path, "SEED", -1)
    default_setup(cfg, arguments("--resume"))
    assert cfg.SEED == 77


@pytest.mark.parametrize("eval_only", [False, True])
def test_setup_refuses_missing_weights(tmp_path, eval_only):
    cfg = tiny.tiny_cfg(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS"):
        default_setup(cfg, arguments(*["--eval-only"] * eval_only))
    default_setup(cfg, arguments("--resume"))  # not needed where there is a checkpoint


def test_output_folder_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cfg = tiny.tiny_cfg(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="OUTPUT_DIR .* cannot be written to"):
        default_setup(cfg, arguments())


def test_float32_precision_is_set(tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        default_setup(tiny.tiny_cfg(tmp_path, "FLOAT32_PRECISION", "high"), arguments())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_small_helpers(tmp_path):
    cfg = get_cfg()
    assert defaults_module._try_get_key(cfg, "NO.SUCH", "SOLVER.GAMMA") == cfg.SOLVER.GAMMA
    assert defaults_module._try_get_key(cfg, "NO.SUCH", default=5) == 5
    assert "MODEL" in defaults_module._highlight("MODEL: 1", "a.yaml")
    kinds = [type(writer).__name__ for writer in default_writers(str(tmp_path / "new"), 5)]
    assert kinds == ["CommonMetricPrinter", "JSONWriter", "TensorboardXWriter"]
    model = nn.Linear(1, 1)
    assert create_ddp_model(model) is model


def test_table_of_results():
    results = {"val": {"bbox": {"AP": 1.234, "AP-cat": 5.0}, "segm": {"AP": 2.0, "AR": 3.0}}}
    lines = table_of_results(results).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "dataset",
        "task",
        "AP",
        "AR",
    ]
    assert "1.23" in lines[2]
    assert "AP-cat" not in lines[0]


# ---- user errors


def fail_here():
    raise ValueError("a bug of the script")


def test_user_errors_print_one_message(capsys, monkeypatch):
    monkeypatch.delenv("D2KIT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as error, user_errors():
        get_cfg().merge_from_list(["SOLVER.GAMA", 1])
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert "SOLVER.GAMMA" in printed
    assert "Traceback" not in printed
    assert printed.startswith("error: config overrides: unknown config key")


def test_other_errors_and_debugging_pass(monkeypatch):
    with pytest.raises(ValueError, match="a bug of the script"), user_errors():
        fail_here()
    with pytest.raises(KeyError), user_errors(debug=True):
        get_cfg().merge_from_list(["SOLVER.GAMA", 1])
    monkeypatch.setenv("D2KIT_DEBUG", "1")

    @user_errors()
    def decorated():
        get_cfg().merge_from_list(["SOLVER.GAMA", 1])

    with pytest.raises(KeyError):
        decorated()


# ---- trainer


def test_preflight_comes_before_the_model(tmp_path, images, monkeypatch):
    monkeypatch.setattr(tiny.TinyTrainer, "build_model", lambda cfg: pytest.fail("model was built"))
    wrong_name = tiny.tiny_cfg(tmp_path, "DATASETS.TEST", (tiny.NAME + "y",))
    with pytest.raises(KeyError, match=f"nearest: .*{tiny.NAME}"):
        tiny.TinyTrainer(wrong_name)
    with pytest.raises(ValueError, match="80 classes.* has 1"):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 80))
    (images / "3.png").unlink()
    records = tiny.records(images)
    (images / "3.png").unlink()
    monkeypatch.setattr(tiny, "records", lambda folder: records)
    with pytest.raises((ValueError, OSError), match=r"3\.png"):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path))


def test_trainer_tells_its_length_and_has_its_parts(tmp_path, images, caplog):
    with caplog.at_level(logging.INFO):
        trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 7))
        trainer.train()
    assert "7 iterations = 2.0 epochs over 7 images" in caplog.text
    assert trainer.model is trainer._trainer.model
    assert trainer.optimizer is trainer._trainer.optimizer
    assert trainer.data_loader is trainer._trainer.data_loader
    names = [type(hook).__name__ for hook in trainer._hooks]
    expected = ["IterationTimer", "LRScheduler", "TimeForecast", "PeriodicCheckpointer", "EvalHook"]
    assert names == [*expected, "PeriodicWriter", "Preemption"]
    assert {"model_final.pth", "metrics.json", "last_checkpoint"} <= set(os.listdir(tmp_path))


def test_after_backward_reaches_the_hooks_of_the_trainer(tmp_path, images):
    class Gradients(HookBase):
        norms = []

        def after_backward(self):
            self.norms.append(self.trainer.model.head.weight.grad.norm().item())

    hook = Gradients()
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 2))
    trainer.register_hooks([hook])
    trainer.train()
    assert len(hook.norms) == 2
    assert min(hook.norms) > 0


def test_mixed_precision_and_precise_bn_by_config(tmp_path, images):
    options = ["SOLVER.AMP.ENABLED", True, "TEST.PRECISE_BN.ENABLED", True, "SOLVER.MAX_ITER", 2]
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, *options, "TEST.PRECISE_BN.NUM_ITER", 2))
    trainer.train()
    assert type(trainer._trainer).__name__ == "AMPTrainer"
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert "grad_scaler" in saved["trainer"]["_trainer"]


def test_precision_of_mixed_precision_by_config(tmp_path, images, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    options = ["SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 1, "SOLVER.AMP.PRECISION"]
    inner = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, *options, "bfloat16"))._trainer
    assert (inner.precision, inner.grad_scaler.is_enabled()) == (torch.bfloat16, False)
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.PRECISION.*'half'"):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, *options, "half"))


def test_a_loader_that_cannot_jump_is_named(tmp_path, images, caplog):
    class Other(tiny.TinyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [
                batch for batch, _ in zip(super().build_train_loader(cfg), range(9), strict=False)
            ]

    Other(tiny.tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 2)).train()
    trainer = Other(tiny.tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 4))
    trainer.resume_or_load()
    trainer.train()
    assert "cannot start at batch 2" in caplog.text


# ---- evaluation


class Constant(nn.Module):
    """Answers each image with nothing."""

    def forward(self, batch):
        return [{} for _ in batch]


def evaluation(name, value):
    from d2kit.evaluation import DatasetEvaluator

    class Evaluator(DatasetEvaluator):
        count = 0

        def process(self, inputs, outputs):
            self.count += len(inputs)

        def evaluate(self):
            return {"bbox": {"AP": value, "images": self.count}}

    return Evaluator()


def test_test_runs_every_dataset_and_prints_one_table(tmp_path, images, caplog):
    cfg = tiny.tiny_cfg(tmp_path, "DATASETS.TEST", (tiny.NAME, tiny.NAME))
    with pytest.raises(ValueError, match="2 test datasets, but 1"):
        DefaultTrainer.test(cfg, Constant(), evaluators=[evaluation("a", 1)])
    cfg.DATASETS.TEST = (tiny.NAME,)
    with caplog.at_level(logging.INFO):
        results = DefaultTrainer.test(cfg, Constant(), evaluators=evaluation("a", 12.5))
    assert results == {"bbox": {"AP": 12.5, "images": 7}}
    assert "| dataset" in caplog.text
    assert "12.5" in caplog.text


def test_expected_results_are_verified_after_training(tmp_path, images):
    class Trainer(tiny.TinyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": 40.0}}

    options = ["SOLVER.MAX_ITER", 1, "TEST.EXPECTED_RESULTS"]
    good = tiny.tiny_cfg(tmp_path, *options, [["bbox", "AP", 40.1, 0.2]])
    assert Trainer(good).train() == {"bbox": {"AP": 40.0}}
    bad = tiny.tiny_cfg(tmp_path, *options, [["bbox", "AP", 50.0, 0.2]])
    with pytest.raises(SystemExit):
        Trainer(bad).train()


def test_default_evaluator(tmp_path, images):
    from d2kit.evaluation import COCOEvaluator

    cfg = tiny.tiny_cfg(tmp_path)
    assert isinstance(DefaultTrainer.build_evaluator(cfg, tiny.NAME), COCOEvaluator)
    MetadataCatalog.get("engine_tests_other").evaluator_type = "mine"
    try:
        with pytest.raises(ValueError, match="evaluator_type 'mine'"):
            DefaultTrainer.build_evaluator(cfg, "engine_tests_other")
    finally:
        MetadataCatalog.remove("engine_tests_other")


# ---- predictor


def small_rcnn(tmp_path, *options):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "MODEL.RESNETS.DEPTH", 18]
        + [
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            64,
            "MODEL.BACKBONE.NAME",
            "build_resnet_fpn_backbone",
        ]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
        + ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]]
        + ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
        + ["MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.RPN.PRE_NMS_TOPK_TEST", 50]
        + ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
        + ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
        + ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
        + ["MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7]
        + ["MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5]
        + ["INPUT.MIN_SIZE_TEST", 64, "OUTPUT_DIR", str(tmp_path), *options]
    )
    return cfg


def test_predictor_answers_in_pixels_of_the_image(tmp_path, caplog):
    image = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    torch.manual_seed(0)
    predictor = DefaultPredictor(small_rcnn(tmp_path))
    instances = predictor(image)["instances"]
    assert instances.image_size == (48, 80)
    assert len(instances) == 5
    assert instances.pred_masks.shape == (5, 48, 80)
    assert instances.pred_boxes.tensor.max() <= 80
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "w.pth")
    loaded = DefaultPredictor(small_rcnn(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "w.pth")))
    assert torch.equal(loaded(image)["instances"].scores, instances.scores)
    mirrored = small_rcnn(tmp_path, "MODEL.WEIGHTS", str(tmp_path / "w.pth"), "INPUT.FORMAT", "RGB")
    flipped = np.ascontiguousarray(image[:, :, ::-1])
    assert torch.equal(DefaultPredictor(mirrored)(flipped)["instances"].scores, instances.scores)
    with pytest.raises(ValueError, match=r"got shape \(4, 4\)"):
        predictor(np.zeros((4, 4)))
    if not torch.cuda.is_available():
        DefaultPredictor(small_rcnn(tmp_path, "MODEL.DEVICE", "cuda"))(image)
        assert "using the CPU" in caplog.text


def test_predictor_refuses_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
        DefaultPredictor(small_rcnn(tmp_path, "INPUT.FORMAT", "L"))


def test_import_is_light():
    code = (
        "import sys, d2kit.engine; "
        "print([m for m in ('cv2','matplotlib','scipy','tensorboard','pycocotools','hotcoco',"
        "'supervision','fvcore.nn','av','d2kit.data','d2kit.modeling','d2kit.evaluation') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
