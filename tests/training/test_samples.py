"""Sources, decoding, transforms, and the order of the samples."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from PIL import Image
from tiny import four_patches

from mae_hf.training.augment import Normalize, eval_transform, image_processor, train_transform
from mae_hf.training.decode import decode_image
from mae_hf.training.evaluate import evaluation_batches
from mae_hf.training.order import PADDING, SampleKey, make_schedule, sample_keys
from mae_hf.training.samples import LabelledImages, PretrainingImages, batches
from mae_hf.training.sources import (
    ImageSource,
    few_labels,
    hold_out,
    image_order,
    open_labelled,
    open_source,
    select,
)
from mae_hf.training.tasks import FinetuneRecipe


def pixels(index: int, channels: int = 3) -> np.ndarray:
    """A 12x16 picture of one brightness, so that it can be told which one it is even through JPEG."""
    shape = (12, 16) if channels == 1 else (12, 16, channels)
    return np.full(shape, 10 * index + 5, dtype=np.uint8)


def encoded(index: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(index)).save(buffer, kind)
    return buffer.getvalue()


def which(record: dict) -> int:
    return round((decode_image(record, 1).float().mean().item() - 5) / 10)


def write_folder(folder: Path, names: list[str]) -> str:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(index, "JPEG" if name.endswith("jpg") else "PNG"))
    return str(folder)


def write_table(count: int = 6) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "note": datasets.Value("string")})
    rows = {"picture": [{"bytes": encoded(i), "path": None} for i in range(count)], "note": ["a"] * count}
    return datasets.Dataset.from_dict(rows, features=features)


def upload_tables(images: dict[str, int], folder: Path) -> HfApi:
    """The data set user/pictures on the Hub: tables by their path, of so many images each."""
    api = HfApi()
    api.create_repo("user/pictures", repo_type="dataset")
    for path, count in images.items():
        write_table(count).to_parquet(str(folder / "table.parquet"))
        api.upload_file(
            path_or_fileobj=folder / "table.parquet", path_in_repo=path, repo_id="user/pictures", repo_type="dataset"
        )
    return api


def write_parquet(folder: Path) -> str:
    folder.mkdir()
    write_table().to_parquet(str(folder / "train-00000.parquet"))
    return str(folder)


def write_arrow(folder: Path) -> str:
    folder.mkdir()
    write_table().save_to_disk(str(folder / "saved"))
    (shard,) = (folder / "saved").glob("data-*.arrow")
    return str(shard)


def write_saved(folder: Path) -> str:
    write_table().save_to_disk(str(folder))
    return str(folder)


def write_shards(folder: Path) -> str:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for index in range(3 * shard, 3 * shard + 3):
                for ending, content in ((".png", encoded(index)), (".txt", b"a note")):
                    info = tarfile.TarInfo(f"{index:04d}{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/part-*.tar"


SOURCES = {
    "flat folder": lambda path: write_folder(path, [f"{i}.jpg" for i in range(6)]),
    "labelled folder": lambda path: write_folder(path, [f"{'ab'[i // 3]}/{i}.png" for i in range(6)]),
    "parquet": write_parquet,
    "arrow": write_arrow,
    "saved to disk": write_saved,
    "webdataset": write_shards,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_open_source__every_image_once(kind: str, streaming: bool, tmp_path: Path) -> None:
    source = open_source(SOURCES[kind](tmp_path / "images"), streaming=streaming)
    assert source.is_stream == streaming
    assert sorted(which(row["image"]) for row in source.images) == list(range(6))
    assert str(tmp_path) not in source.name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", SOURCES)
def test_fingerprint__is_that_of_the_images_not_of_their_place(kind: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = SOURCES[kind](tmp_path / "one" / "images")
    before = open_source(path, streaming=streaming).fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "other disk")
    copy = path.replace("/one/", "/other disk/")
    assert open_source(copy, streaming=streaming).fingerprint == before
    assert json.loads(json.dumps(before)) == before
    if not streaming:
        assert before["images"] == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_fingerprint__tells_an_image_that_came_went_or_was_renamed(streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png"])
    prints = [open_source(folder, streaming=streaming).fingerprint]
    for change in (
        lambda: (tmp_path / "a" / "1.png").rename(tmp_path / "b" / "1.png"),
        lambda: write_folder(tmp_path, ["b/3.png"]),
        lambda: (tmp_path / "a" / "0.png").unlink(),
    ):
        change()
        prints.append(open_source(folder, streaming=streaming).fingerprint)
    assert len({print["names"] for print in prints}) == 4
    if not streaming:
        assert [print["images"] for print in prints] == [3, 3, 4, 3]


def test_open_source__digits_are_those_of_scikit_learn() -> None:
    digits = pytest.importorskip("sklearn.datasets", reason="the digits are inside scikit-learn").load_digits()
    source = open_source("digits")
    assert source.length == 1797
    image = decode_image(source.images[17]["image"], 1)
    assert torch.equal(image[0], torch.tensor((digits.images[17] * 255 / 16).round(), dtype=torch.uint8))


def test_open_source__splits_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["train/a/0.png", "train/b/1.png", "test/a/2.png"])
    assert [which(row["image"]) for row in open_source(folder, "test").images] == [2]
    assert open_source(folder, "train").length == 2
    with pytest.raises(ValueError, match="splits test, train"):
        open_source(folder, "validation")


def test_open_source__a_class_called_train_is_no_split(tmp_path: Path) -> None:
    # `datasets` by itself reads only the trains of such a folder.
    folder = write_folder(tmp_path, ["train/0.png", "car/1.png", "plane/2.png"])
    assert open_source(folder).length == 3


def test_open_source__brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    assert open_source(write_folder(tmp_path / "run [1]", ["0.png", "1.png"])).length == 2


def test_open_source__refuses_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match="no image file in"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"ends in \.parquet, \.arrow, \.tar"):
        open_source(str(tmp_path / "notes.txt"))

    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "words.parquet"))
    with pytest.raises(ValueError, match=r"0 columns of images among its columns \(text, label\)"):
        open_source(str(tmp_path / "words.parquet"))

    twice = datasets.concatenate_datasets(
        [write_table(), write_table().rename_columns({"picture": "again", "note": "n"})], axis=1
    )
    twice.to_parquet(str(tmp_path / "two.parquet"))
    with pytest.raises(ValueError, match="2 columns of images"):
        open_source(str(tmp_path / "two.parquet"))
    assert open_source(str(tmp_path / "two.parquet"), image_column="again").length == 6
    with pytest.raises(ValueError, match="no column 'agian'"):
        open_source(str(tmp_path / "two.parquet"), image_column="agian")


# --- decoding


def record_of(image: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


RED = Image.new("RGB", (4, 3), (200, 20, 40))
LOOKS_RED = {
    "RGB": record_of(RED),
    "RGBA": record_of(RED.convert("RGBA")),
    "palette": record_of(RED.convert("P")),
    "transparent palette": record_of(RED.convert("P"), transparency=bytes([0, 128, 255])),
    "CMYK": record_of(RED.convert("CMYK"), "TIFF"),
    "JPEG": record_of(RED, "JPEG", quality=95),
}


@pytest.mark.parametrize("kind", LOOKS_RED)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_image__every_mode_becomes_the_channels(kind: str, channels: int) -> None:
    image = decode_image(LOOKS_RED[kind], channels)
    assert image.shape == (channels, 3, 4)
    assert image.dtype == torch.uint8
    # A palette of 216 colours and JPEG move the colour a little; a lost or swapped channel moves it by over 100.
    expected = {1: [76], 3: [200, 20, 40], 4: [200, 20, 40]}[channels]
    assert (image.float().mean((1, 2))[:3] - torch.tensor(expected).float()).abs().max() < 30


def test_decode_image__16_bit_keeps_its_high_byte() -> None:
    values = np.array([[0, 256, 300], [40000, 65535, 255]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode_image(record_of(Image.fromarray(values), kind), 3)
        assert torch.equal(image[0], torch.tensor(values >> 8, dtype=torch.uint8)), kind


def test_decode_image__is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert decode_image(record_of(RED, "JPEG", exif=exif), 3).shape == (3, 4, 3)


def test_decode_image__names_the_file_it_cannot_read(tmp_path: Path) -> None:
    for name, content in (("text.jpg", b"not an image"), ("empty.png", b""), ("cut.png", encoded(1)[:50])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as an image"):
            decode_image({"bytes": None, "path": str(tmp_path / name)}, 3)
    with pytest.raises(ValueError, match="floats, which have no known range"):
        decode_image(record_of(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), 3)


# --- transforms


@pytest.mark.parametrize(("shape", "center_crop"), [((224, 224), 0.875), ((32, 32), 1.0), ((64, 96), 0.875)])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_processor__equals_the_eval_transform(shape: tuple[int, int], center_crop: float, channels: int) -> None:
    mean, std = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    image = torch.randint(0, 256, (channels, 190, 250), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = image_processor(shape, center_crop, mean, std)
    normalize = Normalize(mean, std, torch.device("cpu"))
    ours = normalize(eval_transform(shape, center_crop)(image))
    theirs = processor(image, return_tensors="pt").pixel_values[0]
    assert ours.shape == (channels, *shape)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(640, 427), (1920, 1080), (1080, 1920), (500, 375), (225, 224)])
def test_image_processor__cuts_the_centre_where_the_eval_transform_does(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ours = eval_transform((224, 224), 0.875)(Image.fromarray(noise))
    processor = image_processor((224, 224), 0.875, [0.5] * 3, [0.5] * 3)
    theirs = processor(Image.fromarray(noise), return_tensors="pt", do_normalize=False).pixel_values[0] * 255
    assert (ours - theirs).abs().max() < 0.01


def test_train_transform__crops_within_the_scale_and_flips_half() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64).clone()  # brightness says the column
    transform = train_transform((64, 64), [0.2, 1.0], horizontal_flip=True)
    torch.manual_seed(0)
    shares, flips = [], 0
    for _ in range(300):
        row = transform(ramp)[0, 32].float()
        shares.append(((row.max() - row.min()).abs() / 63).item())
        flips += int(row[-1] < row[0])
    # The smallest crop is 0.2 of the area at an aspect ratio of 3/4: sqrt(0.2 * 3/4) = 0.39 of the width.
    assert 0.36 < min(shares) < 0.5
    assert max(shares) > 0.95
    assert 120 < flips < 180
    never = train_transform((64, 64), [0.2, 1.0], horizontal_flip=False)
    assert all(never(ramp)[0, 32, 0] < never(ramp)[0, 32, -1] for _ in range(30))


def test_normalize__by_hand() -> None:
    normalize = Normalize([0.5, 0.25], [0.5, 0.1], torch.device("cpu"))
    out = normalize(torch.tensor([[[[255]], [[51]]]], dtype=torch.uint8))
    assert torch.allclose(out.flatten(), torch.tensor([1.0, -0.5]))


# --- order


def test_image_order__a_permutation_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(image_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 4
    assert tuple(image_order(50, 1, 1).tolist()) == orders[1, 1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("position", [0, 1, 5, 6, 7, 17, 18])
def test_sample_keys__from_a_position_is_the_rest_of_the_whole(streaming: bool, position: int, tmp_path: Path) -> None:
    source = open_source(write_shards(tmp_path / "shards"), streaming=streaming)
    whole = list(islice(sample_keys(source, seed=3, position=0, shuffle_buffer=4), 24))
    for epoch in range(4):  # every image once an epoch
        assert [key.epoch for key in whole[6 * epoch : 6 * epoch + 6]] == [epoch] * 6
        assert sorted(key.image_index for key in whole[6 * epoch : 6 * epoch + 6]) == list(range(6))
    if streaming:
        assert sorted(which(key.row["image"]) for key in whole[:6]) == list(range(6))
        assert len({tuple(which(key.row["image"]) for key in whole[6 * e : 6 * e + 6]) for e in range(4)}) > 1
    rest = list(islice(sample_keys(source, seed=3, position=position, shuffle_buffer=4), 24 - position))
    assert rest == whole[position:]


def test_stream__order_is_no_librarys_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_shards(tmp_path / "shards"), streaming=True)
    monkeypatch.delattr(datasets.IterableDataset, "shuffle")
    order = [which(key.row["image"]) for key in islice(sample_keys(source, 3, 0, shuffle_buffer=4), 18)]
    assert order == [1, 2, 4, 5, 3, 0, 1, 0, 5, 3, 4, 2, 3, 0, 2, 5, 1, 4]


def pretraining_images(source) -> PretrainingImages:
    return PretrainingImages(source, train_transform((8, 8), [0.2, 1.0], True), four_patches(3), seed=5)


def test_pretraining_images__depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, ["0.png", "1.png"]))
    images = pretraining_images(source)
    state = torch.get_rng_state()
    first = images[SampleKey(2, 1)]
    assert torch.equal(torch.get_rng_state(), state), "the sample drew from the global random numbers"
    images[SampleKey(0, 0)]
    torch.manual_seed(99)
    again = images[SampleKey(2, 1)]
    assert torch.equal(first["noise"], again["noise"])
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    other_noise = [images[key]["noise"] for key in (SampleKey(2, 0), SampleKey(1, 1), SampleKey(3, 1))]
    assert not any(torch.equal(first["noise"], noise) for noise in other_noise)


def test_pretraining_images__refuse_channels_that_files_do_not_have(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, ["0.png"]))
    with pytest.raises(ValueError, match="1, 3 or 4 channels, but num_channels is 7"):
        PretrainingImages(source, train_transform((8, 8), [0.2, 1.0], True), four_patches(7), seed=0)


def steps_of_noise(source, processes: int, workers: int = 0, first_step: int = 0) -> list[torch.Tensor]:
    """For every step the noise of its samples over all processes, sorted: a fingerprint of which samples it has."""
    schedule = make_schedule(
        source, epochs=3, total_batch_size=4, per_device_batch_size=2, num_processes=processes, images_per_epoch=6
    )
    loaders = [
        list(batches(pretraining_images(source), schedule, first_step, process, workers, shuffle_buffer=3))
        for process in range(processes)
    ]
    steps = []
    for step in range(schedule.total_steps - first_step):
        rounds = slice(step * schedule.rounds, (step + 1) * schedule.rounds)
        steps.append(torch.cat([batch["noise"] for loader in loaders for batch in loader[rounds]]).sort(0).values)
    return steps


@pytest.mark.parametrize("streaming", [False, True])
def test_batches__same_samples_for_any_processes_workers_and_interruption(streaming: bool, tmp_path: Path) -> None:
    source = open_source(write_shards(tmp_path / "shards"), streaming=streaming)
    one = steps_of_noise(source, processes=1)
    assert len(one) == 4  # 3 epochs of 6 images in batches of 4, the last incomplete one left out
    for other in (
        steps_of_noise(source, processes=2),
        steps_of_noise(source, processes=4),
        steps_of_noise(source, processes=1, workers=2),
        one[:3] + steps_of_noise(source, processes=2, first_step=3),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_make_schedule__derives_accumulation(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, [f"{i}.png" for i in range(10)]))
    schedule = make_schedule(source, 4, total_batch_size=16, per_device_batch_size=2, num_processes=4)
    assert (schedule.micro_batch_size, schedule.rounds) == (2, 2)
    assert schedule.total_steps == 2  # 40 samples; a batch larger than the images is filled by the next epoch
    assert make_schedule(source, 4, 16, per_device_batch_size=64, num_processes=1).rounds == 1
    assert make_schedule(source, 1, total_batch_size=64, per_device_batch_size=64, num_processes=1).total_steps == 1


def test_make_schedule__refuses_with_a_sentence(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, [f"{i}.png" for i in range(4)]))
    with pytest.raises(ValueError, match="total_batch_size 9 cannot be divided over 2 processes"):
        make_schedule(source, 1, 9, 4, num_processes=2)
    with pytest.raises(ValueError, match="cannot be divided into rounds of per_device_batch_size 4"):
        make_schedule(source, 1, 18, 4, num_processes=1)
    stream = open_source(write_shards(tmp_path / "shards"), streaming=True)
    with pytest.raises(ValueError, match="--images_per_epoch"):
        make_schedule(stream, 1, 2, 2, num_processes=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_open_source__by_name_from_the_hub(streaming: bool, hub: Hub, tmp_path: Path) -> None:
    upload_tables({"data/train-00000-of-00001.parquet": 6, "data/test-00000-of-00001.parquet": 2}, tmp_path)
    source = open_source("user/pictures", "test", streaming=streaming)
    assert source.name == "user/pictures"
    assert sorted(which(row["image"]) for row in source.images) == [0, 1]
    assert len(list(open_source("user/pictures", streaming=streaming).images)) == 6
    with pytest.raises(ValueError, match="validation"):
        open_source("user/pictures", "validation", streaming=streaming)


def labelled_folder(tmp_path: Path) -> Path:
    """Classes "cat" (10 images), "dog" (5) and "eel" (2); the grey value tells the image."""
    number = 0
    for name, count in (("cat", 10), ("dog", 5), ("eel", 2)):
        (tmp_path / name).mkdir()
        for _ in range(count):
            Image.new("L", (6, 6), number).save(tmp_path / name / f"{number:02d}.png")
            number += 1
    return tmp_path


def test_open_source__labels_of_class_folders_words_and_numbers(tmp_path: Path) -> None:
    source = open_source(str(labelled_folder(tmp_path)), labelled=True)
    assert source.label_names == ["cat", "dog", "eel"]
    assert source.images["label"][:] == [0] * 10 + [1] * 5 + [2] * 2
    rows = [{"image": row["image"], "kind": ["cat", "dog", "eel"][row["label"]]} for row in source.images]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "words.parquet")
    with pytest.raises(ValueError, match=r"0 columns of labels among its columns .*--label_column"):
        open_source(str(tmp_path / "words.parquet"), labelled=True)
    words = open_source(str(tmp_path / "words.parquet"), labelled=True, label_column="kind")
    assert (words.label_names, labels_of(words)) == (source.label_names, labels_of(source))
    with pytest.raises(ValueError, match="does not say what its labels are: give --num_labels"):
        open_source(str(tmp_path / "words.parquet"), labelled=True, label_column="kind", streaming=True)


def labels_of(source: ImageSource) -> list[int]:
    """The classes by both ways to them: all at once, and image by image; -1 for none."""
    together = source.classes.numbers_of(source.images).tolist()
    each = [source.classes.number_of(row["label"]) for row in source.images]
    assert together == [-1 if number is None else number for number in each]
    return together


LABELS = {
    "numbers": ([10, 2, 0, 1, 11], ["0", "1", "2", "10", "11"], [3, 2, 0, 1, 4]),
    "some missing": ([1, None, 0, 1, -1], ["0", "1"], [1, -1, 0, 1, -1]),
    "whole floats": ([1.0, float("nan"), 0.0, 12.0, 2.0], ["0", "1", "2", "12"], [1, -1, 0, 3, 2]),
    "words": (["b", None, "a", "10", "9"], ["10", "9", "a", "b"], [3, -1, 2, 0, 1]),
    "truth": ([True, False, None, True, True], ["False", "True"], [1, 0, -1, 1, 1]),
    "fractions": ([0.5, 1.0, 2.0, 3.0, 4.0], r"holds numbers that are not classes, 0\.5", None),
    "lists": ([[0], [1], [0], [1], [0]], "not one class for each image", None),
    "hidden": ([-1, -1, None, -1, -1], "has no labels: they are missing, or hidden", None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_open_source__labels_of_a_column(kind: str, tmp_path: Path) -> None:
    labels, names, numbers = LABELS[kind]
    rows = [{"image": {"bytes": encoded(index), "path": None}, "label": value} for index, value in enumerate(labels)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "labels.parquet")
    if numbers is None:
        with pytest.raises(ValueError, match=names):
            open_source(str(tmp_path / "labels.parquet"), labelled=True)
        return
    source = open_source(str(tmp_path / "labels.parquet"), labelled=True)
    assert source.label_names == names
    assert labels_of(source) == numbers


def test_open_labelled__the_evaluation_set_may_lack_classes_but_has_no_others(tmp_path: Path) -> None:
    for place, names in (("train", "abc"), ("held", "ca"), ("other", "ad")):
        for number, name in enumerate(names):
            (tmp_path / place / name).mkdir(parents=True)
            image = Image.new("RGB", (8, 8), (10 * number, ord(place[0]), ord(name)))
            image.save(tmp_path / place / name / f"{place}.png")
    (tmp_path / "held" / "b").mkdir()  # empty
    recipe = FinetuneRecipe(dataset=str(tmp_path / "train"), eval_dataset=str(tmp_path / "held"), eval_split="train")
    for streaming in (False, True):
        train, held = open_labelled(replace(recipe, streaming=streaming))
        assert held.label_names == train.label_names == ["a", "b", "c"]
        assert [held.classes.number_of(row["label"]) for row in held.images] == [0, 2]
    with pytest.raises(ValueError, match="has classes that the training images don't have: 'd'"):
        open_labelled(replace(recipe, eval_dataset=str(tmp_path / "other")))


def test_hold_out__a_class_of_one_image_is_trained(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source = open_source(str(labelled_folder(tmp_path / "images")), labelled=True)
    few = select(source, [0, 1, 2, 10, 15, 16])  # three cats, a dog, two eels
    train, held = hold_out(few, 0.4, seed=0)
    assert sorted(labels_of(train)) == [0, 0, 1, 2]
    assert sorted(labels_of(held)) == [0, 2]
    with pytest.raises(ValueError, match="has no class of two images"):
        hold_out(select(source, [0, 10, 15]), 0.4, seed=0)


def test_hold_out__stratified_disjoint_and_the_same_again(tmp_path: Path) -> None:
    source = open_source(str(labelled_folder(tmp_path)), labelled=True)
    train, held = hold_out(source, 0.2, seed=3)
    assert [held.images["label"][:].count(label) for label in range(3)] == [2, 1, 1]
    paths = [{row["image"]["path"] for row in part.images} for part in (train, held)]
    assert not paths[0] & paths[1]
    assert len(paths[0] | paths[1]) == 17
    assert hold_out(source, 0.2, seed=3)[1].images["image"][:] == held.images["image"][:]
    assert hold_out(source, 0.2, seed=4)[1].images["image"][:] != held.images["image"][:]


def test_few_labels__as_many_of_each_class_and_nested(tmp_path: Path) -> None:
    source = open_source(str(labelled_folder(tmp_path)), labelled=True)
    one, two = few_labels(source, 1, seed=0), few_labels(source, 2, seed=0)
    assert two.images["label"][:] == [0, 0, 1, 1, 2, 2]
    assert {r["image"]["path"] for r in one.images} < {r["image"]["path"] for r in two.images}
    with pytest.raises(ValueError, match="labels_per_class is 3, but there are 2 images of 'eel'"):
        few_labels(source, 3, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 4), (2, 4), (3, 5), (4, 30)])
def test_evaluation_batches__each_image_once(
    num_processes: int, batch_size: int, streaming: bool, tmp_path: Path
) -> None:
    source = open_source(str(labelled_folder(tmp_path)), labelled=True, streaming=streaming)
    images = LabelledImages(source, eval_transform((6, 6), 1.0), 1, seed=0)
    seen, counts = [], set()
    for process_index in range(num_processes):
        loaded = list(evaluation_batches(images, batch_size, process_index, num_processes, num_workers=0))
        counts.add(tuple(len(batch["label"]) for batch in loaded))
        for batch in loaded:
            real = batch["label"] != PADDING
            seen += zip(batch["pixel_values"][real, 0, 0, 0].tolist(), batch["label"][real].tolist(), strict=True)
    assert len(counts) == 1  # every process has the same batches to compute
    assert sorted(seen) == [(i, 0 if i < 10 else 1 if i < 15 else 2) for i in range(17)]
