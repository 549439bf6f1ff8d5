"""How far a comparison has come: a bar where `rich` is installed, else a line each."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator

Tell = Callable[[str, float], None]  # candidate, share of it that is done


@contextlib.contextmanager
def progress(names: list[str], shown: bool) -> Iterator[Tell]:
    """Gives a function to call with the candidate and its share, on standard error."""
    if not shown:
        yield lambda name, share: None
        return
    try:
        rich = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(stderr=True)
    except ImportError:
        yield _lines(names)
        return
    columns = [*rich.Progress.get_default_columns(), rich.TimeElapsedColumn()]
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(names))

        def tell(name: str, share: float) -> None:
            done = names.index(name)
            words = f"{name} ({done + 1}/{len(names)})"
            bar.update(task, completed=done + share, description=words)

        yield tell


def _lines(names: list[str]) -> Tell:
    started = set()

    def tell(name: str, share: float) -> None:
        del share
        if name not in started:
            started.add(name)
            print(f"{name} ({len(started)}/{len(names)})", file=sys.stderr)

    return tell
