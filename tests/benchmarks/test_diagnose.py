"""Smoke test of the benchmark of planted faults."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "diagnose.py"


@pytest.fixture(scope="module")
def benchmark_of_faults():
    spec = importlib.util.spec_from_file_location("benchmark_of_faults", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_faults_of_one_network_are_found(benchmark_of_faults, tmp_path):
    out = tmp_path / "diagnose.md"
    asked = ["--network", "mlp_tanh", "--cases", "2", "--out", str(out)]
    with jax.numpy_rank_promotion("allow"):  # As users run it.
        assert benchmark_of_faults.main(asked) == 0
    text = re.sub(" +", " ", out.read_text())
    assert "| right cause, all faults: 95% | 2 of 2, 100% | yes |" in text
    assert "| right layer, all faults: 95% | 2 of 2, 100% | yes |" in text


def test_the_cases_cover_what_they_should(benchmark_of_faults):
    every = benchmark_of_faults.cases(0)
    faulty = [case for case in every if case.rule]
    assert len(faulty) >= 40 and len(every) - len(faulty) >= 12
    assert len({case.network for case in faulty}) == 8
    assert len({case.rule for case in faulty}) >= 15
