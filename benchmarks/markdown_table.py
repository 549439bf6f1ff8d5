"""A table in Markdown, whose columns are padded to one width."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table; a bar in a cell is escaped."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    pad = lambda line: [c.ljust(w) for c, w in zip(line, widths, strict=True)]
    return "\n".join(f"| {' | '.join(pad(line))} |" for line in lines)
