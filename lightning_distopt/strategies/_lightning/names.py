"""The private names of Lightning that training needs, looked for before it starts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

PRIVATE_NAMES = (
    ("fit_loop.epoch_loop", "_broadcast_sigterm_tensor"),  # 2.6.5 and later; earlier versions have no such collective
    ("fit_loop.epoch_loop", "_num_ready_batches_reached"),
    ("fit_loop.epoch_loop", "_get_monitor_value"),
    ("fit_loop.epoch_loop", "_results"),
    ("fit_loop", "_should_accumulate"),
    ("fit_loop", "_combined_loader_states_to_load"),
    ("fit_loop", "_combined_loader"),
    ("fit_loop", "_data_fetcher"),
    ("_data_connector", "_prepare_dataloader"),
    ("precision_plugin", "_after_closure"),
    ("_signal_connector", "_sigterm_notifier_fn"),
    ("_signal_connector", "received_sigterm"),
    ("_signal_connector", "_slurm_sigusr_handler_fn"),
    ("_logger_connector", "on_batch_end"),
    ("_logger_connector", "update_eval_epoch_metrics"),
    ("_logger_connector", "_callback_metrics"),
    ("_logger_connector", "_logged_metrics"),
    ("_logger_connector", "_progress_bar_metrics"),
    ("fit_loop.epoch_loop.val_loop", "_restarting"),
    ("fit_loop.epoch_loop.val_loop", "_seen_batches_per_dataloader"),
    ("_accelerator_connector", "use_distributed_sampler"),
    ("_checkpoint_connector", "dump_checkpoint"),
)


SEVERAL_ROWS = {
    "_num_ready_batches_reached",
    "_results",
    "_should_accumulate",
    "_prepare_dataloader",
    "_after_closure",
}
"""Names without which a rank can't host several replicas; without the others training goes on, with a warning."""


LOCAL_METRICS = {
    "update_eval_epoch_metrics",
    "_callback_metrics",
    "_logged_metrics",
    "_progress_bar_metrics",
    "_restarting",
    "_seen_batches_per_dataloader",
}
"""Names without which replicas can't be evaluated beside their average; nothing else needs them."""


def check_private_names(
    trainer: pl.Trainer, replicas_per_device: int, transforms_gradients: bool, evaluates_both: bool = False
) -> None:
    """Look for every private name before training starts.

    Raises:
        MisconfigurationException: if one is missing that this training can't do without.
    """
    for path, name in PRIVATE_NAMES:
        owner: Any = trainer
        for part in path.split("."):
            owner = getattr(owner, part, None)
        if hasattr(owner, name) or name == "_broadcast_sigterm_tensor":
            continue
        lacks = f"This Lightning version ({pl.__version__}) is unknown: it lacks `{name}`"
        if transforms_gradients and name == "_after_closure":
            raise MisconfigurationException(f"{lacks}, which this algorithm needs. Install lightning 2.6.")
        if name in LOCAL_METRICS:
            if evaluates_both:
                raise MisconfigurationException(
                    f"{lacks}, which `evaluate='both'` needs. Use `evaluate='average'`, or install lightning 2.6."
                )
            continue
        if replicas_per_device > 1 and name in SEVERAL_ROWS:
            raise MisconfigurationException(
                f"{lacks}, which several replicas in one process need. Use `replicas_per_device=1`, or install lightning 2.6."
            )
        rank_zero_warn(f"{lacks}. Training goes on without what depends on it.")
