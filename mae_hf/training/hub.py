"""Push a run folder to the Hub, in the background while training goes on and once more at the end.

The token is huggingface_hub's affair (`hf auth login`, or HF_TOKEN): no setting of ours could leak into a recipe.
"""

import shlex
from collections.abc import Callable
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitOperationAdd, HfApi, get_token

# What of a run folder is for others: model and code, processor, card, metrics, versions, pictures. Checkpoints, logs,
# and recipe.yaml and skipped.jsonl, which have the paths of this machine, are not.
SHARED_FILES = ("README.md", "*.json", "metrics.jsonl", "*.safetensors", "*.py", "*.png")


class HubPush:
    """Pushes of one run folder to one repository, each a single commit.

    A push that fails is reported and raises nothing: the folder on disk is complete, and a run of many hours must not
    end for the sake of an upload. Only the main process pushes.

    Args:
        folder: the run folder.
        repo_id: "user/name", made if need be.
        recipe_yaml: what goes to the Hub as recipe.yaml, without the paths of this machine.
        private: make a private repository; else what the account has as its default.
        revision: the branch to push to, made if need be; `None` means main.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        recipe_yaml: str,
        private: bool = False,
        revision: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.repo_id, self.recipe_yaml = folder, repo_id, recipe_yaml
        self.private, self.revision, self.say = private, revision, say
        self.api = HfApi(library_name="mae_hf")
        self.running: Future[str | None] | None = None

    def prepare(self) -> None:
        """Make the repository, so that a wrong name or token is known before the training and not after it."""
        if reason := self._attempt(self._make_repository):
            self.say(f"hub       {self.repo_id} cannot be written to now, to be tried again at the end: {reason}")
        else:
            self.say(f"hub       {self.repo_id}{f' at {self.revision}' if self.revision else ''}")

    def is_free(self) -> bool:
        """Whether no push is under way; the same answer on every process, and all of them have to ask."""
        return broadcast_object_list([self.running is None or self.running.done()])[0]

    def in_background(self, message: str) -> None:
        """Push while the training goes on; the weights in the folder must not change until `is_free`."""
        self.wait()
        self.running = self.api.run_as_future(self._attempt, self._push, message, self._files())

    def wait(self) -> None:
        """Wait for the push in the background, if there is one, and say so if it failed."""
        if self.running is not None and (reason := self.running.result()):
            self.say(f"The push of a checkpoint to {self.repo_id} failed: {reason}")
        self.running = None

    def finish(self, message: str) -> None:
        """Push and wait for it; if it fails, say why, and with which command to push later."""
        self.wait()
        if reason := self._attempt(self._push, message, self._files()):
            self.say(f"The push to {self.repo_id} failed: {reason}")
            self.say(f"Nothing is lost, the model is in {self.folder}. To push it later:")
            self.say(f"    {self._command()}")
        else:
            self.say(f"Pushed to {self.api.endpoint}/{self.repo_id}.")

    def _make_repository(self) -> None:
        self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        if self.revision is not None:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def _files(self) -> list[CommitOperationAdd]:
        # By their content as it is now, because the metrics grow on; weights by their path, because they are large.
        shared = [path for path in sorted(self.folder.iterdir()) if any(fnmatch(path.name, p) for p in SHARED_FILES)]
        files = [
            CommitOperationAdd(path.name, path if path.suffix == ".safetensors" else path.read_bytes())
            for path in shared
        ]
        return [*files, CommitOperationAdd("recipe.yaml", self.recipe_yaml.encode())]

    def _push(self, message: str, files: list[CommitOperationAdd]) -> None:
        self._make_repository()
        # Not upload_folder, which may divide its files over several commits.
        self.api.create_commit(self.repo_id, files, commit_message=message, revision=self.revision)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> str | None:
        """Why the action failed, in a line without the token; None if it did not."""
        try:
            action(*arguments)
        except Exception as error:  # whatever a network and three libraries can raise, the run goes on
            text = " ".join(str(error).split()) or "no reason given"
            token = get_token()
            return f"{type(error).__name__}: {text.replace(token, '***') if token else text}"
        return None

    def _command(self) -> str:
        words = ["hf", "upload", self.repo_id, str(self.folder), "."]
        for pattern in SHARED_FILES:
            words += ["--include", pattern]
        words += ["--exclude", "*/*"]
        if self.private:
            words.append("--private")
        if self.revision is not None:
            words += ["--revision", self.revision]
        return shlex.join(words)
