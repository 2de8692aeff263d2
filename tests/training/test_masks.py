"""Images with maps: which belong together, which classes there are, and every bad input with its sentence."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mae_hf.training.decode import BadImageError, decode_map
from mae_hf.training.masks import MapClasses, open_map, open_masked
from mae_hf.training.tasks import SegmentationRecipe


def save(folder: Path, name: str, values: np.ndarray | None = None, mode: str | None = None) -> Path:
    """A picture of 8x6 pixels, or a map of given values."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if values is None:
        values = np.random.default_rng(len(name)).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def halves(left: int, right: int) -> np.ndarray:
    values = np.full((6, 8), left, dtype=np.uint8)
    values[:, 4:] = right
    return values


def pairs(root: Path, count: int = 6, **names: str) -> Path:
    """A folder of images, and beside it their maps with the classes 0, 1 and 2."""
    for index in range(count):
        save(root / names.get("images", "images"), f"{index}.jpg")
        save(root / names.get("masks", "masks"), f"{index}{names.get('suffix', '')}.png", halves(0, 1 + index % 2))
    return root


def opened(dataset: Path | str, **settings: object):
    words = {"eval_fraction": 0.34, **settings}
    return open_masked(SegmentationRecipe(dataset=str(dataset), **words))


# ---------------------------------------------------------------------------------------------------------------------
# Where images and maps lie
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"images": "imgs", "masks": "labels"},
        {"images": "JPEGImages", "masks": "SegmentationClass"},
        {"suffix": "_mask"},
        {"images": "train_images", "masks": "annotations"},
    ],
)
def test_folder__of_images_and_masks_by_stem(names: dict, tmp_path: Path) -> None:
    train, evaluation, classes = opened(pairs(tmp_path, **names))
    assert (train.length, evaluation.length) == (4, 2)
    assert classes.names == ["0", "1", "2"]
    rows = [*train.images, *evaluation.images]
    assert {Path(row["image"]["path"]).stem for row in rows} == set("012345")
    for row in rows:
        assert Path(row["mask"]["path"]).stem == Path(row["image"]["path"]).stem + names.get("suffix", "")


@pytest.mark.parametrize("above", [True, False])
def test_folder__splits_above_or_within(above: bool, tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 3)):
        place = tmp_path / split if above else tmp_path
        inner = "" if above else f"/{split}"
        pairs(place, count, images=f"images{inner}", masks=f"masks{inner}")
        for path in place.glob(f"images{inner}/*"):  # other images in the other split
            Image.effect_noise((8, 6), 60 + count).save(path)
    train, evaluation, _ = opened(tmp_path, eval_fraction=None, eval_split="validation")
    assert (train.length, evaluation.length) == (5, 3)
    with pytest.raises(ValueError, match="both are read from"):
        opened(tmp_path, eval_fraction=None, eval_split="train")


def test_folder__what_has_no_partner_is_left_out_and_said(tmp_path: Path) -> None:
    pairs(tmp_path)
    save(tmp_path / "images", "alone.jpg")
    save(tmp_path / "masks", "lost.png", halves(0, 1))
    train, *_ = opened(tmp_path)
    assert "1 images without a map (alone.jpg); 1 maps without an image (lost.png)" in train.summary


def test_folder__refuses_names_that_fit_twice_or_never(tmp_path: Path) -> None:
    pairs(tmp_path / "twice")
    save(tmp_path / "twice" / "images", "0.png")
    with pytest.raises(ValueError, match=r"0.jpg and .*0.png have the same name but for their ends"):
        opened(tmp_path / "twice")
    for index in range(3):
        save(tmp_path / "never" / "images", f"a{index}.jpg")
        save(tmp_path / "never" / "masks", f"b{index}.png", halves(0, 1))
    with pytest.raises(ValueError, match="no file in masks has the name of one in images"):
        opened(tmp_path / "never")


def test_table__of_two_columns(tmp_path: Path) -> None:
    pairs(tmp_path / "files")
    names = sorted(path.stem for path in (tmp_path / "files" / "images").iterdir())
    columns = {
        "picture": [str(tmp_path / "files" / "images" / f"{name}.jpg") for name in names],
        "label": [str(tmp_path / "files" / "masks" / f"{name}.png") for name in names],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table = table.cast_column("label", datasets.Image())
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")
    train, evaluation, classes = opened(tmp_path / "table")
    assert (train.length, evaluation.length, len(classes.names)) == (4, 2, 3)
    assert set(train.images.column_names) == {"image", "mask"}
    with pytest.raises(ValueError, match=r"has no column 'lable'. Did you mean 'label'"):
        opened(tmp_path / "table", mask_column="lable")
    table.rename_column("label", "second").to_parquet(tmp_path / "table" / "train.parquet")
    with pytest.raises(ValueError, match="say which one to use with --mask_column, or put the images in a folder"):
        opened(tmp_path / "table")
    assert opened(tmp_path / "table", mask_column="second")[0].length == 4


def test_labelled_images__are_few_and_the_same_for_a_seed(tmp_path: Path) -> None:
    def names(count: int, seed: int = 0) -> set[str]:
        train, *_ = opened(tmp_path, labelled_images=count, seed=seed, eval_fraction=None, eval_dataset=str(other))
        return {row["image"]["path"] for row in train.images}

    pairs(tmp_path, 12)
    other = pairs(tmp_path.parent / f"{tmp_path.name}_other", 2)
    for path in (other / "images").iterdir():
        Image.effect_noise((8, 6), 90).save(path)
    assert len(names(3)) == 3
    assert names(3) < names(5)
    assert names(5) == names(5) != names(5, seed=1)
    with pytest.raises(ValueError, match="labelled_images is 13, but there are 12"):
        names(13)


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


def with_maps(root: Path, *maps: np.ndarray, mode: str | None = None) -> Path:
    for index, values in enumerate(maps):
        save(root / "images", f"{index}.jpg")
        save(root / "masks", f"{index}.png", values, mode)
    return root


def classes_in(root: Path, classes: MapClasses, index: int = 0) -> list[int]:
    row = {"mask": {"bytes": None, "path": str(root / "masks" / f"{index}.png")}}
    found = open_map(row, Image.open(root / "images" / f"{index}.jpg"), classes, "an image")
    return sorted(set(found.flatten().tolist()))


def test_classes__are_the_values_that_occur_without_the_ignored_one(tmp_path: Path) -> None:
    root = with_maps(tmp_path, halves(0, 7), halves(3, 255), halves(7, 3), halves(0, 3))
    _, _, classes = opened(root)
    assert classes.names == ["0", "3", "7"]
    assert classes_in(root, classes, 0) == [0, 2]
    assert classes_in(root, classes, 1) == [1, 255]


def test_classes__black_and_white_maps_are_two(tmp_path: Path) -> None:
    root = with_maps(tmp_path, *[halves(0, 255)] * 4)
    _, _, classes = opened(root)
    assert classes.names == ["0", "255"]
    assert classes_in(root, classes) == [0, 1]
    assert classes.background == 0


def test_reduce_labels__zero_is_unknown(tmp_path: Path) -> None:
    root = with_maps(tmp_path, halves(0, 1), halves(2, 0), halves(1, 2), halves(2, 1))
    _, _, classes = opened(root, reduce_labels=True)
    assert classes.names == ["1", "2"]
    assert classes_in(root, classes) == [0, 255]


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("grass\nroof\nwater\n", ["grass", "roof", "water"], [0, 1]),
        ("# of the town\n\n0 grass\n1 roof\n9: water", ["grass", "roof", "water"], [0, 1]),
        ("1,roof\n0,grass", ["roof", "grass"], [0, 1]),
        ("0 grass\n1 ignore\n2 water", ["grass", "water"], [0, 255]),
    ],
)
def test_class_list__by_name_and_by_value(text: str, names: list, found: list, tmp_path: Path) -> None:
    root = with_maps(tmp_path, *[halves(0, 1)] * 4)
    (root / "classes.txt").write_text(text)
    _, _, classes = opened(root)
    assert classes.names == names
    assert classes_in(root, classes) == found


@pytest.mark.parametrize(
    "text", ["#000000 street\n#ff8000 roof\n#ffffff ignore", "0 0 0 street\n255,128,0\troof\n255 255 255 ignore"]
)
def test_class_list__of_colours(text: str, tmp_path: Path) -> None:
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[2:4] = [255, 128, 0]
    colours[4:] = 255
    root = with_maps(tmp_path, colours, colours, colours * 0, colours)
    (tmp_path / "list.txt").write_text(text)
    _, _, classes = opened(root, class_list=str(tmp_path / "list.txt"))
    assert classes.names == ["street", "roof"]
    assert classes_in(root, classes) == [0, 1, 255]
    assert classes_in(root, classes, 2) == [0]  # which, all black, is read as grey


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grass\ngrass", "has a name twice"),
        ("1 grass\n1 roof", "has a value twice"),
        ("1 grass\nroof", "has name and number at the beginning of its lines"),
        ("300 0 0 grass\n0 0 0 roof", "'300 0 0' is not a colour"),
        ("70000 grass\n1 roof", "maps have at most 65535"),
        ("grass", "1 classes .* nothing to tell apart"),
    ],
)
def test_class_list__refused(text: str, sentence: str, tmp_path: Path) -> None:
    root = with_maps(tmp_path, *[halves(0, 1)] * 4)
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        opened(root)
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read"):
        opened(root, class_list="nowhere.txt")


def test_colours_without_a_list__are_refused(tmp_path: Path) -> None:
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[2:] = [255, 0, 0]
    root = with_maps(tmp_path, *[colours] * 4)
    with pytest.raises(ValueError, match=r"are pictures in colours, .*png for instance: list the colours"):
        opened(root)


def test_grey_levels__are_no_classes(tmp_path: Path) -> None:
    levels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    maps = [np.asarray(Image.fromarray(levels.astype(np.uint16) + 48 * k)) for k in range(12)]
    root = with_maps(tmp_path, *maps)
    with pytest.raises(ValueError, match=r"more than 256 values, .* rather grey levels than classes"):
        opened(root)


def test_evaluation_set__with_other_classes_is_refused(tmp_path: Path) -> None:
    for split, right in (("train", 1), ("val", 5)):
        for index in range(3):
            save(tmp_path / split / "images", f"{split}{index}.jpg")
            save(tmp_path / split / "masks", f"{split}{index}.png", halves(0, right))
    with pytest.raises(ValueError, match="evaluation set has the values 5 in its maps, which no training map has"):
        opened(tmp_path, eval_fraction=None, eval_split="val")
    (tmp_path / "classes.txt").write_text("0 a\n1 b\n5 c")
    assert opened(tmp_path, eval_fraction=None, eval_split="val")[2].names == ["a", "b", "c"]


def test_one_class__is_refused(tmp_path: Path) -> None:
    root = with_maps(tmp_path, *[halves(0, 0)] * 4)
    with pytest.raises(ValueError, match=r"1 classes .0.,"):
        opened(root)


def test_more_classes_than_the_ignored_value__are_refused(tmp_path: Path) -> None:
    root = with_maps(tmp_path, *[halves(0, 1)] * 4)
    (root / "classes.txt").write_text("\n".join(f"class {number}" for number in range(300)))
    with pytest.raises(ValueError, match="300 classes, so that ignore_index 255 is one of their numbers"):
        opened(root)
    assert len(opened(root, ignore_index=65535)[2].names) == 300


# ---------------------------------------------------------------------------------------------------------------------
# Maps that cannot be used
# ---------------------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG") -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


TWO = MapClasses(["a", "b"], {0: 0, 1: 1}, False, 255, frozenset({255}))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (encoded(Image.fromarray(halves(0, 1)).resize((9, 6))), "has 9x6 pixels, but its image 8x6"),
        (encoded(Image.fromarray(halves(0, 12))), "has the value 12, which is none of the 2 classes"),
        (encoded(Image.new("RGB", (8, 6), "red")), "is a picture in colours, but the classes are numbers"),
        (encoded(Image.new("L", (8, 6)), "JPEG"), "a JPEG changes the values of pixels"),
        (encoded(Image.new("F", (8, 6)), "TIFF"), "mode F, neither numbers nor colours"),
        ({"bytes": b"", "path": None}, "it is empty"),
        ({"bytes": b"no picture", "path": None}, "its bytes begin like no format of images"),
        ({"bytes": None, "path": "gone.png"}, "gone.png cannot be read as a map: .*No such file"),
        (None, "there is none"),
    ],
)
def test_map__refused_with_its_sentence(mask: dict | None, sentence: str) -> None:
    with pytest.raises(BadImageError, match=sentence):
        open_map({"mask": mask}, Image.new("RGB", (8, 6)), TWO, "photo 3")


@pytest.mark.parametrize("kind", ["palette", "one bit", "16 bits", "grey in colours", "grey and transparency", "TIFF"])
def test_map__of_any_kind_of_picture_has_its_values(kind: str) -> None:
    values = halves(0, 1)
    picture = Image.fromarray(values)
    if kind == "palette":
        picture.putpalette([200, 10, 10, 10, 200, 10])
        assert picture.mode == "P"
    elif kind == "one bit":
        picture = Image.fromarray(values * 255).convert("1")
    elif kind == "16 bits":
        picture = Image.fromarray(values.astype(np.uint16))
    elif kind == "grey in colours":
        picture = picture.convert("RGB")
    elif kind == "grey and transparency":
        picture = picture.convert("LA")
    found = decode_map(encoded(picture, "TIFF" if kind == "TIFF" else "PNG"))
    assert found.shape == (6, 8)
    assert (found == values).all()
