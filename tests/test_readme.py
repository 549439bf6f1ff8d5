"""The README says what is true: its snippets run, its commands and names exist."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import stablegrad as sg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_every_python_snippet_runs_and_prints_what_it_says(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert np.isfinite(namespace["params"]["w"]).all()
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", README, re.MULTILINE)
    assert len(printed) == len(promised)
    for line, promise in zip(printed, promised, strict=True):
        assert line.startswith(promise.removesuffix("...").rstrip())


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 10_000


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 8
    assert not [link for link in links if not (ROOT / link).exists()]


def test_ci_runs_the_test_commands_of_the_readme():
    assert 'pip install -e ".[test]" && pytest\n' in README
    assert "`pytest -m slow`" in README
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[test]"\npytest\npytest -m slow\n' in ci


def test_names_in_the_tables_are_public():
    cells = re.findall(r"^\|.*\|$", README, re.MULTILINE)
    used = set(re.findall(r"(?<![\w.])([a-z_]+)\(", "\n".join(cells)))
    unknown = {name for name in used if not hasattr(sg, name)}
    assert not unknown


def test_the_stated_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, least = requirement.split(">=")
        if name != "jaxlib":
            assert f"{name} {least} or newer" in README.replace("JAX", "jax").replace(
                "Optax", "optax"
            )
