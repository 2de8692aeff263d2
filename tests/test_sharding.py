"""Readiness for FSDP2 over two gloo processes, and the Accelerate configurations that ship.

Accelerate turns FSDP and DeepSpeed on only where there is an accelerator, so its configurations are parsed and checked,
and what they would do to the model is done here with torch's own `fully_shard`.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from fsdp_steps import steps
from safetensors.torch import load_file
from scripts import launch
from tiny import tiny_config

from mae_hf import MAEForImageClassification, MAEForPreTraining

CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs__parse_and_say_how_to_launch(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys that Accelerate does not know
    assert config.mixed_precision == "bf16"
    assert f"--config_file examples/accelerate/{path.name}" in path.read_text()


def test_fsdp_config__wraps_the_blocks_of_both_models() -> None:
    (path,) = (path for path in CONFIGS if path.stem == "fsdp2")
    wrapped = yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    for model, blocks in ((MAEForPreTraining(tiny_config()), 5), (MAEForImageClassification(tiny_config()), 3)):
        assert sum(type(module).__name__ in wrapped for module in model.modules()) == blocks
        assert set(wrapped) <= set(model._no_split_modules)


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
