"""The reference has every public name, once, and none that is not there."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import stablegrad as sg

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = re.compile(r"^\.\. auto(?:function|class):: (stablegrad[\w.]+)$", re.MULTILINE)
ENTRIES = [
    entry
    for page in sorted((DOCS / "api").glob("*.md"))
    for entry in ENTRY.findall(page.read_text())
]
ROOMS = (  # Where public names live.
    "stablegrad",
    "stablegrad.structure",
    "stablegrad.structure.nnx",
    "stablegrad.structure.linen",
    "stablegrad.sweep",
    "stablegrad.diagnose",
    "stablegrad.integrations.nnx",
    "stablegrad.integrations.linen",
    "stablegrad.integrations.orbax",
    "stablegrad.integrations.loggers",
)
IN_TEXT = {"sweep.WORDS", "sweep.RATES", "diagnose.RULES"}  # No function, no class.


def public_names(room):
    module = importlib.import_module(room)
    for name, thing in inspect.getmembers(module):
        if name.startswith("_") or inspect.ismodule(thing):
            continue
        home = getattr(thing, "__module__", "")
        is_package = module.__name__ == "stablegrad" or hasattr(module, "__path__")
        if is_package and not home.startswith("stablegrad"):
            continue
        if not is_package and home != module.__name__:
            continue  # Imported for its own use.
        yield f"{room}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference(room):
    names = set(public_names(room))
    assert names
    aliases = {"stablegrad.structure.limit_gradient", "stablegrad.diagnose.diagnose"}
    internal = {"stablegrad.structure.nnx.LargestLogits"}
    assert names - aliases - internal <= set(ENTRIES)


def test_no_name_is_in_the_reference_twice_and_constants_are_in_its_text():
    assert len(ENTRIES) == len(set(ENTRIES))
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in IN_TEXT:
        assert f"`stablegrad.{name}`" in text or f"`{name}`" in text, name


def test_every_entry_of_the_reference_exists():
    for entry in ENTRIES:
        module, _, name = entry.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        assert callable(thing), entry


def test_every_page_of_the_reference_is_in_its_table_of_contents():
    listed = (DOCS / "api" / "index.md").read_text()
    for page in (DOCS / "api").glob("*.md"):
        assert page.stem == "index" or f"\n{page.stem}\n" in listed


def test_the_package_itself_is_what_the_first_room_covers():
    functions = {name for name, _ in inspect.getmembers(sg, inspect.isfunction)}
    shown = {entry.removeprefix("stablegrad.") for entry in ENTRIES}
    assert {name for name in functions if not name.startswith("_")} <= shown
