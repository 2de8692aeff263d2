"""transformers' ViTMAEForPreTraining, trained exactly like ours: the baseline of the results on real data.

    python examples/benchmarks/vit_mae.py shipped  --recipe fashion_mnist_pretrain --epochs 8 --output_dir runs/shipped
    python examples/benchmarks/vit_mae.py repaired --recipe fashion_mnist_pretrain --epochs 8 --output_dir runs/repaired

`shipped` is what the class makes of a configuration (transformers 5.24): position tables, class token and mask token of
zeros, the tables frozen. `repaired` fills the tables with the sin-cos table and draws the two tokens; the other weights
keep transformers' initialisation. Settings, images, crops, masks, optimizer and schedule are those of run_pretrain.py.
A run does not resume.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_hf import MAEConfig
from mae_hf.patches import sincos_position_table
from mae_hf.training.augment import Normalize, image_processor, train_transform
from mae_hf.training.optim import lr_at, parameter_groups
from mae_hf.training.order import make_schedule
from mae_hf.training.progress import DataClock, Progress
from mae_hf.training.recipe import PretrainRecipe, parse_recipe
from mae_hf.training.run import RunFolder, closes_run_folder
from mae_hf.training.samples import PretrainingImages, batches
from mae_hf.training.sources import open_source

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


def train(recipe: PretrainRecipe, repaired: bool) -> None:
    """run_pretrain.py's loop, without its checkpoints and pictures, around the other model."""
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    source = open_source(recipe.dataset, recipe.split, recipe.image_column, config=recipe.dataset_config)
    recipe = recipe.fitted(source.length)
    set_seed(recipe.seed)
    config = recipe.config()
    bare_model = build_vit_mae(config, repaired)
    if recipe.attn_implementation:
        bare_model.set_attn_implementation(recipe.attn_implementation)
    resolved = replace(recipe.resolved(config, accelerator.mixed_precision), overwrite=True)  # it never goes on
    folder = RunFolder(recipe.output_dir, resolved)
    recipe = folder.recipe
    schedule = make_schedule(
        source, recipe.epochs, recipe.total_batch_size, recipe.per_device_batch_size, accelerator.num_processes
    )
    total_steps, warmup_steps = schedule.total_steps, round(recipe.warmup * schedule.steps_per_epoch)
    accelerator.gradient_accumulation_steps = schedule.rounds
    groups = parameter_groups(bare_model, recipe.weight_decay)
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=recipe.effective_lr, betas=betas, fused=True)
    model, optimizer = accelerator.prepare(bare_model, optimizer)

    folder.start()
    folder.note_versions(0)
    transform = train_transform(config.image_shape, recipe.crop_scale, recipe.horizontal_flip)
    images = PretrainingImages(source, transform, config.num_channels, config.num_patches, recipe.seed)
    data = DataClock(
        iter(batches(images, schedule, 0, accelerator.process_index, recipe.num_workers, recipe.shuffle_buffer))
    )
    normalize = Normalize(recipe.image_mean, recipe.image_std, accelerator.device)
    progress = Progress(total_steps, 0, accelerator.is_main_process, recipe.log_every)
    model.train()
    loss_sum, logged_step = torch.zeros((), device=accelerator.device), 0
    for step in range(1, total_steps + 1):
        lr = lr_at(step - 1, total_steps, warmup_steps, recipe.effective_lr, recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(schedule.rounds):
            batch = next(data)
            with accelerator.accumulate(model):
                loss = model(normalize(batch["pixel_values"]), noise=batch["noise"].to(accelerator.device)).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum += loss.detach() / schedule.rounds
        progress.advance(loss)
        if step % recipe.log_every == 0 or step == total_steps:
            mean_loss = loss_sum.item() / (step - logged_step)
            folder.log({"step": step, "epoch": step / schedule.steps_per_epoch, "loss": mean_loss, "lr": lr})
            print(f"step {step}/{total_steps}  loss {mean_loss:.4f}", flush=True)
            loss_sum.zero_()
            logged_step = step
    progress.close()
    processor = image_processor(config.image_shape, recipe.center_crop, recipe.image_mean, recipe.image_std)
    with folder.exporting(accelerator) as path:
        processor.save_pretrained(path)
        bare_model.save_pretrained(path)
    folder.close()


@closes_run_folder()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", choices=["shipped", "repaired"], help="the position tables and the two tokens")
    chosen, settings = parser.parse_known_args(arguments)
    train(parse_recipe(PretrainRecipe, settings, RECIPES), repaired=chosen.tables == "repaired")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"vit_mae.py: {error}")
