"""The worked example of CONTRIBUTING.md runs, and keeps what it says must be kept."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def run(snippets):
    namespace = {"__name__": "contributing"}
    for snippet in snippets:
        exec(compile(snippet, "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_the_worked_example_prints_what_it_says(capsys):
    run(SNIPPETS)
    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.*\)  # (.*)$", "".join(SNIPPETS), re.MULTILINE)
    assert len(printed) == len(promised) == 3
    for line, promise in zip(printed, promised, strict=True):
        assert line.startswith(promise.removesuffix("...").rstrip())


@pytest.mark.slow
def test_a_lasting_rise_is_usual_to_the_threshold_of_the_example():
    made = run(SNIPPETS[:2])
    tx = sg.guard(optax.sgd(0.0), sg.clip(made["recent_max"](2.0)))
    params = jnp.zeros(())

    def step(state, norm):
        _, state = tx.update(norm, state, params)
        return state, sg.metrics(state)["clip_scale"]

    norms = jnp.array([1.0] * 5 + [1000.0] * 20)
    scales = np.asarray(jax.lax.scan(step, tx.init(params), norms)[1])
    np.testing.assert_allclose(scales[5], 0.002, rtol=1e-5)
    assert (scales[15:] == 1).all()


def test_the_example_is_short():
    example = TEXT[TEXT.index("## A worked example") :]
    example = example[: example.index("\n## ")]
    code = re.findall(r"^```python\n(.*?)^```", example, re.DOTALL | re.MULTILINE)
    pieces = [line for line in "".join(code[:2]).splitlines() if line.strip()]
    assert len(pieces) <= 60


def test_the_citation_has_the_version_of_the_package_and_no_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert "@" not in citation and "://" not in citation


def test_pre_commit_runs_what_ci_checks():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    for check in ("ruff check", "ruff format", "pyright"):
        assert f"entry: {check}\n" in hooks and f"\n{check}" in ci


def test_ci_builds_the_documentation_with_warnings_as_errors_and_runs_tutorials():
    ci = "".join((ROOT / ".ci" / name).read_text() for name in ("run", "tutorials"))
    builds = re.findall(r"timeout (\d+) sphinx-build (.*)", ci)
    assert [int(limit) for limit, _ in builds] == [180, 600]
    assert all("-W" in options for _, options in builds)
    assert "nb_execution_mode=force" in builds[1][1]


def test_the_changelog_is_kept_in_order():
    text = (ROOT / "CHANGELOG.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(
        r"^## \[([\d.]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", text, re.M
    )
    assert len(versions) == text.count("\n## ")
    numbers = [tuple(map(int, version.split("."))) for version, _ in versions]
    assert numbers == sorted(numbers, reverse=True)
    assert versions[0][0] == project["version"]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
