"""Clients on other machines: a server and two clients of Flower, here all on this machine, talking over loopback.

Run it with `python examples/flower_two_clients.py`, after `pip install 'lightning-distopt[flower]'` (Flower 1.41 or later). The
first half is the app, the same file on every machine; `docs/flower.md` says how to start it on several. The second half starts
a SuperLink and two SuperNodes, lets them train for two rounds, and trains the same in one process: the models are the same.
"""

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_distopt import FederatedStrategy, FedProx
from lightning_distopt.bridges.flower import client_app, server_app
from lightning_distopt.data.digits import load_digits_tensors

ROUNDS = 2
OPTIONS = {"aggregator": FedProx(mu=0.1), "clients": 2, "fraction": 1.0, "local_epochs": 3}


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = torch.nn.functional.cross_entropy(self.layer(images), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits(split):
    images, targets = load_digits_tensors(split)
    return TensorDataset(images.flatten(1).double(), targets)


def samples_of(client):
    """The first client has most of the digits below 5, the second one most of the others."""
    below = digits("train").tensors[1] < 5
    if client == 0:
        return below.nonzero().flatten()[::2].tolist() + (~below).nonzero().flatten()[1::10].tolist()
    return (~below).nonzero().flatten()[::3].tolist() + below.nonzero().flatten()[1::10].tolist()


def loader_of(client):
    return DataLoader(Subset(digits("train"), samples_of(client)), batch_size=16, shuffle=True)


client = client_app(Digits, loader_of, **OPTIONS)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
server = server_app(Digits, ROUNDS, trainer=QUIET, checkpoint="trained.ckpt", timeout=240, **OPTIONS)

# ------------------------------------------------------------------------------------------------ all of it on one machine
APP = """
[project]
name = "two-clients"
version = "1.0.0"
description = "Two clients on loopback"
dependencies = []

[tool.flwr.app]
publisher = "example"

[tool.flwr.app.components]
serverapp = "flower_two_clients:server"
clientapp = "flower_two_clients:client"
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for_port(port, process, seconds=60):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{process.args[0]} does not listen on port {port}.")


def stop(processes, seconds=10):
    """End the processes that were started here, and those that they have started, which are in their groups."""
    ours = [process.pid for process in processes if process.returncode is None]
    for pid in ours:
        os.killpg(pid, signal.SIGTERM)
    end = time.monotonic() + seconds
    for pid in ours:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)  # the group is there as long as nobody has asked how its leader has ended
    for process in processes:
        process.wait()


def train_with_flower(folder, seconds=300):
    """Return the state of the model after all rounds; if there is none, say what the processes have said."""
    app, log, trained = folder / "app", folder / "log.txt", folder / "trained.ckpt"
    app.mkdir()
    shutil.copy(__file__, app / "flower_two_clients.py")
    (app / "pyproject.toml").write_text(APP)
    link, *nodes = free_ports(3)
    (folder / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{link}"\ninsecure = true\n')
    scripts = sysconfig.get_path("scripts")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    processes = []

    def start(name, *arguments):
        command = [os.path.join(scripts, name), *arguments]
        with log.open("a") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        processes.append(process)
        return process

    try:
        loopback = ["--insecure", "--host", "127.0.0.1", "--port"]
        superlink = start("flower-superlink", *loopback, str(link), "--disable-runtime-dependency-installation")
        wait_for_port(link, superlink)
        for k, port in enumerate(nodes):
            node = ["--superlink", f"127.0.0.1:{link}", "--node-config", f"partition-id={k}"]
            start("flower-supernode", *loopback, str(port), *node)
        start("flwr", "run", str(app), "loopback", "--stream").wait(seconds)
        assert trained.exists()
    except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"Flower has not trained the model:\n{log.read_text()[-8000:]}") from error
    finally:
        stop(processes)
    return torch.load(trained, weights_only=True)["state_dict"]


def train_in_one_process():
    torch.manual_seed(0)
    strategy = FederatedStrategy(partition=[samples_of(0), samples_of(1)], **OPTIONS)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=ROUNDS, **QUIET)
    module = Digits()
    trainer.fit(module, DataLoader(digits("train"), batch_size=16, shuffle=True))
    return module.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        distributed = train_with_flower(Path(folder))
    alone = train_in_one_process()
    distance = max((distributed[name] - alone[name]).abs().max().item() for name in alone)

    model = Digits()
    model.load_state_dict(distributed)
    images, targets = digits("test").tensors
    accuracy = (model.layer(images).argmax(dim=1) == targets).double().mean().item()
    print(f"Two clients with {len(samples_of(0))} and {len(samples_of(1))} digits have trained for {ROUNDS} rounds")
    print(f"and get {100 * accuracy:.1f} % of the test digits right; in one process the same comes out: {distance < 1e-10}")
    assert distance < 1e-10
    assert accuracy > 0.7
