"""Data sets on this disk: which files count, which folders are splits or classes, and what is refused."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import run_finetune
import run_pretrain
from hub import Hub
from PIL import Image
from test_run_pretrain import SMALL
from training.test_samples import encoded, pixels, upload_tables, which, write_folder, write_shards, write_table

from mae_hf.training.command_line import parse_recipe
from mae_hf.training.labels import Classes
from mae_hf.training.sources import ImageSource, class_weights, few_labels, hold_out, open_labelled, open_source
from mae_hf.training.tasks import FinetuneRecipe, ProbeRecipe

ROOT = Path(__file__).parents[2]
CLASSES = ["cat", "dog", "eel"]


def class_folders(folder: Path, first: int = 0, count: int = 2) -> str:
    """`count` images of each class, each image unlike any other."""
    for number, name in enumerate(CLASSES):
        for index in range(count):
            path = folder / name / f"{first + index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), (first + index, 80 * number, 0), dtype=np.uint8)).save(path)
    return str(folder)


def recipe(dataset: object, *words: str) -> FinetuneRecipe:
    return parse_recipe(FinetuneRecipe, ["--dataset", str(dataset), *words])


def names(source: ImageSource) -> list[str]:
    """The images' files, from their class on."""
    return ["/".join(Path(row["image"]["path"]).parts[-2:]) for row in source.images]


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


KINDS = ["folders", "flat", "parquet", "pattern of parquet", "shards", "save_to_disk", "digits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_split_that_is_not_there__is_refused(kind: str, streaming: bool, tmp_path: Path) -> None:
    if kind == "folders":
        dataset = class_folders(tmp_path / "data")
    elif kind == "flat":
        dataset = write_folder(tmp_path / "data", ["a.png", "b.png"])
    elif kind == "shards":
        dataset = write_shards(tmp_path / "data")
    elif kind == "digits":
        dataset = "digits"
    else:
        table = write_table()
        table.save_to_disk(tmp_path / "saved")
        table.to_parquet(tmp_path / "table.parquet")
        files = {"parquet": "table.parquet", "pattern of parquet": "*.parquet", "save_to_disk": "saved"}
        dataset = str(tmp_path / files[kind])
    assert open_source(dataset, "train", streaming=streaming)
    with pytest.raises(ValueError, match=r"no splits in it, all of it is 'train', so there is no split 'validation'"):
        open_source(dataset, "validation", streaming=streaming)


def test_evaluation_split_that_is_not_there__no_score_of_training_images(checkpoint: Path, tmp_path: Path) -> None:
    words = [
        "--dataset",
        class_folders(tmp_path / "data"),
        "--model_name_or_path",
        str(checkpoint),
        "--num_workers",
        "0",
    ]
    with pytest.raises(ValueError, match=r"no split 'validation'\. Take a share out of it with --eval_fraction"):
        run_finetune.main([*words, "--eval_split", "validation", "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("train", "evaluation", "asked"),
    [
        ("Training", "Testing", "test"),
        ("train", "val", "validation"),
        ("TRAIN", "VALID", "val"),
        ("imagenet_train", "imagenet_val", "validation"),
        ("train2017", "val2017", "val"),
        ("train_images", "test-images", "test"),
        ("seg_train", "seg_test", "seg_test"),
    ],
)
@pytest.mark.parametrize("beside", [None, "__MACOSX", "annotations", "devkit"])
def test_split_folders__in_any_case_with_affixes_and_others_beside(
    train: str, evaluation: str, asked: str, beside: str | None, tmp_path: Path
) -> None:
    class_folders(tmp_path / train, 0, 3)
    class_folders(tmp_path / evaluation, 100, 2)
    if beside is not None:
        write_folder(tmp_path / beside, ["other.png"])
    trained, eval_source = open_labelled(recipe(tmp_path, "--eval_split", asked))
    assert (trained.length, eval_source.length) == (9, 6)
    assert trained.label_names == eval_source.label_names == CLASSES
    assert not set(names(trained)) & set(names(eval_source))


def test_splits__more_than_one_that_may_be_meant_are_named(tmp_path: Path) -> None:
    for index, name in enumerate(("train", "val", "test")):
        class_folders(tmp_path / name, 50 * index)
    with pytest.raises(ValueError, match=r"no split 'holdout' in it; it has the splits test, train, val\."):
        open_source(str(tmp_path), "holdout")
    (tmp_path / "test").rename(tmp_path / "valid")
    with pytest.raises(ValueError, match=r"'validation' may be any of its splits val, valid: say which"):
        open_source(str(tmp_path), "validation")
    assert open_source(str(tmp_path), "valid").length == 6


def test_classes_called_like_a_split__are_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, ["train/a.png", "car/b.png", "plane/c.png"])  # vehicles
    assert open_source(str(tmp_path), labelled=True).label_names == ["car", "plane", "train"]


@pytest.mark.parametrize("split", ["train+test", "train[:50%]", "val[1:]"])
def test_part_of_a_split__is_refused_on_this_disk(split: str, tmp_path: Path) -> None:
    for name in ("train", "val"):
        class_folders(tmp_path / "split" / name)
    class_folders(tmp_path / "flat")
    for folder in ("split", "flat"):
        with pytest.raises(ValueError, match="is read from the Hub only: name one split"):
            open_source(str(tmp_path / folder), split)


def test_eval_fraction__says_that_a_picture_is_on_both_sides(tmp_path: Path) -> None:
    class_folders(tmp_path, 0, 8)
    for path in list(tmp_path.rglob("*.png")):
        shutil.copy(path, path.with_stem(f"{path.stem} again"))
    _, eval_source = open_labelled(recipe(tmp_path, "--eval_fraction", "0.25"))
    assert "evaluation images looked at are training images, too" in eval_source.summary


def test_eval_fraction__says_that_a_split_is_left_unused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 0, 4)
    class_folders(tmp_path / "val", 50, 2)
    _, eval_source = open_labelled(recipe(tmp_path, "--eval_fraction", "0.25"))
    assert "0.25 of the training images, and not the split val" in eval_source.summary
    _, eval_source = open_labelled(recipe(tmp_path / "train", "--eval_fraction", "0.25"))
    assert "and not the split" not in eval_source.summary


def test_one_class__is_nothing_to_tell_apart(tmp_path: Path) -> None:
    write_folder(tmp_path, ["cat/a.png", "cat/b.png"])
    with pytest.raises(ValueError, match=r"are of one class, 'cat', so that there is nothing to tell apart"):
        open_labelled(recipe(tmp_path, "--eval_fraction", "0.5"))


def test_eval_dataset__needs_no_split(tmp_path: Path) -> None:
    train, evaluation = class_folders(tmp_path / "a"), class_folders(tmp_path / "b", 100, 1)
    trained, eval_source = open_labelled(recipe(train, "--eval_dataset", evaluation))
    assert (trained.length, eval_source.length) == (6, 3)
    parts = class_folders(tmp_path / "parts" / "train", 50), class_folders(tmp_path / "parts" / "val", 60, 1)
    _, eval_source = open_labelled(recipe(train, "--eval_dataset", str(Path(parts[0]).parent)))
    assert eval_source.length == 3, "the only split for evaluation was not taken"


# ---------------------------------------------------------------------------------------------------------------------
# Training images in the evaluation set
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["the same folder", "another spelling", "a link", "copies", "a parquet of both"])
def test_evaluation_on_training_images__is_refused(way: str, tmp_path: Path) -> None:
    train = Path(class_folders(tmp_path / "a"))
    evaluation = {"the same folder": train, "another spelling": tmp_path / "x" / ".." / "a"}.get(way, tmp_path / "b")
    if way == "another spelling":
        (tmp_path / "x").mkdir()
    elif way == "a link":
        evaluation.symlink_to(train)
    elif way == "copies":
        shutil.copytree(train, evaluation)
    elif way == "a parquet of both":
        rows = {"image": [{"bytes": encoded(index), "path": None} for index in range(6)], "label": [0, 1] * 3}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / "a.parquet")
        shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
        train, evaluation = tmp_path / "a.parquet", tmp_path / "b.parquet"
    with pytest.raises(ValueError, match=r"evaluation set has to have other images than the training set, but"):
        open_labelled(recipe(train, "--eval_dataset", str(evaluation)))


def test_one_picture_twice__is_said_and_not_refused(tmp_path: Path) -> None:
    train, evaluation = Path(class_folders(tmp_path / "a", 0, 20)), Path(class_folders(tmp_path / "b", 100, 20))
    shutil.copy(train / "cat" / "0.png", evaluation / "cat" / "100.png")
    _, eval_source = open_labelled(recipe(train, "--eval_dataset", str(evaluation)))
    assert "1 of 60 evaluation images looked at are training images, too" in eval_source.summary


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------------------------------


def test_linked_class_folder__is_followed_and_a_circle_is_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ["cat/0.png", "dog/1.png"])
    write_folder(tmp_path / "elsewhere", ["2.png", "3.png"])
    (tmp_path / "data" / "eel").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "data" / "cat" / "self.png").symlink_to(tmp_path / "data" / "cat" / "self.png")
    source = open_source(str(tmp_path / "data"), labelled=True)
    assert names(source) == ["cat/0.png", "dog/1.png", "eel/2.png", "eel/3.png"]
    assert source.label_names == CLASSES
    assert "2 other files (gone.png, self.png)" in source.summary


@pytest.mark.parametrize(
    "stray",
    ["images.tar", "metadata.parquet", "embeddings.parquet", "photos.zip", "notes.txt", "clip.mpg", "features.h5"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_file_beside_images__is_left_out_and_said(stray: str, streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", ["a.png", "b/c.png"])
    if stray.endswith(".parquet"):
        datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "data" / stray)
    else:
        (tmp_path / "data" / stray).write_bytes(b"not an image")
    source = open_source(folder, streaming=streaming)
    assert sorted(which(row["image"]) for row in source.images) == [0, 1]
    assert f"left out: 1 other files ({stray})" in source.summary


def test_zip_alone__is_to_be_unpacked(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "zips" / "photos"), "zip", write_folder(tmp_path / "data", ["a.png"]))
    for dataset in (tmp_path / "zips", tmp_path / "zips" / "photos.zip"):
        with pytest.raises(ValueError, match=r"unpack photos\.zip first: archives other than \.tar are not read"):
            open_source(str(dataset))


PATTERNS = ["s-{000..002}.tar", "s-00?.tar", "s-00[0-2].tar", "{s-000,s-001,s-002}.tar", "*.tar"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_of_shards(pattern: str, tmp_path: Path) -> None:
    for index in range(3):
        with tarfile.open(tmp_path / f"s-00{index}.tar", "w") as shard:
            entry = tarfile.TarInfo(f"{index}.png")
            entry.size = len(encoded(index))
            shard.addfile(entry, io.BytesIO(encoded(index)))
    found = open_source(str(tmp_path / pattern), streaming=True).images
    assert sorted(which(row["image"]) for row in found) == [0, 1, 2]


def test_pattern_of_folders_and_a_gap_in_a_list(tmp_path: Path) -> None:
    write_folder(tmp_path, ["day1/a.png", "day2/b.png", "night/c.png"])
    assert [which(row["image"]) for row in open_source(f"{tmp_path}/day*").images] == [0, 1]
    with pytest.raises(ValueError, match=r"there is no .*/s-001\.tar"):
        open_source(f"{tmp_path}/s-{{001..003}}.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*", ["cat", "dog"]), ("{cat,dog}", ["cat", "dog"]), ("*/*.png", ["cat", "dog"]), ("c*", ["cat"])],
)
def test_pattern_of_class_folders__keeps_their_names(pattern: str, expected: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path, ["cat/a.png", "cat/wild/b.png", "dog/c.png"])
    assert open_source(f"{tmp_path}/{pattern}", labelled=True).label_names == expected


def test_pattern_of_folders_with_classes__has_those(tmp_path: Path) -> None:
    write_folder(tmp_path, ["part1/cat/a.png", "part1/dog/b.png", "part2/dog/c.png"])
    assert open_source(f"{tmp_path}/part*", labelled=True).label_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["train-00000-of-00002-7f3e", "train-00001-of-00002-ab12", "validation-00000-of-00001"],
            {"train": 2, "val": 1},
        ),
        (["train/part-val-0", "train/part-val-1", "test/part-val-0"], {"train": 2, "test": 1}),
        (["digits_train", "digits_test"], {"train": 1, "test": 1}),
        (["imgs-dev-board-000", "imgs-dev-board-001"], {"train": 2}),
        (["latest-test-rig", "my-validation-of-parts"], {"train": 2}),
    ],
)
def test_splits_of_tables__by_how_their_names_begin_or_end(
    files: list[str], expected: dict[str, int], tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"image": [encoded(1)]}).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / f"{file}.parquet"
        )
    assert {split: open_source(str(tmp_path), split).length for split in expected} == expected


@pytest.mark.parametrize(
    ("odd", "streaming"),
    [("no rows", False), ("other columns", False), ("numbers as images", False), ("numbers as images", True)],
)
def test_table_that_cannot_be_used__is_said_in_a_sentence(odd: str, streaming: bool, tmp_path: Path) -> None:
    write_table().select(range(0 if odd == "no rows" else 6)).to_parquet(tmp_path / "a.parquet")
    column = None
    if odd == "other columns":
        datasets.Dataset.from_dict({"picture": [1], "other": ["b"]}).to_parquet(tmp_path / "b.parquet")
    elif odd == "numbers as images":
        pq.write_table(pa.table({"number": [1, 2, 3]}), tmp_path / "a.parquet")
        column = "number"
    with pytest.raises(ValueError, match=r"cannot be opened|holds no images"):
        open_source(str(tmp_path), None, column, streaming)


@pytest.mark.parametrize("kind", ["bytes and path", "bytes alone"])
def test_table_that_does_not_say_what_is_an_image(kind: str, tmp_path: Path) -> None:
    """As pandas and polars write it, without the metadata of `datasets`."""
    rows = [{"bytes": encoded(3), "path": "3.png"} if kind == "bytes and path" else {"bytes": encoded(3)}]
    pq.write_table(pa.table({"photo": pa.array(rows), "embedding": [b"none"]}), tmp_path / "a.parquet")
    (row,) = open_source(str(tmp_path / "a.parquet")).images
    assert which(row["image"]) == 3


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_every_format_of_pillow__is_an_image(kind: str, tmp_path: Path) -> None:
    suffix = {"JPEG2000": "jp2", "TIFF": "TIF"}.get(kind, kind.lower())
    try:
        Image.fromarray(pixels(3)).save(tmp_path / f"a.{suffix}", kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow cannot write {kind}")
    (row,) = open_source(str(tmp_path)).images
    assert which(row["image"]) == 3


@pytest.mark.parametrize("name", ["a::b.png", "$HOME.png", "[x].png", "ä\n.png", "{a,b}.png", "~.png", "%41.png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_odd_file_name__is_an_image_of_that_name(name: str, streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", [name, "z.png"])
    source = open_source(folder, streaming=streaming)
    assert sorted(Path(row["image"]["path"]).name for row in source.images) == sorted([name, "z.png"])
    assert sorted(which(row["image"]) for row in source.images) == [0, 1]


def test_pipe_in_a_folder__is_no_file_and_waits_for_nobody(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", ["a.png"])
    for name in ("b.png", "c.parquet"):
        os.mkfifo(tmp_path / "data" / name)
    assert "2 other files (b.png, c.parquet)" in open_source(folder).summary
    with pytest.raises(ValueError, match=r"a file of images ends in"):
        open_source(str(tmp_path / "data" / "c.parquet"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata__what_it_does_not_list_is_said_and_what_is_not_there_refused(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", [f"{index}.png" for index in range(5)])
    rows = datasets.Dataset.from_dict({"file_name": ["1.png", "3.png"], "label": ["x", "y"]})
    write = rows.to_csv if kind == "csv" else rows.to_json
    write(tmp_path / "data" / f"metadata.{kind}")
    source = open_source(folder, labelled=True)
    assert [which(row["image"]) for row in source.images] == [1, 3]
    assert source.label_names == ["x", "y"]
    assert "3 images that its metadata do not list" in source.summary
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of its metadata are not there \(3\.png\)"):
        open_source(folder)


def test_class__is_the_outermost_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, ["train/cat/tom/0.png", "train/cat/kit/1.png", "train/dog/rex/2.png", "val/dog/a/3.png"])
    source = open_source(str(tmp_path), labelled=True)
    assert (source.label_names, [row["label"] for row in source.images]) == (["cat", "dog"], [0, 0, 1])


def test_images_beside_the_class_folders__have_no_class_and_are_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["cat/0.png", "dog/1.png", "readme.png"])
    assert "1 images beside the class folders (readme.png)" in open_source(folder, labelled=True).summary
    assert open_source(folder).length == 3, "without labels they count"


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe_class", [FinetuneRecipe, ProbeRecipe])
def test_eval_split__overrides_the_fraction_of_a_recipe_file(recipe_class: type, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("dataset: a/b\nmodel_name_or_path: a/c\neval_fraction: 0.2\n")
    words = ["--recipe", str(tmp_path / "mine.yaml")]
    assert parse_recipe(recipe_class, words).eval_fraction == 0.2
    for given, then in ((["--eval_split", "test"], (None, "test")), (["--eval_fraction=0.3"], (0.3, None))):
        found = parse_recipe(recipe_class, [*words, *given])
        assert (found.eval_fraction, found.eval_split) == then
    with pytest.raises(ValueError, match="leave eval_split or it out"):
        parse_recipe(recipe_class, [*words, "--eval_split", "test", "--eval_fraction", "0.3"])


@pytest.mark.parametrize("words", [["--eval_dataset"], ["--dataset"], ["--dataset", "{}", "--eval_split", "test"]])
def test_eval_only__takes_any_folder_of_the_classes(words: list[str], tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "new")
    if "--eval_split" in words:
        Path(folder).rename(tmp_path / "test")
        folder = str(tmp_path)
    words = [word.format(folder) for word in words] if "{}" in words else [*words, folder]
    if "--dataset" not in words:
        words = ["--dataset", "user/training-images-that-are-not-needed", *words]
    settings = parse_recipe(FinetuneRecipe, [*words, "--eval_only", "true", "--model_name_or_path", "runs/x"])
    _, eval_source = open_labelled(settings)
    assert (eval_source.length, eval_source.label_names) == (6, CLASSES)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("runs/quickstart", "To make it: accelerate launch examples/run_pretrain.py --recipe quickstart"),
        ("data/photso", "Did you mean data/photos?"),
        ("mydata/photso", "Did you mean mydata/photos?"),
        ("photos.parquet", "there is no such file or folder as photos.parquet"),
        ("./photso", "there is no such file or folder"),
    ],
)
def test_path_that_is_not_there__is_said_at_once_and_the_hub_not_asked(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "mydata"):
        write_folder(tmp_path / folder / "photos", ["a.png"])
    script = str(ROOT / "examples" / "run_finetune.py")
    dataset = ["--dataset", name, "--eval_fraction", "0.5"]
    model = ["--dataset", "data/photos", "--eval_fraction", "0.5", "--model_name_or_path", name]
    for words in (dataset, model):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=60)
        assert time.perf_counter() - started < 10, "the imports were waited for, or the Hub"
        assert done.returncode == 1
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client
def test_dataset_config__is_asked_for_and_heeded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_accelerate: None
) -> None:
    card = "---\nconfigs:\n- config_name: few\n  data_files: few.parquet\n"
    card += "- config_name: many\n  data_files: many.parquet\n---\n"
    api = upload_tables({"few.parquet": 6, "many.parquet": 8}, tmp_path)
    file = io.BytesIO(card.encode())
    api.upload_file(path_or_fileobj=file, path_in_repo="README.md", repo_id="user/pictures", repo_type="dataset")
    words = ["--dataset", "user/pictures", *SMALL, "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="it has the configurations few, many: say which with --dataset_config"):
        run_pretrain.main(words)
    run_pretrain.main([*words, "--dataset_config", "many"])
    assert "images    user/pictures, 8 images" in capsys.readouterr().out


def test_dataset_of_a_typo__by_main(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", ["a.png"])
    with pytest.raises(ValueError, match=r"Did you mean .*/photos\?"):
        run_pretrain.main(["--dataset", str(tmp_path / "photso"), "--output_dir", str(tmp_path / "run")])


# ---------------------------------------------------------------------------------------------------------------------
# Weights of classes
# ---------------------------------------------------------------------------------------------------------------------


def test_class_weights__are_scikit_learns_of_the_images_that_are_trained_on(tmp_path: Path) -> None:
    of_sklearn = pytest.importorskip("sklearn.utils.class_weight", reason="compared with scikit-learn")
    labels = [0] * 40 + [1] * 9 + [2] * 3 + [-1] * 5  # the last have no label
    images = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * len(labels), "label": labels})
    source = ImageSource("unequal", images, len(labels), Classes(CLASSES))
    kept, _ = hold_out(source, 0.3, seed=0)
    balanced = recipe("digits", "--eval_split", "test", "--class_weights", "balanced")
    for part in (source, kept):
        counted = [label for label in part.images["label"] if label >= 0]
        expected = of_sklearn.compute_class_weight("balanced", classes=np.arange(3), y=counted)
        assert class_weights(balanced, part).tolist() == pytest.approx(expected.tolist())
    assert class_weights(recipe("digits", "--eval_split", "test"), source) is None
    class_folders(tmp_path, count=4)
    (tmp_path / "eel" / "0.png").unlink()
    few, _ = open_labelled(recipe(tmp_path, "--eval_fraction", "0.25", "--labels_per_class", "2"))
    assert class_weights(balanced, few).tolist() == [1, 1, 1]


def test_class_weights__of_a_class_without_images_are_refused() -> None:
    images = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 3, "label": [0, 0, 1]})
    source = ImageSource("unequal", images, 3, Classes(CLASSES))
    with pytest.raises(ValueError, match=r"Classes without a training image have no weight \(1: eel\): leave class_w"):
        class_weights(recipe("digits", "--eval_split", "test", "--class_weights", "balanced"), source)


# ---------------------------------------------------------------------------------------------------------------------
# Many
# ---------------------------------------------------------------------------------------------------------------------


def test_many_rows__divided_as_one_by_one() -> None:
    count, classes = 5_000, 50
    labels = np.random.default_rng(0).integers(0, classes, count)
    images = datasets.Dataset.from_dict({"image": [None] * count, "label": labels})
    source = ImageSource("many", images, count, Classes([str(index) for index in range(classes)]))
    kept, held = hold_out(source, 0.1, seed=0)
    held_labels, kept_labels = (np.array(part.images["label"]) for part in (held, kept))
    for label in range(classes):
        members = int((labels == label).sum())
        assert (held_labels == label).sum() == max(1, round(0.1 * members))
        assert (kept_labels == label).sum() == members - max(1, round(0.1 * members))
    few = few_labels(source, 7, seed=0)
    assert (np.bincount(few.images["label"]) == 7).all()
