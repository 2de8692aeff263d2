"""How fast one core turns JPEG files into batches, beside the original's PIL pipeline: images per second of CPU time.

    python examples/benchmarks/benchmark_loading.py PHOTOS   # JPEGs, ImageNet-sized for instance
    python examples/benchmarks/benchmark_loading.py PHOTOS --large_from FOLDER  # and 12 Mpixel ones of FOLDER

One thread, no worker processes: a training process with W workers on W free cores loads W times as much. The sides take
turns, in another order every round, and each round sees other crops; printed are the median and the range over the
rounds, and the median of the ratios to the original within a round. The last line is all of it as JSON.

Every side ends in a batch. The original's is normalised, in floats; ours is in bytes, which the training process
normalises on its device (`Normalize`), as one operation for the batch: `--normalized` counts that operation as loading,
too. The files are in the machine's cache after the first round, which is not counted.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms

from mae_hf import MAEConfig
from mae_hf.training.augment import Normalize, SmallestCrop, train_transform
from mae_hf.training.decode import decode_image, open_image
from mae_hf.training.order import SampleKey
from mae_hf.training.samples import PretrainingImages
from mae_hf.training.sources import open_source
from mae_hf.training.starting_weights import IMAGENET_MEAN, IMAGENET_STD

SIZE, CROP_SCALE = 224, [0.2, 1.0]
LARGE_SHAPE, LARGE_COUNT = (4000, 3000), 8
ENDINGS = (".jpg", ".jpeg", ".png")

Load = Callable[[int, range], list[dict[str, Any]]]  # (round, numbers of the images) -> the samples of a batch


def original(files: list[Path], draft: bool = False) -> Load:
    """The pipeline of the paper's repository: PIL all through, floats at the end.

    Args:
        files: images.
        draft: let libjpeg reduce the image, as far as the smallest crop allows; the original does not.
    """
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, tuple(CROP_SCALE), interpolation=Image.Resampling.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    smallest = SmallestCrop(CROP_SCALE[0], (SIZE, SIZE))

    def load(number: int) -> dict[str, Tensor]:
        with Image.open(files[number % len(files)]) as image:
            if draft:
                reduction = smallest.reduction(*image.size)
                image.draft("RGB", (image.width // reduction, image.height // reduction))
            return {"pixel_values": augment(image.convert("RGB"))}

    return lambda _, numbers: [load(number) for number in numbers]


def ours(folder: Path, repeats: int = 1, reduced: bool = False) -> Load:
    """What run_pretrain.py loads, with the mask noise, and with `repeats` samples in a row of each image."""
    transform = train_transform((SIZE, SIZE), CROP_SCALE, horizontal_flip=True)
    smallest = SmallestCrop(CROP_SCALE[0], (SIZE, SIZE)) if reduced else None
    source = open_source(str(folder))
    images = PretrainingImages(source, transform, MAEConfig(image_size=SIZE), 0, repeats, smallest)

    def load(epoch: int, numbers: range) -> list[dict[str, Any]]:
        keys = [(number // repeats % len(source.images), number % repeats) for number in numbers]
        return images.__getitems__([SampleKey(epoch, image, repeat=repeat) for image, repeat in keys])

    return load


def parts(folder: Path) -> dict[str, Load]:
    """Where the time goes: decoding alone, and the crop of an image that is a tensor as a whole."""
    transform = train_transform((SIZE, SIZE), CROP_SCALE, horizontal_flip=True)
    records = list(open_source(str(folder)).images["image"])

    def decoded(_: int, numbers: range) -> list[dict[str, Any]]:
        return [{"size": open_image(records[number % len(records)], 3).size} for number in numbers]

    def whole(_: int, numbers: range) -> list[dict[str, Any]]:
        return [{"pixel_values": transform(decode_image(records[number % len(records)], 3))} for number in numbers]

    return {"part: decoding alone": decoded, "part: the whole image as a tensor, then the crop": whole}


def write_large(folder: Path, out: Path) -> None:
    """12 Mpixel photographs: the largest images in `folder`, or below, cut to 4:3 and enlarged where they are smaller.

    Raises:
        ValueError: there is no image.
    """
    sizes = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS):
        with Image.open(path) as image:
            sizes.append((image.width * image.height, path))
    if not sizes:
        raise ValueError(f"There is no JPEG or PNG in {folder}, or below: give --large_from another folder.")
    for number, (_, path) in enumerate(sorted(sizes, reverse=True)[:LARGE_COUNT]):
        with Image.open(path) as image:
            width = min(image.width, image.height * 4 // 3)
            box = (0, 0, width, width * 3 // 4)
            large = image.convert("RGB").resize(LARGE_SHAPE, Image.Resampling.BICUBIC, box)
            large.save(out / f"{number}.jpg", quality=92)


def measure(sides: dict[str, Load], images: int, rounds: int, finish: Callable[[Tensor], Tensor]) -> dict[str, dict]:
    """Images per second of CPU time, for each side; the first side is what the others are compared with.

    Args:
        sides: what is measured.
        images: in a batch; a round is a batch of each side.
        rounds: that are counted, after one that is not.
        finish: what is done to a batch of bytes.
    """
    names, seconds = list(sides), {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            batch = default_collate(sides[name](number, range(images)))
            if "pixel_values" in batch and batch["pixel_values"].dtype == torch.uint8:
                finish(batch["pixel_values"])
            if number:
                seconds[name].append((time.process_time() - start) / images)
    results = {}
    for name, times in seconds.items():
        ratios = [first / own for first, own in zip(seconds[names[0]], times, strict=True)]
        results[name] = {
            "images_per_second": round(1 / statistics.median(times), 1),
            "range": [round(1 / max(times), 1), round(1 / min(times), 1)],
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
        low, high = results[name]["range"]
        print(f"{name:50s} {1 / statistics.median(times):7.0f} images/s ({low:.0f} to {high:.0f})", end="")
        print(f"   {results[name]['ratio']:.2f}x", flush=True)
    return results


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of JPEGs")
    parser.add_argument("--large_from", type=Path, help="a folder whose largest images become 12 Mpixel JPEGs")
    parser.add_argument("--images", type=int, default=128, help="in a round of one side")
    parser.add_argument("--large_images", type=int, default=8, help="the same, of 12 Mpixel ones")
    parser.add_argument("--rounds", type=int, default=15, help="that are counted")
    parser.add_argument("--normalized", action="store_true", help="our batches, too, end in normalised floats")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
    finish = normalize if options.normalized else lambda pixels: pixels

    files = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"There is no JPEG or PNG in {options.photos}, or below: name a folder of photographs.")
    sides = {
        "original": original(files),
        "ours": ours(options.photos),
        "ours, 2 samples of an image": ours(options.photos, repeats=2),
        "ours, 4 samples of an image": ours(options.photos, repeats=4),
        **parts(options.photos),
    }
    results = {"photos": measure(sides, options.images, options.rounds, finish)}
    if options.large_from:
        with tempfile.TemporaryDirectory() as folder:
            large = Path(folder)
            write_large(options.large_from, large)
            files = sorted(large.glob("*.jpg"))
            sides = {
                "12 Mpixel, original with draft mode": original(files, draft=True),
                "12 Mpixel, original": original(files),
                "12 Mpixel, ours": ours(large),
                "12 Mpixel, ours with reduced_decoding": ours(large, reduced=True),
                "12 Mpixel, ours with both, 4 samples": ours(large, repeats=4, reduced=True),
            }
            results["large"] = measure(sides, options.large_images, options.rounds, finish)
    results |= {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "normalized": options.normalized,
        "images": options.images,
        "rounds": options.rounds,
        "versions": {"pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
