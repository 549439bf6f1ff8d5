"""Checkpoints by Orbax that keep a healthy state within reach."""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from .. import _checks
from . import _checkpoint_folders as folders
from ._checkpoint_manager import open_manager


class CheckpointError(RuntimeError):
    """Raised if a checkpoint cannot be written or read; the others are untouched."""


class Restored(NamedTuple):
    """A checkpoint as it was saved."""

    step: int
    trees: Any
    opt_state: Any
    metadata: Any


class HealthyCheckpoints:
    """Save healthy states only, and never delete the last one from before a spike.

    A thin layer on `orbax.checkpoint.CheckpointManager`. A state is *healthy* if no
    guard has halted and all of `trees` is finite; no other is saved. It is *calm* if,
    besides, no guard has intervened in the last `calm_steps` steps. The newest `keep`
    checkpoints stay, and so does the newest calm one, however long a spike lasts. Older
    ones are deleted once a newer one is whole; what only reads deletes nothing. All
    that a guard knows is saved, so a run restored amid a spike goes on bit for bit.

    Args:
        folder: For these checkpoints alone; it is made if it is missing.
        keep: How many of the newest to keep, >= 1.
        calm_steps: Steps without an event that make a state calm, >= 0.
        asynchronous: Whether `save` returns before the disk is done. The next call, or
            `close`, waits for it, and raises its error.

    Raises:
        ValueError: If an argument is out of range, or if the folder holds something
            else, or checkpoints of a newer version; nothing in it is touched.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> from stablegrad.integrations.orbax import HealthyCheckpoints
        >>> params, tx = jnp.ones(2), sg.stabilize(optax.adam(0.1))
        >>> state = tx.init(params)
        >>> with HealthyCheckpoints(tempfile.mkdtemp()) as checkpoints:
        ...     good = checkpoints.save(1, params, state, {"epoch": 3})
        ...     bad = checkpoints.save(2, params * jnp.nan, state)
        ...     found = checkpoints.restore(params, state)
        >>> good, bad, found.step, found.metadata
        (True, False, 1, {'epoch': 3})
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        calm_steps: int = 50,
        asynchronous: bool = True,
    ):
        """Open the folder."""
        _checks.require_count("keep", keep)
        _checks.require_count("calm_steps", calm_steps, least=0)
        self._folder, self._keep, self._calm_steps = Path(folder), keep, calm_steps
        folders.claim(folder)
        self._open = lambda writes: open_manager(self._folder, asynchronous, writes)
        self._manager = self._open(False)
        self._calm: dict[int, bool] = {}
        self._writes = self._closed = False

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order; the last may still be on its way."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, trees: Any, opt_state: Any, metadata: Any = None) -> bool:
        """Save the state if it is healthy; return whether it was saved.

        Args:
            step: The number of the checkpoint, an integer >= 0, on the device or not,
                and larger than those of all that are there. A run that goes back to an
                older one calls `delete_newer` first.
            trees: Arrays that must be finite, such as parameters and batch statistics,
                and numbers, which are restored as arrays.
            opt_state: The optimizer's state, which may hold an inf on purpose: it is
                healthy if its guards are.
            metadata: Anything for JSON: an epoch, a place in the data.

        Raises:
            CheckpointError: If this or the last one cannot be written, if `step` is
                not larger than the newest, or after `close`; earlier ones stay whole.
            TypeError: If a leaf is no array or number, or `metadata` is not for JSON.
            ValueError: If `step` is not an integer >= 0, or `opt_state` comes from
                `nnx.state(optimizer)`, in which no guard can be read.
        """
        step = folders.step_number(step)
        if self._closed:
            raise self._failed(f"checkpoint {step} was not written", "it is closed")
        saved = folders.as_arrays(trees, opt_state)
        guards = folders.guards_in(trees, opt_state)
        if not folders.may_be_saved(trees, guards):
            return False
        calm = all(folders.is_calm(own, self._calm_steps) for own in guards)
        own = folders.as_json(metadata)
        notes = ocp.args.JsonSave({"format": folders.FORMAT, "calm": calm, "told": own})
        items = ocp.args.Composite(state=ocp.args.StandardSave(saved), notes=notes)
        self.wait()
        what = f"checkpoint {step} was not written"
        newest = self._manager.latest_step()
        if newest is not None and newest >= step:
            raise self._failed(what, f"the newest one is {newest}; see `delete_newer`")
        if not self._writes:
            self._manager.close()
            self._manager, self._writes = self._open(True), True
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._failed(what, error) from error
        self._calm[step] = calm
        return True

    def restore(
        self, trees: Any, opt_state: Any, *, step: int | None = None
    ) -> Restored | None:
        """Read a checkpoint, the newest by default; None if there is none.

        Args:
            trees: A pytree like the one that was saved, for structure, shapes, dtypes
                and devices.
            opt_state: The same of the optimizer's state, such as `tx.init(params)`.
            step: Which one, of `steps`.

        Raises:
            CheckpointError: If it is damaged, or of another model or optimizer. The
                message lists what differs, and the other checkpoints.
            TypeError: If a leaf is neither an array nor a number.
        """
        like = folders.as_arrays(trees, opt_state)
        self.wait()
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        what = f"checkpoint {step} cannot be read"
        try:
            stored = folders.shapes_by_name(self._manager.item_metadata(step)["state"])
        except Exception as error:
            raise self._failed(what, error) from error
        differing = folders.differences(stored, folders.shapes_by_name(like))
        if differing:
            raise self._failed(f"checkpoint {step} is of another run", differing)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=items)
        except Exception as error:
            raise self._failed(what, error) from error
        return Restored(step, **found["state"], metadata=found["notes"]["told"])

    def delete_newer(self, step: int) -> None:
        """Delete the checkpoints newer than `step`, so that the next can be saved.

        Args:
            step: The one that the run goes back to, of `steps`.

        Raises:
            CheckpointError: If there is no such checkpoint; nothing is deleted then.
        """
        self.wait()
        if step not in self.steps:
            raise self._failed(f"cannot go back to checkpoint {step}", "there is none")
        for newer in [other for other in reversed(self.steps) if other > step]:
            self._manager.delete(newer)

    def metadata(self, step: int | None = None) -> Any:
        """Read the metadata of a checkpoint, the newest by default; None if none.

        Raises:
            CheckpointError: If it is damaged.
        """
        step = self._manager.latest_step() if step is None else step
        return None if step is None else self._notes(step)["told"]

    def wait(self) -> None:
        """Wait until the last one is whole, then delete what is no longer needed.

        Raises:
            CheckpointError: If it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._manager.reload()
            raise self._failed("the last checkpoint was not written", error) from error
        if self._writes:
            self._manager.reload()  # One may have been deleted by hand.
        steps = self.steps if self._writes else []
        calm = [step for step in steps if self._calmness(step)]
        for step in set(steps[: -self._keep]) - set(calm[-1:]):
            try:
                self._manager.delete(step)
            except OSError as error:  # As of a file in use.
                warnings.warn(f"checkpoint {step} stays: {error}", stacklevel=3)

    def close(self) -> None:
        """Wait, and close the folder."""
        try:
            self.wait()
        finally:
            self._closed = True
            self._manager.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Wait, and close the folder; an error within the block has the precedence."""
        try:
            self.close()
        except Exception as own:
            if error is None:
                raise
            error.add_note(str(own))

    def _calmness(self, step: int) -> bool:
        """Return whether a checkpoint is calm; one whose notes are damaged is not."""
        if step not in self._calm:
            try:
                self._calm[step] = self._notes(step)["calm"]
            except CheckpointError:
                self._calm[step] = False
        return self._calm[step]

    def _notes(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(notes=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=items)["notes"]
        except Exception as error:
            raise self._failed(f"checkpoint {step} cannot be read", error) from error

    def _failed(self, what: str, why: Any) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: {what}: {str(why)[:600]}\nNothing was changed; there are "
            f"checkpoints {self.steps}."
        )
