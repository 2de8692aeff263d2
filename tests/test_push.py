"""run_pretrain.py --push_to_hub against the loopback Hub: what arrives, what does not, and what a failure costs."""

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import run_pretrain
import yaml
from accelerate.state import AcceleratorState
from hub import READ_TOKEN, WRITE_TOKEN, Hub
from huggingface_hub import HfApi, ModelCard
from transformers import AutoImageProcessor

from mae_hf import MAEForPreTraining
from mae_hf.training.hub import HubPush

SCRIPT = str(Path(run_pretrain.__file__))
SMALL = [
    *("--image_size", "8", "--patch_size", "4", "--hidden_size", "16", "--num_hidden_layers", "1"),
    *("--num_attention_heads", "2", "--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "1"),
    *("--decoder_num_attention_heads", "2", "--num_channels", "1", "--image_mean", "0.3", "--image_std", "0.4"),
    *("--dataset", "digits", "--images_per_epoch", "16", "--total_batch_size", "4", "--epochs", "2"),
    *("--warmup_epochs", "1", "--num_workers", "0", "--log_every", "1", "--save_every", "2"),
]
FILES = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "metrics.jsonl"),
    *("versions.json", "reconstruction.png", "configuration_mae.py", "cross_decoder.py", "modeling_dense.py"),
    *("inputs.py", "layers.py", "loading.py", "masking.py", "modeling_mae.py", "patches.py", "reconstruction.py"),
    *("modeling_detection.py", "modeling_segmentation.py", "targets.py", "windows.py"),
}
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # huggingface_hub of its HTTP client
]


def pretrain(output_dir: Path, *arguments: str) -> None:
    run_pretrain.main([*SMALL, "--output_dir", str(output_dir), *arguments])


def push(*arguments: str) -> list[str]:
    return ["--push_to_hub", "--hub_model_id", "user/digits", *arguments]


def test_push__one_commit_with_everything(hub: Hub, tmp_path: Path) -> None:
    pretrain(tmp_path / "run", *push("--hub_private_repo"))
    (commit,) = hub.model("user/digits").history()
    assert commit.files.keys() == FILES
    assert commit.title == "Pre-trained for 8 steps"
    assert hub.model("user/digits").private

    model = MAEForPreTraining.from_pretrained("user/digits")
    saved = MAEForPreTraining.from_pretrained(tmp_path / "run").state_dict()
    assert all(weight.equal(saved[name]) for name, weight in model.state_dict().items())
    assert AutoImageProcessor.from_pretrained("user/digits").image_mean == (0.3,)
    assert len(commit.files["metrics.jsonl"].content.splitlines()) == 8
    card = ModelCard.load("user/digits")
    assert card.data.library_name == "transformers"
    assert "# user/digits" in card.text


def test_push__nothing_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    """No path, no token, no name of the folder; not even when the run continues from a folder."""
    pretrain(tmp_path / "first")
    pretrain(tmp_path / "second", *push(), "--model_name_or_path", str(tmp_path / "first"))
    for path, file in hub.model("user/digits").history()[0].files.items():
        for private in (str(tmp_path), tmp_path.name, str(Path.home()), WRITE_TOKEN):
            assert private.encode() not in file.content, (path, private)
    for path in (tmp_path / "second").rglob("*"):
        assert path.is_dir() or WRITE_TOKEN.encode() not in path.read_bytes(), path


def test_push__recipe_can_be_used_again(hub: Hub, tmp_path: Path) -> None:
    pretrain(tmp_path / "run", *push())
    (tmp_path / "recipe.yaml").write_bytes(hub.model("user/digits").history()[0].files["recipe.yaml"].content)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_pretrain.main(["--recipe", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "again")
    ]
    assert losses[0] == losses[1]


def test_push__to_a_branch(hub: Hub, tmp_path: Path) -> None:
    pretrain(tmp_path / "run", *push("--hub_revision", "small"))
    assert hub.model("user/digits").history() == []
    assert hub.model("user/digits").history("small")[0].files.keys() == FILES


def test_push__every_checkpoint(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubPush, "is_free", lambda self: self.wait() or True)  # or a quick run would leave some out
    pretrain(tmp_path / "run", *push("--hub_push_every_checkpoint"))
    commits = hub.model("user/digits").history()[::-1]
    assert [commit.title for commit in commits] == [
        *("Step 2 of 8", "Step 4 of 8", "Step 6 of 8", "Pre-trained for 8 steps")
    ]
    assert [len(commit.files["metrics.jsonl"].content.splitlines()) for commit in commits] == [2, 4, 6, 8]
    assert len({commit.files["model.safetensors"].sha256 for commit in commits}) == 4
    assert b"for 0.5 of 2 epochs" in commits[0].files["README.md"].content
    assert b"for 2 epochs" in commits[-1].files["README.md"].content


def test_push__does_not_block_training(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first push hangs, the training goes on, and other checkpoints are left out."""
    training_is_over, wait = threading.Event(), HubPush.wait
    send = HfApi.create_commit

    def slow(self: HfApi, *arguments: object, **named: object) -> object:
        assert training_is_over.wait(timeout=60)
        return send(self, *arguments, **named)

    def wait_at_the_end(self: HubPush) -> None:
        if self.running is not None:
            steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
            assert steps == 8
            training_is_over.set()
        wait(self)

    monkeypatch.setattr(HfApi, "create_commit", slow)
    monkeypatch.setattr(HubPush, "wait", wait_at_the_end)
    pretrain(tmp_path / "run", *push("--hub_push_every_checkpoint"))
    titles = [commit.title for commit in hub.model("user/digits").history()]
    assert titles == ["Pre-trained for 8 steps", "Step 2 of 8"]


# ---------------------------------------------------------------------------------------------------------------------
# A push that fails
# ---------------------------------------------------------------------------------------------------------------------


def test_push__wrong_token_costs_nothing(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    command = [sys.executable, SCRIPT, *SMALL, "--output_dir", str(run), *push("--hub_private_repo")]
    environment = {**os.environ, "HF_TOKEN": "hf_wrong"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert hub.repos == {}
    assert MAEForPreTraining.from_pretrained(run).config.hidden_size == 16

    before, after = result.stdout.split("step 1/8")
    assert "user/digits cannot be written to now" in before  # known before the training, too
    assert "401" in before
    assert "The push to user/digits failed" in after
    assert "401" in after
    assert "hf_wrong" not in result.stdout + result.stderr

    # What it says is what helps.
    (later,) = [line for line in after.splitlines() if line.strip().startswith("hf upload")]
    words = shlex.split(later)
    hf = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    subprocess.run(hf, env=os.environ, capture_output=True, check=True, timeout=120)
    assert hub.model("user/digits").private
    assert hub.model("user/digits").history()[0].files.keys() == FILES - {"recipe.yaml"}
    assert MAEForPreTraining.from_pretrained("user/digits").config.hidden_size == 16


def test_push__no_right_costs_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    pretrain(tmp_path / "run", *push())
    said = capfd.readouterr().out
    assert "The push to user/digits failed: HfHubHTTPError: 403 Forbidden" in said
    assert "hf upload user/digits" in said
    assert MAEForPreTraining.from_pretrained(tmp_path / "run").config.hidden_size == 16


@pytest.mark.usefixtures("no_waiting")
def test_push__connection_drops(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.cut_uploads = 1000
    pretrain(tmp_path / "run", *push("--hub_push_every_checkpoint"))
    said = capfd.readouterr().out
    assert "The push of a checkpoint to user/digits failed: RuntimeError: Error while uploading" in said
    assert "The push to user/digits failed: RuntimeError: Error while uploading" in said
    assert hub.model("user/digits").history() == []

    # Starting again in the folder has nothing to train, and pushes.
    hub.cut_uploads = None
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(tmp_path / "run", *push())
    assert hub.model("user/digits").history()[0].files.keys() == FILES


def test_push__a_token_in_an_error_is_not_said(hub: Hub, tmp_path: Path) -> None:
    said: list[str] = []
    push = HubPush(tmp_path, "user/digits", "", say=said.append)
    push.api.create_repo = lambda *arguments, **named: (_ for _ in ()).throw(OSError(f"bad header {WRITE_TOKEN}"))
    push.prepare()
    push.finish("title")
    assert "OSError: bad header ***" in said[0]
    assert WRITE_TOKEN not in " ".join(said)


def test_recipe__a_name_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--hub_model_id user/name"):
        pretrain(tmp_path / "run", "--push_to_hub")
    with pytest.raises(ValueError, match="without push_to_hub"):
        pretrain(tmp_path / "run", "--hub_push_every_checkpoint")
    assert not (tmp_path / "run").exists()


def test_recipe__a_finished_run_can_still_be_pushed(hub: Hub, tmp_path: Path) -> None:
    """The settings of the Hub may change in a run folder; they stay in its recipe, but do not go to the Hub."""
    pretrain(tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(tmp_path / "run", *push())
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["hub_model_id"] == "user/digits"
    pushed = yaml.safe_load(hub.model("user/digits").history()[0].files["recipe.yaml"].content)
    assert not {"push_to_hub", "hub_model_id", "output_dir"} & pushed.keys()


def test_push__of_two_processes(hub: Hub, tmp_path: Path) -> None:
    """One of them pushes, and both agree on when a checkpoint is left out; otherwise they would wait for each other."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, SCRIPT, *SMALL, "--output_dir", str(tmp_path), *push("--hub_push_every_checkpoint")]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True, timeout=120)
    newest, *before = hub.model("user/digits").history()
    assert newest.files.keys() == FILES
    assert {commit.title for commit in before} <= {"Step 2 of 8", "Step 4 of 8", "Step 6 of 8"}
    assert before
