"""`python -m eca_fused`: the main job, and commands beside it.

Without a command, or with options only, the main job runs; it is also there as the command `run`.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

# The module of each command has main(argv) -> exit status, and is imported only when it runs.
COMMANDS = {
    "run": "eca_fused.cli.demo.command",
    "gates": "eca_fused.cli.gates.command",
    "plan": "eca_fused.cli.plan",
    "tables": "eca_fused.cli.tables.command",
}
# What shells give for a program that SIGPIPE and SIGINT end.
READER_GONE = 141
INTERRUPTED = 130
SETTING = "ECA_FUSED_"  # in an error about a variable of the environment
# What PyTorch says, as a RuntimeError, of more memory than there is, or than can be counted.
NO_MEMORY = ("can't allocate memory", "out of memory", "calculation overflowed")


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names, or else the main job; its exit status."""
    name, arguments = "run", list(argv)
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: expected a command ({known}) or options, got {name!r}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[name]).main(arguments))


def process(argv: Sequence[str]) -> int:
    """main() where what goes wrong outside of the program is one line on stderr, and a status.

    A full disk, a reader that is gone, an interruption, more memory than there is, or a variable of
    the environment. Any other exception is a fault of the program, and has its traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see eca_fused/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("MPLBACKEND", None)  # pictures are files; matplotlib fails on a name it lacks
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:  # not every terminal has the characters of file names
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main(argv)
        finally:  # also after argparse's exit
            sys.stdout.flush()
    except BrokenPipeError:  # such as head, which has read enough
        status, message = READER_GONE, ""
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted"
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        status, message = 1, f"{error.strerror or error}{where}"
    except (MemoryError, OverflowError) as error:
        status, message = 1, too_large(error)
    except (RuntimeError, ValueError) as error:
        if SETTING in str(error):
            status, message = 1, str(error).partition("\n")[0]
        elif any(sign in str(error) for sign in NO_MEMORY):
            status, message = 1, too_large(error)
        else:
            raise
    if message:
        print(f"error: {message}", file=sys.stderr)
    # What is left to write must not fail again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


def too_large(error: BaseException) -> str:
    reason = str(error).partition("\n")[0]
    return f"not enough memory for these sizes: {reason or 'none left'}; use smaller ones"


if __name__ == "__main__":
    sys.exit(process(sys.argv[1:]))
