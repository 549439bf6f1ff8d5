"""The package as it is installed: metadata, dependencies, public names."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import pytest

import stablegrad as sg

ROOT = Path(__file__).parents[1]
FLAX_LAYERS = ("nnx", "linen")  # Modules of `stablegrad.structure`.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_metadata():
    try:
        installed = version("stablegrad")
    except PackageNotFoundError:
        pytest.skip("a source tree that was never installed has no metadata")
    assert sg.__version__ == installed == PROJECT["version"]


NOT_INSTALLED = """
from importlib import metadata

known = metadata.version

def version(name):
    if name == "stablegrad":
        raise metadata.PackageNotFoundError(name)
    return known(name)

metadata.version = version
import stablegrad

print(stablegrad.__file__, stablegrad.__version__)
"""


@pytest.mark.slow
def test_a_source_tree_that_was_never_installed_can_be_imported():
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / "stablegrad" / "__init__.py"),
        "0+unknown",
    ]


def test_the_changelog_tells_of_the_current_version():
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_it_is_typed():
    assert files("stablegrad").joinpath("py.typed").is_file()


def test_it_needs_jax_jaxlib_and_optax_only():
    names = [re.split(r"[<>=~]", line)[0] for line in PROJECT["dependencies"]]
    assert sorted(names) == ["jax", "jaxlib", "optax"]
    imported = set()
    for path in (ROOT / "stablegrad").rglob("*.py"):
        # What `__init__` never imports may import what it is made for.
        if path.stem not in FLAX_LAYERS and "integrations" not in path.parts:
            text = path.read_text()
            found = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
            imported |= set(found)
    third_party = imported & {"flax", "matplotlib", "rich", "chex", "orbax", "equinox"}
    assert not third_party


@pytest.mark.slow
def test_flax_is_loaded_by_those_alone_who_import_its_layers():
    code = "import sys, stablegrad; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    for name in FLAX_LAYERS:
        assert (ROOT / "stablegrad" / "structure" / f"{name}.py").is_file()


def test_every_public_name_has_a_docstring_with_an_example():
    for room, name in [(r, x) for r in (sg, sg.structure) for x in dir(r)]:
        thing = getattr(room, name)
        if name.startswith("_") or not callable(thing):
            continue
        assert thing.__doc__, name
        if type(thing).__name__ == "function":
            assert ">>>" in thing.__doc__, name
            for section in ("Args:", "Raises:", "Example:"):
                assert section in thing.__doc__, (name, section)


def test_every_module_is_one_mechanism_short_enough_to_read():
    for path in (ROOT / "stablegrad").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 260, path


# The rooms of the package. A module imports from its own room and from earlier ones.
ROOMS = (
    "_platform",
    "_figure",
    "_mapped_axes",
    "_trees",
    "_checks",
    "_missing",
    "_extra_args",
    "_text_files",
    "_compiled",
    "_leaf_sums",
    "_norms",
    "_scales",
    "_packing",
    "_placing",
    "granularity",
    "thresholds",
    "responses",
    "engine",
    "clipping",
    "presets",
    "learning_rate",
    "_reading",
    "_events",
    "_halt_message",
    "_observe",
    "_scalars",
    "curvature",
    "flight_recorder",
    "recovery",
    "structure",
    "diagnose",
    "sweep",
    "integrations",
)


def modules(root):
    """The files of a package by module name, but for its own `__init__`."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[root.name]
    return found


def statements(node, types):
    """All nodes of a tree; unless `types`, without those for type checkers alone."""
    if (
        not types
        and isinstance(node, ast.If)
        and "TYPE_CHECKING" in ast.dump(node.test)
    ):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from statements(child, types)


def imports(name, found, types=True):
    """The modules of the package that a module imports, anywhere in its file."""
    package = name.partition(".")[0]
    level = name.count(".") + (found[name].stem == "__init__")  # Of its own package.
    imported = set()
    for node in statements(ast.parse(found[name].read_text()), types):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = name.split(".")[: level + 1 - node.level] if node.level else []
            base = [*up, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for full in names:
            if full.partition(".")[0] == package:
                module = full if full in found else full.rpartition(".")[0]
                imported.add(module or package)
    return imported


def upward(found, rooms):
    """The imports that lead to a later room, or to the package itself."""
    place = {room: i for i, room in enumerate(rooms)}
    wrong = []
    for name in found:
        for other in imports(name, found):
            own, its = name.split(".")[1], (*other.split("."), None)[1]
            if its is None or place[its] > place[own]:
                wrong.append((name, other))
    return wrong


def cycle(found):
    """Files that import each other in a ring, or None."""
    graph = {name: imports(name, found, types=False) & set(found) for name in found}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


@pytest.mark.slow
def test_a_module_imports_from_its_own_room_and_earlier_ones():
    found = modules(ROOT / "stablegrad")
    assert {name.split(".")[1] for name in found} == set(ROOMS)
    assert sum(len(imports(name, found)) for name in found) > 100
    assert upward(found, ROOMS) == []


@pytest.mark.slow
def test_no_files_import_each_other_in_a_ring():
    assert cycle(modules(ROOT / "stablegrad")) is None


def test_wrong_imports_are_found_however_they_are_written(tmp_path):
    def build(**files):
        root = tmp_path / "pkg"
        for path, text in files.items():
            file = root.joinpath(*path.split("__")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (root / "__init__.py").write_text("from . import late")

    later = {
        "a": "from ..late import thing",
        "b": "from .. import late",
        "c": "import pkg.late.d",
        "e": "def f():\n    from ..late.d import thing",
        "g": "from pkg import early, late",
        "h": "import pkg",
        "t": "if TYPE_CHECKING:\n    from ..late import thing",
        "fine": "from . import a\nfrom .b import f\nfrom ..base import x",
    }
    build(
        **{f"early__{name}": text for name, text in later.items()},
        base="",
        late__d="from ..early.a import thing\nfrom ..early import t",
        late__i="from . import d",
    )
    (tmp_path / "pkg" / "early" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "late" / "__init__.py").write_text("")
    found = modules(tmp_path / "pkg")
    wrong = upward(found, ("base", "early", "late"))
    assert {name for name, _ in wrong} == {f"pkg.early.{x}" for x in "abceght"}
    assert cycle(found) is None  # `late.d` imports two that import only `late`.
    (tmp_path / "pkg" / "late" / "__init__.py").write_text("from .i import thing")
    ring = cycle(modules(tmp_path / "pkg"))
    assert ring is not None and {"pkg.late", "pkg.early.a"} <= set(ring)
