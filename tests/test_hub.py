"""To the Hub and back with the real client, over the loopback Hub of tests/hub.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import READ_TOKEN, Hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from tiny import random_images, random_noise, scramble, seeded, tiny_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    pipeline,
)

from mae_hf import (
    MAEBackbone,
    MAEConfig,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEForSemanticSegmentation,
    MAEModel,
)
from mae_hf.training.augment import image_processor

CODE = {
    *("configuration_mae.py", "cross_decoder.py", "inputs.py", "layers.py", "loading.py", "masking.py"),
    *(
        "modeling_dense.py",
        "modeling_detection.py",
        "modeling_mae.py",
        "modeling_segmentation.py",
        "patches.py",
        "reconstruction.py",
    ),
    "targets.py",
    "windows.py",
}
MODELS = [
    (MAEModel, AutoModel),
    (MAEForPreTraining, AutoModelForPreTraining),
    (MAEForImageClassification, AutoModelForImageClassification),
    (MAEForSemanticSegmentation, AutoModelForSemanticSegmentation),
    (MAEBackbone, AutoBackbone),
]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub of its HTTP client


def scrambled(model_class: type = MAEModel, **fields: object):
    return scramble(seeded(model_class, tiny_config(**fields))).eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """What a model makes of fixed images: features, a map of them, predictions or class scores."""
    images = random_images(model.config)
    with torch.no_grad():
        output = model(images, noise=random_noise(model.config)) if hasattr(model, "decoder") else model(images)
    if "feature_maps" in output:
        return output.feature_maps[-1]
    return output.logits if "logits" in output else output.last_hidden_state


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, which reads the settings of huggingface_hub anew."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def partial_downloads() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


# ---------------------------------------------------------------------------------------------------------------------
# Push and pull
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_class", "auto_class"), MODELS)
def test_push_and_pull__bit_equal(model_class: type, auto_class: type, hub: Hub) -> None:
    model = scrambled(model_class, num_labels=5)
    model.push_to_hub("user/name")
    (commit,) = hub.model("user/name").history()
    assert commit.files.keys() == CODE | {"README.md", "config.json", "model.safetensors"}
    for loader in (model_class, auto_class):
        loaded = loader.from_pretrained("user/name")
        assert type(loaded) is model_class
        assert outputs(loaded).equal(outputs(model))
        for name, weight in model.state_dict().items():
            assert loaded.state_dict()[name].equal(weight), name


def test_push_and_pull__configuration_and_processor(hub: Hub) -> None:
    tiny_config(mask_ratio=0.5).push_to_hub("user/name")
    image_processor((32, 32), 0.875, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]).push_to_hub("user/name")
    assert type(config := AutoConfig.from_pretrained("user/name")) is MAEConfig
    assert config.mask_ratio == 0.5
    assert AutoImageProcessor.from_pretrained("user/name").image_mean == (0.5, 0.4, 0.3)


def test_push_and_pull__tags_and_revisions(hub: Hub) -> None:
    models = {"first": scrambled(), "second": scrambled(pooling="cls"), "side": scrambled(mask_ratio=0.5)}
    models["first"].push_to_hub("user/name")
    HfApi().create_tag("user/name", tag="v1")
    first_commit = HfApi().model_info("user/name").sha
    models["second"].push_to_hub("user/name")
    models["side"].push_to_hub("user/name", revision="side")
    assert {tag.name for tag in HfApi().list_repo_refs("user/name").tags} == {"v1"}
    for revision, name in {"v1": "first", first_commit: "first", "main": "second", "side": "side"}.items():
        config = MAEModel.from_pretrained("user/name", revision=revision).config
        expected = models[name].config
        assert (config.pooling, config.mask_ratio) == (expected.pooling, expected.mask_ratio), revision
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        MAEModel.from_pretrained("user/name", revision="v2")


def test_push_and_pull__only_what_changed_is_sent(hub: Hub) -> None:
    model = scrambled()
    model.push_to_hub("user/name")
    hub.requests.clear()
    model.config.mask_ratio = 0.5
    model.push_to_hub("user/name")
    assert len(hub.model("user/name").history()) == 2
    assert not any(request.startswith("PUT") for request in hub.requests)  # the weights are there
    MAEModel.from_pretrained("user/name")
    hub.requests.clear()
    MAEModel.from_pretrained("user/name")
    assert not any("GET /user/name/resolve" in request for request in hub.requests)  # ETags: all of it is in the cache


# ---------------------------------------------------------------------------------------------------------------------
# What may not be
# ---------------------------------------------------------------------------------------------------------------------


def test_private__only_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    scrambled().push_to_hub("user/secret", private=True)
    assert HfApi().model_info("user/secret").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match=r"private repository.*hf auth login"):
        MAEModel.from_pretrained("user/secret")
    with pytest.raises(RepositoryNotFoundError) as error:
        HfApi().model_info("user/secret")
    assert error.value.response.status_code == 401
    assert MAEModel.from_pretrained("user/secret", token=READ_TOKEN).config.hidden_size == 32


def test_missing__named(hub: Hub) -> None:
    with pytest.raises(OSError, match="user/nothing is not a local folder and is not a valid model identifier"):
        MAEModel.from_pretrained("user/nothing")
    tiny_config().push_to_hub("user/name")
    with pytest.raises(OSError, match=r"user/name does not appear to have a file named model\.safetensors"):
        MAEModel.from_pretrained("user/name")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("user/name", revision="v7")


@pytest.mark.parametrize(("token", "status"), [("hf_wrong", 401), (READ_TOKEN, 403)])
def test_push__without_the_right(token: str, status: int, hub: Hub) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        scrambled().push_to_hub("user/name", token=token)
    assert error.value.response.status_code == status
    assert hub.repos == {}


def test_push__stale_parent(hub: Hub, tmp_path: Path) -> None:
    scrambled().push_to_hub("user/name")
    stale = HfApi().model_info("user/name").sha
    scrambled(pooling="cls").push_to_hub("user/name")
    scrambled(mask_ratio=0.5).save_pretrained(tmp_path)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        HfApi().upload_folder(repo_id="user/name", folder_path=tmp_path, parent_commit=stale)
    assert error.value.response.status_code == 412
    assert len(hub.model("user/name").history()) == 2
    assert MAEModel.from_pretrained("user/name").config.pooling == "cls"


# ---------------------------------------------------------------------------------------------------------------------
# Broken connections
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
def test_upload__connection_drops(hub: Hub) -> None:
    model = scrambled()
    hub.cut_uploads = 10_000
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        model.push_to_hub("user/name")
    assert hub.model("user/name").history() == []  # no commit, not even of the small files
    hub.cut_uploads = None
    model.push_to_hub("user/name")
    assert outputs(MAEModel.from_pretrained("user/name")).equal(outputs(model))


@pytest.mark.usefixtures("no_waiting")
def test_download__connection_drops(hub: Hub) -> None:
    model = scrambled()
    model.push_to_hub("user/name")
    hub.cut_downloads = 0
    with pytest.raises(OSError, match="user/name"):
        MAEModel.from_pretrained("user/name")
    hub.cut_downloads = None
    assert outputs(MAEModel.from_pretrained("user/name")).equal(outputs(model))
    assert partial_downloads() == []


@pytest.mark.usefixtures("no_waiting")
def test_download__goes_on_where_it_was_cut_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled()
    model.push_to_hub("user/name")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what came before the cut reaches the disk
    hub.cut_downloads = 100_000  # of 180,000 bytes
    assert outputs(MAEModel.from_pretrained("user/name")).equal(outputs(model))
    assert sum(request.startswith("GET") and request.endswith("/model.safetensors") for request in hub.requests) == 2


LOAD = """
import time
time.sleep = lambda seconds: None  # between the attempts of the client
from mae_hf import MAEModel
for name in ("user/name", "user/other"):
    try:
        print(MAEModel.from_pretrained(name).config.hidden_size)
    except OSError as error:
        print("OSError:", error)
"""


def test_cache__server_is_gone(hub: Hub) -> None:
    scrambled().push_to_hub("user/name")
    MAEModel.from_pretrained("user/name")
    gone = Hub()
    gone.stop()
    cached, missing = python(LOAD, HF_ENDPOINT=gone.url).stdout.split("\n", 1)
    assert cached == "32"
    assert f"OSError: We couldn't connect to '{gone.url}'" in missing


def test_cache__offline(hub: Hub) -> None:
    scrambled().push_to_hub("user/name")
    MAEModel.from_pretrained("user/name")
    hub.requests.clear()
    cached, missing = python(LOAD, HF_HUB_OFFLINE="1").stdout.split("\n", 1)
    assert cached == "32"
    assert "OSError: We couldn't connect to" in missing
    assert hub.requests == []


# ---------------------------------------------------------------------------------------------------------------------
# Without this package
# ---------------------------------------------------------------------------------------------------------------------

# Only torch and transformers, and what these two need themselves.
WITHOUT_PACKAGE = """
import sys
for name in ("mae_hf", "accelerate", "datasets", "torchvision", "sklearn"):
    sys.modules[name] = None  # importing it now raises ImportError
import torch, transformers
inputs, results, *auto_classes = sys.argv[1:]
inputs = torch.load(inputs)
outputs = {}
for auto_class in auto_classes:
    model = getattr(transformers, auto_class).from_pretrained("user/" + auto_class, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    images, noise = inputs
    with torch.no_grad():
        output = model(images, noise=noise) if hasattr(model, "decoder") else model(images)
    found = [output[name] for name in ("logits", "last_hidden_state") if name in output]
    outputs[auto_class] = found[0] if found else output.feature_maps[-1]
torch.save(outputs, results)
"""


def test_without_package__bit_equal(hub: Hub, tmp_path: Path) -> None:
    models = {auto_class.__name__: scrambled(model_class, num_labels=5) for model_class, auto_class in MODELS}
    for name, model in models.items():
        model.push_to_hub(f"user/{name}")
    config = tiny_config()
    torch.save((random_images(config), random_noise(config)), tmp_path / "inputs.pt")
    run = python(WITHOUT_PACKAGE, str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt"), *models)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "results.pt")
    for name, model in models.items():
        assert found[name].equal(outputs(model)), name


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


def save_with_processor(folder: Path, model: torch.nn.Module) -> None:
    channels = model.config.num_channels
    model.save_pretrained(folder)
    image_processor((32, 32), 0.875, [0.5] * channels, [0.25] * channels).save_pretrained(folder)


def picture(mode: str) -> Image.Image:
    return Image.linear_gradient("L").rotate(30).convert(mode)


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipeline__equals_model_and_processor(task: str, where: str, hub: Hub, tmp_path: Path) -> None:
    model = scrambled(MAEForImageClassification if task == "image-classification" else MAEModel, num_labels=3)
    save_with_processor(tmp_path, model)
    HfApi().create_repo("user/name")
    HfApi().upload_folder(repo_id="user/name", folder_path=tmp_path)
    name = "user/name" if where == "hub" else str(tmp_path)
    result = pipeline(task, model=name)(picture("RGB"))

    pixel_values = AutoImageProcessor.from_pretrained(name)(picture("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values)
    if task == "image-classification":
        expected = output.logits.softmax(-1)[0]
        assert {row["label"]: pytest.approx(row["score"]) for row in result} == {
            f"LABEL_{i}": score.item() for i, score in enumerate(expected)
        }
    else:
        torch.testing.assert_close(torch.tensor(result), output.last_hidden_state)


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipeline__grey_model_says_what_it_needs(task: str, tmp_path: Path) -> None:
    """The pipelines turn every picture into RGB, so a grey model is used through its processor."""
    model = scrambled(MAEForImageClassification if task == "image-classification" else MAEModel, num_channels=1)
    save_with_processor(tmp_path, model)
    with pytest.raises(ValueError, match=r"1 channels"):
        pipeline(task, model=str(tmp_path))(picture("L"))
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(picture("L"), return_tensors="pt").pixel_values
    assert model(pixel_values)[0].isfinite().all()
