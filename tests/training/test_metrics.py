"""Metrics of a classifier, against scikit-learn."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mae_hf.training.metrics import classification_metrics, save_confusion_picture

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
    assert found.per_class[2] != found.per_class[2]  # nan: nothing is known
    assert found.balanced_accuracy == 0.75
    with pytest.raises(ValueError, match="no image to judge"):
        classification_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_confusion_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws the picture")
    found = classification_metrics(torch.eye(3)[[0, 1, 0]], torch.tensor([0, 1, 1]))
    save_confusion_picture(found, ["cat", "dog", "eel"], tmp_path / "confusion.png")
    assert min(Image.open(tmp_path / "confusion.png").size) > 300
