"""Orbax's checkpoint manager, for reading a folder or for writing to it."""

from pathlib import Path

import orbax.checkpoint as ocp


def open_manager(
    folder: Path, asynchronous: bool, writes: bool
) -> ocp.CheckpointManager:
    """Open a folder; only a manager that writes removes what was left unfinished.

    Without `max_to_keep`: Orbax does not know which checkpoints are calm.
    """
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=asynchronous, cleanup_tmp_directories=writes
    )
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "notes": ocp.JsonCheckpointHandler(),
    }
    # Orbax takes absolute paths only.
    return ocp.CheckpointManager(
        folder.resolve(), options=options, item_handlers=handlers
    )
