"""Every Python snippet of the documentation runs and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.parts and SNIPPET.search(page.read_text())
]
EXTRAS = {"clu", "mlflow", "tensorboardX", "wandb"}  # Not what tests install.


def missing_extra(code):
    wanted = set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE))
    for name in sorted(EXTRAS & wanted):
        pytest.importorskip(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run_and_print_what_they_say(page, tmp_path):
    snippets = SNIPPET.findall(page.read_text())
    missing_extra("\n".join(snippets))
    namespace, printed = {"__name__": "snippets"}, io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(printed):
        for snippet in snippets:
            exec(compile(snippet, str(page), "exec"), namespace)
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(snippets), re.MULTILINE)
    lines = iter(printed.getvalue().splitlines())
    for promise in promised:
        start = promise.removesuffix("...").rstrip()
        assert any(line.startswith(start) for line in lines), promise


def test_no_python_is_shown_that_no_test_runs():
    for page in sorted(DOCS.rglob("*.md")):
        if "_build" not in page.parts:
            text = page.read_text()
            assert not re.search(r"^ *(```|:::){?code-block}? *python", text), page
            fences = re.findall(r"^ *`{3,}.*python.*$", text, re.MULTILINE)
            cells = {"```{code-cell} python"} if page.parent.name == "tutorials" else {}
            assert set(fences) <= {"```python", *cells}, page
