"""DeepLabV3+: head, loss, schedule, backbone, and all of it in training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultTrainer
from d2kit.layers import FrozenBatchNorm2d, ShapeSpec
from d2kit.modeling import SEM_SEG_HEADS_REGISTRY, build_backbone, build_model
from d2kit.projects.deeplab import (
    DeepLabV3PlusHead,
    add_deeplab_config,
    build_lr_scheduler,
)
from d2kit.projects.deeplab.loss import DeepLabCE
from d2kit.projects.deeplab.lr_scheduler import WarmupPolyLR
from d2kit.solver import LRMultiplier
from tests.modeling.tiny import tiny_config
from tests.modeling.tiny_dense import labelled_input


def head(strides=(4, 8, 16), **options):
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(strides)}
    finer = len(strides) - 1
    options = {
        "project_channels": [3, 5][:finer],
        "aspp_dilations": [1, 2, 3],
        "aspp_dropout": 0.0,
        "decoder_channels": [6] * finer + [7],
        "common_stride": 4,
        "norm": "",
        "train_size": None,
        "num_classes": 5,
        **options,
    }
    torch.manual_seed(0)
    module = DeepLabV3PlusHead(shapes, **options)
    if options["num_classes"] is not None:
        torch.nn.init.normal_(module.predictor.weight)  # so that losses differ between pixels
    return module


def features(strides=(4, 8, 16), size=(32, 48)):
    rng = torch.Generator().manual_seed(0)
    return {
        f"p{i}": torch.randn(2, 8, -(-size[0] // s), -(-size[1] // s), generator=rng)
        for i, s in enumerate(strides)
    }


def labels(size=(32, 48)):
    return torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))


class TestHead:
    def test_shapes_and_names(self):
        module = head().eval()
        scores, losses = module(features())
        assert scores.shape == (2, 5, 32, 48)
        assert losses == {}
        assert module.layers(features()).shape == (2, 5, 8, 12)
        names = {k for k in module.state_dict() if k.endswith("weight")}
        assert names == {
            *(f"decoder.p2.project_conv.convs.{i}.weight" for i in range(4)),
            *("decoder.p2.project_conv.convs.4.1.weight", "decoder.p2.project_conv.project.weight"),
            *("decoder.p1.project_conv.weight", "decoder.p0.project_conv.weight"),
            *(f"decoder.p{i}.fuse_conv.{k}.weight" for i in (0, 1) for k in (0, 1)),
            "predictor.weight",
        }
        assert module.decoder["p1"]["fuse_conv"][0].weight.shape == (6, 5 + 7, 3, 3)

    def test_depthwise_separable(self):
        module = head(use_depthwise_separable_conv=True).eval()
        assert module.decoder["p0"]["fuse_conv"].depthwise.weight.shape == (3 + 6, 1, 5, 5)
        assert module(features())[0].shape == (2, 5, 32, 48)

    @pytest.mark.parametrize("strides", [(4,), (4, 16)])
    def test_number_of_levels(self, strides):
        assert head(strides).eval()(features(strides))[0].shape == (2, 5, 32, 48)

    @torch.no_grad()
    def test_every_level_counts(self):
        module, levels = head().eval(), features()
        whole = module(levels)[0]
        for name in levels:
            assert not torch.allclose(
                module({**levels, name: torch.zeros_like(levels[name])})[0], whole
            )

    def test_decoder_without_classifier(self):
        module = head(num_classes=None)
        assert module(features()).shape == (2, 6, 8, 12)
        assert not hasattr(module, "predictor")

    @pytest.mark.parametrize("ignored", [0, 1, 3000])
    def test_cross_entropy_is_the_mean_over_labelled_pixels(self, ignored):
        module, target = head(loss_weight=0.5, ignore_value=255), labels()
        target.view(-1)[:ignored] = 255
        none, losses = module(features(), target)
        assert none is None
        expected = 0.5 * F.cross_entropy(module.eval()(features())[0], target, ignore_index=255)
        torch.testing.assert_close(losses["loss_sem_seg"], expected)

    def test_hard_pixels_are_a_fifth(self):
        module, target = head(loss_type="hard_pixel_mining", ignore_value=255), labels()
        target[:, :9] = 255
        _, losses = module(features(), target)
        scores = module.eval()(features())[0]
        each = F.cross_entropy(scores, target, ignore_index=255, reduction="none")
        expected = sorted(each.flatten().tolist(), reverse=True)[: int(0.2 * each.numel())]
        assert losses["loss_sem_seg"].item() == pytest.approx(np.mean(expected), rel=1e-5)

    @pytest.mark.parametrize("loss_type", ["cross_entropy", "hard_pixel_mining"])
    def test_everything_ignored_has_no_loss(self, loss_type):
        module = head(loss_type=loss_type, ignore_value=255)
        _, losses = module(features(), torch.full((2, 32, 48), 255))
        losses["loss_sem_seg"].backward()
        assert losses["loss_sem_seg"] == 0
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())

    def test_image_that_is_no_multiple_of_the_stride(self):
        module = head()
        _, losses = module(features(size=(30, 45)), labels((30, 45)))
        assert torch.isfinite(losses["loss_sem_seg"])

    def test_pooling_over_the_crops(self):
        module = head(train_size=(32, 48))
        assert module.decoder["p2"]["project_conv"].pool_kernel_size == (2, 3)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: head(strides=()), "IN_FEATURES"),
            (lambda: head(strides=(8, 16)), "COMMON_STRIDE"),
            (lambda: head(project_channels=[3]), "PROJECT_CHANNELS"),
            (lambda: head(decoder_channels=[3]), "decoder_channels"),
            (lambda: head(loss_type="focal"), "LOSS_TYPE"),
            (lambda: head(train_size=(32, 50)), r"CROP\.SIZE.*16"),
            (lambda: head()(features()), "targets"),
            (lambda: SEM_SEG_HEADS_REGISTRY.get("DeepLabV3PlusHead")(get_cfg(), {}), "add_deeplab"),
            (
                lambda: DeepLabV3PlusHead(config("INPUT.CROP.ENABLED", True), {}),
                r"INPUT\.CROP\.TYPE",
            ),
            (lambda: DeepLabV3PlusHead(config(), {}), "'p2'"),
        ],
    )
    def test_mistakes_are_named(self, make, match):
        with pytest.raises(ValueError, match=match):
            make()


class TestLoss:
    logits = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(2)) * 3
    target = torch.randint(0, 4, (2, 5, 7), generator=torch.Generator().manual_seed(3))

    def test_all_pixels_are_cross_entropy(self):
        plain = F.cross_entropy(self.logits, self.target)
        torch.testing.assert_close(DeepLabCE()(self.logits, self.target), plain)
        weight = torch.tensor([1.0, 2.0, 0.0, 0.5])
        each = F.cross_entropy(self.logits, self.target, weight=weight, reduction="none")
        loss = DeepLabCE(weight=weight)(self.logits, self.target)
        torch.testing.assert_close(loss, each.mean())

    @pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.2, 14), (0.5, 35), (1.0, 70)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_mean_of_the_largest(self, share, count, weighted):
        target = self.target.clone()
        target[0, :2] = 9
        weights = torch.rand(target.shape, generator=torch.Generator().manual_seed(4)) * 3
        losses = []
        for n, y, x in np.ndindex(*target.shape):
            label = int(target[n, y, x])
            loss = -self.logits[n, :, y, x].log_softmax(0)[label].item() if label != 9 else 0.0
            losses.append(loss * (weights[n, y, x].item() if weighted else 1.0))
        loss = DeepLabCE(9, share)(self.logits, target, weights if weighted else None)
        expected = np.mean(sorted(losses, reverse=True)[:count])
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, 20])
    def test_share_is_checked(self, share):
        with pytest.raises(ValueError, match="share"):
            DeepLabCE(top_k_percent_pixels=share)


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    return torch.optim.SGD(groups)


class TestSchedule:
    @pytest.mark.parametrize(
        ("method", "ending"), [("linear", 0.0), ("constant", 0.0), ("linear", 0.25)]
    )
    def test_formula(self, method, ending):
        cfg = get_cfg()
        add_deeplab_config(cfg)
        cfg.merge_from_list(
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 20]
            + ["SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.1]
            + ["SOLVER.WARMUP_METHOD", method, "SOLVER.POLY_LR_CONSTANT_ENDING", ending]
        )
        moved = optimizer()
        schedule = build_lr_scheduler(cfg, moved)
        assert isinstance(schedule, WarmupPolyLR)
        for step, (first, second) in enumerate(rates(schedule, moved, 23)):
            poly = max(1 - step / 20, 0) ** 0.9
            warm = {"linear": 0.1 + 0.9 * step / 4, "constant": 0.1}[method]
            expected = poly * warm if step < 4 else max(poly, ending)
            assert first == pytest.approx(expected)
            assert second == pytest.approx(0.1 * expected)

    def test_resume(self):
        moved, again = optimizer(), optimizer()
        schedule = WarmupPolyLR(moved, 20, warmup_iters=3)
        rates(schedule, moved, 7)
        resumed = WarmupPolyLR(again, 20, warmup_iters=3)
        resumed.load_state_dict(schedule.state_dict())
        again.load_state_dict(moved.state_dict())
        assert rates(resumed, again, 5) == rates(schedule, moved, 5)

    def test_others_are_delegated(self):
        cfg = get_cfg()
        assert isinstance(build_lr_scheduler(cfg, optimizer()), LRMultiplier)
        cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPoly"
        with pytest.raises(ValueError, match="LR_SCHEDULER_NAME"):
            build_lr_scheduler(cfg, optimizer())

    @pytest.mark.parametrize(
        "wrong", [{"warmup_method": "slow"}, {"constant_ending": -0.1}, {"constant_ending": 2}]
    )
    def test_mistakes_are_named(self, wrong):
        with pytest.raises(ValueError, match=r"slow|CONSTANT_ENDING"):
            WarmupPolyLR(optimizer(), 20, **wrong)


def backbone(*options):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res4", "res5"]]
        + ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
        + ["MODEL.RESNETS.WIDTH_PER_GROUP", 2, *options]
    )
    return build_backbone(cfg)


class TestBackbone:
    @pytest.mark.parametrize(
        ("res4", "res5", "strides"), [(1, 1, (4, 16, 32)), (1, 2, (4, 16, 16)), (2, 4, (4, 8, 8))]
    )
    @torch.no_grad()
    def test_strides_and_dilations(self, res4, res5, strides):
        net = backbone("MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5)
        shapes = net.output_shape()
        assert tuple(shapes[name].stride for name in ("res2", "res4", "res5")) == strides
        for name, feature in net.eval()(torch.rand(1, 3, 64, 96)).items():
            stride = shapes[name].stride
            assert feature.shape == (1, shapes[name].channels, 64 // stride, 96 // stride)
        dilations = [[block.conv2.dilation[0] for block in stage] for stage in net.stages]
        assert dilations[2:] == [[res4] * 6, [res5, 2 * res5, 4 * res5]]
        assert [block.conv2.padding[0] for block in net.res5] == dilations[3]

    def test_stems(self):
        stem = backbone().stem
        convs = (stem.conv1, stem.conv2, stem.conv3)
        assert [tuple(c.weight.shape) for c in convs] == [(4, 3, 3, 3), (4, 4, 3, 3), (8, 4, 3, 3)]
        assert backbone("MODEL.RESNETS.STEM_TYPE", "basic").stem.conv1.kernel_size == (7, 7)

    def test_frozen_stem(self):
        net = backbone("MODEL.BACKBONE.FREEZE_AT", 1, "MODEL.RESNETS.NORM", "BN")
        assert not any(p.requires_grad for p in net.stem.parameters())
        assert isinstance(net.stem.conv3.norm, FrozenBatchNorm2d)
        assert all(p.requires_grad for p in net.res2.parameters())

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("DEPTH", 18), ("RES4_DILATION", 2), ("RES5_DILATION", 3), ("STEM_TYPE", "deep"),
            ("RES5_MULTI_GRID", [1, 2]), ("OUT_FEATURES", ["res6"]),
        ],
    )  # fmt: skip
    def test_mistakes_are_named(self, key, value):
        with pytest.raises(ValueError, match="res6" if key == "OUT_FEATURES" else key):
            backbone(f"MODEL.RESNETS.{key}", value)


NAME = "deeplab_tests"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four images with label images, on disk."""
    folder = tmp_path_factory.mktemp("deeplab")
    records = []
    for i in range(4):
        item = labelled_input(i, objects=i, size=(64, 64))
        image = item["image"].permute(1, 2, 0).clamp(0, 255).byte().numpy()[:, :, ::-1]
        files = {"file_name": f"{folder}/{i}.png", "sem_seg_file_name": f"{folder}/{i}_labels.png"}
        Image.fromarray(image).save(files["file_name"])
        Image.fromarray(item["sem_seg"].byte().numpy()).save(files["sem_seg_file_name"])
        records.append({**files, "image_id": i, "height": 64, "width": 64})
    DatasetCatalog.register(NAME, lambda: records)
    classes = ["things", "wall", "floor"]
    MetadataCatalog.get(NAME).set(evaluator_type="sem_seg", stuff_classes=classes, ignore_label=255)
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(*options):
    cfg = tiny_config()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "DATASETS.TRAIN", (NAME,)]
        + ["DATASETS.TEST", (NAME,), "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64]
        + ["MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3]
        + ["MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"], "MODEL.SEM_SEG_HEAD.NORM", "BN"]
        + ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32]
        + ["MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [32], "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.0]
        + ["MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [1, 2, 3], "SOLVER.BASE_LR", 0.05, "SEED", 1]
        + ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.WARMUP_ITERS", 0]
        + ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0]
        + [*options]
    )
    return cfg


class Trainer(DefaultTrainer):
    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    def build_writers(self):
        return []


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("loss", "crop", "separable"),
    [("hard_pixel_mining", True, False), ("cross_entropy", False, True)],
)
def test_train_and_evaluate(loss, crop, separable, tmp_path):
    cfg = config(
        *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss, "OUTPUT_DIR", str(tmp_path)),
        *("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", separable),
        *("INPUT.CROP.ENABLED", crop, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [32, 32]),
    )
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    results = trainer.train()
    for key, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all(), key
        assert parameter.grad.any(), key
        assert not torch.equal(parameter, before[key]), key
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize(("loss", "rate"), [("hard_pixel_mining", 0.001), ("cross_entropy", 0.05)])
def test_three_steps_on_one_batch(loss, rate):
    torch.manual_seed(0)
    model = build_model(config("MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss))
    moved = torch.optim.SGD(model.parameters(), lr=rate)
    batch = [labelled_input(0), labelled_input(1, 3, (48, 70))]
    totals = []
    for _ in range(3):
        (value,) = model(batch).values()
        moved.zero_grad()
        value.backward()
        assert all(p.grad.any() for p in model.parameters())
        moved.step()
        totals.append(value.item())
    assert totals[0] > totals[1] > totals[2]


@torch.no_grad()
def test_scores_in_the_wanted_size():
    model = build_model(config()).eval()
    (output,) = model([{**labelled_input(0, size=(50, 62)), "height": 32, "width": 100}])
    assert output["sem_seg"].shape == (3, 32, 100)
