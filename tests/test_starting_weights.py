"""What the scripts start from: a checkpoint with its whole encoder, or they refuse and name what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import run_finetune
import run_linear_probe
import run_pretrain
import torch
import visualize
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from tiny import tiny_config

from mae_hf import MAEForImageClassification, MAEForPreTraining, MAEModel

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FEW = [
    *("--total_batch_size", "4", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0", "--log_every", "1"),
    *("--image_mean", "0.4", "0.5", "0.6", "--image_std", "0.2", "0.3", "0.4"),
]
SPLIT = ["--eval_fraction", "0.25"]


def pretrain(start: Path, pets: Path, output: Path, *words: str) -> None:
    settings = ["--dataset", str(pets), "--model_name_or_path", str(start), *FEW, "--output_dir", str(output)]
    run_pretrain.main([*settings, *words])


def finetune(start: Path, pets: Path, output: Path, *words: str) -> None:
    settings = ["--dataset", str(pets), "--model_name_or_path", str(start), *FEW, *SPLIT, "--output_dir", str(output)]
    run_finetune.main([*settings, *words])


def evaluate(start: Path, pets: Path, output: Path, *words: str) -> None:
    finetune(start, pets, output, "--eval_only", "true", "--pooling", "cls", *words)


def probe(start: Path, pets: Path, output: Path, *words: str) -> None:
    settings = ["--dataset", str(pets), "--model_name_or_path", str(start), *FEW, *SPLIT, "--output_dir", str(output)]
    run_linear_probe.main([*settings, *words])


def show(start: Path, pets: Path, output: Path) -> None:
    visualize.main([str(start), str(pets / "cat" / "0.png"), "--output", str(output.with_suffix(".png"))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("script", [pretrain, finetune])
def test_checkpoint_in_16_bits__is_trained_in_32(
    script: Callable[..., None], dtype: torch.dtype, pets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = MAEForPreTraining.from_pretrained(checkpoint, dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "half")
    script(tmp_path / "half", pets, tmp_path / "run", "--mixed_precision", "no")
    before = model.vit.layers[0].mlp.fc1.weight.float()
    after = load_file(tmp_path / "run" / "model.safetensors")["vit.layers.0.mlp.fc1.weight"]
    assert after.dtype == torch.float32
    assert (after != before).float().mean() > 0.95, "the steps were rounded away"


SCRIPTS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "probe": probe,
    "show": show,
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the pets that pools the class token, so that it has every weight of the encoder."""
    folder = tmp_path_factory.mktemp("classifier")
    labels = {0: "cat", 1: "dog", 2: "eel"}
    config = tiny_config(pooling="cls", id2label=labels, label2id={name: i for i, name in labels.items()})
    MAEForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def start(request: pytest.FixtureRequest, checkpoint: Path, classifier: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoilt, of the kind that the script is for."""
    folder = tmp_path / "start"
    if request.node.callspec.params["script"] != "evaluate":
        return Path(shutil.copytree(checkpoint, folder))
    shutil.copytree(classifier, folder)
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    return folder


def change_keys(start: Path, rename: Callable[[str], str | None]) -> None:
    weights = load_file(start / "model.safetensors")
    kept = {new: weight for key, weight in weights.items() if (new := rename(key)) is not None}
    save_file(kept, start / "model.safetensors", metadata={"format": "pt"})


def change_config(start: Path, **fields: object) -> None:
    config = json.loads((start / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (start / "config.json").write_text(json.dumps(kept))


def foreign(start: Path) -> None:
    change_keys(start, lambda key: f"student.{key}")


def without_layers(start: Path) -> None:
    change_keys(start, lambda key: None if key.startswith("vit.layers.") else key)


def without_a_layer(start: Path) -> None:
    change_keys(start, lambda key: None if key.startswith("vit.layers.1.") else key)


def without_the_position_table(start: Path) -> None:
    change_keys(start, lambda key: None if key == "vit.embeddings.position_embeddings" else key)


def without_a_bias(start: Path) -> None:
    change_keys(start, lambda key: None if key == "vit.layers.1.mlp.fc1.bias" else key)


def depth_not_said(start: Path) -> None:
    change_config(start, num_hidden_layers=None)


def shallower(start: Path) -> None:
    change_config(start, num_hidden_layers=2)


def narrower(start: Path) -> None:
    change_config(start, intermediate_size=64)


SPOILT = [
    (foreign, r"No weight in .*start fits the encoder.*student\."),
    (without_layers, r"start are not those of its configuration: missing is vit\.layers\.0\..* and 45 more"),
    (without_a_layer, r"missing is vit\.layers\.1\.attention\.k_proj\.bias, .* and 13 more"),
    (without_a_bias, r"missing is vit\.layers\.1\.mlp\.fc1\.bias\. "),
    (without_the_position_table, r"missing is vit\.embeddings\.position_embeddings\. "),
    (depth_not_said, r"missing is vit\.layers\.10\..* and 141 more"),  # 12 layers by default, and there are 3
    (shallower, r"left over is vit\.layers\.2\..* and 13 more"),
    (narrower, r"of another shape is vit\.layers\.0\.mlp\.fc1\.bias"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("spoil", "sentence"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_encoder__that_is_not_whole_is_refused_with_its_keys(
    script: str, spoil: Callable[[Path], None], sentence: str, start: Path, pets: Path, tmp_path: Path
) -> None:
    spoil(start)
    if script == "probe":
        sentence = sentence.replace(r"vit\.", r"(vit\.)?")  # it has nothing but the encoder
    with pytest.raises(ValueError, match=sentence):
        SCRIPTS[script](start, pets, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_encoder__of_a_wrapped_model_is_taken(script: str, start: Path, pets: Path, tmp_path: Path) -> None:
    change_keys(start, lambda key: f"_orig_mod.{key}")
    SCRIPTS[script](start, pets, tmp_path / "out")
    assert list(tmp_path.glob("out*"))


def test_pretrain__without_a_decoder_goes_on_and_says_so(
    checkpoint: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAEModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "encoder")
    pretrain(tmp_path / "encoder", pets, tmp_path / "out")
    assert f"weights   {tmp_path / 'encoder'}, which has no decoder: that is new" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(checkpoint, pets, tmp_path / "both")
    assert f"weights   {checkpoint}\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain", "show"])
def test_decoder__in_pieces_is_refused_with_its_keys(script: str, checkpoint: Path, pets: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(checkpoint, tmp_path / "start"))
    change_config(start, decoder_num_hidden_layers=3)  # and the checkpoint has 2
    with pytest.raises(ValueError, match=r"missing is decoder\.decoder_layers\.2\..* and 13 more"):
        SCRIPTS[script](start, pets, tmp_path / "out")


@pytest.mark.parametrize("run", [pretrain, probe])
def test_encoder__of_a_classifier_that_has_no_final_norm_is_refused(
    run: Callable[..., None], checkpoint: Path, pets: Path, tmp_path: Path
) -> None:
    MAEForImageClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(tmp_path / "mean")
    with pytest.raises(ValueError, match=r"missing is (vit\.)?layernorm\.bias.*that pools the mean has no final norm"):
        run(tmp_path / "mean", pets, tmp_path / "out")


@pytest.mark.parametrize("words", [[], ["--eval_only", "true"]])
def test_classifier__keeps_its_pooling(words: list[str], classifier: Path, pets: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classifies the class token, not the mean of the patches: give --pooling cls"):
        finetune(classifier, pets, tmp_path / "out", *words)
    finetune(classifier, pets, tmp_path / "out", "--pooling", "cls", *words)


def test_finetune__of_an_encoder_alone_takes_it_whole(checkpoint: Path, pets: Path, tmp_path: Path) -> None:
    MAEModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "encoder")
    finetune(tmp_path / "encoder", pets, tmp_path / "out", "--base_lr", "0")
    tuned, before = (
        MAEForImageClassification.from_pretrained(tmp_path / "out"),
        MAEForPreTraining.from_pretrained(checkpoint),
    )
    weights = before.vit.layers.state_dict()
    assert all((weight - weights[key]).abs().max() < 1e-6 for key, weight in tuned.vit.layers.state_dict().items())
