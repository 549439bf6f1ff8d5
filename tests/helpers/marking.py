"""Which cases of a test are run by default, and which by `pytest -m slow` alone."""

import pytest


def core(cases, *kept):
    """The cases of a parametrisation, all of them slow but those kept.

    Several arguments of one case are a tuple.
    """
    return [_slow(case) if case not in kept else case for case in cases]


def _slow(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
