"""Text files that a killed process leaves readable."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: it holds the whole old text or the whole new text.

    A draft that a killed process left is overwritten by the next one. Of a symbolic
    link, the file that it leads to is replaced. A device, such as `/dev/stdout`, is
    written to.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(text.encode())
        return
    draft = path.with_name(f"{path.name}.tmp")
    try:
        draft.write_bytes(text.encode())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def append_lines(path: Path, text: str) -> None:
    """Append lines, below a last one that a killed process left unfinished."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else f"\n{text}"
        file.write(text.encode())
