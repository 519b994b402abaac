"""The one place that touches Lightning's private names.

Each function degrades with a warning where a name is missing, so that an unknown Lightning version still trains;
`tests/strategies/test_lightning_names.py` checks that each name exists.
"""

from lightning_distopt.strategies._lightning.launchers import end_in_order
from lightning_distopt.strategies._lightning.logs import (
    Metrics,
    agree_on_logs,
    captured_logs,
    log_batch,
    logs_apart,
    set_step_logs,
    step_logs,
    validate_unseen,
)
from lightning_distopt.strategies._lightning.loops import (
    augment_message,
    batches_trained,
    batches_trained_in_all,
    begin_epoch_anew,
    broadcast_module,
    clip_gradients,
    count_steps,
    divides_data,
    dump_checkpoint,
    epoch_length,
    is_accumulating,
    more_batches_follow,
    move_optimizers,
    peek_validation_loaders,
    put_loader_states,
    rebuild_dataloader,
    requeue_handler,
    resume_loaders,
    starts_over,
    stop_for_sigterm,
    take_loader_states,
    to_device,
    validation_loaders,
)
from lightning_distopt.strategies._lightning.names import LOCAL_METRICS, PRIVATE_NAMES, SEVERAL_ROWS, check_private_names
from lightning_distopt.strategies._lightning.patches import Patches

__all__ = [
    "LOCAL_METRICS",
    "PRIVATE_NAMES",
    "SEVERAL_ROWS",
    "Metrics",
    "Patches",
    "agree_on_logs",
    "augment_message",
    "batches_trained",
    "batches_trained_in_all",
    "begin_epoch_anew",
    "broadcast_module",
    "captured_logs",
    "check_private_names",
    "clip_gradients",
    "count_steps",
    "divides_data",
    "dump_checkpoint",
    "end_in_order",
    "epoch_length",
    "is_accumulating",
    "log_batch",
    "logs_apart",
    "more_batches_follow",
    "move_optimizers",
    "peek_validation_loaders",
    "put_loader_states",
    "rebuild_dataloader",
    "requeue_handler",
    "resume_loaders",
    "set_step_logs",
    "starts_over",
    "step_logs",
    "stop_for_sigterm",
    "take_loader_states",
    "to_device",
    "validate_unseen",
    "validation_loaders",
]
