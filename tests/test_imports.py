"""Importing the package waits for nothing that few of its users need."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.helpers import fresh_environment

ROOT = Path(__file__).parent.parent
OPTIONAL = [
    "accelerate",
    "curvlinops",
    "flwr",
    "matplotlib",
    "pyhessian",
    "scipy",
    "shtab",
    "sklearn",
    "tokenizers",
    "transformers",
]
LATER = {"docstring_parser", "jsonargparse", "networkx", "torch._dynamo", "torchvision", *OPTIONAL}
"""What is imported when it is used, and not by `import lightning_distopt`; unless Lightning has done so already."""

AT_ONCE = {"lightning", "lightning_distopt", "numpy", "torch", "torchdata", "torchmetrics", "tqdm", "typing_extensions"}

SCRIPT = textwrap.dedent(
    """
    import json, sys
    import lightning
    before = set(sys.modules)
    for name in sys.argv[1:]:
        if name not in before:
            sys.modules[name] = None  # as if it were not installed
    import lightning_distopt
    print(json.dumps([sorted(before), sorted(name for name, module in sys.modules.items() if module is not None)]))
    """
)


def imported(*absent: str) -> tuple[set[str], set[str]]:
    """Return modules after `import lightning`, and those that `import lightning_distopt` adds."""
    command = [sys.executable, "-c", SCRIPT, *absent]
    done = subprocess.run(command, env=fresh_environment(ROOT), capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    before, after = map(set, json.loads(done.stdout))
    return before, after - before


def test_what_few_need_is_not_imported() -> None:
    before, added = imported()
    assert "lightning_distopt.strategies.gossip" in added
    assert LATER & added == set()
    assert LATER - before >= {"jsonargparse", "networkx"}  # so that the above says something
    assert {name.partition(".")[0] for name in added} - sys.stdlib_module_names <= AT_ONCE


def test_it_is_imported_where_nothing_optional_is_installed() -> None:
    _, added = imported(*OPTIONAL, "jsonargparse", "docstring_parser")
    assert "lightning_distopt.strategies.gossip" in added
