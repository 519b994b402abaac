"""The quick start, typed as it stands there, in an environment that is empty but for what the package depends on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.installed import ROOT, build, environment, run

PAGE = ROOT / "docs" / "quick_start.md"
LAST = "python -c 'import lightning_distopt; print(f\"used: {lightning_distopt.__file__}\")'\n"


def session() -> tuple[str, list[str], list[str]]:
    """Return what is typed as a script, the commands in it, and the files that are written on the way."""
    script, commands, files = "", [], []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if language == "bash":
            commands += text.splitlines()
            script += text
        elif (name := re.match(r"# (\S+\.(?:py|yaml))\n", text)) is not None:
            files.append(name[1])
            script += f"cat > {name[1]} <<'END OF FILE'\n{text}END OF FILE\n"
    return script, commands, files


def test_the_page_has_all_that_is_typed() -> None:
    _, commands, files = session()
    assert [command.partition(" ")[0] for command in commands] == [
        *("python", "source", "pip"),
        *("lightning-distopt", "cd", "python", "cd"),
        *("python", "lightning-distopt"),
    ]
    assert files == ["mine.py", "config.yaml"]
    assert "pip install 'lightning-distopt[data]'" in commands


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_from_nothing_to_a_trained_model(tmp_path: Path) -> None:
    """Packages come from here instead of from an index; all else is as on the page."""
    (tmp_path / "dist").mkdir()
    _, wheel = build(tmp_path / "dist")
    variables = environment(tmp_path / "dependencies")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    variables["PATH"] = f"{programs}:{variables['PATH']}"
    variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": "/dev/null"}
    home = tmp_path / "home"
    home.mkdir()
    script, *_ = session()
    output = run(["bash", "-e", "-c", script + LAST], home, variables, timeout=400)

    used = Path(re.search(r"^used: (.+)$", output, re.MULTILINE)[1])
    assert used.is_relative_to(home / ".venv"), "the package must come from the wheel"
    assert f"Successfully installed {'-'.join(wheel.name.split('-')[:2]).replace('_', '-')}" in output

    project = torch.load(home / "my_project" / "checkpoints" / "best.ckpt", weights_only=False)
    (best,) = [state["best_model_score"] for name, state in project["callbacks"].items() if "ModelCheckpoint" in name]
    assert best > 0.9
    steps = 10 * 23  # 1,437 digits in batches of 16 for four replicas, ten epochs
    assert output.count(f"Communication of 4 replica(s) in {steps} steps:") == 1
    # 4096 samples in batches of 32 for two processes: 64 steps an epoch, a round of gossip after each, two epochs.
    assert "rounds=128" in output
    weights = re.search(r"each of which should be 1: \[\[(.+?)\]\]", output)[1].split(", ")
    assert [float(weight) for weight in weights] == pytest.approx([1.0] * 8, abs=0.01)
    trained = [path for path in home.glob("lightning_logs/*/checkpoints/*.ckpt") if path.name.startswith("epoch=3")]
    assert len(trained) == 1  # of config.yaml; that of mine.py is of its second epoch
