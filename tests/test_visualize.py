"""examples/visualize.py, run for real: which images, which mask, what the picture shows."""

from pathlib import Path

import numpy as np
import pytest
import visualize
from PIL import Image

TITLES = 16  # pixels above the first row
PICTURE = 96  # a side, of a model of 32 pixels


def masked_column(path: Path, row: int = 0) -> np.ndarray:
    """The picture with the hidden patches in the mean colour."""
    top, left = TITLES + 4 + row * (PICTURE + 4), 4 + PICTURE + 4
    return np.asarray(Image.open(path))[top : top + PICTURE, left : left + PICTURE].astype(int)


def test_folder__its_first_images_in_order(checkpoint: Path, pets: Path, tmp_path: Path) -> None:
    of_folder, of_files = tmp_path / "folder.png", tmp_path / "files.png"
    visualize.main([str(checkpoint), str(pets), "--count", "2", "--output", str(of_folder)])
    files = [str(pets / "cat" / name) for name in ("0.png", "1.png")]
    visualize.main([str(checkpoint), *files, "--output", str(of_files)])
    assert Image.open(of_folder).size == (4 * (PICTURE + 4) + 4, TITLES + 2 * (PICTURE + 4) + 4)
    assert of_folder.read_bytes() == of_files.read_bytes()


def test_seed__hides_the_same_patches_beside_any_other_image(checkpoint: Path, pets: Path, tmp_path: Path) -> None:
    cat, dog = str(pets / "cat" / "0.png"), str(pets / "dog" / "0.png")
    pictures = {}
    for name, words in {"alone": [dog], "second": [cat, dog], "other": [dog, "--seed", "1"]}.items():
        visualize.main([str(checkpoint), *words, "--output", str(tmp_path / f"{name}.png")])
        pictures[name] = masked_column(tmp_path / f"{name}.png", row=int(name == "second"))
    assert np.array_equal(pictures["alone"], pictures["second"])
    assert not np.array_equal(pictures["alone"], pictures["other"])


def test_mask__hides_what_is_white(
    checkpoint: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:, :4] = 255  # the left half, of any size
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    words = [str(checkpoint), str(pets / "cat" / "0.png"), str(pets / "dog" / "1.png"), "--mask"]
    visualize.main([*words, str(tmp_path / "mask.png"), "--output", str(tmp_path / "out.png")])
    assert "2 images, 8 of 16 patches hidden by the mask" in capsys.readouterr().out
    for row in range(2):
        picture = masked_column(tmp_path / "out.png", row)
        assert np.ptp(picture[:, : PICTURE // 2], axis=(0, 1)).max() == 0, "the left half is not of one colour"
        assert np.ptp(picture[:, PICTURE // 2 :], axis=(0, 1)).max() > 50


def test_mask__is_cropped_as_the_photograph_is(checkpoint: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 32), np.uint8)
    mask[:, :16] = 255  # the left half of the photograph, and of the quarter that is seen
    mask[:, :8] = 0  # but what the crop leaves out
    Image.fromarray(mask).save(tmp_path / "mask.png")
    noisy = np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    words = [f"--mask={tmp_path / 'mask.png'}", f"--output={tmp_path / 'out.png'}"]
    visualize.main([str(checkpoint), str(tmp_path / "noisy.png"), *words])
    picture = masked_column(tmp_path / "out.png")
    assert np.ptp(picture[:, : PICTURE // 2], axis=(0, 1)).max() == 0, "the left half of the crop is not hidden"
    assert np.ptp(picture[:, PICTURE // 2 :], axis=(0, 1)).max() > 50


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--output", "no/where.png"], "no folder for --output no/where"),
    ],
)
def test_visualize__refuses_in_a_sentence(words: list[str], sentence: str, checkpoint: Path, pets: Path) -> None:
    with pytest.raises(ValueError, match=r"model: there is no such file or folder as runs/nowhere"):
        visualize.main(["runs/nowhere", str(pets)])
    with pytest.raises(ValueError, match=sentence):
        visualize.main([str(checkpoint), str(pets), *words])


def test_visualize__refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model that can be loaded"):
        visualize.main([str(tmp_path), "image.png"])


def test_visualize__knows_the_home_of_the_user(
    checkpoint: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, target in (("model", checkpoint), ("pets", pets)):
        (tmp_path / name).symlink_to(target)
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    visualize.main(["~/model", "~/pets/cat/0.png", "--mask=~/mask.png", "--output=~/out.png"])
    assert Image.open(tmp_path / "out.png").height == TITLES + 4 + PICTURE + 4
