"""check compares box, mask and picture; --fix never makes a contradiction valid by one side."""

import copy
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from d2kit.curate.checking import check_dataset, repair_coco, survey_images
from d2kit.curate.findings import mask_disagrees
from d2kit.data.datasets import load_coco_json

H, W = 90, 120
BOXES = [(10, 10, 30, 20), (70, 40, 24, 40), (20, 50, 40, 30)]
BRIGHT = 200


def outline(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def whole(masks=True, name="{}.png"):
    rows = [{"id": i, "file_name": name.format(i), "height": H, "width": W} for i in (1, 2)]
    annotations = []
    for image in (1, 2):
        for x, y, w, h in BOXES:
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
            one |= {"bbox": [x, y, w, h], "area": w * h}
            annotations.append(one | ({"segmentation": outline(x, y, w, h)} if masks else {}))
    return {
        "images": rows,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "box"}],
    }


def picture():
    image = np.zeros((H, W, 3), np.uint8)
    for x, y, w, h in BOXES:
        image[y : y + h, x : x + w] = BRIGHT
    return image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"photos/{i}.png"), picture())
    return tmp_path / "photos"


def checked(tmp_path, data, folder=None):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(data))
    return [f for f in check_dataset(path, folder) if f.level == "error"]


def fixed(data, folder=None):
    survey = survey_images(data["images"], folder) if folder else None
    return repair_coco(data, "d.json", survey, folder)


def lies_on_its_object(folder, data):
    """Whether each box of a copy holds a drawn rectangle and nothing else."""
    names = {i["id"]: i["file_name"] for i in data["images"]}
    for a in data["annotations"]:
        x, y, w, h = (int(v) for v in a["bbox"])
        pixels = cv2.imread(str(folder / names[a["image_id"]]))[y : y + h, x : x + w]
        if pixels.size == 0 or (pixels > BRIGHT // 2).mean() < 0.95:
            return False
    return True


# ---- box and mask


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ([10, 10, 30, 20], True),
        ([9, 9, 33, 22], True),  # rounding
        ([11, 11, 25, 17], True),
        ([10, 10, 40, 30], False),  # corners
        ([10, 10, 15, 20], True),  # an IoU of 0.5
        ([10, 10, 14, 20], False),
        ([60, 60, 30, 20], False),
        ([0.1, 0.1, 0.3, 0.2], False),  # shares of the image
    ],
)
def test_a_box_that_is_not_that_of_its_mask(box, fits):
    said = mask_disagrees({"bbox": box, "segmentation": outline(10, 10, 30, 20)}, {})
    assert (said is None) == fits
    if said:
        assert str(box) in said
        assert "[10, 10, 30, 20]" in said


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y, w, h: [x, y, x + w, y + h],  # corners
        lambda x, y, w, h: [x / W, y / H, w / W, h / H],  # shares
        lambda x, y, w, h: [y, x, h, w],  # turned
        lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],  # from the centre
    ],
)
def test_where_the_box_is_wrong_the_mask_is_the_witness(tmp_path, folder, wrong):
    data = whole()
    for a in data["annotations"]:
        a["bbox"] = [float(v) for v in wrong(*a["bbox"])]
    before = copy.deepcopy(data)
    assert "bbox" in {f.field for f in checked(tmp_path, data, folder)}
    copied, done = fixed(data, folder)
    assert data == before, "the input is not changed"
    assert done
    assert len(copied["annotations"]) == 6
    assert lies_on_its_object(folder, copied)
    assert [a["segmentation"] for a in copied["annotations"]] == [
        a["segmentation"] for a in before["annotations"]
    ]


def test_a_box_without_a_mask_beyond_the_border_is_cut_there(tmp_path, folder):
    data = whole(masks=False)
    data["annotations"][1]["bbox"] = [70, 40, 90, 40]
    copied, done = fixed(data, folder)
    assert [f.field for f in done if f.where == "annotation 2"] == ["bbox"]
    assert copied["annotations"][1]["bbox"] == [70, 40, 50, 40]


def test_a_box_far_larger_than_its_mask_is_not_taken_for_corners():
    """A box around what is hidden, too: an IoU of 0.5 is enough."""
    assert (
        mask_disagrees({"bbox": [10, 10, 30, 40], "segmentation": outline(10, 10, 30, 20)}, {})
        is None
    )


# ---- pictures


def turned(folder, orientation=6):
    """Write the pictures as photos whose EXIF turns them by 90 degrees, labels as they lie."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = whole(name="{}.jpg")
    for image in data["images"]:
        Image.fromarray(picture()).save(folder / image["file_name"], exif=exif, quality=95)
    return data


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_turned_photos_with_unturned_labels_are_left_out(tmp_path, folder, orientation):
    data = turned(folder, orientation)
    said = checked(tmp_path, data, folder)
    assert {f.field for f in said} == {"width, height"}
    copied, done = fixed(data, folder)
    assert copied["images"] == []
    assert copied["annotations"] == []
    lines = [f.what for f in done if f.field == "width, height"]
    assert len(lines) == 2
    assert all("turned (EXIF)" in line for line in lines)


def test_a_size_that_is_wrong_without_turning_is_corrected(folder):
    data = whole()
    data["images"][0].update(width=W + 10, height=H + 10)
    copied, _ = fixed(data, folder)
    assert (copied["images"][0]["width"], copied["images"][0]["height"]) == (W, H)
    assert len(copied["annotations"]) == 6
    assert lies_on_its_object(folder, copied)


# ---- ids and names


@pytest.mark.parametrize("mixed", [False, True])
def test_text_ids_are_numbered_in_images_and_annotations_alike(folder, mixed):
    data = whole()
    new = {1: "first", 2: 2 if mixed else "second"}
    for image in data["images"]:
        image["id"] = new[image["id"]]
    for a in data["annotations"]:
        a["image_id"], a["category_id"] = new[a["image_id"]], "kind"
    data["categories"][0]["id"] = "kind"
    copied, done = fixed(data, folder)
    names = {i["id"]: i["file_name"] for i in copied["images"]}
    assert sorted(names.values()) == ["1.png", "2.png"]
    assert all(type(i) is int and i >= 0 for i in names)
    assert [names[a["image_id"]] for a in copied["annotations"]] == ["1.png"] * 3 + ["2.png"] * 3
    assert {a["category_id"] for a in copied["annotations"]} == {copied["categories"][0]["id"]}
    assert {f.where for f in done} >= {"images", "categories"}


def test_text_ids_that_are_used_twice_are_not_guessed_at(folder):
    data = whole()
    for image in data["images"]:
        image["id"] = "same"
    for a in data["annotations"]:
        a["image_id"] = "same"
    copied, done = fixed(data, folder)
    assert copied["annotations"] == []
    assert done


@pytest.mark.parametrize(
    "name",
    [
        "/data/local-files/?d=photos/{}%20b%C3%A4r.png",
        "https://host/upload/{}%20b%C3%A4r.png?token=1",
        "C:\\Users\\me\\{} bär.png",
        "/home/other/photos/{} bär.png",
        "{} BÄR.PNG",
    ],
)
def test_names_of_other_machines_are_found(folder, name):
    data = whole(name=name)
    for i in (1, 2):
        (folder / f"{i}.png").rename(folder / f"{i} bär.png")
    copied, _ = fixed(data, folder)
    assert [i["file_name"] for i in copied["images"]] == ["1 bär.png", "2 bär.png"]
    assert len(copied["annotations"]) == 6
    assert lies_on_its_object(folder, copied)


def test_a_name_that_fits_two_files_is_left_out(folder):
    for sub in ("a", "b"):
        (folder / sub).mkdir()
        cv2.imwrite(str(folder / sub / "9.png"), picture())
    data = whole()
    data["images"][0]["file_name"] = "/elsewhere/9.png"
    copied, done = fixed(data, folder)
    assert [i["file_name"] for i in copied["images"]] == ["2.png"]
    assert any(f.field == "file_name" and "left out" in f.what for f in done)


def test_objects_without_a_mask_among_masks_are_left_out_and_counted(tmp_path, folder):
    data = whole()
    data["annotations"][2]["segmentation"] = []
    assert [(f.where, f.field) for f in checked(tmp_path, data)] == [
        ("annotation 3", "segmentation")
    ]
    copied, done = fixed(data, folder)
    assert [a["id"] for a in copied["annotations"]] == [1, 2, 4, 5, 6]
    assert any("left out: it has no mask" in f.what for f in done)


# ---- rotated boxes


def test_rotated_boxes_are_checked(tmp_path, folder):
    data = whole(masks=False)
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x + w / 2, y + h / 2, w, h, 30.0]
    assert checked(tmp_path, data, folder) == []
    copied, done = fixed(data, folder)
    assert (copied["annotations"], done) == (data["annotations"], [])
    data["annotations"][0]["bbox"][2] = -30
    assert [(f.where, f.field) for f in checked(tmp_path, data)] == [("annotation 1", "bbox")]
    copied, _ = fixed(data, folder)
    path = tmp_path / "fixed.json"
    path.write_text(json.dumps(copied))
    assert sum(len(r["annotations"]) for r in load_coco_json(path, folder)) == 5


# ---- what else tells


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y, w, h: [x, y, x + w, y + h],  # corners
        lambda x, y, w, h: [x / W, y / H, w / W, h / H],  # shares
    ],
)
def test_without_a_mask_the_area_is_the_witness(tmp_path, folder, wrong):
    data = whole(masks=False)
    for a in data["annotations"]:
        a["bbox"] = [float(v) for v in wrong(*a["bbox"])]
    assert checked(tmp_path, data)
    copied, _ = fixed(data, folder)
    assert len(copied["annotations"]) == 6
    assert lies_on_its_object(folder, copied)


def test_shares_without_a_witness_are_left_out(tmp_path, folder):
    data = whole(masks=False)
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x / W, y / H, w / W, h / H]
        del a["area"]
    assert any("shares of the image size" in f.what for f in checked(tmp_path, data))
    copied, done = fixed(data, folder)
    assert copied["annotations"] == []
    assert sum("left out" in f.what for f in done) == 6


def test_masks_in_shares_become_pixels(folder):
    data = whole()
    for a in data["annotations"]:
        a["segmentation"] = [[v / (W, H)[i % 2] for i, v in enumerate(a["segmentation"][0])]]
    copied, _ = fixed(data, folder)
    assert [a["bbox"] for a in copied["annotations"]] == [a["bbox"] for a in data["annotations"]]
    for found, meant in zip(copied["annotations"], whole()["annotations"], strict=True):
        np.testing.assert_allclose(found["segmentation"], meant["segmentation"])


def test_a_contradiction_that_nothing_explains_is_left_out(folder):
    """Box and mask lie apart, both of the size of the area: the others stay."""
    data = whole()
    data["annotations"][0]["segmentation"] = outline(70, 60, 30, 20)
    copied, done = fixed(data, folder)
    assert [a["id"] for a in copied["annotations"]] == [2, 3, 4, 5, 6]
    assert [f.where for f in done] == ["annotation 1"]


def test_keypoints_away_from_their_box(tmp_path, folder):
    data = whole()
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        a |= {"keypoints": [x, y, 2, x + w, y + h, 1, 0, 0, 0], "num_keypoints": 2}
    assert checked(tmp_path, data) == []
    data["annotations"][3]["keypoints"] = [100, 80, 2, 105, 85, 2, 0, 0, 0]
    [finding] = checked(tmp_path, data)
    assert (finding.where, finding.field) == ("annotation 4", "keypoints")
    copied, _ = fixed(data, folder)
    assert copied["annotations"][3]["keypoints"] == [0] * 9
    assert copied["annotations"][3]["num_keypoints"] == 0
    assert len(copied["annotations"]) == 6


def as_text(data):
    for a in data["annotations"]:
        a["bbox"], a["segmentation"] = str(a["bbox"]), json.dumps(a["segmentation"])


def with_commas(data):
    for a in data["annotations"]:
        a["bbox"] = ", ".join(map(str, a["bbox"]))


def as_tables(data):
    for key in ("images", "annotations", "categories"):
        data[key] = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in data[key]}


def without_endings(data):
    for image in data["images"]:
        image["file_name"] = image["file_name"].removesuffix(".png")


def under_another_key(data):
    for image in data["images"]:
        image["path"] = "/mnt/server/" + image.pop("file_name")


def without_categories(data):
    del data["categories"]


@pytest.mark.parametrize(
    "change",
    [as_text, with_commas, as_tables, without_endings, under_another_key, without_categories],
)
def test_what_other_programs_write_is_kept(tmp_path, folder, change):
    data = whole()
    change(data)
    copied, done = fixed(data, folder)
    assert done
    assert checked(tmp_path, copied, folder) == []
    assert len(copied["annotations"]) == 6
    assert lies_on_its_object(folder, copied)


def test_marks_that_are_characters_of_their_own(tmp_path, folder):
    """macOS takes letters apart: b, a, diaeresis, r."""
    data = whole(name="bär{}.png")
    for i in (1, 2):
        (folder / f"{i}.png").rename(folder / f"ba\u0308r{i}.png")
    copied, _ = fixed(data, folder)
    assert [i["file_name"] for i in copied["images"]] == ["ba\u0308r1.png", "ba\u0308r2.png"]


def test_an_ending_that_two_files_have_is_not_guessed(folder):
    (folder / "1.jpg").write_bytes((folder / "2.png").read_bytes())
    data = whole(name="{}")
    copied, done = fixed(data, folder)
    assert [i["file_name"] for i in copied["images"]] == ["2.png"]
    assert any("does not exist" in f.what for f in done)
