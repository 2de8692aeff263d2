"""Model cards: what the Hub reads in them, what a person reads, and what must not be in them."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import run_detection
import run_finetune
import run_pretrain
import run_segmentation
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from test_faults import SMALL, SMALL_ENCODER

from mae_hf import MAEConfig, MAEForPreTraining
from mae_hf.training.gain import TITLES
from mae_hf.training.model_card import loss_table, shareable_recipe, teachers_of, write_pretraining_card
from mae_hf.training.tasks import FinetuneRecipe, PretrainRecipe

CARDS = Path(__file__).parents[2] / "model_cards"
HISTORY = [{"step": 10 * i, "epoch": i / 4, "loss": 1 / i, "lr": 1e-4 * i} for i in range(1, 41)]


def resolved(**fields: object) -> PretrainRecipe:
    recipe = PretrainRecipe(size="tiny", epochs=10, warmup_epochs=1, **fields)
    return recipe.resolved(recipe.config(), "no")


def card(folder: Path, source_name: str, history: list[dict] = HISTORY, **fields: object) -> ModelCard:
    write_pretraining_card(folder, resolved(**fields), source_name, history, 12_345_678)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("place", ["user/labelled", "folder"])
def test_gain__is_a_table_of_the_card(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    dataset = str(tmp_path / "folder") if place == "folder" else place
    recipe = resolved(labelled_dataset=dataset, model_name_or_path="a/b")
    gain = {name: {"top1": 0.5 + i / 10, "balanced_accuracy": 0.25} for i, name in enumerate(TITLES)}
    write_pretraining_card(tmp_path, recipe, "images", HISTORY, 12_345_678, None, gain)
    text = (tmp_path / "README.md").read_text()
    assert "| frozen before | 50.0 | 25.0 |\n| frozen after | 60.0 | 25.0 |\n| fine-tuned | 70.0 | 25.0 |\n" in text
    assert f"On labelled images, {place}, in per cent" in text
    for written in (text, str(card(tmp_path, "images"))):
        assert "\n\n\n" not in written.split("```")[2]
        assert "\n\n## Training\n\n" in written
    assert "What it has brought" not in written


def test_metadata__of_a_run_on_the_hub(tmp_path: Path) -> None:
    written = card(
        tmp_path,
        source_name="user/images",
        dataset="user/images",
        model_name_or_path="facebook/vit-mae-base",
        hub_model_id="user/name",
        license="cc-by-nc-4.0",
    )
    data = written.data.to_dict()
    assert data.pop("tags") == ["mae", "masked-autoencoder", "self-supervised", "vision", "mae_hf"]
    assert data == {
        "license": "cc-by-nc-4.0",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "datasets": ["user/images"],
        "base_model": "facebook/vit-mae-base",
    }
    assert "[user/images](https://huggingface.co/datasets/user/images)" in written.text
    assert "starting from [facebook/vit-mae-base](https://huggingface.co/facebook/vit-mae-base)" in written.text
    assert 'name = "user/name"' in written.text


def test_metadata__of_a_run_on_this_machine(tmp_path: Path) -> None:
    """Neither the images nor the checkpoint have a name that means anything elsewhere."""
    run = tmp_path / "run"
    run.mkdir()
    local = {"dataset": str(tmp_path / "photos"), "model_name_or_path": str(tmp_path), "output_dir": str(run)}
    written = card(run, source_name="a local folder of images", **local)
    assert written.data.license == "unknown"  # which is for the person who trained it to say
    assert not {"datasets", "base_model", "model-index"} & written.data.to_dict().keys()
    assert "on a local folder of images" in written.text
    assert "starting from" not in written.text
    assert str(tmp_path) not in str(written)


def test_card__the_text_of_a_person(tmp_path: Path) -> None:
    written = card(tmp_path, source_name="user/images", dataset="user/images").text
    for expected in ("12,345,678 parameters", "for 10 epochs: 75 % of", "reconstruction.png", "0.0250"):
        assert expected in written
    assert "{{" not in written
    assert yaml.safe_load(written.split("```yaml\n")[1].split("```")[0])["base_lr"] == 1.5e-4
    assert '.convert("RGB")' in written
    grey = {"num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}
    assert '.convert("L")' in card(tmp_path, source_name="user/images", **grey).text


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("script", "words", "run"),
    [
        (run_pretrain, SMALL, "runs/mine"),
        (run_pretrain, SMALL, "../elsewhere"),
        (run_finetune, [*SMALL_ENCODER, "--eval_fraction", "0.25"], "runs/mine"),
        (run_finetune, [*SMALL_ENCODER, "--eval_fraction", "0.25", "--num_channels", "1"], "runs/mine"),
    ],
)
def test_card__its_code_runs_where_the_run_was_started(
    script: ModuleType, words: list[str], run: str, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script.main(["--dataset", str(pets), *words, "--epochs", "1", "--output_dir", run])
    (code,) = re.findall(r"```python\n(.*?)```", Path(run, "README.md").read_text(), flags=re.DOTALL)
    assert ("path/to/elsewhere" in code) == (run == "../elsewhere"), "its folder is nobody's business"
    shutil.copy(pets / "cat" / "0.png", "image.jpg")
    exec(code.replace("path/to", ".."), {})


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("script", "images", "words"),
    [
        (run_finetune, "pets", []),
        (run_segmentation, "fields", ["--segmentation_channels", "16"]),
        (run_detection, "boxes", ["--pyramid_channels", "16", "--box_head_channels", "32"]),
    ],
    ids=["classifier", "segmenter", "detector"],
)
def test_card__names_whom_the_encoder_was_taught_by(
    script: ModuleType,
    images: str,
    words: list[str],
    checkpoint: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if script is run_detection:
        pytest.importorskip("faster_coco_eval", reason="pip install faster-coco-eval")
    words = [*words, "--eval_fraction", "0.3", "--image_size", "32", "--total_batch_size", "4", "--num_workers", "0"]
    taught = shutil.copytree(checkpoint, tmp_path / "taught")
    config = MAEConfig.from_pretrained(checkpoint)
    config.distilled_from = "some/teacher@0123, layers 3; before <b>"
    config.save_pretrained(taught)
    for start, is_taught in ((taught, True), (checkpoint, False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = ["--dataset", str(request.getfixturevalue(images)), "--output_dir", str(tmp_path / f"{is_taught}")]
        script.main([*run, "--model_name_or_path", str(start), *words, "--epochs", "1", "--warmup_epochs", "0"])
        written = (tmp_path / f"{is_taught}" / "README.md").read_text()
        assert ("**This is a distillation.**" in written) == is_taught
        assert ("some/teacher@0123, layers 3; before &lt;b&gt;: the images and labels" in written) == is_taught
        assert "\n\n\n" not in written

    assert not teachers_of("tokenizer tokens.safetensors@0123")
    assert teachers_of("tokenizer a@0; before b@1; before c@2") == "b@1; before c@2"


def test_card__a_run_that_has_learned_has_no_doubts(tmp_path: Path) -> None:
    learned = card(tmp_path, "images", history=[{**record, "loss_of_mean": 0.98} for record in HISTORY]).text
    assert "at the end: 0.0250; a model that predicts just the mean has 0.9800.\n\n| step" in learned


@pytest.mark.parametrize(("records", "said"), [(2, "for 0.5 of 10 epochs"), (39, "for 10 epochs"), (0, "not logged")])
def test_card__of_a_run_that_is_not_over(records: int, said: str, tmp_path: Path) -> None:
    assert said in card(tmp_path, source_name="user/images", history=HISTORY[:records]).text


def test_recipe__paths_are_left_out_and_names_are_not() -> None:
    named = resolved(dataset="user/images", model_name_or_path="user/model", push_to_hub=True, hub_model_id="user/name")
    shown = yaml.safe_load(shareable_recipe(named, "user/images"))
    assert (shown["dataset"], shown["model_name_or_path"]) == ("user/images", "user/model")
    everything = vars(named).keys()
    assert everything - shown.keys() == {"output_dir", "overwrite", "push_to_hub"} | {
        n for n in everything if n.startswith("hub_")
    }
    hidden = yaml.safe_load(shareable_recipe(resolved(dataset="digits", model_name_or_path="/"), "the digits"))
    assert not {"dataset", "model_name_or_path"} & hidden.keys()
    evaluated = FinetuneRecipe(dataset="user/images", eval_dataset="/home/somebody/*.tar")
    shown = yaml.safe_load(shareable_recipe(evaluated, "user/images", "local files"))
    assert (shown["dataset"], "eval_dataset" in shown) == ("user/images", False)
    named = replace(evaluated, eval_dataset="user/other")
    assert yaml.safe_load(shareable_recipe(named, "user/images", "user/other"))["eval_dataset"] == "user/other"


@pytest.mark.parametrize(("records", "steps"), [(0, []), (1, [10]), (3, [10, 20, 30]), (40, range(40, 401, 40))])
def test_loss_table__evenly_spaced_to_the_end(records: int, steps: list[int]) -> None:
    rows = loss_table(HISTORY[:records]).splitlines()[2:]
    assert [int(row.split("|")[1]) for row in rows] == list(steps)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published__cards_are_what_fill_writes(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails and you meant it: python model_cards/fill.py"""
    monkeypatch.syspath_prepend(CARDS)
    from fill import PUBLISHED, published_card

    sys.modules.pop("fill")
    written = ModelCard.load(CARDS / f"vit_{size}.md")
    assert str(written) == str(published_card(size))
    assert written.data.license == "cc-by-nc-4.0"
    assert f"python -m mae_hf.convert facebook/vit-mae-{size} DESTINATION" in written.text
    assert [result.metric_value for result in written.data.eval_results] == [
        PUBLISHED[size]["finetuned"],
        PUBLISHED[size]["linear"],
    ]
    import torch

    with torch.device("meta"):
        model = MAEForPreTraining(MAEConfig.from_size(size))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == PUBLISHED[size]["parameters"]
    assert f"{sum(p.numel() for p in model.vit.parameters()):,}" == PUBLISHED[size]["encoder_parameters"]


def test_decoder__named_where_it_is_not_the_papers(tmp_path: Path) -> None:
    crossed = card(tmp_path, "images", decoder_type="cross", prediction_ratio=1 / 3).text
    assert "a cross-attention decoder (CrossMAE" in crossed
    assert "predicted 33 % of the hidden patches" in crossed
    fused = card(tmp_path, "images", fused_layers=[0, 2]).text
    assert "fused with the hidden states 0, 2 (MFF" in fused
    plain = card(tmp_path, "images").text
    assert "CrossMAE" not in plain
    assert "MFF" not in plain
