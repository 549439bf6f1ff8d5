"""`python -m stablegrad.diagnose module:function`: the report of what it returns.

The function takes nothing and returns the arguments of `stablegrad.diagnose`: a tuple
`(loss_fn, params, batch)` or `(loss_fn, params, batch, tx)`, or a dict by name.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import diagnose


def main(argv: Sequence[str] | None = None) -> int:
    """Print a report; return 1 if it has a finding that is critical, else 0."""
    parser = argparse.ArgumentParser("python -m stablegrad.diagnose")
    parser.add_argument("target", help="module:function that returns the arguments")
    parser.add_argument("--steps", type=int, help="optimizer steps to try")
    parser.add_argument("--html", type=Path, help="write a page")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.add_argument("--figure", type=Path, help="write the profile by depth")
    options = parser.parse_args(argv)
    try:
        function = _function(options.target)
    except (ImportError, AttributeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    arguments = _arguments(function())
    if options.steps is not None:
        arguments["steps"] = options.steps
    report = diagnose(**arguments)
    print(report)
    if options.html:
        report.to_html(options.html)
    if options.json:
        report.to_json(options.json)
    if options.figure:
        report.figure().savefig(options.figure, dpi=150)
    return int(report.severity == "critical")


def _function(target: str) -> Callable[[], Any]:
    """Return the function of `module:function`, from the current folder too."""
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"the target must be module:function, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    return getattr(importlib.import_module(module), name)


def _arguments(found: Any) -> dict[str, Any]:
    """Return the arguments of `diagnose` by name, or raise TypeError."""
    if isinstance(found, dict):
        return found
    if not isinstance(found, tuple | list) or len(found) not in (3, 4):
        raise TypeError(
            "the function must return (loss_fn, params, batch), the same and tx, or a "
            f"dict of arguments by name; got {type(found).__name__}"
            + (f" of {len(found)}." if isinstance(found, tuple | list) else ".")
        )
    return dict(zip(("loss_fn", "params", "batch", "tx"), found, strict=False))


if __name__ == "__main__":
    sys.exit(main())
