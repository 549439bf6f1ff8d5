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


def snippets(page):
    return SNIPPET.findall(page.read_text())


def extra(code):
    """The optional library that a snippet imports, if any."""
    wanted = set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE))
    return next(iter(EXTRAS & wanted), None)


OPTIONAL = [
    (page, name)
    for page in PAGES
    for name in sorted(filter(None, set(map(extra, snippets(page)))))
]


def run(page, chosen, folder):
    """Runs snippets one after the other, and checks what they print."""
    namespace, printed = {"__name__": "snippets"}, io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        for snippet in chosen:
            exec(compile(snippet, str(page), "exec"), namespace)
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(chosen), re.MULTILINE)
    lines = iter(printed.getvalue().splitlines())
    for promise in promised:
        start = promise.removesuffix("...").rstrip()
        assert any(line.startswith(start) for line in lines), promise


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run_and_print_what_they_say(page, tmp_path):
    run(page, [code for code in snippets(page) if extra(code) is None], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Those libraries' own.
@pytest.mark.parametrize("page, name", OPTIONAL, ids=lambda part: Path(part).stem)
def test_the_snippets_of_an_optional_library_run_where_it_is(
    page, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # As the page says.
    pytest.importorskip(name)
    run(
        page, [code for code in snippets(page) if extra(code) in (None, name)], tmp_path
    )


def test_no_python_is_shown_that_no_test_runs():
    for page in sorted(DOCS.rglob("*.md")):
        if "_build" not in page.parts:
            text = page.read_text()
            assert not re.search(r"^ *(```|:::){?code-block}? *python", text), page
            fences = re.findall(r"^ *`{3,}.*python.*$", text, re.MULTILINE)
            cells = {"```{code-cell} python"} if page.parent.name == "tutorials" else {}
            assert set(fences) <= {"```python", *cells}, page
