"""Every Auto class on every checkpoint that the scripts write, with this package installed and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_finetune
import run_pretrain
from accelerate.state import AcceleratorState
from tiny import scramble, seeded, tiny_config

from mae_hf import MAEModel
from mae_hf.training.augment import image_processor

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# In a process of its own, because the Auto classes remember what they have seen.
EVERY_AUTO_CLASS = """
import sys
installed, picture, again, *folders = sys.argv[1:]
if installed == "with":
    import mae_hf
else:
    for name in ("mae_hf", "accelerate", "datasets", "sklearn"):
        sys.modules[name] = None  # importing it now raises ImportError

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, pipeline

CLASSES = {
    AutoModel: "MAEModel",
    AutoModelForPreTraining: "MAEForPreTraining",
    AutoModelForImageClassification: "MAEForImageClassification",
}
for folder in folders:
    saved = {name.removeprefix("vit."): weight for name, weight in load_file(folder + "/model.safetensors").items()}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "MAEConfig"
    for auto_class, name in CLASSES.items():
        for model in (
            auto_class.from_pretrained(folder, trust_remote_code=True),
            auto_class.from_pretrained(folder, trust_remote_code=True, config=config),
        ):
            assert type(model).__name__ == name, (folder, auto_class)
            assert type(model).__module__.startswith("mae_hf" if installed == "with" else "transformers_modules")
            weights = {name.removeprefix("vit."): weight for name, weight in model.state_dict().items()}
            found = [name for name in weights if name in saved]
            assert {"embeddings.cls_token", "layers.1.mlp.fc2.weight"} <= set(found)
            assert all(weights[name].equal(saved[name]) for name in found), (folder, auto_class)
        assert type(auto_class.from_config(config, trust_remote_code=True)).__name__ == name

    extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, device="cpu")
    pixel_values = extract.image_processor(Image.open(picture).convert("RGB"), return_tensors="pt").pixel_values
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(extract(picture)), model(pixel_values).last_hidden_state)
    if config.architectures == ["MAEForImageClassification"]:
        classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
        assert {row["label"] for row in classify(picture)} == {"cat", "dog", "eel"}

# Loaded from a folder or the Hub and saved again, all of the code comes along.
model.save_pretrained(again)
assert type(AutoModelForPreTraining.from_pretrained(again, trust_remote_code=True)).__name__ == "MAEForPreTraining"
print("done", len(folders))
"""


@pytest.fixture(scope="module")
def saved(pets: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder of each of the three models: two that the scripts leave, and an encoder."""
    root = tmp_path_factory.mktemp("saved")
    os.environ["ACCELERATE_USE_CPU"] = "1"
    for script, name in ((run_pretrain, "pretrained"), (run_finetune, "fine-tuned")):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--dataset", str(pets), "--model_name_or_path", str(checkpoint), "--output_dir", str(root / name)]
        words += ["--total_batch_size", "8", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
        script.main([*words, *(["--eval_fraction", "0.25"] if script is run_finetune else [])])
    scramble(seeded(MAEModel, tiny_config())).save_pretrained(root / "encoder")
    image_processor((32, 32), 0.875, [0.5] * 3, [0.25] * 3).save_pretrained(root / "encoder")
    return [str(root / name) for name in ("pretrained", "fine-tuned", "encoder")]


@pytest.mark.parametrize("installed", ["with", "without"])
def test_every_auto_class_and_pipeline__on_every_kind_of_checkpoint(
    installed: str, saved: list[str], pets: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            EVERY_AUTO_CLASS,
            installed,
            str(pets / "cat" / "0.png"),
            str(tmp_path / "again"),
            *saved,
        ],
        env={**os.environ, "HF_HOME": str(tmp_path)},  # of which nothing stays: the code beside the weights is copied
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["done 3"], done.stderr[-3000:]


def test_own_subclass__does_not_claim_the_code_of_ours(tmp_path: Path) -> None:
    class Own(MAEModel):
        pass

    seeded(MAEModel, tiny_config()).save_pretrained(tmp_path / "ours")
    Own.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    for reference in (config.get("auto_map") or {}).values():
        assert (tmp_path / "own" / f"{reference.split('.')[0]}.py").exists(), reference
