"""What is released: wheel and sdist, installed where nothing else of it is."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE = Path(find_spec("optax").origin).parents[1]
MOST = 0.3  # Of the time that `import optax` takes, which is about a second.

BUILD = """
import sys
import hatchling.build as backend

print(backend.build_wheel(sys.argv[1]))
print(backend.build_sdist(sys.argv[1]))
"""
USE = """
import jax.numpy as jnp, optax
import stablegrad as sg

tx = sg.stabilize(optax.adam(1e-3))
params = {"w": jnp.ones(2)}
grads = {"w": jnp.array([jnp.nan, 1.0])}
params, state = sg.apply(tx, grads, tx.init(params), params, value=1.0)
print(sg.__file__)
print(sg.__version__, params["w"].tolist(), int(sg.metrics(state)["skipped_steps"]))
"""
TIMED = """
import time
start = time.perf_counter()
import optax
known = time.perf_counter()
import stablegrad
print((time.perf_counter() - known) / (known - start))
"""

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """What a command prints, without the paths that pytest adds."""
    hidden = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The paths of wheel and sdist, built from the tree."""
    out = tmp_path_factory.mktemp("dist")
    return [out / name for name in run(sys.executable, "-c", BUILD, str(out), cwd=ROOT)]


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The Python of an environment that holds the wheel, and what it depends on."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = ("pip", "--python", str(python), "install", "--no-deps", "--no-index")
    run(sys.executable, "-m", *install, str(built[0]), cwd=folder)
    (place,) = folder.glob("lib/python*/site-packages")
    # Its dependencies are those of this environment; its own `.pth` files, of which
    # one may name the tree, are not followed.
    (place / "dependencies.pth").write_text(f"{SITE}\n")
    return python


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "stablegrad").rglob("*.py")}
    info = f"stablegrad-{PROJECT['version']}.dist-info/"
    packed = {name for name in names if not name.startswith(info)}
    assert packed == tree | {"stablegrad/py.typed"}
    assert f"{info}licenses/LICENSE" in names


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert {path.name for path in tree.iterdir()} >= {"README.md", "CHANGELOG.md"}
    wheel, _ = run(sys.executable, "-c", BUILD, str(tmp_path), cwd=tree)
    again, first = (zipfile.ZipFile(path) for path in (tmp_path / wheel, built[0]))
    contents = lambda archive: {
        name: archive.read(name) for name in archive.namelist() if "RECORD" not in name
    }
    assert contents(again) == contents(first)


def test_the_metadata_are_those_of_the_project(built):
    archive = zipfile.ZipFile(built[0])
    info = f"stablegrad-{PROJECT['version']}.dist-info/METADATA"
    metadata = archive.read(info).decode()
    assert f"\nVersion: {PROJECT['version']}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    for extra in PROJECT["optional-dependencies"]:
        assert f"\nProvides-Extra: {extra}\n" in metadata
    assert "# stablegrad" in metadata  # The README is the page of the registry.


def test_it_guards_a_step_where_nothing_but_the_wheel_is_installed(python, tmp_path):
    where, told = run(str(python), "-c", USE, cwd=tmp_path)
    assert str(python.parents[1]) in where
    assert told == f"{PROJECT['version']} [1.0, 1.0] 1"


def test_its_import_takes_a_part_of_the_time_of_optax(python, tmp_path):
    ratios = [float(*run(str(python), "-c", TIMED, cwd=tmp_path)) for _ in range(3)]
    assert min(ratios) < MOST
