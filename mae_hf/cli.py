"""The command `mae-hf`: the scripts as sub-commands, for an installation without the clone.

    mae-hf pretrain --dataset path/to/images --output_dir runs/mine
    mae-hf finetune --help
    accelerate launch -m mae_hf.cli pretrain --dataset path/to/images       # several processes

Sub-commands are pretrain, finetune, segmentation, detection, linear_probe, visualize and convert; each has --help.
"""

import runpy
import sys
from pathlib import Path

SCRIPTS = {
    "pretrain": "run_pretrain.py",
    "finetune": "run_finetune.py",
    "segmentation": "run_segmentation.py",
    "detection": "run_detection.py",
    "linear_probe": "run_linear_probe.py",
    "visualize": "visualize.py",
}
# In the package, where a wheel has put the scripts, or in the clone.
FOLDER = Path(__file__).with_name("scripts")
if not FOLDER.is_dir():
    FOLDER = Path(__file__).parents[1] / "examples"


def main() -> None:
    command = sys.argv[1].removeprefix("run_") if len(sys.argv) > 1 else ""
    known = [*SCRIPTS, "convert"]
    if command in ("", "-h", "--help"):
        print(__doc__)
    elif command == "convert":
        from .convert import main as convert

        convert(sys.argv[2:])
    elif command in SCRIPTS:
        script = str(FOLDER / SCRIPTS[command])
        sys.argv = [script, *sys.argv[2:]]
        runpy.run_path(script, run_name="__main__")  # as if it was started by itself, which its workers look at
    else:
        sys.exit(f"mae-hf: {sys.argv[1]!r} is an unknown sub-command. Known: {', '.join(known)}.")


if __name__ == "__main__":
    main()
