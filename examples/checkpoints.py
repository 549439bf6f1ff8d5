"""Checkpoints of several runs in one folder, written by Orbax after every epoch."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The newest state of each run, and the settings that all of them share.

        folder/settings.json
        folder/<run>/<epoch>/    arrays, and what was told with them

    A folder that is not resumed is emptied first.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        """ValueError if there is nothing to resume, or it had other settings."""
        self.folder = folder.resolve()  # Orbax takes absolute paths only.
        path = self.folder / "settings.json"
        if resume:
            if not path.exists():
                raise ValueError(f"{folder} has nothing to resume.")
            _require_same(folder, json.loads(path.read_text()), settings)
            return
        if self.folder.exists():
            if any(self.folder.iterdir()) and not path.exists():
                raise ValueError(f"{folder} holds something else than checkpoints.")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        path.write_text(json.dumps(settings))

    def save(self, run: str, epoch: int, state: Any, told: dict[str, Any]) -> None:
        """Writes a pytree of arrays, and what goes into JSON; the older one goes."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), told=ocp.args.JsonSave(told)
        )
        with self._manager(run) as manager:
            manager.save(epoch, args=items)

    def told(self, run: str) -> dict[str, Any] | None:
        """What was told with the newest checkpoint of a run; None if it has none."""
        items = ocp.args.Composite(told=ocp.args.JsonRestore())
        found = self._restore(run, items)
        return None if found is None else found["told"]

    def state(self, run: str, like: Any) -> Any:
        """The newest state of a run, on the devices on which `like` is."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._restore(run, items)["state"]

    def _restore(self, run: str, items: ocp.args.Composite) -> Any:
        if not (self.folder / run).exists():
            return None
        with self._manager(run) as manager:
            newest = manager.latest_step()
            return None if newest is None else manager.restore(newest, args=items)

    def _manager(self, run: str) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self.folder / run, options=options)


def _require_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {saved.get(name)}, not {value}."
            )
