"""The Accelerate configurations that ship, each started for real on a CPU; and torch.compile by the launcher.

DeepSpeed has one process here, DDP and FSDP2 two over gloo. Accelerate turns FSDP on only where there are several GPUs:
several_runs.py tells it that there are, everything after that is Accelerate's and torch's own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import run_finetune
import run_linear_probe
import run_pretrain
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from fsdp_steps import steps
from safetensors.torch import load_file
from scripts import launch, losses, metrics
from tiny import tiny_config
from transformers import ViTConfig, ViTForImageClassification

from mae_hf import MAEForImageClassification, MAEForPreTraining
from mae_hf.training import loop

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "accelerate").glob("*.yaml"))
SEVERAL_RUNS = str(Path(__file__).with_name("several_runs.py"))
COMMON = [
    *("--total_batch_size", "4", "--per_device_batch_size", "1", "--num_workers", "0", "--log_every", "1"),
    *("--warmup_epochs", "1", "--epochs", "2", "--save_every", "5"),
]
PRETRAIN = [
    *("--image_size", "16", "--patch_size", "4", "--hidden_size", "32", "--num_hidden_layers", "2"),
    *("--num_attention_heads", "2", "--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1"),
    *("--decoder_num_attention_heads", "2", "--base_lr", "0.1", *COMMON),
]
LAST = "step-00000012"  # of two epochs of 24 images
FINETUNE = [
    *("--eval_fraction", "0.25", "--base_lr", "0.1", "--layer_decay", "0.5", "--max_grad_norm", "0.5", *COMMON),
    *("--mixup", "0", "--cutmix", "0", "--drop_path_rate", "0"),  # of which every process has its own
]
LOADS_ALONE = """
import sys
sys.modules["mae_hf"] = None  # not to be imported
import torch
from transformers import AutoModelForPreTraining
model = AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "MAEForPreTraining" and type(model).__module__.startswith("transformers_modules")
assert model(torch.zeros(1, 3, 16, 16)).loss.isfinite()
"""

LOADS_AS_THE_SECOND = """
import os, sys
import torch
from torch import distributed
from mae_hf import MAEConfig, MAEForImageClassification
from mae_hf.training.starting_weights import load_with_encoder
from mae_hf.training.teachers import Teacher

checkpoint, teacher, classes = sys.argv[1:]
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
told = dict(os.environ)
config = MAEConfig.from_pretrained(checkpoint, num_labels=int(classes))
student, new = load_with_encoder(MAEForImageClassification, checkpoint, config)
assert "classifier.weight" in new, new
for model in (student, Teacher(teacher)):
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta or not tensor.isfinite().all()]
assert 0 < student.classifier.weight.std() < 1e-4
assert dict(os.environ) == told
"""


def environment_of(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` says to the processes by their environment."""
    (path,) = (path for path in CONFIGS if path.stem == config)
    words = ["--config_file", str(path), "--num_processes", "2", "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(("ACCELERATE_", "FSDP_"))}


def torchrun(config: str) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    def start(runs: Path) -> subprocess.CompletedProcess[str]:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SEVERAL_RUNS, str(runs)]
        return _start(words, {**environment_of(config), "ACCELERATE_USE_CPU": "1"})

    return start


def deepspeed(runs: Path) -> subprocess.CompletedProcess[str]:
    (path,) = (path for path in CONFIGS if path.stem == "deepspeed_zero2")
    words = ["-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "1"]
    return _start([*words, SEVERAL_RUNS, str(runs)], {"DS_ACCELERATOR": "cpu"})


def _start(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], env=environment, text=True, capture_output=True, timeout=400)


def alone(script, dataset: Path, output_dir: Path, *words: str) -> list[float]:
    """A run in this process, without a launcher; its losses."""
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(["--dataset", str(dataset), "--output_dir", str(output_dir), *words])
    return losses(metrics(output_dir))


def difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return float(np.abs(np.subtract(a, b)).max())


def assert_equal_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == torch.float32
        if tolerance and name.endswith("k_proj.bias"):  # attention does not depend on it: its gradient is rounding
            continue
        assert (tensor - second[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs__parse_and_say_how_to_launch(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys that Accelerate does not know
    assert config.mixed_precision == "bf16"
    assert f"--config_file examples/accelerate/{path.name}" in path.read_text()


FSDP, DEEPSPEED, MEGATRON = DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM
ZERO_2, ZERO_3 = ({"deepspeed_plugin": SimpleNamespace(zero_stage=stage)} for stage in (2, 3))


@pytest.mark.parametrize(
    ("script", "kind", "told", "words", "sentence"),
    [
        (run_pretrain, MEGATRON, {}, [], "Megatron-LM cannot train this model"),
        (run_pretrain, FSDP, {"is_fsdp2": False}, [], "FSDP1 hides the parameters.*set fsdp_version: 2"),
        (run_finetune, FSDP, {"is_fsdp2": True}, ["--ema_decay", "0.9"], "leave --ema_decay out"),
        (run_pretrain, DEEPSPEED, ZERO_3, [], "use zero_stage 2"),
        (run_finetune, DEEPSPEED, ZERO_2, ["--max_skipped_steps", "1"], "leave --max_skipped_steps out"),
        (run_pretrain, DEEPSPEED, {**ZERO_2, "mixed_precision": "fp16"}, [], "mixed_precision is bf16 or no, not fp16"),
        (run_linear_probe, FSDP, {"is_fsdp2": True}, [], "A probe is too small to be divided"),
        (run_linear_probe, DEEPSPEED, ZERO_2, [], "A probe is too small to be divided"),
    ],
)
def test_launched_by_what_cannot_train__is_refused(
    script: ModuleType,
    kind: DistributedType,
    told: dict,
    words: list[str],
    sentence: str,
    pets: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Launched(Accelerator):
        """What Accelerate would be on several GPUs, after such a configuration."""

        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)
            self.__class__ = type("Told", (Accelerator,), {"distributed_type": kind, **told})

    monkeypatch.setattr(loop, "Accelerator", Launched)
    words = ["--dataset", str(pets), "--model_name_or_path", str(checkpoint), *words]
    words += ["--output_dir", str(tmp_path / "run"), *([] if script is run_pretrain else ["--eval_fraction", "0.25"])]
    with pytest.raises(ValueError, match=sentence):
        script.main(words)
    assert not (tmp_path / "run").exists()


def test_fsdp_config__wraps_the_blocks_of_both_models() -> None:
    (path,) = (path for path in CONFIGS if path.stem == "fsdp2")
    wrapped = yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    for model, blocks in ((MAEForPreTraining(tiny_config()), 5), (MAEForImageClassification(tiny_config()), 3)):
        assert sum(type(module).__name__ in wrapped for module in model.modules()) == blocks
        assert set(wrapped) <= set(model._no_split_modules)


def test_fsdp_that_loads_in_one_process__leaves_no_weight_out_in_another(checkpoint: Path, tmp_path: Path) -> None:
    """A head that is new, and the pooler that a classifier of transformers lacks as a teacher."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    told = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "1"}
    done = _start(["-c", LOADS_AS_THE_SECOND, str(checkpoint), str(tmp_path), "3"], told)
    assert done.returncode == 0, done.stderr


def test_fully_shard__same_losses_and_a_plain_model(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("fsdp_steps.py"))
    done = launch("torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config())
    expected = steps(model, 0, 1)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected.tolist(), abs=1e-5)
    gathered, whole = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert gathered.keys() == whole.keys()
    assert max((gathered[name] - whole[name]).abs().max() for name in whole) < 1e-5
    MAEForPreTraining.from_pretrained(tmp_path)
    # The code and the names of a model that was never sharded.
    model.save_pretrained(tmp_path / "plain")
    saved, plain = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "plain"))
    assert saved == plain
    assert plain["auto_map"]["AutoModelForPreTraining"] == "modeling_mae.MAEForPreTraining"
    code = [{path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in (tmp_path, tmp_path / "plain")]
    assert code[0] == code[1]
    assert "sharded over processes: pass state_dict=accelerator.get_state_dict(model)" in done.stderr
    assert not (tmp_path / "sharded").exists()


@pytest.mark.parametrize("wrapped", ["torch.compile", "of its blocks", "DataParallel"])
def test_save_pretrained__plain_keys_of_a_wrapped_model(wrapped: str, tmp_path: Path) -> None:
    model = MAEForPreTraining(tiny_config())
    names = set(model.state_dict())
    wrapper: torch.nn.Module = model
    if wrapped == "torch.compile":
        wrapper = torch.compile(model, backend="eager")
    elif wrapped == "of its blocks":
        model.vit.layers[1] = torch.compile(model.vit.layers[1], backend="eager")
    else:
        wrapper = torch.nn.DataParallel(model)
    model.save_pretrained(tmp_path, state_dict=wrapper.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == names
    _, info = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_config__trains_resumes_and_exports_as_one_process_without_it(
    config: str, pets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    start = torchrun(config)
    refused = []
    averaged = ["--ema_decay", "0.9"]
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
        start = deepspeed
        refused = [("run_pretrain", "max_skipped_steps", ["--max_skipped_steps", "1"])]
    if config == "fsdp2":
        averaged = []
        refused = [("run_finetune", "ema_decay", [*FINETUNE, "--ema_decay", "0.9"])]
    if config != "ddp":
        refused += [
            ("run_linear_probe", "ddp.yaml", ["--model_name_or_path", str(checkpoint), "--eval_fraction", "0.25"])
        ]

    def run(script: str, name: str, *words: str, **more: object) -> dict[str, object]:
        arguments = ["--dataset", str(pets), "--output_dir", str(tmp_path / name), *words]
        return {"script": script, "arguments": arguments, **more}

    exact = ["--mixed_precision", "no"]
    tuned = ["--model_name_or_path", str(checkpoint), *FINETUNE, *exact, *averaged]
    again = {"continues": str(tmp_path / "whole"), "without": LAST}
    runs = [run("run_pretrain", "whole", *PRETRAIN), run("run_pretrain", "cut", *PRETRAIN, **again)]
    if config == "fsdp2":
        sharded = {"environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
        runs += [run("run_pretrain", "sharded", *PRETRAIN, **sharded)]
        again = {"continues": str(tmp_path / "sharded"), "without": LAST}
        runs += [run("run_pretrain", "sharded_cut", *PRETRAIN, **again)]
    runs += [run("run_pretrain", "exact", *PRETRAIN, *exact), run("run_finetune", "tuned", *tuned)]
    again = {"continues": str(tmp_path / "tuned"), "without": "step-00000009"}
    runs += [run("run_finetune", "tuned_cut", *tuned, **again)]
    runs += [run(script, "none", *words, refused=says) for script, says, words in refused]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = start(tmp_path / "runs.json")
    assert done.returncode == 0, done.stdout + done.stderr
    processes = "1 processes x 1 images x 4" if config == "deepspeed_zero2" else "2 processes x 1 images x 2"
    assert f"batch     4 in total = {processes} rounds" in done.stdout
    assert "precision bf16" in done.stdout
    assert not (tmp_path / "none").exists()

    # Interrupted runs go on to the bit.
    for whole, cut in (("whole", "cut"), ("sharded", "sharded_cut"), ("tuned", "tuned_cut")):
        if (tmp_path / whole).exists():
            assert losses(metrics(tmp_path / whole)) == losses(metrics(tmp_path / cut))
            assert_equal_weights(tmp_path / whole, tmp_path / cut)
    assert done.stdout.count("resume    from step") == (3 if config == "fsdp2" else 2)

    # The launcher changes nothing: in float32 up to rounding, and in bfloat16 up to its rounding.
    expected = alone(run_pretrain, pets, tmp_path / "alone", *PRETRAIN)
    assert difference(losses(metrics(tmp_path / "exact")), expected) < 1e-5
    assert_equal_weights(tmp_path / "exact", tmp_path / "alone", 1e-4)
    clipped = alone(run_pretrain, pets, tmp_path / "clipped", *PRETRAIN, "--max_grad_norm", "1")
    assert difference(clipped, expected) > 1e-4  # so that a clip that nobody has asked for would show
    half = alone(run_pretrain, pets, tmp_path / "half", *PRETRAIN, "--mixed_precision", "bf16")
    assert difference(losses(metrics(tmp_path / "whole")), half) < 3e-3
    expected = alone(run_finetune, pets, tmp_path / "tuned_alone", *tuned)
    assert difference(losses(metrics(tmp_path / "tuned")), expected) < 1e-5
    for folder in (".", "best"):
        assert_equal_weights(tmp_path / "tuned" / folder, tmp_path / "tuned_alone" / folder, 1e-4)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("tuned", "tuned_alone")]
    assert results[0].pop("per_class") == pytest.approx(results[1].pop("per_class"), abs=1e-4)
    assert results[0] == pytest.approx(results[1], abs=1e-4)

    # What was written loads with the package, and without it.
    assert isinstance(MAEForPreTraining.from_pretrained(tmp_path / "whole"), MAEForPreTraining)
    words = [sys.executable, "-c", LOADS_ALONE, str(tmp_path / "whole")]
    done = subprocess.run(words, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr

    if config == "ddp":  # and one process goes on where two have stopped
        cut = tmp_path / "cut" / "checkpoints"
        newest = max(cut.iterdir())
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
        resumed = alone(run_pretrain, pets, tmp_path / "cut", *PRETRAIN, "--mixed_precision", "bf16")
        assert difference(resumed, losses(metrics(tmp_path / "whole"))) < 3e-3


@pytest.mark.slow
def test_preparing_the_images__may_take_longer_than_any_exchange(pets: Path, tmp_path: Path) -> None:
    words = ["--dataset", str(pets), "--output_dir", str(tmp_path / "run"), *PRETRAIN, "--process_timeout", "8"]
    runs = [{"script": "run_pretrain", "arguments": words, "preparing": 12}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = torchrun("ddp")(tmp_path / "runs.json")
    assert done.returncode == 0, done.stderr
    assert len(losses(metrics(tmp_path / "run"))) == 12


def test_compiled_by_the_launcher__leaves_and_resumes_the_same_model(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(run_pretrain, pets, tmp_path / "plain", *PRETRAIN)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert difference(alone(run_pretrain, pets, tmp_path / "compiled", *PRETRAIN), expected) < 1e-5
    assert_equal_weights(tmp_path / "compiled", tmp_path / "plain", 1e-4)
    _, loaded = MAEForPreTraining.from_pretrained(tmp_path / "compiled", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]

    for run, backend in (("compiled", "NO"), ("plain", "EAGER")):  # resumed without, and with it
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        newest = tmp_path / run / "checkpoints" / LAST
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
        assert difference(alone(run_pretrain, pets, tmp_path / run, *PRETRAIN), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [(), ("--ema_decay", "0.9")], ids=["plain", "averaged"])
def test_compiled_by_the_launcher__leaves_the_same_classifier(
    averaged: tuple[str, ...], pets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model_name_or_path", str(checkpoint), *FINETUNE, *averaged]
    expected = alone(run_finetune, pets, tmp_path / "plain", *words)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert difference(alone(run_finetune, pets, tmp_path / "compiled", *words), expected) < 1e-5
    for folder in (".", "best"):
        assert_equal_weights(tmp_path / "compiled" / folder, tmp_path / "plain" / folder, 1e-4)
        assert MAEForImageClassification.from_pretrained(tmp_path / "compiled" / folder).num_labels == 3
