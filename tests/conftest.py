"""What several files of tests use; and a Hub of our own for every test.

huggingface_hub reads its settings when it is imported, so they are set before.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub import WRITE_TOKEN, Hub
from PIL import Image

assert "huggingface_hub" not in sys.modules, "huggingface_hub was imported before its settings could be made"

HUB = Hub()
HF_HOME = Path(tempfile.mkdtemp(prefix="mae_hf_tests_"))
os.environ.update(
    HF_ENDPOINT=HUB.url,  # so no test reaches the real Hub
    HF_HOME=str(HF_HOME),
    HF_HUB_DISABLE_XET="1",  # Xet would take large files elsewhere
    HF_HUB_DISABLE_TELEMETRY="1",
    DISABLE_SAFETENSORS_CONVERSION="1",  # transformers would ask a service outside to convert a pickle
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    HUB.stop()
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Whatever a script sets in this process: another number of threads would round otherwise in the tests after it."""
    import torch  # not above: huggingface_hub may not be imported yet

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Whatever a script listens to in this process: Ctrl-C should end the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, an empty cache, and the right to write."""
    HUB.reset()
    shutil.rmtree(HF_HOME, ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    yield HUB
    HUB.reset()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits ever longer between its attempts; the tests don't."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, and without the settings of a script that ran before in this process."""
    from accelerate.state import AcceleratorState  # not above: it imports huggingface_hub

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine cats, eight dogs, seven eels, colour images of stripes: upright, lying and slanting."""
    folder = tmp_path_factory.mktemp("pets")
    rows, columns = np.mgrid[:24, :24]
    for name, count, wave in (("cat", 9, columns), ("dog", 8, rows), ("eel", 7, rows + columns)):
        (folder / name).mkdir()
        for index in range(count):
            grey = 127 + 100 * np.sin(0.8 * wave + index)
            Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, 2)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits, ten times as many threes as eights to train on; in val/ there are as many of both."""
    from mae_hf.training.scenes import load_digits  # not above: it imports huggingface_hub

    pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    folder = tmp_path_factory.mktemp("unequal")
    pixels, labels = load_digits()
    for digit, name, count in ((3, "three", 120), (8, "eight", 12)):
        images = [Image.fromarray((255 / 16 * grey).astype(np.uint8)) for grey in pixels[labels == digit]]
        for split, chosen in (("train", images[:count]), ("val", images[120:170])):
            (folder / split / name).mkdir(parents=True)
            for index, image in enumerate(chosen):
                image.save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked autoencoder with random weights, and the image processor that it was trained with."""
    import torch  # not above, nor the next two: they import huggingface_hub
    from tiny import tiny_config

    from mae_hf import MAEForPreTraining
    from mae_hf.training.augment import image_processor

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config())
    torch.nn.init.normal_(model.decoder.decoder_pred.bias)  # or the decoder would be taken for one never trained
    model.save_pretrained(folder)
    image_processor(model.config.image_shape, 1.0, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen pictures from above, images/ and masks/: ground, a red field and a striped one, at random places."""
    folder = tmp_path_factory.mktemp("fields")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("background\nred field\nstriped field\n")
    rng = np.random.default_rng(0)
    for index in range(14):
        image, mask = rng.integers(60, 120, (32, 32, 3)).astype(np.uint8), np.zeros((32, 32), np.uint8)
        for number in (1, 2):
            top, left = rng.integers(0, 20, 2)
            place = np.s_[top : top + 12, left : left + 12]
            mask[place] = number
            image[place] = [220, 30, 30] if number == 1 else np.where(np.arange(12)[:, None, None] % 4 < 2, 240, 10)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def boxes(fields: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fields, their annotations in COCO's form: boxes and polygons of the two fields; the last image has none."""
    folder = tmp_path_factory.mktemp("boxes")
    shutil.copytree(fields / "images", folder / "images")
    images, annotations = [], []
    for path in sorted((folder / "images").iterdir(), key=lambda path: int(path.stem)):
        number = int(path.stem)
        images.append({"id": number, "file_name": path.name, "width": 32, "height": 32})
        mask = np.asarray(Image.open(fields / "masks" / path.name))
        for category in (1, 2) if number < 13 else ():
            rows, columns = np.nonzero(mask == category)
            if len(rows):
                x, y, right, bottom = (int(n) for n in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
                polygon = [[x, y, right, y, right, bottom, x, bottom]]
                box = [x, y, right - x, bottom - y]
                one = {"image_id": number, "category_id": category, "bbox": box, "segmentation": polygon}
                annotations.append(one)
    names = [{"id": 1, "name": "red field"}, {"id": 2, "name": "striped field"}]
    content = {"images": images, "annotations": annotations, "categories": names}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
