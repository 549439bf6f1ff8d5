"""The package as it is installed: metadata, dependencies, public names."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import stablegrad as sg

ROOT = Path(__file__).parents[1]
FLAX_LAYERS = ("nnx", "linen")  # Modules of `stablegrad.structure`.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_metadata():
    assert sg.__version__ == version("stablegrad") == PROJECT["version"]


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
        if path.stem not in FLAX_LAYERS:
            text = path.read_text()
            found = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
            imported |= set(found)
    third_party = imported & {"flax", "matplotlib", "rich", "chex", "orbax", "equinox"}
    assert not third_party


def test_flax_is_loaded_by_those_alone_who_import_its_layers():
    code = "import sys, stablegrad; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    for name in FLAX_LAYERS:
        assert (ROOT / "stablegrad" / "structure" / f"{name}.py").is_file()


def test_every_public_name_has_a_docstring_with_an_example():
    for name in dir(sg):
        thing = getattr(sg, name)
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
