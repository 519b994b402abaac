"""What the decision page, the how-to pages and the migration page tell to write, run.

All Python of a page runs in its order, in one namespace and an empty folder, with CPUs in place of GPUs. Left out, and compiled
elsewhere, is what begins with `# before`: code for other systems.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_distopt import FederatedStrategy, GossipStrategy, LocalSGDStrategy, PostLocalSwitch, cli
from tests.helpers import PoolEnvironment

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how_to").glob("*.md"))
DECISION, MIGRATION, YAML = DOCS / "which_strategy.md", DOCS / "migration.md", DOCS / "how_to" / "yaml.md"
PAGES = [DECISION, MIGRATION, *HOW_TO]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and drop what trainers leave in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def snippets(page: Path) -> list[str]:
    """Return the Python of a page that is for this package."""
    return [code for code in blocks(page, "python") if not code.startswith("# before")]


def run(page: Path, after: Any = lambda number, code, namespace: None) -> dict[str, Any]:
    """Run a page; `after` each snippet its namespace can be looked at."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for number, code in enumerate(snippets(page)):
        code = code.replace('accelerator="gpu"', 'accelerator="cpu"')
        exec(compile(code, f"{page.name}, snippet {number + 1}", "exec"), namespace)
        after(number, code, namespace)
    return namespace


# ------------------------------------------------------------------------------------------------------ all pages
@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_snippets_of_how_to_pages_run(page):
    warnings.filterwarnings("ignore", message=".*is already on the CPU|.*exists and is not empty")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    assert snippets(page)
    run(page)


def test_the_checkpoint_that_the_page_resumes_from_goes_on(tmp_path):
    trained = run(DOCS / "how_to" / "checkpoints.md")
    assert (tmp_path / "checkpoints" / "last.ckpt.replicas").is_dir() or (tmp_path / "checkpoints" / "last.ckpt").is_symlink()
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 3  # the fourth, from 0
    # Another strategy, and no strategy, go on from it: one more epoch.
    for strategy in ("auto", LocalSGDStrategy(sync_period=8, replicas_per_device=2)):
        trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=5, limit_train_batches=4, **QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(trained["make_module"](), trained["data"], ckpt_path="checkpoints/last.ckpt")
        assert trainer.current_epoch == 5


def test_the_topology_page_says_what_it_prints(capsys):
    namespace = run(DOCS / "how_to" / "own_topology.md")
    page = (DOCS / "how_to" / "own_topology.md").read_text()
    topology = namespace["topology"]
    printed = re.findall(r"^print\((.*)\)  # .*?(\d[\d.]*)", page, re.MULTILINE)
    assert len(printed) == 3
    for expression, said in printed:
        value = eval(expression, namespace)
        assert f"{value:.3g}" == said, expression
    assert topology.contraction < 0.352  # more slowly than on a ring
    assert namespace["busiest"] == 4 * 4 * 1_000_000


# ------------------------------------------------------------------------------------------------------ which strategy
def test_every_recommendation_trains():
    """Each `strategy` and its `callbacks`, for two steps of 8 replicas in one process."""
    seen: list[Any] = []

    def train(number, code, namespace):
        assert "strategy" in code or "callbacks" in code
        strategy, callbacks = namespace.pop("strategy", None), namespace.pop("callbacks", [])
        trainer = namespace.pop("trainer", None)
        if strategy is None and trainer is not None:
            assert type(trainer.strategy) is L.pytorch.strategies.DDPStrategy
            seen.append("ddp")
            return
        seen.append(type(strategy).__name__ if strategy is not None else "probes")
        fit(strategy if strategy is not None else "auto", callbacks)

    run(DECISION, train)
    assert seen.count("LocalSGDStrategy") >= 4
    assert seen.count("GossipStrategy") >= 4
    assert "FederatedStrategy" in seen and "probes" in seen and "ddp" in seen


class Sites(TensorDataset):
    """Samples with a key, as the page's replicas with different data have."""

    def __init__(self) -> None:
        x = torch.randn(64, 6)
        super().__init__(x, (x.sum(dim=1) > 0).long())
        self.site = [k % 8 for k in range(64)]


class Small(L.LightningModule):
    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        self.momentum = momentum

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


def fit(strategy: Any, callbacks: list[Any]) -> None:
    owns_momentum = isinstance(strategy, GossipStrategy) and hasattr(strategy.algorithm, "mu")
    if isinstance(strategy, LocalSGDStrategy | GossipStrategy):
        links = getattr(strategy, "topology", None)
        strategy.replicas_per_device = 4 if isinstance(links, list) else 8
    if isinstance(strategy, FederatedStrategy):
        strategy.algorithm.clients, strategy.algorithm.fraction = 8, 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, callbacks=callbacks, max_epochs=1, **QUIET)
        data = Sites()
        trainer.fit(Small(0.0 if owns_momentum else 0.9), DataLoader(data, 4, shuffle=True), DataLoader(data, 64))
    assert trainer.global_step > 0
    if isinstance(strategy, LocalSGDStrategy | GossipStrategy):
        assert strategy.algorithm is not None


def test_what_the_planner_prints_is_what_the_page_shows(capsys, tmp_path):
    shown = re.findall(r"```bash\nlightning-distopt (plan [^\n]*)\n```\n\n```\n(.*?)```", DECISION.read_text(), re.DOTALL)
    assert len(shown) == 1
    for command, output in shown:
        cli.main([*shlex.split(command), f"--output={tmp_path / 'a.png'}"])
        assert capsys.readouterr().out.partition("Written")[0] == output


def test_what_the_page_says_of_the_example_is_what_the_planner_prints():
    example = DECISION.read_text().partition("## A worked example")[2].partition("\n## ")[0]
    _, output, prose = example.split("```\n", 3)[1:]
    rows = [line[2:].split("  ")[0] for line in output.splitlines() if line.startswith("  ")]
    names = re.findall(r'\*"(.*?)"\*', prose)
    assert len(names) == 4 and set(names) <= set(rows)
    times = re.findall(r"(\d[\d.]*) times", prose)
    assert len(times) == 4
    assert all(f" {figure}x " in output or f" {figure} times " in output for figure in times)


def test_figures_are_those_of_the_pages_that_they_come_from():
    paragraphs = re.findall(r"^\*\*Measured:\*\* (.*?)\n\n", DECISION.read_text(), re.DOTALL | re.MULTILINE)
    assert len(paragraphs) >= 7
    for paragraph in paragraphs:
        sources = [DOCS / target for target in re.findall(r"\]\(([^)#]+)", paragraph)]
        assert sources
        text = " ".join(source.read_text() for source in sources).replace("+-", "±")
        prose = re.sub(r"\]\([^)]*\)", "", paragraph)
        for figure in re.findall(r"-?\d[\d,.]*\d ± \d[\d.]*\d|-?\d[\d,.]*\d(?:x\d+)?", prose):
            assert figure in text, figure


# ----------------------------------------------------------------------------------------------------------------- YAML
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_parses(page):
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text)["trainer"], dict)


SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1"]
SHORT += [f"--trainer.{name}=false" for name in QUIET if name != "enable_checkpointing"]


def test_the_configuration_trains(tmp_path):
    first, _ = blocks(YAML, "yaml")
    (tmp_path / "config.yaml").write_text(first)
    more = "--trainer.strategy.ddp_kwargs={find_unused_parameters: true}"
    trained = cli._CLI(["fit", "--config=config.yaml", *SHORT, more])
    strategy = trained.trainer.strategy
    assert isinstance(strategy, LocalSGDStrategy) and strategy.num_replicas == 4
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    (switch,) = [callback for callback in trained.trainer.callbacks if isinstance(callback, PostLocalSwitch)]
    assert switch.at == 0.5


def test_the_commands_of_the_page_run_one_after_the_other(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(blocks(YAML, "yaml")[0])
    (commands,) = blocks(YAML, "bash")
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    assert [line[:2] for line in lines] == [["lightning-distopt", command] for command in ("fit", "fit", "validate")]
    for _, *arguments in lines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main([*arguments, *SHORT])
    assert "val_accuracy" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_nested_options_become_what_the_page_says(tmp_path):
    first, second = (yaml.safe_load(text) for text in blocks(YAML, "yaml"))
    second["trainer"] |= {key: value for key, value in first["trainer"].items() if key not in ("strategy", "callbacks")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**first, **second}))
    strategy = cli._CLI(["fit", "--config=config.yaml", *SHORT]).trainer.strategy
    assert repr(strategy.algorithm.compressor).startswith("TopK(ratio=0.01")
    assert repr(strategy.algorithm.sync_period) == "LinearWarmup(sync_period=8, steps=800)"
    assert strategy.partition.alpha == 0.1 and strategy.partition.seed == 3
    assert strategy.topology == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert strategy._timeout.total_seconds() == 3600


def test_a_command_line_of_ones_own_reads_the_file(tmp_path, monkeypatch, capsys):
    (code,) = snippets(YAML)
    (tmp_path / "config.yaml").write_text(blocks(YAML, "yaml")[0])
    monkeypatch.setattr(sys, "argv", ["my_cli.py", "fit", "--config=config.yaml", "--print_config"])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "my_cli.py", "exec"), {"__name__": "__main__"})
    assert end.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["strategy"]["class_path"].endswith("LocalSGDStrategy")
    assert printed["trainer"]["strategy"]["init_args"]["sync_period"] == 8


@pytest.mark.parametrize(
    "mistake",
    [
        ["--trainer.strategy=LocalSGDStrategy", "--trainer.strategy.sync_perod=4"],
        ["--trainer.callbacks+=LocalSDGStrategy"],
        ["--trainer.strategy=local_sdg"],
        ["--trainer.max_epochs=many"],
    ],
    ids=["option", "class", "strategy", "type"],
)
def test_mistakes_are_answered_as_the_page_says(mistake, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--model=ImageClassifier", "--data=DigitsDataModule", *mistake])
    assert end.value.code == 2
    said = capsys.readouterr().err.partition("error: ")[2].partition("\n")[0]
    quoted = re.findall(r"^\| ``(?!`)(.+?)``(?!`) \|", YAML.read_text(), re.MULTILINE)
    assert any(quote.strip() in said for quote in quoted), said


# ------------------------------------------------------------------------------------------------------------ migration
def test_snippets_of_the_migration_page_run():
    namespace = run(MIGRATION)
    pairs = [[(namespace["ShiftOne"](8).neighbors(i, t)[0]) for i in range(8)] for t in range(5)]
    # What Bagua computes for 8 ranks; each step pairs the halves.
    for t, peers in enumerate(pairs):
        for rank, peer in enumerate(peers):
            expected = (t + rank) % 4 + 4 if rank < 4 else (rank - 4 - t) % 4
            assert peer == expected and peers[peer] == rank
    assert pairs[4] == pairs[0]
    namespace["ShiftOne"](8).validate()


def quadratics(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(24 * n, 3, dtype=torch.float64, generator=generator)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None]) + torch.randn(len(x), 1, generator=generator)


class Line(L.LightningModule):
    """Remembers its weights after every step."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.line = torch.nn.Linear(3, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.line.weight, 0.1)
        torch.nn.init.zeros_(self.line.bias)
        self.momentum, self.seen = momentum, []

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=self.momentum)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(torch.cat([p.detach().flatten() for p in self.line.parameters()]))


def ours(rank, n, strategy, at, momentum=0.0):
    module, (x, y) = Line(momentum), quadratics(n)
    data = TensorDataset(x, y)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, n, rank, shuffle=False))
    switch = [PostLocalSwitch(at=at)] if at else []
    environment = [PoolEnvironment(rank, n)]
    trainer = L.Trainer(
        accelerator="cpu", devices=n, strategy=strategy, callbacks=switch, plugins=environment, max_epochs=1, **QUIET
    )
    trainer.fit(module, loader)
    return torch.stack(module.seen)


def theirs(rank, n, averager, warmup, subgroup=None, momentum=0.0):
    """The loop on the page, on CPUs."""
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.optim import PostLocalSGDOptimizer

    module, (x, y) = Line(momentum), quadratics(n)
    network = torch.nn.parallel.DistributedDataParallel(module.line)
    state = PostLocalSGDState(None, subgroup, warmup, post_local_gradient_allreduce=subgroup is not None)
    network.register_comm_hook(state, post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(module.configure_optimizers(), averager)
    data = TensorDataset(x, y)
    for batch in DataLoader(data, 2, sampler=DistributedSampler(data, n, rank, shuffle=False)):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(batch[0]), batch[1]).backward()
        optimizer.step()
        module.on_train_batch_end(None, batch, 0)
    return torch.stack(module.seen)


def test_torchs_periodic_averager_is_local_sgd_one_step_later(ranks):
    """`warmup_steps=W`, `period=H` is `PostLocalSwitch(at=W + 1)` with `sync_period=H`, for SGD without momentum."""

    def compare(rank, n):
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        there = theirs(rank, n, PeriodicModelAverager(4, warmup_steps=3), 3)
        same = ours(rank, n, LocalSGDStrategy(sync_period=4), at=4)
        later = ours(rank, n, LocalSGDStrategy(sync_period=4), at=3)
        return (there - same).abs().max().item(), (there - later).abs().max().item(), len(there)

    for same, later, steps in ranks.run(2, compare):
        assert steps == 12
        assert same < 1e-12 < 1e-4 < later


def test_with_momentum_they_differ_by_the_step_of_the_switch(ranks):
    def compare(rank, n):
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        there = theirs(rank, n, PeriodicModelAverager(4, warmup_steps=3), 3, momentum=0.9)
        here = ours(rank, n, LocalSGDStrategy(sync_period=4), at=4, momentum=0.9)
        return (there - here).abs().max(dim=1).values.tolist()

    for apart in ranks.run(2, compare):
        assert max(apart[:4]) < 1e-12  # up to the average after step 4
        assert apart[4] > 1e-4


def test_the_default_of_torchs_hook_is_ddp_in_blocks(ranks):
    """Gradients averaged in subgroups, and parameters over all every `H` steps: `sync_period=1, block_period=H`."""

    def compare(rank, n):
        from torch.distributed import new_subgroups
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        subgroup, _ = new_subgroups(2)
        there = theirs(rank, n, PeriodicModelAverager(4, warmup_steps=3), 3, subgroup)
        strategies = [LocalSGDStrategy(sync_period=1, block_size=2, block_period=4), LocalSGDStrategy(sync_period=4)]
        return [(there - ours(rank, n, strategy, at=4)).abs().max().item() for strategy in strategies]

    for same, without_blocks in ranks.run(4, compare):
        assert same < 1e-12 < 1e-4 < without_blocks


def test_torchs_hierarchical_averager_is_hierarchical_local_sgd(ranks):
    """It counts from the start of training; where the largest period divides the warm-up, `at` is one step later."""

    def compare(rank, n):
        from collections import OrderedDict

        from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            averager = HierarchicalModelAverager(OrderedDict([(2, 2), (4, 4)]), warmup_steps=4)
        there = theirs(rank, n, averager, 4)
        here = [ours(rank, n, LocalSGDStrategy(sync_period=2, block_size=2, block_period=2), at=at) for at in (5, 4)]
        return [(there - seen).abs().max().item() for seen in here]

    for same, sooner in ranks.run(4, compare):
        assert same < 1e-12 < 1e-4 < sooner


def test_torchs_optimizer_is_none_for_lightning():
    from torch.distributed.optim import PostLocalSGDOptimizer

    with pytest.raises(TypeError, match="closure"):
        PostLocalSGDOptimizer.step(None, closure=lambda: None)


def test_lightning_ignores_the_hook_on_cpus(ranks):
    """As the page says: gradients are averaged at every step."""

    def compare(rank, n):
        from lightning.pytorch.strategies import DDPStrategy
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

        state = PostLocalSGDState(None, None, 2, post_local_gradient_allreduce=False)
        recipe = DDPStrategy(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=4)
        there = ours(rank, n, recipe, at=None)
        without, local = ours(rank, n, "ddp", at=None), ours(rank, n, LocalSGDStrategy(sync_period=4), at=3)
        return (there - without).abs().max().item(), (there - local).abs().max().item()

    for as_without, as_local in ranks.run(2, compare):
        assert as_without < 1e-12 < 1e-4 < as_local
