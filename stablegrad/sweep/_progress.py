"""Progress on standard error: a bar with Rich, else one line per candidate."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(names: list[str], shown: bool) -> Iterator[Callable[[str, float], None]]:
    """Yield a function to call with a candidate's name and its share that is done."""
    title = lambda name: f"{name} ({names.index(name) + 1}/{len(names)})"
    if not shown:
        yield lambda name, share: None
        return
    try:
        rich = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(stderr=True)
    except ImportError:
        yield lambda name, share: None if share else print(title(name), file=sys.stderr)
        return
    columns = [*rich.Progress.get_default_columns(), rich.TimeElapsedColumn()]
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(names))
        yield lambda name, share: bar.update(
            task, completed=names.index(name) + share, description=title(name)
        )
