"""`python -m stablegrad.diagnose module:function`: the report of what it returns.

The function takes nothing and returns the arguments of `stablegrad.diagnose`: a tuple
`(loss_fn, params, batch)` or `(loss_fn, params, batch, tx)`, or a dict by name.
"""

import argparse
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._figure import new_figure
from . import diagnose

# Files of installed packages, of Python itself and of JAX's wrappers.
OTHERS = r"site-packages|dist-packages|[/\\]lib[/\\]python3|^<"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report; return 1 if it has a finding that is critical, else 0."""
    parser = argparse.ArgumentParser(
        "python -m stablegrad.diagnose",
        description="Print the report on what a function returns: a tuple (loss_fn, "
        "params, batch), the same and an optimizer, or a dict of the arguments of "
        "`stablegrad.diagnose`. The function is called without arguments.",
    )
    parser.add_argument("target", help="module:function, such as train:setup")
    parser.add_argument("--steps", type=int, help="optimizer steps to try")
    parser.add_argument("--html", type=Path, help="write a page")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.add_argument("--figure", type=Path, help="write the profile by depth")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 0:
        parser.exit(2, f"{parser.prog}: error: --steps must be >= 0\n")
    try:
        for path in filter(None, (options.html, options.json, options.figure)):
            _prepare(path)
        written = [x for x in (options.html, options.json, options.figure) if x]
        if len({x.resolve() for x in written}) < len(written):
            raise ValueError("--html, --json and --figure must be different files")
        if options.figure:
            _require_format(options.figure)
        function = _function(options.target)
        arguments = _arguments(function)
        if options.steps is not None:
            arguments["steps"] = options.steps
        report = diagnose(**arguments)
        if options.html:
            report.to_html(options.html)
        if options.json:
            report.to_json(options.json)
        if options.figure:
            report.figure().savefig(options.figure, dpi=150)
    except Exception as error:  # A status of 1 means a critical finding.
        parser.exit(2, f"{parser.prog}: error: {_told(error)}\n")
    print(report)
    return int(report.severity == "critical")


def _told(error: Exception) -> str:
    """Return an error in words, with its place if that is in the user's files."""
    own = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    users = [x for x in frames if not re.search(OTHERS, x.filename)]
    users = [x for x in users if not x.filename.startswith(own)]
    where = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
    expected = isinstance(error, ImportError | ValueError | OSError | TypeError)
    name = "" if expected and str(error) else f"{type(error).__name__}: "
    return f"{name}{error}{where}"


def _prepare(path: Path) -> None:
    """Make the folder of a file; raise OSError or ValueError if it cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")


def _require_format(path: Path) -> None:
    """Raise ValueError if Matplotlib cannot write such a file."""
    known = new_figure(1, 1)[0].canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--figure must end in one of {sorted(known)}, got {path}")


def _function(target: str) -> Callable[[], Any]:
    """Return the function of `module:function`, from the current folder too."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"the target must be module:function, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    return getattr(importlib.import_module(module), name)


def _arguments(function: Callable[[], Any]) -> dict[str, Any]:
    """Return the arguments of `diagnose` by name, or raise ValueError."""
    needed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"the function must take no arguments, and needs {', '.join(needed)}: give "
            "one that returns (loss_fn, params, batch)."
        )
    found = function()
    known = inspect.signature(diagnose).parameters
    if isinstance(found, dict):
        unknown = [str(name) for name in found if name not in known]
        if unknown:
            raise ValueError(
                f"the function returned a dict with {', '.join(unknown)}, which "
                f"`diagnose` does not take: {', '.join(known)}."
            )
        return dict(found)
    if not isinstance(found, tuple | list) or len(found) not in (3, 4):
        raise ValueError(
            "the function must return (loss_fn, params, batch), the same and tx, or a "
            f"dict of arguments by name; got {type(found).__name__}"
            + (f" of {len(found)}." if isinstance(found, tuple | list) else ".")
        )
    return dict(zip(("loss_fn", "params", "batch", "tx"), found, strict=False))


if __name__ == "__main__":
    sys.exit(main())
