"""What the pages tell a new user to type, typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fresh_environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=fresh_environment(ROOT), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.launch
def test_the_script_of_the_quick_start(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(blocks("docs/quick_start.md", "python")[0])
    # 4096 samples in batches of 32 for two processes: 64 steps an epoch, H = 8, two epochs.
    assert "rounds=16" in run([sys.executable, "train.py"], tmp_path)


@pytest.mark.launch
def test_the_configuration_of_the_quick_start(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(blocks("docs/quick_start.md", "yaml")[0])
    command = [sys.executable, "-m", "lightning_distopt", "fit", "--config", "config.yaml"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    run([*command, *short, "--data.init_args.num_train=600", "--data.init_args.num_test=100"], tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_the_pages_parses(page: Path) -> None:
    for block in blocks(str(page.relative_to(ROOT)), "python"):
        compile(re.sub(r"\*\*options_of_every_strategy", "**{}", block), str(page), "exec")
