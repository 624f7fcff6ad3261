"""Programs that run side by side, as the processes of one computation do."""

import contextlib
import os
import socket
import subprocess
import sys

SECONDS = 240  # none takes a tenth of it on an idle machine; a hang must not hold up the other tests for ever


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def arguments(options):
    """Of a command line, from options by their names in Python."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@contextlib.contextmanager
def started(commands, **environment):
    """Python programs, each a list of arguments, on a CPU of one device unless they ask for more."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    programs = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        yield programs
    finally:
        for program in programs:
            program.kill()
            program.wait()
            program.stdout.close()


def ended(programs):
    """[(exit status, what it said)], of each when all have ended."""
    said = [program.communicate(timeout=SECONDS)[0] for program in programs]
    return [(program.returncode, text) for program, text in zip(programs, said, strict=True)]
