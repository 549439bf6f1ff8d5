"""Numbers of a step, written once the next one is under way."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ... import _checks, _trees
from ..._observe import metrics
from ..._packing import Packed, Packing, decode, encode, on_host
from ..._scalars import select_scalars
from ...engine._record import column_names, dtypes_and_names
from ._writer import Writer

REAL = (jnp.floating, jnp.integer, jnp.bool_)


class _Waiting(NamedTuple):
    step: int
    columns: dict[str, None]  # Their dtypes and names.
    packed: Packed  # On the device.
    own: dict[str, Any]  # The user's numbers, on the device or not.


class Late:
    """Hand the numbers of each step to writers, one step late.

    A step's numbers are set aside on the device when it is logged, and fetched when the
    next one is. So the host always has a step in hand, and the device never waits for
    it; a state that is donated to the next step can be logged. `with` writes the last
    ones at its end, whatever happens.

    Args:
        *writers: What to write to: `CSV`, `JSONLines`, `TensorBoard`,
            `WeightsAndBiases`, `MLflow`, `CLU`, or any `Writer`. In a run of several
            processes, all of them must log, with writers in one of them alone.
        interval: Steps from one log entry to the next, >= 1; others cost nothing.
        every: Whether to write all numbers, as for `stablegrad.scalars`.

    Raises:
        ValueError: If `interval` is not a positive integer.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> from stablegrad.integrations import loggers
        >>> tx = sg.stabilize(optax.sgd(0.1))
        >>> params = jnp.ones(2)
        >>> state = tx.init(params)
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.csv")
        >>> with loggers.Late(loggers.CSV(path)) as log:
        ...     for step in range(3):
        ...         loss, grads = jnp.sum(params**2), 2 * params
        ...         params, state = sg.apply(tx, grads, state, params, value=loss)
        ...         log(step, state, {"accuracy": jnp.array(0.5)})
        >>> path.read_text().splitlines()[1].split(",")[:2]
        ['0', '0.5']
    """

    def __init__(self, *writers: Writer, interval: int = 1, every: bool = False):
        """Take the writers."""
        _checks.require_count("interval", interval)
        for writer in writers:
            if isinstance(writer, type) or not callable(getattr(writer, "write", None)):
                raise TypeError(
                    "`Late` takes writers, such as `CSV('run.csv')`, got "
                    f"{_checks.short_repr(writer)}."
                )
        self._writers = writers
        self._interval = interval
        self._every = every
        self._waiting: _Waiting | None = None

    def __call__(
        self, step: int, state: Any, numbers: Mapping[str, Any] | None = None
    ) -> None:
        """Set the numbers of a step aside, and write those of the one before.

        Args:
            step: The step, which the host counts.
            state: A state with a guard's state anywhere in it, as for `metrics`.
            numbers: Further real scalars by name, on the device or not. One that is
                named like a number of the guard's is written in its place.

        Raises:
            ValueError: If there is nothing to read in the state, if it is stacked over
                an ensemble, or if something in `numbers` is not a real scalar.
        """
        step = operator.index(step)
        if step % self._interval:
            return
        own = {name: _own(name, number) for name, number in (numbers or {}).items()}
        arrays = lambda x: x if _trees.is_array(x) else None  # Not a model's functions.
        state = jax.tree.map(arrays, _trees.without_variables(state))
        columns, packed = _set_aside(state)
        for array in jax.tree.leaves((packed, own)):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        last, self._waiting = self._waiting, _Waiting(step, columns, packed, own)
        self._write(last)

    def flush(self) -> None:
        """Write what is set aside; it waits for that step."""
        last, self._waiting = self._waiting, None
        self._write(last)

    def _write(self, waiting: _Waiting | None) -> None:
        """Write to all writers, then raise the first error of one."""
        if waiting is None:
            return
        numbers = _unpacked(waiting.columns, waiting.packed)
        own = {name: _on_host(number) for name, number in waiting.own.items()}
        told = {**own, **select_scalars(numbers, self._every), **own}
        errors = []
        for writer in self._writers:
            try:
                writer.write(waiting.step, told)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Write what is set aside; an error within the block has the precedence."""
        try:
            self.flush()
        except Exception as own:
            if error is None:
                raise
            error.add_note(f"the last numbers were not written: {own!r}")


def _own(name: str, number: Any) -> Any:
    """Return a copy of a real scalar, where it lies: the caller may donate its own."""
    if isinstance(number, int | float):
        return number  # An int may be too large for any array.
    number = _trees.without_variables(number)
    on_device = isinstance(number, jax.Array)
    array = number if on_device else np.array(number)
    if array.shape or not any(jnp.issubdtype(array.dtype, kind) for kind in REAL):
        raise ValueError(
            f"`numbers[{name!r}]` must be a real scalar, got {number!r:.60}."
        )
    return _trees.distinct(array) if on_device else array


def _on_host(number: Any) -> float | int:
    """Return a real scalar as Python's own number."""
    value = np.asarray(number).item()
    return int(value) if isinstance(value, int) else float(value)


@jax.jit
def _set_aside(state) -> tuple[dict[str, None], Packed]:
    """Return names and numbers in two small arrays, which outlive a donated state."""
    found = metrics(state)
    of_many = {name: x for name, x in found.items() if x.ndim}
    select_scalars(of_many, every=True)  # Raises ValueError if there are any.
    numbers = {
        name: encode(x) if _trees.is_inexact(x) else x.astype(jnp.int32)
        for name, x in sorted(found.items())
    }
    return column_names(numbers), Packing(numbers).pack(numbers)


def _unpacked(columns: dict[str, None], packed: Packed) -> dict[str, np.ndarray]:
    described = dtypes_and_names(columns)
    structs = {name: jax.ShapeDtypeStruct((), kind) for kind, name in described}
    numbers = Packing(structs).unpack(on_host(packed))
    floats = {name for kind, name in described if kind == "float32"}
    return {n: decode(x) if n in floats else x for n, x in numbers.items()}
