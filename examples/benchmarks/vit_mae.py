"""transformers' ViTMAEForPreTraining, trained exactly like ours: the baseline of the results on real data.

    python examples/benchmarks/vit_mae.py shipped  --recipe fashion_mnist_pretrain --epochs 8 --output_dir runs/shipped
    python examples/benchmarks/vit_mae.py repaired --recipe fashion_mnist_pretrain --epochs 8 --output_dir runs/repaired

`shipped` is what the class makes of a configuration (transformers 5.24): position tables, class token and mask token of
zeros, the tables frozen. `repaired` fills the tables with the sin-cos table and draws the two tokens; the other weights
keep transformers' initialisation. Settings, images, crops, masks, optimizer and loop are those of run_pretrain.py.
A run does not resume.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_hf import MAEConfig
from mae_hf.patches import sincos_position_table
from mae_hf.training.augment import Normalize, image_processor, train_transform
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.loop import Run
from mae_hf.training.optim import parameter_groups
from mae_hf.training.run import closes_run_folder
from mae_hf.training.samples import PretrainingImages
from mae_hf.training.sources import open_source
from mae_hf.training.tasks import PretrainRecipe

RECIPES = Path(__file__).resolve().parents[1] / "reproduce" / "recipes"


def build_vit_mae(config: MAEConfig, repaired: bool) -> ViTMAEForPreTraining:
    """The ViTMAE of the same sizes; `repaired` fills what transformers leaves at zero."""
    model = ViTMAEForPreTraining(
        ViTMAEConfig(**{name: getattr(config, name) for name in ViTMAEConfig.__annotations__.keys() - {"model_type"}})
    )
    if repaired:
        embeddings, decoder = model.vit.embeddings, model.decoder
        with torch.no_grad():
            embeddings.position_embeddings.copy_(sincos_position_table(config.hidden_size, config.grid_shape))
            decoder.decoder_pos_embed.copy_(sincos_position_table(config.decoder_hidden_size, config.grid_shape))
            embeddings.cls_token.normal_(std=config.initializer_range)
            decoder.mask_token.normal_(std=config.initializer_range)
    return model


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", choices=["shipped", "repaired"], help="the position tables and the two tokens")
    chosen, settings = parser.parse_known_args(arguments)
    # It starts over, because the recipe in a run folder does not tell which of the two it is of.
    recipe = replace(parse_recipe(PretrainRecipe, settings, RECIPES), overwrite=True)
    run = Run(recipe)
    source = open_source(recipe.dataset, recipe.split, recipe.image_column, config=recipe.dataset_config)
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    config = recipe.config()
    model = build_vit_mae(config, repaired=chosen.tables == "repaired")
    if recipe.attn_implementation:
        model.set_attn_implementation(recipe.attn_implementation)
    recipe = run.open(recipe, config, source)
    run.plan(source)
    groups, betas = parameter_groups(model, recipe.weight_decay), (recipe.adam_beta1, recipe.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=recipe.effective_lr, betas=betas, fused=True)
    model, optimizer, bare_model = run.prepare(model, optimizer)
    run.announce({"images": source.summary, "model": f"ViTMAEForPreTraining, {chosen.tables}"}, [])
    run.begin()

    transform = train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
    images = PretrainingImages(source, transform, config, recipe.seed)
    normalize = Normalize(recipe.image_mean, recipe.image_std, run.device)
    for step in run.steps(images):
        for batch in run.batches(step):
            run.backward(model(normalize(batch["pixel_values"]), noise=batch["noise"].to(run.device)).loss)
        run.end_step(step)
        run.save_if_due(step)
    run.end_steps()
    with run.folder.exporting(run.accelerator) as path:
        image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std).save_pretrained(
            path
        )
        bare_model.save_pretrained(path)
    run.end("Trained")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"vit_mae.py: {error}")
