"""What an installed package is made of: its dependencies are declared."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"matplotlib", "scikit-learn"}  # of the extras digits and plots


def test_dependencies__everything_imported_is_declared() -> None:
    imported = set()
    for file in [*ROOT.glob("mae_hf/**/*.py"), *ROOT.glob("examples/run_*.py"), ROOT / "examples" / "visualize.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.partition(".")[0])
    owners = packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-") for name in imported - sys.stdlib_module_names - {"mae_hf"}}
    assert {"torch", "pyyaml"} <= needed
    declared = {re.split(r"[<>=\[]", line)[0].lower() for line in PROJECT["dependencies"]}
    assert needed - declared <= OPTIONAL
