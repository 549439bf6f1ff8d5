"""Checkpoints of several runs in one folder, written after every epoch."""

import json
import shutil
from pathlib import Path
from typing import Any

from stablegrad.integrations.orbax import HealthyCheckpoints


class Checkpoints:
    """The newest healthy state of each run, and the settings that all of them share.

        folder/settings.json
        folder/<run>/<epoch>/    arrays and metadata

    A folder that is not resumed is emptied first. States that are not finite are not
    saved, so such a run is resumed from its last healthy epoch.
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

    def save(self, run: str, epoch: int, state: Any, metadata: dict[str, Any]) -> bool:
        """Writes a state with an `opt_state`, and what goes into JSON, if healthy."""
        with self._open(run) as checkpoints:
            trees = state._replace(opt_state=())
            return checkpoints.save(epoch, trees, state.opt_state, metadata)

    def metadata(self, run: str) -> dict[str, Any] | None:
        """The metadata of the newest checkpoint of a run; None if it has none."""
        if not (self.folder / run).exists():
            return None
        with self._open(run) as checkpoints:
            return checkpoints.metadata()

    def state(self, run: str, like: Any) -> Any:
        """The newest state of a run, on the devices on which `like` is."""
        with self._open(run) as checkpoints:
            found = checkpoints.restore(like._replace(opt_state=()), like.opt_state)
        return found.trees._replace(opt_state=found.opt_state)

    def _open(self, run: str) -> HealthyCheckpoints:
        return HealthyCheckpoints(self.folder / run, keep=1, asynchronous=False)


def _require_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{folder} was begun with {name} {saved.get(name)}, not {value}."
            )
