"""What a pre-training loss is compared with, and what a run that cannot learn says: by examples/run_pretrain.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_run_pretrain import pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

MEAN, STD = 0.4, 0.2
WHOLE = ["--crop_scale", "1", "1", "--image_mean", *[str(MEAN)] * 3, "--image_std", *[str(STD)] * 3]


@pytest.fixture(scope="module")
def half_flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 16x16, the left half of each grey, the right one noise."""
    folder = tmp_path_factory.mktemp("half_flat")
    for index in range(8):
        pixels = np.full((16, 16, 3), 128, np.uint8)
        pixels[:, 8:] = np.random.default_rng(index).integers(0, 256, (16, 8, 3))
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("normalised", [True, False])
def test_baseline__is_the_loss_of_the_mean_and_said_where_nothing_is_learned(
    normalised: bool, half_flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WHOLE, "--norm_pix_loss", str(normalised), "--base_lr", "0", "--total_batch_size", "16", "--epochs", "2"]
    records = pretrain(str(half_flat), tmp_path / "run", *words)
    pixels = (np.stack([np.asarray(Image.open(path)) for path in half_flat.iterdir()]) / 255 - MEAN) / STD
    # Of a patch of 48 numbers the unbiased variance is 1, so the mean square 47/48; flat patches have none.
    expected = 0.5 * 47 / 48 if normalised else np.var(pixels, axis=(0, 1, 2)).mean()
    assert records[-1]["loss_of_mean"] == pytest.approx(expected, rel=1e-3)

    said, card = capsys.readouterr().out, (tmp_path / "run" / "README.md").read_text()
    assert f"loss {records[-1]['loss']:.4f} (mean {expected:.4f})" in said
    before, after = said.split("resume ")
    for sentence in ("One step takes the images 2 times", "1 step will hardly be enough"):
        assert said.count(sentence) == before.count(sentence) == 1
        assert sentence in card
    for text in (after, card):
        assert f"The loss ended at {records[-1]['loss']:.4f}, and predicting the mean has {expected:.4f}" in text


@pytest.mark.parametrize(
    ("warmup_epochs", "grows_throughout"), [("2", True), ("1.5", True), ("1", False), ("0", False)]
)
def test_doubts__of_a_learning_rate_that_only_grows(
    warmup_epochs: str, grows_throughout: bool, half_flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--total_batch_size", "4", "--epochs", "2", "--warmup_epochs", warmup_epochs]  # 4 steps
    records = pretrain(str(half_flat), tmp_path / "run", *words)
    assert ("The learning rate grows through all of the 4 steps" in capsys.readouterr().out) == grows_throughout
    assert (records[-1]["lr"] == max(record["lr"] for record in records)) == grows_throughout
