"""Show what a masked autoencoder makes of your images.

    python examples/visualize.py runs/quickstart photo.jpg another.png --output pictures.png
    python examples/visualize.py runs/mine path/to/images --count 16 --seed 3
    python examples/visualize.py runs/mine photo.jpg --mask mask.png   # laid over the photo: white is hidden

A row for each image: image | masked | reconstruction | reconstruction with the visible patches. A seed hides the same
patches of every image, whichever others are shown with it.
"""

import argparse
import sys
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor

from mae_hf import MAEConfig, MAEForPreTraining, MAEReconstruction
from mae_hf.inputs import draw_noise
from mae_hf.training.decode import decode_image
from mae_hf.training.paths import absence, is_absent_path
from mae_hf.training.pictures import save_picture
from mae_hf.training.sources import open_source
from mae_hf.training.starting_weights import checkpoint_normalisation, load_with_encoder


def find_images(paths: list[str], count: int) -> list[dict[str, Any]]:
    """Encoded images {"bytes", "path"}: the files as they are named, and the first `count` of each folder."""
    found: list[dict[str, Any]] = []
    for path in paths:
        if Path(path).is_dir():
            found += [row["image"] for row in islice(open_source(path).images, count)]
        else:
            found.append({"path": path, "bytes": None})
    return found


def own_mask(path: str, image: Tensor, processor: Any) -> Tensor:
    """A picture as a mask of the pixels that the model sees, (1, H, W) bool, true from middle grey up.

    It is laid over the image (C, height, width), stretched to its size, and resized and cropped with it.
    """
    nearest = functional.InterpolationMode.NEAREST
    grey = decode_image({"path": path, "bytes": None}, num_channels=1)
    laid_over = functional.resize(grey, list(image.shape[1:]), interpolation=nearest).expand(image.shape)
    seen = processor(laid_over, resample=nearest, do_rescale=False, do_normalize=False, return_tensors="pt")
    return seen.pixel_values[:, 0] >= 128


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=expanduser, help="a folder or a name on the Hub")
    parser.add_argument("images", nargs="+", type=expanduser, help="image files, or folders of them")
    parser.add_argument("--count", type=int, default=8, help="how many images of a folder")
    parser.add_argument("--output", type=expanduser, default="reconstruction.png", help="the PNG to write")
    parser.add_argument("--mask_ratio", type=float, help="share of hidden patches, if not the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    parser.add_argument(
        "--mask", type=expanduser, help="a picture of each image's shape, white where patches are hidden, not at random"
    )
    chosen = parser.parse_args(arguments)
    if chosen.count < 1:
        raise ValueError(f"--count must be at least 1, but is {chosen.count}.")
    if not Path(chosen.output).absolute().parent.is_dir():
        raise ValueError(f"There is no folder for --output {chosen.output}.")
    if is_absent_path(chosen.model):
        raise ValueError(f"model: {absence(chosen.model)}")

    try:
        model, _ = load_with_encoder(MAEForPreTraining, chosen.model, MAEConfig.from_pretrained(chosen.model))
        processor = AutoImageProcessor.from_pretrained(chosen.model)
    except OSError as error:
        raise ValueError(f"{chosen.model!r} is not a model that can be loaded: {error}") from error
    config = model.config
    images = [decode_image(record, config.num_channels) for record in find_images(chosen.images, chosen.count)]
    generator = torch.Generator().manual_seed(chosen.seed)
    noise = draw_noise(config, config.grid_shape, batch=1, mask_ratio=chosen.mask_ratio, generator=generator)
    mean, std = checkpoint_normalisation(chosen.model, config.num_channels)
    rows = []
    for image in images:  # one by one, because a mask of pixels may hide more patches of one than of another
        pixel_values = processor(image, return_tensors="pt").pixel_values
        hidden = {"bool_masked_pos": own_mask(chosen.mask, image, processor)} if chosen.mask else {"noise": noise}
        rows.append(model.reconstruct(pixel_values, mean, std, mask_ratio=chosen.mask_ratio, **hidden))
    pictures = MAEReconstruction(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    save_picture(pictures, chosen.output)
    counts = sorted({int(mask.sum()) for mask in pictures.mask})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    by = f"the mask {chosen.mask}" if chosen.mask else f"seed {chosen.seed}"
    print(f"{chosen.output}: {len(images)} images, {number} of {config.num_patches} patches hidden by {by}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # something that the user can mend, said in a sentence
        sys.exit(f"visualize.py: {error}")
