import numpy as np
import pytest
import torch
from PIL import Image

from d2kit.data.catalog import CITYSCAPES_CATEGORIES, MetadataCatalog
from d2kit.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from d2kit.evaluation.cityscapes_evaluation import THING_IDS
from d2kit.structures import Boxes, Instances
from tests.support import cityscapes_synthetic as city

NAME = "zz_cityscapes_evaluation"
CLASSES = list(THING_IDS)
LABELS = list(THING_IDS.values())
TRAIN_IDS = {c["id"]: c["trainId"] for c in CITYSCAPES_CATEGORIES}


@pytest.fixture
def root(tmp_path):
    MetadataCatalog.get(NAME).set(
        thing_classes=CLASSES,
        image_dir=str(tmp_path / "leftImg8bit/val"),
        gt_dir=str(tmp_path / "gtFine/val"),
    )
    yield tmp_path
    MetadataCatalog.remove(NAME)


def instances(masks, scores, labels):
    found = Instances((city.HEIGHT, city.WIDTH))
    found.pred_boxes = Boxes(torch.zeros(len(labels), 4))
    found.pred_masks = torch.as_tensor(np.array(masks).reshape(-1, city.HEIGHT, city.WIDTH))
    found.scores = torch.as_tensor(np.array(scores), dtype=torch.float64)
    found.pred_classes = torch.tensor([LABELS.index(label) for label in labels], dtype=torch.int64)
    return {"instances": found}


def make_instances(root, seed, images=4):
    """Write ground truth; return [(file, masks, scores, labels)]. Some images are empty."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(images):
        ids = city.truth(rng, things=0 if number == 1 else 12)
        file = city.write(root, ids, f"aachen_{number:06d}_000019")
        made.append((file, *city.predictions(rng, ids, count=0 if number == 2 else 25)))
    return made


def ours_of_instances(made):
    evaluator = CityscapesInstanceEvaluator(NAME)
    for file, masks, scores, labels in made:
        evaluator.process([{"file_name": str(file)}], [instances(masks, scores, labels)])
    return evaluator.evaluate()["segm"]


@pytest.fixture
def official(monkeypatch):
    """The published package, which still calls what numpy 2.4 took away."""
    monkeypatch.setattr(np, "in1d", lambda a, b: np.isin(np.asarray(a).ravel(), b), raising=False)
    return pytest.importorskip("cityscapesscripts.helpers.csHelpers", exc_type=ImportError)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_instances_equal_the_published_tool(root, official, monkeypatch, seed):
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as tool

    monkeypatch.setattr(tool, "writeDict2JSON", lambda *_: None)  # cannot write numpy's integers
    made = make_instances(root, seed)
    results = root / "results"
    results.mkdir()
    lists = [], []
    for file, masks, scores, labels in made:
        lines = []
        stem = file.name.removesuffix("_leftImg8bit.png")
        for i, (mask, score, label) in enumerate(zip(masks, scores, labels, strict=True)):
            Image.fromarray(mask.astype(np.uint8) * 255).save(results / f"{stem}_{i}.png")
            lines.append(f"{stem}_{i}.png {label} {score}\n")
        (results / f"{stem}.txt").write_text("".join(lines))
        lists[0].append(str(results / f"{stem}.txt"))
        lists[1].append(str(root / "gtFine/val/aachen" / f"{stem}_gtFine_instanceIds.png"))
    args = tool.args
    args.predictionPath, args.predictionWalk = str(results), None
    args.gtInstancesFile, args.JSONOutput = str(root / f"gt{seed}.json"), False
    args.quiet = True
    theirs = tool.evaluateImgLists(*lists, args)["averages"]
    ours = ours_of_instances(made)
    assert ours["AP"] == pytest.approx(theirs["allAp"] * 100, abs=1e-9)
    assert ours["AP50"] == pytest.approx(theirs["allAp50%"] * 100, abs=1e-9)
    assert 0 < ours["AP"] < 100


def make_semantic(root, seed, images=3):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(images):
        ids = city.truth(rng)
        file = city.write(root, ids, f"aachen_{number:06d}_000019")
        labels = np.roll(city.labels_of(ids), rng.integers(-4, 5, 2), axis=(0, 1))
        train = np.vectorize(lambda v: TRAIN_IDS.get(v, 18))(labels)
        noise = rng.random(train.shape) < 0.1
        made.append((file, np.where(noise, rng.integers(0, 19, train.shape), train)))
    return made


def ours_of_labels(made, scores=False):
    evaluator = CityscapesSemSegEvaluator(NAME)
    for file, train in made:
        output = torch.as_tensor(train)
        if scores:
            output = torch.nn.functional.one_hot(output, 19).permute(2, 0, 1).float()
        evaluator.process([{"file_name": str(file)}], [{"sem_seg": output}])
    return evaluator.evaluate()["sem_seg"]


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(4))
def test_labels_equal_the_published_tool(root, official, seed):
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as tool

    made = make_semantic(root, seed)
    to_label = np.array([c["id"] for c in CITYSCAPES_CATEGORIES], dtype=np.uint8)
    predictions, truths = [], []
    for file, train in made:
        stem = file.name.removesuffix("_leftImg8bit.png")
        predictions.append(str(root / f"{stem}.png"))
        Image.fromarray(to_label[train]).save(predictions[-1])
        truths.append(str(root / "gtFine/val/aachen" / f"{stem}_gtFine_labelIds.png"))
    tool.args.JSONOutput, tool.args.quiet = False, True
    theirs = tool.evaluateImgLists(predictions, truths, tool.args)
    ours = ours_of_labels(made)
    for key, name in {
        "IoU": "averageScoreClasses",
        "iIoU": "averageScoreInstClasses",
        "IoU_sup": "averageScoreCategories",
        "iIoU_sup": "averageScoreInstCategories",
    }.items():
        assert ours[key] == pytest.approx(theirs[name] * 100, abs=1e-9)
    assert 0 < ours["iIoU"] < 100


def test_perfect_and_empty_instances(root):
    rng = np.random.default_rng(1)
    ids = city.truth(rng)
    file = city.write(root, ids, "aachen_000000_000019")
    values = [v for v in np.unique(ids) if v >= 24000 and v // 1000 in LABELS]
    perfect = (file, [ids == v for v in values], [0.9] * len(values), [v // 1000 for v in values])
    assert ours_of_instances([perfect]) == {"AP": 100.0, "AP50": 100.0}
    assert ours_of_instances([(file, [], [], [])]) == {"AP": 0.0, "AP50": 0.0}
    empty = city.write(root, np.full_like(ids, 7), "aachen_000001_000019")
    assert np.isnan(ours_of_instances([(empty, [], [], [])])["AP"])
    assert np.isnan(CityscapesInstanceEvaluator(NAME).evaluate()["segm"]["AP"])


def test_scores_are_labels(root):
    made = make_semantic(root, 9)
    assert ours_of_labels(made) == ours_of_labels(made, scores=True)
    perfect = [
        (f, np.vectorize(lambda v: TRAIN_IDS.get(v, 0))(np.asarray(Image.open(_labels(f)))))
        for f, _ in made
    ]
    figures = ours_of_labels(perfect)
    assert figures["IoU"] == pytest.approx(100)
    assert figures["iIoU_sup"] == pytest.approx(100)


def _labels(file):
    name = file.name.replace("leftImg8bit", "gtFine_labelIds")
    return str(file.parent / name).replace("leftImg8bit/val", "gtFine/val")


def test_an_image_seen_twice_counts_once(root):
    made = make_instances(root, 3)
    assert ours_of_instances(made + made[:1]) == ours_of_instances(made)


def test_wrong_use_is_told(root, tmp_path):
    file = city.write(root, city.truth(np.random.default_rng(0)), "aachen_000000_000019")
    evaluator = CityscapesSemSegEvaluator(NAME)
    inputs = [{"file_name": str(file)}]
    with pytest.raises(ValueError, match="prediction torch|prediction"):
        evaluator.process(inputs, [{"sem_seg": torch.zeros(19, 5, 5)}])
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        evaluator.process(inputs, [{"sem_seg": torch.full((city.HEIGHT, city.WIDTH), 19)}])
    with pytest.raises(ValueError, match="no '\\*_leftImg8bit.png' below"):
        evaluator.process([{"file_name": "/etc/passwd"}], [{"sem_seg": torch.zeros(19, 5, 5)}])
    MetadataCatalog.get("zz_bare")
    with pytest.raises(ValueError, match="no image_dir, gt_dir in its metadata"):
        CityscapesSemSegEvaluator("zz_bare")
    MetadataCatalog.remove("zz_bare")
    MetadataCatalog.get("zz_other").set(
        **{**MetadataCatalog.get(NAME).as_dict(), "name": "zz_other", "thing_classes": ["cat"]}
    )
    with pytest.raises(ValueError, match="does not evaluate instances of cat"):
        CityscapesInstanceEvaluator("zz_other").process(inputs, [instances([], [], [])])
    MetadataCatalog.remove("zz_other")
