"""Measures over all pixels against a slow count and torchmetrics; windows against a slow mean; what pipelines see."""

import math

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import scramble, seeded, tiny_config
from torch import Tensor
from torch.nn import functional as F

from mae_hf import MAEForSemanticSegmentation
from mae_hf.training.augment import Normalize
from mae_hf.training.evaluate import evaluation_batches
from mae_hf.training.joint import RandomPart, View, color_jitter
from mae_hf.training.masks import MapClasses
from mae_hf.training.order import SampleKey
from mae_hf.training.pictures import palette, save_predictions
from mae_hf.training.scenes import as_png
from mae_hf.training.segmentation import (
    MaskedEvalImages,
    MaskedImages,
    SegmentationMetrics,
    confusion_of,
    evaluate_segmenter,
    predicted_classes,
    slide,
    view_processor,
    window_starts,
)
from mae_hf.training.sources import ImageSource

CLASSES = MapClasses(["background", "a", "b"], {0: 0, 1: 1, 2: 2}, False, 255, frozenset({255}))


def maps(count: int, height: int = 9, width: int = 7, classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    found = torch.randint(classes, (count, height, width), generator=generator)
    found[torch.rand(found.shape, generator=generator) < 0.2] = 255
    return found


def source(*rows: tuple[np.ndarray, np.ndarray | None]) -> ImageSource:
    """Images with maps, of any sizes; a map that is None cannot be read."""
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "mask")})
    broken = {"bytes": b"broken", "path": None}
    columns = {
        "image": [as_png(image) for image, _ in rows],
        "mask": [broken if mask is None else as_png(mask) for _, mask in rows],
    }
    return ImageSource("some images", datasets.Dataset.from_dict(columns, features=features), len(rows))


def random_rows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 50, (count, 2))
    return [
        (rng.integers(0, 255, (*size, 3), dtype=np.uint8), rng.choice([0, 1, 2, 255], size).astype(np.uint8))
        for size in sizes
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def test_metrics__equal_a_slow_count_and_torchmetrics() -> None:
    of_library = pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    truth, predicted = maps(6), maps(7)[:6] % 4
    predicted[predicted == 3] = 0  # class 3 is never predicted
    confusion = sum(confusion_of(*pair, 4, 255) for pair in zip(truth, predicted, strict=True))
    slow = np.zeros((4, 4), int)
    for label, found in zip(truth.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if label != 255:
            slow[label, found] += 1
    assert confusion.tolist() == slow.tolist()
    metrics = SegmentationMetrics(confusion, 6, background=0)
    ious = [slow[k, k] / (slow[k].sum() + slow[:, k].sum() - slow[k, k]) for k in range(4)]
    assert metrics.per_class == pytest.approx(ious)
    assert metrics.miou == pytest.approx(np.mean(ious))
    assert metrics.mean_accuracy == pytest.approx(np.mean([slow[k, k] / slow[k].sum() for k in range(4)]))
    assert metrics.pixel_accuracy == pytest.approx(np.trace(slow) / slow.sum())
    jaccard = of_library.classification.MulticlassJaccardIndex(num_classes=4, ignore_index=255)
    assert metrics.miou == pytest.approx(jaccard(predicted, truth).item(), abs=1e-6)
    objects = slow[1:, 1:].sum() / (slow.sum() - slow[0, 0])
    background = slow[0, 0] / (slow[0].sum() + slow[:, 0].sum() - slow[0, 0])
    assert metrics.foreground_background == pytest.approx((objects, background))


def test_metrics__of_classes_that_never_occur() -> None:
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    confusion[0, 0], confusion[0, 1], confusion[2, 2] = 6, 2, 4
    metrics = SegmentationMetrics(confusion, 1)
    # Class 1 is only wrongly found, and counts as 0; class 3 is neither there nor found, and does not count.
    assert metrics.per_class == [0.75, 0.0, 1.0, None]
    assert metrics.miou == pytest.approx(1.75 / 3)
    assert metrics.absent == [1, 3]
    assert metrics.foreground_background is None
    assert "foreground_iou" not in metrics.summary()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("whole", [True, False])
def test_evaluation__counts_each_pixel_once_at_its_own_size(whole: bool) -> None:
    rows = random_rows(5)
    model = scramble(seeded(MAEForSemanticSegmentation, tiny_config(num_labels=3, segmentation_head="linear"))).eval()
    view = View((32, 32), whole)
    images = MaskedEvalImages(source(*rows), view, 3, 0, CLASSES)
    normalize = Normalize([0.5] * 3, [0.5] * 3, torch.device("cpu"))

    def predict(samples: list[dict]) -> list[Tensor]:
        return predicted_classes(model, samples, view, normalize, 0.5)

    found = []
    for batch_size in (1, 2, 4):
        batches = evaluation_batches(images, batch_size, 0, 1, 0, list)
        found.append(evaluate_segmenter(predict, batches, CLASSES, Accelerator(), 0.0, fixed=[1, 3]))
    metrics = found[0]
    assert metrics.count == 5
    assert all((other.confusion - metrics.confusion).abs().max() <= 2 for other in found)  # of a rounding at a boundary
    assert metrics.confusion.sum() == sum((mask != 255).sum() for _, mask in rows)
    assert sorted(one.index for one in metrics.fixed) == [1, 3]
    assert metrics.worst[0].score == min(one.score for one in metrics.worst)
    assert metrics.background == 0


@pytest.mark.usefixtures("fresh_accelerate")
def test_evaluation__leaves_out_and_says_what_cannot_be_used(capsys: pytest.CaptureFixture) -> None:
    rows = random_rows(4)
    rows[2] = (rows[2][0], None)
    images = MaskedEvalImages(source(*rows), View((16, 16)), 3, 0, CLASSES)

    def predict(samples: list[dict]) -> list[Tensor]:
        return [torch.zeros(sample["labels"].shape, dtype=torch.int64) for sample in samples]

    def evaluate(largest: float) -> SegmentationMetrics:
        return evaluate_segmenter(
            predict, evaluation_batches(images, 3, 0, 1, 0, list), CLASSES, Accelerator(), largest
        )

    assert evaluate(0.3).count == 3
    assert "1 of 4 images to evaluate on cannot be used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 4 images to evaluate on cannot be used"):
        evaluate(0.0)


@pytest.mark.usefixtures("fresh_accelerate")
def test_evaluation__without_a_known_pixel_is_refused() -> None:
    unknown = np.full((20, 20), 255, np.uint8)
    images = MaskedEvalImages(source((np.zeros((20, 20, 3), np.uint8), unknown)), View((16, 16)), 3, 0, CLASSES)
    batches = evaluation_batches(images, 1, 0, 1, 0, list)
    with pytest.raises(ValueError, match="no pixel of a known class"):
        evaluate_segmenter(lambda samples: [samples[0]["labels"]], batches, CLASSES, Accelerator(), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Windows, views
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 33), (16, 16), (10, 50), (17, 16), (9, 9)])
def test_slide__is_the_mean_over_the_windows_of_a_pixel(height: int, width: int) -> None:
    image = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0))

    def score(images: Tensor) -> Tensor:
        return torch.stack([images.sum(1), images[:, 0] - images.mean((1, 2, 3))[:, None, None]], dim=1)

    found = slide(score, image, (16, 16), 2 / 3)
    total, count = torch.zeros(2, height, width), torch.zeros(height, width)
    for top in window_starts(height, 16, 11):
        for left in window_starts(width, 16, 11):
            part = image[None, :, top : top + 16, left : left + 16]
            total[:, top : top + 16, left : left + 16] += score(part)[0]
            count[top : top + 16, left : left + 16] += 1
    assert (count > 0).all()
    assert found.allclose(total / count, atol=1e-6)


def test_window_starts__reach_the_end_and_not_beyond() -> None:
    assert window_starts(40, 16, 11) == [0, 11, 22, 24]
    assert window_starts(16, 16, 11) == [0]
    assert window_starts(9, 16, 11) == [0]
    assert window_starts(38, 16, 11) == [0, 11, 22]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("view", [View((32, 32)), View((24, 40)), View((32, 32), False, 24), View((32, 32), False)])
def test_processor__shows_what_the_evaluation_sees(view: View, mode: str) -> None:
    channels = len(mode)
    processor = view_processor(view, [0.4] * channels, [0.3] * channels)
    for size in ((50, 40), (37, 61)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode)
        seen = Normalize([0.4] * channels, [0.3] * channels, torch.device("cpu"))(view.of_image(image))
        found = processor(image, return_tensors="pt").pixel_values[0]
        assert found.shape == seen.shape
        assert (found - seen).abs().max() < 1e-5


def test_training_sample__is_the_same_alone_and_in_a_batch() -> None:
    rows = random_rows(4)
    part = RandomPart(View((24, 24)), [0.5, 2.0], True, False)
    images = MaskedImages(source(*rows), CLASSES, part, color_jitter(0.5), [0.5] * 3, 3, 7)
    keys = [SampleKey(1, index) for index in range(4)]
    together = images.__getitems__(keys)
    for key, sample in zip(keys, together, strict=True):
        alone = images[key]
        assert alone["pixel_values"].equal(sample["pixel_values"])
        assert alone["labels"].equal(sample["labels"])
        assert sample["pixel_values"].shape == (3, 24, 24)
        assert set(sample["labels"].unique().tolist()) <= {0, 1, 2, 255}
    assert not images[SampleKey(2, 0)]["pixel_values"].equal(together[0]["pixel_values"])


def test_training_sample__with_a_bad_map_is_another_image() -> None:
    rows = random_rows(3)
    rows[1] = (rows[1][0], rows[1][1][:-1])
    part = RandomPart(View((24, 24)), [1.0, 1.0], False, False)
    sample = MaskedImages(source(*rows), CLASSES, part, None, [0.5] * 3, 3, 7)[SampleKey(0, 1)]
    assert "pixels, but its image" in sample["problem"]
    assert sample["pixel_values"].shape == (3, 24, 24)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_palette__colours_are_told_apart() -> None:
    colours = torch.tensor(palette(20)).float()
    apart = torch.cdist(colours, colours).fill_diagonal_(math.inf)
    assert apart.min() > 30
    assert palette(150)[0] == (0, 0, 0)


@pytest.mark.usefixtures("fresh_accelerate")
def test_picture__has_the_truth_and_the_prediction_in_the_colours_of_the_legend(tmp_path) -> None:
    image, mask = np.full((100, 100, 3), 90, np.uint8), np.zeros((100, 100), np.uint8)
    mask[:, 50:] = 1
    mask[90:] = 255
    images = MaskedEvalImages(source((image, mask)), View((32, 32)), 3, 0, CLASSES)

    def predict(samples: list[dict]) -> list[Tensor]:
        return [torch.full((100, 100), 2)]

    batches = evaluation_batches(images, 1, 0, 1, 0, list)
    metrics = evaluate_segmenter(predict, batches, CLASSES, Accelerator(), 0.0, fixed=[0])
    save_predictions(metrics.fixed, CLASSES.names, 255, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png"))
    colours = palette(3)
    shown = pixels[16:116]  # below the titles
    assert tuple(shown[50, 30]) == (90, 90, 90)
    assert tuple(shown[50, 120]) == colours[0]
    assert tuple(shown[50, 190]) == colours[1]
    assert tuple(shown[95, 150]) == (255, 255, 255)
    assert tuple(shown[50, 260]) == colours[2]
    for colour in colours:  # and in the legend
        assert (pixels[118:] == colour).all(-1).sum() > 60


def test_interpolated_scores__are_those_of_the_pipelines_own() -> None:
    model = scramble(seeded(MAEForSemanticSegmentation, tiny_config(num_labels=3, segmentation_head="linear"))).eval()
    view, normalize = View((32, 32)), Normalize([0.5] * 3, [0.5] * 3, torch.device("cpu"))
    image = Image.fromarray(random_rows(1)[0][0])
    sample = {"pixel_values": view.of_image(image), "labels": torch.zeros(image.height, image.width)}
    with torch.no_grad():
        (found,) = predicted_classes(model, [sample], view, normalize, 1.0)
        processor = view_processor(view, [0.5] * 3, [0.5] * 3)
        output = model(processor(image, return_tensors="pt").pixel_values)
    (expected,) = processor.post_process_semantic_segmentation(output, target_sizes=[(image.height, image.width)])
    assert (found == expected).float().mean() > 0.999
    assert F.one_hot(found, 3).float().mean((0, 1)).max() < 1  # more than one class
