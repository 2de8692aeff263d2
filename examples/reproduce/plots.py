"""The plots of the results on real data, and the picture of the mask strategies."""

import statistics
from pathlib import Path

import torch
from jobs import ABLATIONS, LABELS

from mae_hf.masking import mask_noise, random_masking


def plot_labels(results: dict, path: Path) -> None:
    """Accuracy over the number of labels, with and without pre-training; a bar is the spread over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for encoder, title in (("pretrain", "MAE, fine-tuned"), ("scratch", "from scratch")):
        scores = results["finetune"].get(encoder, {})
        means = [statistics.mean(of_seeds) for of_seeds in scores.values()]
        spreads = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0 for of_seeds in scores.values()]
        axes.errorbar([int(labels) for labels in scores], means, spreads, marker="o", capsize=4, label=title)
    axes.set_xscale("log")
    axes.set_xticks([int(labels) for labels in LABELS], labels=LABELS)
    axes.minorticks_off()
    axes.set(xlabel="labels a class", ylabel="accuracy on the test images (%)", title="Fashion-MNIST")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def plot_ablations(results: dict, path: Path) -> None:
    """Accuracy over the mask ratio (the paper's Fig. 5), and the speed beside it."""
    from matplotlib.figure import Figure

    ratios = {name: int(name.removeprefix("ab_ratio")) for name in ABLATIONS if name.startswith("ab_ratio")}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    linear, speed = figure.subplots(1, 2)

    def curve(axes, title: str, values: dict[str, float]) -> None:
        names = [name for name in ratios if name in values]
        axes.plot([ratios[name] for name in names], [values[name] for name in names], marker="o")
        axes.set(xlabel="hidden patches (%)", title=title)
        axes.set_xticks([25, 50, 75, 90])
        axes.grid(alpha=0.3)

    curve(
        linear, "linear probe (%)", {name: statistics.mean(found["linear"]) for name, found in results["probe"].items()}
    )
    curve(speed, "pre-training, images/s", {name: found["median"] for name, found in results["speed"].items()})
    speed.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)


def plot_masks(path: Path, examples: int = 5, draws: int = 2000) -> None:
    """Some masks of each strategy on 14x14 patches, hidden ones dark, and how often each patch is hidden."""
    from matplotlib.figure import Figure

    grid = (14, 14)
    shown = [("random", 0.75, 1), ("unit", 0.75, 2), ("unit", 0.75, 4), ("block", 0.4, 1), ("grid", 0.75, 2)]
    figure = Figure(figsize=(9, 8), layout="constrained")
    for row, (strategy, ratio, unit) in zip(
        figure.subplots(len(shown), examples + 1, squeeze=False), shown, strict=True
    ):
        generator = torch.Generator().manual_seed(0)
        num_visible = int(grid[0] * grid[1] * (1 - ratio))
        noise = torch.stack([mask_noise(strategy, grid, num_visible, unit, generator) for _ in range(draws)])
        masks = random_masking(noise, num_visible)[2].view(draws, *grid)
        for axes, mask in zip(row, masks, strict=False):
            axes.imshow(mask, cmap="Greys", vmin=0, vmax=1.3)
        often = row[-1].imshow(masks.mean(dim=0), cmap="viridis", vmin=0, vmax=1)
        figure.colorbar(often, ax=row[-1])
        squares = f" {unit}x{unit}" if unit > 1 else ""
        row[0].set_title(f"{strategy}{squares}, {ratio:.0%}", loc="left")
        row[-1].set_title("how often")
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
