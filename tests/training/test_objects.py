"""Images with boxes: the formats they come in, and every bad input with its sentence."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mae_hf.training.decode import BadImageError
from mae_hf.training.labels import Classes
from mae_hf.training.objects import has_masks, objects_of, open_objects
from mae_hf.training.sources import ImageSource
from mae_hf.training.tasks import DetectionRecipe

CATEGORIES = [{"id": 7, "name": "tree"}, {"id": 90, "name": "car"}]  # with gaps
SQUARE = [[2, 2, 10, 2, 10, 8, 2, 8]]


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(path)
    return path


def annotation(image: int, box: list[float] | None = None, category: int = 7, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "bbox": box or [2, 2, 8, 6], "category_id": category, **more}


def coco(folder: Path, name: str, numbers: list[int], annotations: list[dict], at: str = "", **content: Any) -> Path:
    """A file of COCO's annotations, and its images."""
    for number in numbers:
        picture(folder / at / f"{number}.png", number)
    listed = [{"id": number, "file_name": f"{number}.png", "width": 24, "height": 16} for number in numbers]
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": CATEGORIES, **content}))
    return file


def opened(dataset: Path | str, **settings: object) -> tuple[ImageSource, ImageSource]:
    return open_objects(DetectionRecipe(dataset=str(dataset), **{"eval_fraction": 0.34, **settings}))


def all_objects(source: ImageSource, with_masks: bool = False) -> dict[str, Any]:
    """Of each image, by the name of its file."""
    found = {}
    for row in source.images:
        path = row["image"]["path"]
        image = Image.open(path) if path else Image.new("RGB", (24, 16))
        found[Path(path or "none").name] = objects_of(row, image, source.classes, with_masks, "an image")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("", "annotations.json"),
        ("images", "annotations/instances.json"),
        ("train2017", "annotations/instances_train2017.json"),
    ],
)
def test_coco__wherever_the_images_lie(at: str, name: str, tmp_path: Path) -> None:
    annotations = [annotation(1), annotation(1, [0, 0, 4, 4], 90), annotation(3, iscrowd=1), annotation(4)]
    coco(tmp_path, name, [1, 2, 3, 4], annotations, at)
    train, evaluation = opened(tmp_path)
    assert (train.length, evaluation.length) == (3, 1)
    assert train.label_names == ["tree", "car"]
    found = all_objects(train) | all_objects(evaluation)
    assert found["1.png"].boxes.tolist() == [[2, 2, 10, 8], [0, 0, 4, 4]]
    assert found["1.png"].labels.tolist() == [0, 1]
    assert len(found["2.png"]) == 0, "an image without objects is kept"
    assert found["3.png"].is_crowd.tolist() == [True]


@pytest.mark.parametrize("layout", ["coco", "roboflow"])
def test_coco__splits_by_the_names_of_files_or_folders(layout: str, tmp_path: Path) -> None:
    for split, images in (("train", [1, 2, 3]), ("val", [4, 5])):
        annotations = [annotation(number) for number in images]
        if layout == "coco":
            coco(tmp_path, f"annotations/instances_{split}2017.json", images, annotations, f"{split}2017")
        else:
            coco(tmp_path / split, "_annotations.coco.json", images, annotations)
    (tmp_path / "captions_train2017.json").write_text('{"annotations": []}')
    train, evaluation = opened(tmp_path, eval_fraction=None, eval_split="validation")
    assert (train.length, evaluation.length) == (3, 2)
    assert "no object of 1 classes (car)" in train.summary


def test_coco__a_file_by_itself_and_masks(tmp_path: Path) -> None:
    annotations = [annotation(number, [2, 2, 8, 6], segmentation=SQUARE) for number in (1, 2, 3)]
    train, _ = opened(coco(tmp_path, "some.json", [1, 2, 3], annotations))
    assert has_masks(train)
    (objects, *_) = all_objects(train, with_masks=True).values()
    assert objects.masks.shape == (1, 16, 24)
    assert objects.masks[0, 2:8, 2:10].float().mean() > 0.9
    assert objects.masks.sum() <= 7 * 9
    bare, _ = opened(coco(tmp_path, "bare.json", [1, 2, 3], [annotation(1), annotation(2), annotation(3)]))
    assert not has_masks(bare)


@pytest.mark.parametrize(
    ("images", "annotations", "content", "sentence"),
    [
        ([1, 2, 2], [], {}, "two images of the id 2"),
        ([1, 2], [annotation(9)], {}, "1 annotations in .* are of images it does not list, 9 first"),
        ([1, 2], [], {"categories": [*CATEGORIES, CATEGORIES[0]]}, "two categories of the same id"),
        ([1, 2], [{"image_id": 1}], {}, "is not a file of COCO's annotations: KeyError: 'bbox'"),
        (
            [1, 2],
            [],
            {"images": [{"id": 1, "file_name": "gone.png"}]},
            r"1 images that all.json lists are not there \(gone",
        ),
    ],
)
def test_coco__refused(images: list, annotations: list, content: dict, sentence: str, tmp_path: Path) -> None:
    file = coco(tmp_path, "all.json", images, annotations, **content)
    with pytest.raises(ValueError, match=sentence):
        opened(file)


def test_coco__broken_json_and_several_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"annotations": [')
    with pytest.raises(ValueError, match=r"annotations of .*broken.json.* cannot be read"):
        opened(tmp_path / "broken.json")
    coco(tmp_path / "two", "a.json", [1], [])
    coco(tmp_path / "two", "b.json", [2], [])
    with pytest.raises(ValueError, match=r"several files of annotations \(a.json, b.json\): name one as --dataset"):
        opened(tmp_path / "two")


def test_coco__evaluation_set_with_other_classes_is_refused(tmp_path: Path) -> None:
    train = coco(tmp_path / "a", "a.json", [1, 2], [annotation(1)])
    bird = [{"id": 1, "name": "bird"}]
    other = coco(tmp_path / "b", "b.json", [3], [annotation(3, category=1)], categories=bird)
    with pytest.raises(ValueError, match=r"classes that the training images don't have: 'bird'. Theirs are"):
        opened(train, eval_fraction=None, eval_dataset=str(other))
    some = coco(tmp_path / "c", "c.json", [4], [annotation(4, category=3)], categories=[{"id": 3, "name": "car"}])
    _, evaluation = opened(train, eval_fraction=None, eval_dataset=str(some))
    assert all_objects(evaluation)["4.png"].labels.tolist() == [1], "under the number of the training images"


def yolo(root: Path, lines: dict[int, str], names: str | None = "names: [tree, car]") -> Path:
    for number in range(1, 5):
        picture(root / "images" / f"{number}.png", number)
    for number, text in lines.items():
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{number}.txt").write_text(text)
    if names is not None:
        (root / "data.yaml").write_text(names)
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [("names: [tree, car]", ["tree", "car"]), ("names:\n  0: tree\n  1: car", ["tree", "car"]), (None, ["0", "1"])],
)
def test_yolo__boxes_are_shares_around_their_centre(names: str | None, expected: list[str], tmp_path: Path) -> None:
    yolo(tmp_path, {1: "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.5\n", 2: "", 3: "0 0.5 0.5 1 1"}, names)
    train, evaluation = opened(tmp_path)
    assert train.label_names == expected
    found = all_objects(train) | all_objects(evaluation)
    assert found["1.png"].boxes.tolist() == [[9, 4, 15, 12], [0, 0, 12, 8]]
    assert found["1.png"].labels.tolist() == [1, 0]
    assert [len(found[f"{number}.png"]) for number in (2, 3, 4)] == [0, 1, 0]
    assert "1 images without a file of boxes count as without objects" in train.summary


@pytest.mark.parametrize(
    ("lines", "names", "sentence"),
    [
        ({1: "0 0.5 0.5 0.25"}, "names: [a]", "Line 1 of .*1.txt is not a class and four numbers"),
        ({1: "tree 0.5 0.5 0.2 0.2"}, "names: [a]", "Line 1 of .*1.txt is not a class"),
        ({1: "4 0.5 0.5 0.2 0.2"}, "names: [a]", "are of class 4, which has no name"),
        ({9: "0 0.5 0.5 0.2 0.2"}, "names: [a]", r"1 files of boxes have no image of their name \(9.txt\)"),
        ({1: "0 0.5 0.5 0.2 0.2"}, "names: [a", "data.yaml cannot be read"),
    ],
)
def test_yolo__refused(lines: dict, names: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        opened(yolo(tmp_path, lines, names))


@pytest.mark.parametrize("of_structures", [True, False])
def test_table__of_the_hubs_objects(of_structures: bool, tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["tree", "car"])
    box = datasets.List(datasets.Value("float32"))
    if of_structures:
        objects = datasets.List({"bbox": box, "category": label})
        rows = [[{"bbox": [2, 2, 8, 6], "category": 1}], [], [{"bbox": [0, 0, 2, 2], "category": 0}]]
    else:
        objects = {"bbox": datasets.List(box), "category": datasets.List(label)}
        rows = [{"bbox": [], "category": []}]
        rows += [{"bbox": [[2, 2, 8, 6]], "category": [1]}, {"bbox": [[0, 0, 2, 2]], "category": [0]}]
    images = [Image.open(picture(tmp_path / f"{number}.png", number)) for number in range(3)]
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    table = datasets.Dataset.from_dict({"image": images, "objects": rows}, features=features)
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "all.parquet")
    train, evaluation = opened(tmp_path / "table")
    assert train.label_names == ["tree", "car"]
    found = []
    for source in (train, evaluation):
        for row in source.images:
            found.append(objects_of(row, Image.new("RGB", (24, 16)), source.classes, False, "an image"))
    boxes = sorted(tuple(objects.boxes.flatten().tolist()) for objects in found)
    assert boxes == [(), (0, 0, 2, 2), (2, 2, 10, 8)]
    with pytest.raises(ValueError, match="has no column 'boxes' with the boxes of each image"):
        opened(tmp_path / "table", objects_column="boxes")
    with pytest.raises(ValueError, match=r"must have bbox .* and category, but has neither"):
        opened(tmp_path / "table", objects_column="image")


# ---------------------------------------------------------------------------------------------------------------------
# Objects that cannot be used
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = Classes(["tree", "car"], {7: 0, 90: 1})


def row(box: Any, category: Any = 7, mask: Any = None) -> dict[str, Any]:
    segmentation = ["" if mask is None else json.dumps(mask)]
    return {"objects": {"bbox": [box], "category": [category], "iscrowd": [False], "segmentation": segmentation}}


@pytest.mark.parametrize(
    ("given", "with_masks", "sentence"),
    [
        (row([2, 2, 0, 5]), False, "its box 0, .2, 2, 0, 5., has no area"),
        (row([2, 2, 3, -1]), False, "has no area"),
        (row([30, 2, 5, 5]), False, "is outside of the image, which has 24x16 pixels"),
        (row([2, -9, 5, 5]), False, "is outside of the image"),
        (row([2, 2, 5]), False, "is not four numbers"),
        (row([2, float("nan"), 5, 5]), False, "is not four numbers"),
        (row(None), False, "is not four numbers"),
        (row([2, 2, 5, 5], 8), False, "is of the category 8, which is none of the 2"),
        ({"objects": {"bbox": [[1, 1, 2, 2]], "category": []}}, False, "has 1 boxes, but 0 classes"),
        (row([2, 2, 5, 5]), True, "has no mask, and instance_masks asks for one"),
        (row([2, 2, 5, 5], 7, [[1, 1, 5, 5]]), True, "has a polygon of 2 points as its mask"),
        (row([2, 2, 5, 5], 7, {"size": [9, 9], "counts": [81]}), True, "has a mask of 9x9 pixels, its image 24x16"),
        (row([2, 2, 5, 5], 7, {"counts": "x"}), True, "has a mask that cannot be read"),
    ],
)
def test_objects__refused_with_their_sentence(given: dict, with_masks: bool, sentence: str) -> None:
    if with_masks:
        pytest.importorskip("faster_coco_eval", reason="pip install faster-coco-eval")
    with pytest.raises(BadImageError, match=f"^photo 3.*{sentence}"):
        objects_of(given, Image.new("RGB", (24, 16)), CLASSES, with_masks, "photo 3")


def test_objects__that_reach_beyond_the_image_are_cut_off() -> None:
    found = objects_of(row([-3, 10, 10, 20]), Image.new("RGB", (24, 16)), CLASSES, False, "photo 3")
    assert found.boxes.tolist() == [[0, 10, 7, 16]]


def test_objects__none_are_none() -> None:
    for empty in ({"objects": None}, {"objects": []}, {"objects": {"bbox": [], "category": []}}):
        found = objects_of(empty, Image.new("RGB", (24, 16)), CLASSES, True, "photo 3")
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
        assert found.masks.shape == (0, 16, 24)
        assert found.labels.dtype == torch.int64
