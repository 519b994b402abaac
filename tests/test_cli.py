"""The command line: subcommands, configurations in and out, and errors of one sentence."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_distopt import (
    ClientMonitor,
    ExponentialWarmup,
    FederatedStrategy,
    LocalSGDStrategy,
    PostLocalSwitch,
    __version__,
    cli,
)
from lightning_distopt.data import DigitsDataModule
from lightning_distopt.listing import listing
from lightning_distopt.models import ImageClassifier
from lightning_distopt.strategies import ReplicaStrategy
from tests.helpers import Forked, fresh_environment

MODEL = ["--model=ImageClassifier", "--model.model=lenet", "--model.model_options={in_channels: 1, image_size: 8}"]
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and drop what seeding leaves in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(args: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """Run the command line up to its end of the process; return stdout, or stderr if `status` is not 0."""
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert (end.value.code or 0) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def print_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return yaml.safe_load(run([*args, "--print_config"], capsys))


@pytest.mark.parametrize("args", [["--help"], []])
def test_help_lists_every_subcommand_with_one_line(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = [line.strip() for line in run(args, capsys).splitlines()]
    for name in ("fit", "validate", "test", "predict", *cli.COMMANDS):
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert len(line.split()) > 4


def test_version(capsys):
    assert run(["--version"], capsys).split() == ["lightning-distopt", __version__]


def test_the_module_is_the_command(tmp_path):
    command = ["-m", "lightning_distopt", "demo", "--help"]
    with Forked(command, tmp_path, fresh_environment(Path(__file__).parents[1])) as process:
        assert "--quick" in process.finish(timeout=120)


def test_options_of_a_command_come_from_its_signature(capsys, monkeypatch):
    calls = []

    def example(size: int, names: list[str] | None = None, loud: bool = False) -> None:
        """Do something.

        Args:
            size: How large.
            names: Of whom.
            loud: Whether to shout.
        """
        calls.append((size, names, loud))

    monkeypatch.setitem(cli.COMMANDS, "example", example)
    cli.main(["example", "3", "--loud"])
    cli.main(["example", "4", "--names=[a, b]"])
    assert calls == [(3, None, True), (4, ["a", "b"], False)]
    text = run(["example", "--help"], capsys)
    assert "Do something" in text
    assert "Whether to shout" in text
    assert "example" in run(["--help"], capsys)


def test_print_config_reads_back_as_it_was_written(capsys, tmp_path):
    args = ["fit", *MODEL, "--data=DigitsDataModule", "--trainer.strategy=LocalSGDStrategy"]
    args += ["--trainer.strategy.sync_period=3", "--trainer.callbacks+=PostLocalSwitch", "--trainer.callbacks.at=0.5"]
    first = print_config(args, capsys)
    assert first["seed_everything"] is True
    assert first["trainer"]["strategy"]["init_args"]["sync_period"] == 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first))
    assert print_config(["fit", "--config=config.yaml"], capsys) == first


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_print_config_of_lightnings_commands(command, capsys, tmp_path):
    args = [command, *MODEL, "--data=DigitsDataModule", STRATEGY, "--trainer.strategy.block_period=2"]
    config = print_config(args, capsys)
    assert config["model"]["init_args"]["model"] == "lenet"
    assert config["trainer"]["strategy"]["init_args"]["block_period"] == 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert print_config([command, "--config=config.yaml"], capsys) == config


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["new", "my_project"], {"folder": "my_project"}),
        (["demo", "--quick", "--seed=3"], {"quick": True, "seed": 3, "replicas": 4}),
        (["strategies", "local_sgd"], {"name": "local_sgd"}),
        (["algorithms", "choco"], {"name": "choco"}),
        (["aggregators", "fedprox"], {"name": "fedprox"}),
        (["pruning", "rigl"], {"name": "rigl"}),
        (["compressors", "sign"], {"name": "sign"}),
        (["topologies", "torus"], {"name": "torus"}),
        (["topology", "ring", "--replicas=16"], {"name": "ring", "replicas": 16, "steps": 50}),
        (["partitioners", "dirichlet"], {"name": "dirichlet"}),
        (["partition", "dirichlet:0.1", "--replicas=16"], {"name": "dirichlet:0.1", "replicas": 16, "data": None}),
        (["plan", "--replicas=64", "--step=50"], {"replicas": 64, "step": 50.0, "clusters": 1, "across": None}),
        (["completion", "bash"], {"shell": "bash"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_print_config_of_our_commands(args, expected, capsys):
    assert print_config(args, capsys).items() >= expected.items()
    assert args[0] in cli.COMMANDS


def test_every_command_of_ours_prints_its_config():
    tested = {"demo", "strategies", "algorithms", "compressors", "topologies", "topology", "partitioners", "partition"}
    tested |= {"aggregators", "pruning", "plan", "completion", "new", "analyze"}  # the last one in `test_analyze.py`
    assert set(cli.COMMANDS) == tested, "add the new one to the test above"


def test_options_of_our_commands_from_a_file(monkeypatch, tmp_path):
    calls = []

    def example(size: int = 1, loud: bool = False) -> None:
        """Do something."""
        calls.append((size, loud))

    monkeypatch.setitem(cli.COMMANDS, "example", example)
    (tmp_path / "config.yaml").write_text("size: 3\nloud: true\n")
    cli.main(["example", "--config=config.yaml"])
    assert calls == [(3, True)]


# ------------------------------------------------------------------------------------------------------------- listings


def test_strategies_lists_every_name_that_the_package_registers(capsys):
    cli.main(["strategies"])
    names, text = capsys.readouterr().out.split("\n", 1)
    assert names.split(", ") == ["local_sgd", "local_sgd_spawn", "local_sgd_fork", "local_sgd_notebook"]
    assert " ".join(text.split()).startswith("LocalSGDStrategy: Train replicas independently for `H` optimizer steps")


def test_options_of_a_strategy_are_those_that_it_takes(capsys):
    cli.main(["strategies", "local_sgd"])
    printed = re.findall(r"^(\w+)=", capsys.readouterr().out, re.MULTILINE)
    own = list(inspect.signature(LocalSGDStrategy.__init__).parameters)[1:-1]
    inherited = list(inspect.signature(ReplicaStrategy.__init__).parameters)[2:]  # without `self`, `algorithm`
    assert printed == own + inherited  # each of which the docstrings describe


def test_options_that_a_strategy_settles_are_not_listed(capsys):
    cli.main(["strategies", "federated"])
    printed = re.findall(r"^(\w+)=", capsys.readouterr().out, re.MULTILINE)
    own = list(inspect.signature(FederatedStrategy.__init__).parameters)[1:-1]
    assert printed[: len(own)] == own
    assert len(set(printed)) == len(printed)
    assert {"evaluate", "nonfinite", "algorithm"}.isdisjoint(printed)
    assert "timeout" in printed


def test_a_misspelt_name_in_a_listing(capsys):
    error = run(["strategies", "local_sdg"], capsys, status=2)
    assert error.startswith("lightning-distopt: error: 'local_sdg' is not among the strategies (did you mean 'local_sgd'?)")


def test_a_listing_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "schedules", listing("schedules", {"exponential": ExponentialWarmup}))
    cli.main(["schedules"])
    assert "ExponentialWarmup: `H` doubles from 1" in capsys.readouterr().out
    cli.main(["schedules", "exponential"])
    assert "steps\n    `T'`, the length of the warm-up" in capsys.readouterr().out
    assert "List the schedules, or the options of one." in run(["schedules", "--help"], capsys)


# ----------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts(shell, capsys):
    script = run(["completion", shell], capsys)
    assert "lightning-distopt" in script
    for word in ("predict", "strategies", "--trainer.max_epochs" if shell != "tcsh" else "completion"):
        assert word in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys, tmp_path):
    (tmp_path / "script").write_text(run(["completion", "bash"], capsys))

    def complete(*words: str) -> list[str]:
        typed = " ".join(shlex.quote(word) for word in ("lightning-distopt", *words))
        program = f"source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_lightning_distopt; "
        program += "printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30, cwd=tmp_path, check=True)
        return done.stdout.split()

    assert complete("str") == ["strategies"]
    assert complete("fit", "--trainer.max_e") == ["--trainer.max_epochs"]
    assert "--trainer.strategy.sync_period" in complete("fit", "--trainer.strategy.")
    assert "local_sgd" in complete("fit", "--trainer.strategy", "local")


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'lightning-distopt[cli]'" in run(["completion", "bash"], capsys, status=2)


# ------------------------------------------------------------------------------------------------------------- training


def test_schedule_and_short_names_in_yaml_train(tmp_path):
    schedule = {"class_path": "lightning_distopt.ExponentialWarmup", "init_args": {"sync_period": 2, "steps": 4}}
    strategy = {"class_path": "LocalSGDStrategy", "init_args": {"sync_period": schedule, "replicas_per_device": 2}}
    callback = {"class_path": "lightning_distopt.PostLocalSwitch", "init_args": {"at": 1}}
    config = {"trainer": {"strategy": strategy, "callbacks": [callback]}, "data": "DigitsDataModule"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    trained = cli._CLI(["fit", "--config=config.yaml", *MODEL, *SHORT])
    assert isinstance(trained.trainer.strategy, LocalSGDStrategy)
    assert isinstance(trained.model, ImageClassifier)
    assert isinstance(trained.datamodule, DigitsDataModule)
    (switch,) = [c for c in trained.trainer.callbacks if isinstance(c, PostLocalSwitch)]
    assert switch.switched_at == 1
    assert isinstance(trained.trainer.strategy.sync_period, ExponentialWarmup)  # given back after training
    assert trained.trainer.global_step == 2
    assert "PL_GLOBAL_SEED" in os.environ
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("name", ["local_sgd", "LocalSGDStrategy", "lightning_distopt.LocalSGDStrategy"])
def test_strategy_by_name_alone(name):
    trained = cli._CLI(["fit", *MODEL, *SHORT, "--data=DigitsDataModule", f"--trainer.strategy={name}"])
    assert isinstance(trained.trainer.strategy, LocalSGDStrategy)
    assert trained.trainer.strategy.sync_period == 8


@pytest.mark.parametrize(
    "strategy",
    [
        ["--trainer.strategy=federated"],
        ["--trainer.strategy=FederatedStrategy", "--trainer.strategy.aggregator=fedprox"],
        [
            "--trainer.strategy=FederatedStrategy",
            "--trainer.strategy.aggregator=FedProx",
            "--trainer.strategy.aggregator.mu=0.1",
        ],
    ],
)
def test_federated_strategy(strategy, capsys, tmp_path):
    watch = ["--trainer.callbacks+=ClientMonitor", "--trainer.callbacks.every_n_rounds=1"]
    config = print_config(["fit", *MODEL, *SHORT, "--data=DigitsDataModule", *strategy, *watch], capsys)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = cli._CLI(["fit", "--config=config.yaml"]).trainer
    assert isinstance(trained.strategy, FederatedStrategy)
    assert trained.strategy.traffic.rounds == 1
    if len(strategy) == 3:
        assert trained.strategy.aggregator.mu == 0.1
    (monitor,) = [c for c in trained.callbacks if isinstance(c, ClientMonitor)]
    assert len(monitor.history[0]["on_clients"]) == 100


STRATEGY = "--trainer.strategy=LocalSGDStrategy"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--trainer.max_epoks=3"],
            "there is no option `--trainer.max_epoks=3` (did you mean `--trainer.max_epochs`?).",
        ),
        (["--trainer.max_epochs=x"], "`trainer.max_epochs`: expected int or null, got x."),
        ([STRATEGY, "--trainer.strategy.sync_perod=3"], "no option `sync_perod` (did you mean `sync_period`?)."),
        (
            [STRATEGY, "--trainer.strategy.partition=Dirichlet", "--trainer.strategy.partition.alpa=1"],
            "`trainer.strategy.partition`: Dirichlet has no option `alpa` (did you mean `alpha`?).",
        ),
        (
            [STRATEGY, "--trainer.strategy.partition=Dirichlet", "--trainer.strategy.partition.alpha=x"],
            "`trainer.strategy.partition.alpha`: expected float, got x.",
        ),
        ([STRATEGY, "--trainer.strategy.sync_period=0"], "`sync_period` must be a whole number of steps, at least 1"),
        (
            [STRATEGY, "--trainer.strategy.sync_period=often"],
            "`trainer.strategy.sync_period`: expected int, got often.",
        ),
        ([STRATEGY, "--trainer.strategy.evaluate=all"], "`trainer.strategy.evaluate`: "),
        (["--trainer.strategy=FederatedStrategy", "--trainer.strategy.fraction=0.001"], "of 100 clients is less than one"),
        (["--trainer.strategy=FederatedStrategy", "--trainer.strategy.evaluate=both"], "has no option `evaluate`."),
        (["--trainer.strategy=FederatedStrategy", "--trainer.strategy.aggregator=fedpro"], "(did you mean 'fedprox'?)"),
        (["--trainer.strategy=local_sdg"], "there is no strategy `local_sdg` (did you mean `local_sgd`?);"),
        (["--trainer.callbacks+=PostLocalSwich"], "no class `PostLocalSwich` (did you mean `PostLocalSwitch`?)"),
        (["--model.lr=fast"], "`model.lr`: expected float, got fast."),
        (["--model.model=resnet9"], "There is no model 'resnet9'"),
        (["--config=missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, capsys):
    error = run(["fit", *MODEL, *SHORT, "--data=DigitsDataModule", *args], capsys, status=2)
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("lightning-distopt: error: ")]
    assert sentence in line


def test_classes_of_the_folder_in_which_the_command_is_run(tmp_path):
    """As `python -m lightning_distopt` finds them."""
    (tmp_path / "mine.py").write_text("from lightning_distopt.data import DigitsDataModule as Mine\n")
    command = Path(sys.executable).with_name("lightning-distopt")
    args = ["partition", "iid", "--replicas=2", "--output=a.png", "--data=mine.Mine"]
    subprocess.run([command, *args], cwd=tmp_path, check=True, timeout=100)


def test_modules_that_there_are_not_and_those_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = run(["partition", "iid", "--data=broken.Data"], capsys, status=2)
    assert "error: `data`: `broken.Data` can't be imported, as there is no module `not_installed`." in error
    error = run(["partition", "iid", "--data=yours.Data"], capsys, status=2)
    assert "error: `data`: there is no module `yours` for `yours.Data`: run the command in its folder, or name that in" in error


def test_mistakes_found_when_training_starts_are_one_sentence(capsys):
    args = [STRATEGY, "--trainer.strategy.replicas_per_device=4", "--trainer.strategy.block_period=2"]
    args += ["--trainer.strategy.block_size=3"]
    error = run(["fit", *MODEL, *SHORT, "--data=DigitsDataModule", *args], capsys, status=2)
    assert "error: `block_size=3` does not divide the 4 replicas into equal blocks: use one of 1, 2, 4." in error


def test_unknown_command(capsys):
    assert "invalid choice: 'fitt'" in run(["fitt"], capsys, status=2)


def test_errors_of_the_users_code_keep_their_traceback(monkeypatch):
    def broken() -> None:
        """Fail."""
        raise ValueError("mine")

    monkeypatch.setitem(cli.COMMANDS, "broken", broken)
    with pytest.raises(ValueError, match="mine"):
        cli.main(["broken"])
