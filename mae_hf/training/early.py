"""Run by a script before its imports, which take seconds: what is wrong with its command line is said at once.

run_path(".../early.py")["check_command_line"]("PretrainRecipe", "quickstart")
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

# Stands for mae_hf.training, whose import would be that of mae_hf, and so of torch and transformers.
PACKAGE = "mae_hf_training_early"


def check_command_line(recipe_class: str, default: str | None = None) -> None:
    """End a script at once, with a sentence, if its command line cannot be right.

    Args:
        recipe_class: the name of a dataclass in tasks.py.
        default: see `command_line.read_recipe`.
    """
    package = ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[PACKAGE] = package
    try:
        read_recipe = import_module(f"{PACKAGE}.command_line").read_recipe
        read_recipe(getattr(import_module(f"{PACKAGE}.tasks"), recipe_class), default=default)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
