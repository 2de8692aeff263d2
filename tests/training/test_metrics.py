"""Metrics of a classifier, against scikit-learn."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mae_hf.training.evaluate import apply_to_images
from mae_hf.training.metrics import classification_metrics, save_confusion_picture
from mae_hf.training.order import PADDING

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="the other side of these tests")


@pytest.mark.parametrize("num_labels", [2, 3, 7, 11])
def test_classification_metrics__those_of_scikit_learn(num_labels: int) -> None:
    generator = torch.Generator().manual_seed(num_labels)
    logits = torch.randn(97, num_labels, generator=generator)
    labels = torch.randint(num_labels, (97,), generator=generator)
    labels[:num_labels] = torch.arange(num_labels)  # every class occurs
    found, classes = classification_metrics(logits, labels), list(range(num_labels))
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1)
    assert found.loss == pytest.approx(sklearn_metrics.log_loss(labels, probabilities, labels=classes))
    assert found.top1 == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    if num_labels > 5:
        top5 = sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)
        assert found.top5 == pytest.approx(top5)
    else:
        assert found.top5 == 1
    assert found.balanced_accuracy == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    assert found.per_class == pytest.approx(sklearn_metrics.recall_score(labels, predicted, average=None).tolist())
    assert found.confusion.tolist() == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert found.count == 97


def test_classification_metrics__a_class_without_images() -> None:
    found = classification_metrics(torch.eye(3)[[0, 1, 0]], torch.tensor([0, 1, 1]))
    assert found.per_class[:2] == [1.0, 0.5]
    assert found.per_class[2] is None, "nothing is known"
    json.dumps(found.per_class, allow_nan=False)
    assert found.balanced_accuracy == 0.75
    with pytest.raises(ValueError, match="no image to evaluate"):
        classification_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.usefixtures("fresh_accelerate")
def test_apply_to_images__reads_a_batch_only_when_the_next_one_is_under_way() -> None:
    happened = []

    class Watched(torch.Tensor):  # whose values can be read only by waiting for the device
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.__getitem__:
                happened.append(f"read {args[0].as_subclass(torch.Tensor)[0].item():g}")
            return super().__torch_function__(function, types, args, kwargs)

    def compute(pixel_values: torch.Tensor) -> torch.Tensor:
        happened.append(f"compute {pixel_values[0].item():g}")
        return pixel_values.as_subclass(Watched)

    labels = (torch.tensor([4, 5]), torch.tensor([6, 7]), torch.tensor([8, PADDING]))
    batches = [{"pixel_values": 10.0 * label, "label": label} for label in labels]
    results, found = apply_to_images(compute, batches)
    assert happened == ["compute 40", "compute 60", "read 40", "compute 80", "read 60", "read 80"]
    assert results.tolist() == [40.0, 50.0, 60.0, 70.0, 80.0]
    assert found.tolist() == [4, 5, 6, 7, 8]


def test_confusion_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    found = classification_metrics(torch.eye(3)[[0, 1, 0]], torch.tensor([0, 1, 1]))
    save_confusion_picture(found.confusion, "3 images", ["cat", "dog", "eel"], tmp_path, print)
    assert min(Image.open(tmp_path / "confusion.png").size) > 300


def test_confusion_picture__names_of_anybodys(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    found = classification_metrics(torch.eye(2), torch.tensor([0, 1]))
    save_confusion_picture(found.confusion, "2 images", ["$HOME and $x^", "two\nlines"], tmp_path, print)
    assert min(Image.open(tmp_path / "confusion.png").size) > 300


def test_classification_metrics__of_ten_thousand_classes_need_no_square_of_them() -> None:
    classes, count = 10_000, 64
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(count, classes, generator=generator),
        torch.arange(0, classes, classes // count)[:count],
    )
    logits[:48].scatter_(1, labels[:48, None], 10.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = classification_metrics(logits, labels)
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 10 * logits.nbytes
    assert (found.top1, found.balanced_accuracy, found.count) == (0.75, 0.75, count)
    assert [found.per_class[label] for label in labels.tolist()] == [1.0] * 48 + [0.0] * 16
    assert found.per_class.count(None) == classes - count
