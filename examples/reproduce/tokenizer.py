"""A small tokenizer of patches for `--target tokens`, by k-means of your own images.

    python examples/reproduce/tokenizer.py --dataset path/to/images --size small --output_dir runs/tokenizer
    python examples/run_pretrain.py --dataset path/to/images --size small --target tokens \\
        --tokenizer runs/tokenizer/tokenizer.safetensors --output_dir runs/tokens

The settings are those of run_pretrain.py, of which the images, the size of the patches and the seed count here; and two
of its own: how many tokens, and of how many images. It is a toy beside those that BEiT (arXiv 2106.08254) and its
successors learn on millions of images with a network of their own: its tokens are the nearest of so many normalised
patches (SplitMask, arXiv 2112.10740).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from mae_hf.patches import normalize_patches, patchify
from mae_hf.training.augment import eval_transform
from mae_hf.training.command_line import read_recipe
from mae_hf.training.order import SampleKey
from mae_hf.training.samples import PretrainingImages
from mae_hf.training.sources import image_order, open_source
from mae_hf.training.tasks import PretrainRecipe
from mae_hf.training.teachers import CODEBOOK, PatchTokenizer

AT_ONCE = 256  # images
MOST_PATCHES = 500_000  # which are 1.5 GB of 16x16 pixels in colour


def some_images(recipe: PretrainRecipe, count: int) -> Tensor:
    """(M, C, H, W) uint8 of at most so many images of the recipe's, and `MOST_PATCHES`, drawn by its seed.

    Raises:
        ValueError: the images are a stream.
    """
    if recipe.streaming:
        raise ValueError("A stream has no images to draw from: leave streaming out.")
    source = open_source(recipe.dataset, recipe.split, recipe.image_column, config=recipe.dataset_config)
    config = recipe.config()
    images = PretrainingImages(source, eval_transform(config.image_shape, recipe.center_crop), config, recipe.seed)
    count = min(count, max(1, MOST_PATCHES // config.num_patches))
    keys = [SampleKey(0, int(index)) for index in image_order(len(source.images), recipe.seed, epoch=0)[:count]]
    batches = [images.__getitems__(keys[first : first + AT_ONCE]) for first in range(0, len(keys), AT_ONCE)]
    return torch.stack([sample["pixel_values"] for batch in batches for sample in batch])


def cluster(patches: Tensor, vocabulary: int, seed: int) -> Tensor:
    """(M, P*Q*C) -> centres (V, P*Q*C), by mini-batch k-means.

    Raises:
        ValueError: there are fewer patches than tokens.
    """
    if len(patches) < vocabulary:
        raise ValueError(f"There are {len(patches):,} patches for {vocabulary:,} tokens: give more images, or fewer.")
    found = MiniBatchKMeans(vocabulary, batch_size=4096, n_init=1, random_state=seed).fit(patches.numpy())
    return torch.from_numpy(found.cluster_centers_.astype(np.float32))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens")
    parser.add_argument("--images", type=int, default=10_000, help="how many are clustered")
    chosen, settings = parser.parse_known_args(arguments)
    recipe = read_recipe(PretrainRecipe, settings)
    config = recipe.config()
    pixels = some_images(recipe, chosen.images)
    patches = normalize_patches(patchify(pixels.float() / 255, config.patch_shape))
    centres = cluster(patches.flatten(0, 1), chosen.vocabulary, recipe.seed)

    path = Path(recipe.output_dir) / "tokenizer.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({CODEBOOK: centres}, path)
    tokenizer = PatchTokenizer(str(path))
    tokenizer.lay_on(config)
    tokens = torch.cat([tokenizer(batch) for batch in pixels.split(AT_ONCE)])
    used = tokens.flatten().bincount(minlength=len(centres)) / tokens.numel()
    print(
        f"{path}: {len(centres):,} tokens of {len(pixels):,} images, {int((used > 0).sum()):,} of them used, the "
        f"commonest for {used.max():.1%} of the patches."
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"tokenizer.py: {error}")
