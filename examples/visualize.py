"""Show what a masked autoencoder makes of your images.

    python examples/visualize.py runs/quickstart photo.jpg another.png --output pictures.png
    python examples/visualize.py runs/mine path/to/images --count 16 --seed 3
    python examples/visualize.py runs/mine photo.jpg --mask mask.png            # white is hidden

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

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.training.decode import decode_image
from mae_hf.training.recipe import checkpoint_normalisation
from mae_hf.training.reconstruction import save_picture
from mae_hf.training.sources import open_source
from mae_hf.training.starting_weights import load_with_encoder


def find_images(paths: list[str], count: int) -> list[dict[str, Any]]:
    """Encoded images {"bytes", "path"}: the files as they are named, and the first `count` of each folder."""
    found: list[dict[str, Any]] = []
    for path in paths:
        if Path(path).is_dir():
            found += [row["image"] for row in islice(open_source(path).images, count)]
        else:
            found.append({"path": path, "bytes": None})
    return found


def own_mask(path: str, config: MAEConfig) -> Tensor:
    """A picture as a mask of pixels (H, W) bool, true from middle grey up; stretched over what the model sees."""
    grey = decode_image({"path": path, "bytes": None}, num_channels=1)
    nearest = functional.InterpolationMode.NEAREST
    return functional.resize(grey, list(config.image_shape), interpolation=nearest)[0] >= 128


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=expanduser, help="a folder or a name on the Hub")
    parser.add_argument("images", nargs="+", type=expanduser, help="image files, or folders of them")
    parser.add_argument("--count", type=int, default=8, help="how many images of a folder")
    parser.add_argument("--output", type=expanduser, default="reconstruction.png", help="the PNG to write")
    parser.add_argument("--mask_ratio", type=float, help="share of hidden patches, if not the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    parser.add_argument("--mask", type=expanduser, help="a picture, white where patches are hidden, not at random")
    chosen = parser.parse_args(arguments)

    try:
        model, _ = load_with_encoder(MAEForPreTraining, chosen.model, MAEConfig.from_pretrained(chosen.model))
        processor = AutoImageProcessor.from_pretrained(chosen.model)
    except OSError as error:
        raise ValueError(f"{chosen.model!r} is no model that can be loaded: {error}") from error
    config = model.config
    images = [decode_image(record, config.num_channels) for record in find_images(chosen.images, chosen.count)]
    pixel_values = processor(images, return_tensors="pt").pixel_values
    hidden: dict[str, Any]
    if chosen.mask is not None:
        hidden = {"bool_masked_pos": own_mask(chosen.mask, config).expand(len(images), -1, -1)}
    else:
        noise = torch.rand(config.num_patches, generator=torch.Generator().manual_seed(chosen.seed))
        hidden = {"noise": noise.expand(len(images), -1)}
    mean, std = checkpoint_normalisation(chosen.model, config.num_channels)
    pictures = model.reconstruct(pixel_values, mean, std, mask_ratio=chosen.mask_ratio, **hidden)
    save_picture(pictures, chosen.output)
    by = f"the mask {chosen.mask}" if chosen.mask is not None else f"seed {chosen.seed}"
    print(
        f"{chosen.output}: {len(images)} images, {int(pictures.mask[0].sum())} of {config.num_patches} patches hidden "
        f"by {by}"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # something that the user can mend, said in a sentence
        sys.exit(f"visualize.py: {error}")
