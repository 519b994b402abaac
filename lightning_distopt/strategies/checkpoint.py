"""Checkpoints: the ordinary file holds the average model; beside it, one file per rank holds what an exact resume needs."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_distopt.communication import first_line
from lightning_distopt.files import replacing
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.loaders import batch_samplers, reseed

KEY = "lightning_distopt"
ALONE = "lightning_distopt_algorithm"  # of a single replica, which has no file beside the checkpoint
LOADERS = "lightning_distopt_loaders"  # positions in shards, which the loaders of a single device do not have
VERSION = 1


class CheckpointMixin:
    """Saving and resuming of diverged replicas, for a strategy.

    `name.ckpt` is an ordinary Lightning checkpoint: its `state_dict` is the average model, its optimizer state is that of
    replica 0. `name.ckpt.replicas/` holds a file of each rank with its replicas. A checkpoint is written in an order in which
    an interruption leaves the previous one of the same name whole: replica files under new names, then the ordinary file
    that names them, then the old replica files go.
    """

    _resume: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------------------- save
    def lightning_module_state_dict(self: Any) -> dict[str, Any]:
        """Return the state of the average model, as copies. Collective, unless training has failed."""
        if self.replicas is None:
            return super().lightning_module_state_dict()  # type: ignore[misc]
        if self.num_replicas == 1 or self._has_failed():
            return _copies(self.lightning_module.state_dict())
        with self.average_parameters():
            return _copies(self.lightning_module.state_dict())

    def save_checkpoint(self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this rank's replicas beside the checkpoint, then (on rank 0) the checkpoint."""
        training = self.replicas is not None and "optimizer_states" in checkpoint
        exact = training and self.num_replicas > 1
        if exact:
            self._set_positions_aside(checkpoint)
        if training and self.num_replicas == 1 and self.algorithm.acts_alone:
            checkpoint[ALONE] = self.algorithm.state_dict()
        if not exact or self._has_failed():  # after a failure ranks are no longer at the same step
            if self.is_global_zero:
                self._write(checkpoint, filepath, storage_options)
            return
        # Rank 0 says where: a name that each rank makes up, such as one with a time or the next free number, may differ.
        token, filepath = self.communicator.gather((secrets.token_hex(4), str(filepath)))[0]
        self._write(self._replica_state(token), _replica_file(filepath, token, self.global_rank), storage_options)
        self.barrier("replica files")
        checkpoint[KEY] = {
            "version": VERSION,
            "token": token,
            "num_replicas": self.num_replicas,
            "replicas_per_device": self.replicas_per_device,
        }
        if self.is_global_zero:
            self._write(checkpoint, filepath, storage_options)
        self.barrier("checkpoint")
        previous, self._tokens[filepath] = self._tokens.get(filepath), token
        if type(self.checkpoint_io) is TorchCheckpointIO:
            self._remove_replica_files(filepath, keep=[token])
        elif previous is not None:  # it may write in the background: until it has, the file names the previous ones
            self._remove_replica_files(filepath, keep=[previous, token])

    def _set_positions_aside(self: Any, checkpoint: dict[str, Any]) -> None:
        """Keep positions in shards where Lightning does not look: it would look for loaders that have such a position."""
        states = private.take_loader_states(self.lightning_module.trainer, checkpoint, ours=batch_samplers)
        if states:
            checkpoint[LOADERS] = states

    def _write(self: Any, state: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        """Write a file aside and then rename it, so that a crash leaves the one of that name as it was."""
        if type(self.checkpoint_io) is not TorchCheckpointIO or not isinstance(get_filesystem(filepath), LocalFileSystem):
            self.checkpoint_io.save_checkpoint(state, filepath, storage_options)  # which has its own way to be safe
            return
        with replacing(filepath) as aside:
            self.checkpoint_io.save_checkpoint(state, aside, storage_options)

    def _replica_state(self: Any, token: str) -> dict[str, Any]:
        return {
            "token": token,
            "first_replica": self.replicas.first_replica,
            "replicas": self.replicas.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "scaler": self.precision_plugin.state_dict(),
            "traffic": self.traffic.state_dict(),
            "recalibration": {} if self._recalibration is None else self._recalibration.state_dict(),
            "steps": self.steps,
            "seed": self._seed,
        }

    def remove_checkpoint(self: Any, filepath: Any) -> None:
        """Remove a checkpoint and, on each rank, its replica file."""
        super().remove_checkpoint(filepath)  # type: ignore[misc]
        self._tokens.pop(str(filepath), None)
        self._remove_replica_files(filepath)

    def _remove_replica_files(self: Any, filepath: Any, keep: Collection[str] = ()) -> None:
        """Remove the replica files of this rank but those of some saves; rank 0 also those of ranks that there were once."""
        folder = f"{filepath}.replicas"
        fs = get_filesystem(folder)
        if not fs.exists(folder):
            return
        for name in [Path(entry).name for entry in fs.ls(folder, detail=False)]:
            token, _, rank = name.removesuffix(".ckpt").partition("-rank-")
            own = rank.isdigit() and (int(rank) == self.global_rank or (self.is_global_zero and int(rank) >= self.world_size))
            if own and token not in keep:
                self.checkpoint_io.remove_checkpoint(os.path.join(folder, name))
        if not keep:
            with contextlib.suppress(OSError):  # not empty yet, or gone: the rank that comes last removes it
                fs.rmdir(folder)

    # ------------------------------------------------------------------------------------------------------------ resume
    def load_checkpoint(self: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and, when fitting, the replicas of this rank; all of it is read before any of it is used."""
        self._resume = None
        checkpoint: dict[str, Any]
        try:
            checkpoint = self._read(checkpoint_path, weights_only)
        except FileNotFoundError:
            raise
        except pickle.UnpicklingError as error:
            raise RuntimeError(
                f"The checkpoint {checkpoint_path} holds something else than tensors and plain containers, which could run "
                "code when it is read, so nothing of it was loaded: leave it out (`save_hyperparameters(ignore=...)`), allow "
                "its class by `torch.serialization.add_safe_globals`, or pass `weights_only=False` if you trust the file. "
                f"({first_line(error)})"
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"The checkpoint {checkpoint_path} can't be read: it is truncated, or no checkpoint. Nothing of it was "
                f"loaded; resume from another one. ({first_line(error)})"
            ) from error
        trainer = self.lightning_module.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
            raise RuntimeError(f"{checkpoint_path} is no checkpoint of Lightning. Nothing of it was loaded.")
        positions, header = checkpoint.pop(LOADERS, None), checkpoint.get(KEY)
        if positions and self.num_replicas > 1:
            private.put_loader_states(checkpoint, positions)
        if header is None:
            if self.num_replicas > 1:
                rank_zero_info(
                    f"{checkpoint_path} holds no replicas (it was saved by another strategy, or after training): all "
                    f"{self.num_replicas} replicas start from its weights and optimizer state."
                )
            return checkpoint
        layout = (self.num_replicas, self.replicas_per_device)
        if (header["num_replicas"], header["replicas_per_device"]) != layout and self._goes_on_elsewhere(checkpoint):
            return checkpoint  # whoever does so says what begins anew
        if header["num_replicas"] != self.num_replicas:
            rank_zero_warn(
                f"{checkpoint_path} was saved with {header['num_replicas']} replicas and is resumed with "
                f"{self.num_replicas}: all start from the average model, with the optimizer state of replica 0; the "
                "algorithm's memories start anew."
            )
        else:
            self._resume = self._read_replicas(str(checkpoint_path), header)
        return checkpoint

    def _goes_on_elsewhere(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether the ordinary file of a checkpoint has what replicas in any layout need to go on."""
        return False

    def _read(self: Any, path: Any, weights_only: bool | None = None) -> Any:
        """Read a file; unless asked otherwise only tensors and plain containers, since other objects can run code."""
        if type(self.checkpoint_io) is not TorchCheckpointIO or weights_only is False or str(path).startswith("http"):
            options = {} if weights_only is None else {"weights_only": weights_only}
            return self.checkpoint_io.load_checkpoint(path, **options)
        files = get_filesystem(path)
        if not files.exists(path):
            raise FileNotFoundError(f"There is no checkpoint {path}.")
        with files.open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    def _read_replicas(self: Any, filepath: str, header: dict[str, Any]) -> dict[str, Any]:
        problem, state = "", {}
        if header["version"] != VERSION or header["replicas_per_device"] != self.replicas_per_device:
            problem = (
                f"it was saved with `replicas_per_device={header['replicas_per_device']}` (format {header['version']}): "
                "use the same number of ranks and replicas per rank"
            )
        else:
            # A link such as last.ckpt leads to the checkpoint whose replicas lie beside it.
            target = os.path.realpath(filepath) if os.path.islink(filepath) else filepath
            path = _replica_file(target, header["token"], self.global_rank)
            try:
                state = self._read(path)
                if state.get("token") != header["token"]:
                    problem = f"{path} belongs to another checkpoint"
                elif state["first_replica"] != self.global_rank * self.replicas_per_device:
                    problem = f"{path} holds the replicas of another rank"
            except FileNotFoundError:
                problem = f"{path} is missing; keep the folder {target}.replicas with the checkpoint"
            except Exception as error:
                problem = f"{path} can't be read, it may be truncated ({first_line(error)})"
        problems = [self.broadcast(problem, src=rank) for rank in range(self.world_size)]
        for rank, text in enumerate(problems):
            if text:
                raise RuntimeError(
                    f"The replicas of {filepath} can't be resumed on rank {rank}: {text}. Nothing was loaded. To start all "
                    "replicas from the average model instead, load it with `load_from_checkpoint` and fit without `ckpt_path`."
                )
        return state

    def load_model_state_dict(self: Any, checkpoint: Any, strict: bool = True) -> None:
        """Restore the module; where it is another one, leave it as it is."""
        before = _copies(self.lightning_module.state_dict())
        try:
            super().load_model_state_dict(checkpoint, strict=strict)  # type: ignore[misc]
        except Exception:
            self.lightning_module.load_state_dict(before)
            raise

    def load_optimizer_state_dict(self: Any, checkpoint: Any) -> None:
        """Restore optimizers, and on an exact resume everything that is different between replicas."""
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        if self.replicas is None:
            return
        if self._resume is None:
            self.replicas.share_optimizer_state()
            if self.num_replicas == 1 and self.algorithm.acts_alone and ALONE in checkpoint:
                self.algorithm.load_state_dict(checkpoint[ALONE])
            return
        state = self._resume
        if state["replicas"]["signature"] != self.replicas.signature():
            raise RuntimeError(
                "The checkpoint's replicas have another layout than the module: resume with the module that was trained, "
                "with the same trainable parameters."
            )
        self.replicas.load_state_dict(state["replicas"])
        self.algorithm.load_state_dict(state["algorithm"])
        if state["scaler"]:
            self.precision_plugin.load_state_dict(state["scaler"])
        self.traffic.load_state_dict(state["traffic"])
        if self._recalibration is not None:
            self._recalibration.load_state_dict(state.get("recalibration", {}), self.root_device)
        self.steps, self._seed = state["steps"], state["seed"]

    def on_train_start(self: Any) -> None:
        """Continue the random streams, last of all that is restored."""
        super().on_train_start()  # type: ignore[misc]
        if self._resume is None:  # the step of training goes on, also from a checkpoint without replicas
            self.steps = self.lightning_module.trainer.global_step
        else:
            reseed(self._loaders, self._seed)  # which may be older than the checkpoint's seed
            private.resume_loaders(self.lightning_module.trainer, only=lambda loader: bool(batch_samplers(loader)))
            self.replicas.resume_streams(self._resume["replicas"]["streams"])
            self._resume = None


def _replica_file(filepath: Any, token: str, rank: int) -> str:
    return os.path.join(f"{filepath}.replicas", f"{token}-rank-{rank:05d}.ckpt")


def _copies(state: dict[str, Any]) -> dict[str, Any]:
    """Replace tensors by copies, since a view of the block would drag the whole block into the file."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.detach().clone(memory_format=torch.preserve_format)
    return state
