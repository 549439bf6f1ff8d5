"""Docstrings as this package writes them, made into reStructuredText.

In the source they are plain text: equations and tables stand indented or between bars,
and a single backtick marks code. Sphinx would fold the equations into paragraphs.
"""

import inspect
import re

import stablegrad as sg

CODE = re.compile(r"(?<![`:\w])`([^`]+?)`(?!`)(?=(\w?))|\|")
SECTION = re.compile(r"^\w+( \w+)?:$")


def public_names():
    """Every name of the package, as the reference spells it, by its last part."""
    names = {}
    for prefix, room in (("structure.", sg.structure), ("", sg)):
        for name, thing in inspect.getmembers(room):
            if not name.startswith("_") and not inspect.ismodule(thing):
                names[name] = f"stablegrad.{prefix}{name}"
    return names


NAMES = public_names()


def marked(text, own):
    """Single backticks as double ones; a public name links to its entry.

    A bar in prose is an absolute value, not a substitution.
    """

    def replaced(match):
        code = match[1]
        if code is None:
            return r"\|"
        end = r"\ " if match[2] else ""  # As in the plural of a name.
        name = code.removeprefix("stablegrad.").removeprefix("sg.")
        if name in NAMES and NAMES[name] != own:
            return f":py:obj:`~{NAMES[name]}`{end}"
        return f"``{code}``{end}"

    return CODE.sub(replaced, text)


def restructured(lines, own=""):
    """The lines of a docstring as reStructuredText."""
    done, prose, previous, literal = [], [], "", False

    def flush():
        done.extend(marked("\n".join(prose), own).split("\n") if prose else [])
        prose.clear()

    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            if not literal:
                prose.append(line)
            else:
                done.append(line)
            continue
        apart = not (i and lines[i - 1].strip())
        if literal and indent < literal[0]:
            literal = False
        outer = len(previous) - len(previous.lstrip())
        block = apart and indent >= outer + 4 and previous.strip()
        bars = apart and line.lstrip().startswith("|")
        doctest = line.lstrip().startswith(">>>")
        item = previous.lstrip().startswith(("- ", "* "))
        text = doctest or item or SECTION.match(previous.strip())
        if not literal and (block or bars) and not text:
            flush()
            done.extend([" " * outer + "::", ""])
            literal = (indent, 4 if bars else 0)
        if literal:
            done.append(" " * literal[1] + line)
        elif doctest or (done and not prose and done[-1].lstrip().startswith(">>>")):
            flush()
            done.append(line)
        else:
            prose.append(line)
        if not literal:
            previous = line
    flush()
    return done


def process(app, what, name, obj, options, lines):
    """Runs before Napoleon, which would take what precedes a colon for a type."""
    del app, what, obj, options
    renamed = ["Result:" if line == "Returns:" else line for line in lines]
    lines[:] = restructured(renamed, name)


def setup(app):
    """Registers the extension."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
