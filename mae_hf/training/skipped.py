"""What a run has left out, counted over all processes: images that cannot be used, steps whose loss is not finite."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from .files import append_records
from .run import RunFolder

FIRST_NAMED = 5


def most_skipped(share: float, of: int) -> float:
    """How many of the images may be left out: the share of them that `max_skipped_images` names, but one at least."""
    return max(1.0, share * of) if share else 0.0


class Skipped:
    """Images that cannot be used: each listed once in the run folder, the first ones named, and too many refused.

    Each process notes what it meets; `gather` brings it together, at the log steps, where the processes meet anyway.

    Args:
        folder: has skipped.jsonl, with what an interrupted run has left out before.
        images_per_epoch: what the share refers to, until more images than that have been seen.
        largest_share: of the images seen; see `most_skipped`.
        accelerator: of the run.
        say: prints a line.
    """

    def __init__(
        self,
        folder: RunFolder,
        images_per_epoch: int,
        largest_share: float,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.images_per_epoch, self.largest_share = folder, images_per_epoch, largest_share
        self.accelerator, self.say = accelerator, say
        before = folder.skipped_records()
        self.images = {record["image"] for record in before if "image" in record}
        self.steps = sum("image" not in record for record in before)
        self.noted: list[dict[str, Any]] = []

    def note(self, step: int, problems: list[str]) -> None:
        """Remember the problems of a batch; most are "", and cost nothing."""
        self.noted += [{"step": step, "image": problem} for problem in problems if problem]

    def gather(self, images_seen: int) -> None:
        """List what all processes have noted; every process calls this.

        Args:
            images_seen: since the beginning of the run, over all processes.

        Raises:
            ValueError: too many images cannot be used.
        """
        found = []
        for record in sorted(gather_object(self.noted), key=lambda record: (record["step"], record["image"])):
            if record["image"] not in self.images:  # it comes again in every epoch
                self.images.add(record["image"])
                found.append(record)
        self.noted = []
        if not found:
            return
        for number, record in enumerate(found, start=len(self.images) - len(found) + 1):
            if number <= FIRST_NAMED:
                self.say(f"skipped   {record['image']}")
            elif number == FIRST_NAMED + 1:
                self.say(f"skipped   more of them are listed in {self.folder.skipped}")
        if self.accelerator.is_main_process:
            append_records(self.folder.skipped, found)
        of = max(images_seen, self.images_per_epoch)
        if len(self.images) > most_skipped(self.largest_share, of):
            raise ValueError(
                f"{len(self.images)} of {of:,} images cannot be used, more than the share of {self.largest_share:g} "
                f"that max_skipped_images allows, for instance: {found[0]['image']} They are listed in "
                f"{self.folder.skipped}: mend or remove them, or allow more."
            )

    def leave_out_step(self, step: int, most: int) -> None:
        """List a step whose loss was not finite on some process, and which moved no weight; every process calls this.

        Raises:
            FloatingPointError: there have been more than `most`.
        """
        self.steps += 1
        self.say(f"skipped   step {step}, whose loss is not finite")
        if self.accelerator.is_main_process:
            append_records(self.folder.skipped, [{"step": step}])
        if self.steps > most:
            raise FloatingPointError(
                f"The loss was not finite in {self.steps} steps, the last one step {step}; max_skipped_steps allows "
                f"{most}. The newest checkpoint is {self.folder.checkpoints.newest()}."
            )
