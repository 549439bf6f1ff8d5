"""Several processes that belong together, none of which outlives the test."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time


def free_port(ports=(0,)) -> int:
    """A port of the loopback interface, of `ports`, that nobody listens on now."""
    for port in ports:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return found.getsockname()[1]
    raise OSError("no port is free.")


def run_together(commands, environments=None, seconds=240) -> list[str]:
    """Runs commands at the same time; their standard output.

    Raises:
        AssertionError: As soon as one fails, or after `seconds`, with all that each
            wrote to standard error. The others are killed then.
    """
    environments = environments or [{} for _ in commands]
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        started = []
        for command, environment in zip(commands, environments, strict=True):
            # Files, because nobody reads a pipe while all are waited for.
            out, err = (
                stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)
            )
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            )
            started.append((process, out, err))
            stack.callback(end, process)
        codes = [None] * len(started)
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [process.poll() for process, _, _ in started]
        outputs = [[read(out), read(err)] for _, out, err in started]
        assert codes == [0] * len(codes), "\n".join(
            [f"exit statuses {codes} (None: still running)"]
            + [
                f"--- {' '.join(command)}\n{err[-3000:]}"
                for command, (_, err) in zip(commands, outputs, strict=True)
            ]
        )
        return [out for out, _ in outputs]


def end(process: subprocess.Popen) -> None:
    """Kills what has not ended: JAX catches the milder signals."""
    process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


def read(file) -> str:
    """All that was written to a file."""
    file.seek(0)
    return file.read()
