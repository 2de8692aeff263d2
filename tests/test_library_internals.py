"""Each name of a library's inside that mae_hf relies on, so that a new version which has changed it is named."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import Accelerator
from torchvision.transforms import v2
from transformers import MODEL_MAPPING, PreTrainedModel

from mae_hf import MAEConfig

ROOT = Path(__file__).parents[1]


def inside(module: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(module)


@dataclass(frozen=True)
class Internal:
    """A name that no library promises.

    Args:
        library: its package.
        owner: makes what has the name.
        name: of the attribute.
        used_in: the one file that relies on it, in mae_hf.
        parameters: of a function that is overridden or called by position, in this order.
    """

    library: str
    owner: Callable[[], Any]
    name: str
    used_in: str
    parameters: tuple[str, ...] | None = None

    def check(self) -> None:
        has = f"{self.library} {version(self.library)} has"
        owner = self.owner()
        assert hasattr(owner, self.name), f"{has} no {self.name}, on which mae_hf/{self.used_in} relies"
        if self.parameters is not None:
            found = tuple(inspect.signature(getattr(owner, self.name)).parameters)
            assert found[: len(self.parameters)] == self.parameters, (
                f"{has} {self.name}{found}, and mae_hf/{self.used_in} was written for {self.parameters}"
            )


INTERNALS = [
    Internal(
        "transformers",
        lambda: PreTrainedModel,
        "_load_pretrained_model",
        "loading.py",
        ("model", "state_dict", "checkpoint_files", "load_config"),
    ),
    Internal("transformers", lambda: PreTrainedModel, "_init_weights", "modeling_mae.py", ("self", "module")),
    Internal("transformers", MAEConfig, "_attn_implementation", "layers.py"),
    Internal("transformers", MAEConfig, "_attn_implementation", "inputs.py"),
    Internal("transformers", lambda: MODEL_MAPPING, "register", "__init__.py", ("key", "value", "exist_ok")),
    Internal("accelerate", lambda: Accelerator(cpu=True), "_models", "training/checkpoints.py"),
    Internal("accelerate", lambda: Accelerator(cpu=True), "_optimizers", "training/checkpoints.py"),
    Internal("accelerate", lambda: Accelerator(cpu=True), "_custom_objects", "training/checkpoints.py"),
    Internal("accelerate", lambda: Accelerator(cpu=True), "native_amp", "training/sharding.py"),
    Internal(
        "accelerate",
        inside("accelerate.checkpointing"),
        "save_accelerator_state",
        "training/checkpoints.py",
        ("output_dir", "model_states", "optimizers", "schedulers", "dataloaders", "process_index", "step", "scaler"),
    ),
    Internal(
        "accelerate", inside("accelerate.commands.config.config_args"), "default_config_file", "training/launcher.py"
    ),
    Internal("datasets", lambda: datasets.Dataset.from_dict({"a": [1]}), "_indices", "training/overlap.py"),
    Internal("datasets", inside("datasets.utils.file_utils"), "xopen", "training/decode.py"),
    Internal(
        "torchvision",
        v2.RandAugment,
        "_apply_image_or_video_transform",
        "training/augment.py",
        ("image", "transform_id", "magnitude", "interpolation", "fill"),
    ),
]
OF_PYTHON = {"_exit", "_replace", "_run_exitfuncs", "_local", "_asdict"}  # its own, or its named tuples'
OURS = {"_freeze_position_tables", "_was_loaded_without_decoder", "_orig_mod"}


def name_of(internal: Internal) -> str:
    return f"{internal.name} in {internal.used_in}"


@pytest.mark.parametrize("internal", INTERNALS, ids=name_of)
@pytest.mark.usefixtures("fresh_accelerate")
def test_internal__is_as_it_was_when_it_was_relied_on(internal: Internal) -> None:
    internal.check()
    assert internal.name in (ROOT / "mae_hf" / internal.used_in).read_text(), "nobody relies on it any more"


@pytest.mark.parametrize("internal", INTERNALS, ids=name_of)
def test_internal__that_is_gone_or_other_is_said_with_the_version(internal: Internal) -> None:
    said = rf"^{internal.library} \d+\.[\w.]+ has no {internal.name}, on which mae_hf/{internal.used_in} relies"
    with pytest.raises(AssertionError, match=said):
        replace(internal, owner=object).check()
    if internal.parameters is not None:
        with pytest.raises(AssertionError, match=f"has {internal.name}.*was written for"):
            replace(internal, parameters=("another", *internal.parameters)).check()


def test_internals__the_list_is_whole_and_each_has_one_place() -> None:
    found = set()
    for file in (ROOT / "mae_hf").rglob("*.py"):
        code = re.sub(r"\"\"\".*?\"\"\"|#.*", "", file.read_text())
        for owner, name in re.findall(r"(\w+)\.(_(?!_)\w+)", code):
            if owner not in ("self", "cls") and name not in OF_PYTHON | OURS:
                found.add((name, file.relative_to(ROOT / "mae_hf").as_posix()))
    listed = {(internal.name, internal.used_in) for internal in INTERNALS}
    assert found <= listed
