"""Show what a masked autoencoder makes of your images.

    python examples/visualize.py runs/quickstart photo.jpg another.png --output pictures.png

A row for each image: image | masked | reconstruction | reconstruction with the visible patches.
"""

import argparse
import sys

import torch
from transformers import AutoImageProcessor

from mae_hf import MAEForPreTraining
from mae_hf.training.data import decode_image
from mae_hf.training.reconstruction import save_picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--output", default="reconstruction.png", help="the PNG to write")
    parser.add_argument("--mask_ratio", type=float, help="share of hidden patches, if not the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the mask")
    chosen = parser.parse_args(arguments)

    try:
        model = MAEForPreTraining.from_pretrained(chosen.model).eval()
        processor = AutoImageProcessor.from_pretrained(chosen.model)
    except OSError as error:
        raise ValueError(f"{chosen.model!r} is no model that can be loaded: {error}") from error
    images = [decode_image({"path": path, "bytes": None}, model.config.num_channels) for path in chosen.images]
    pixel_values = processor(images, return_tensors="pt").pixel_values
    pictures = model.reconstruct(
        pixel_values,
        processor.image_mean,
        processor.image_std,
        mask_ratio=chosen.mask_ratio,
        generator=torch.Generator().manual_seed(chosen.seed),
    )
    save_picture(pictures, chosen.output)
    hidden = int(pictures.mask[0].sum())
    print(f"{chosen.output}: {len(images)} images, {hidden} of {pictures.mask.shape[1]} patches hidden")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # something that the user can mend, said in a sentence
        sys.exit(f"visualize.py: {error}")
