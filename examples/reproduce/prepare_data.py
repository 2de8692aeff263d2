"""The images of the results on real data, as folders of parquet files like any user's.

    apt-get install dataset-fashion-mnist && python examples/reproduce/prepare_data.py fashion_mnist data/fashion_mnist
    pip install elpv-dataset && python examples/reproduce/prepare_data.py elpv data/elpv

Fashion-MNIST (MIT): 60,000 + 10,000 grey images of 28x28, ten balanced classes, as the splits train and test.
elpv (CC BY-NC-SA 4.0, so not for commercial use): 2,624 grey electroluminescence photographs of solar cells, 300x300,
here resized once to 96x96 (PIL's antialiased bicubic filter), in five folds; see `elpv_cells`.
"""

import argparse
import gzip
import sys
from pathlib import Path

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


DATA_SETS = {"fashion_mnist": fashion_mnist, "elpv": elpv}


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
