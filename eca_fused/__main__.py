"""`python -m eca_fused`, and the script `eca-fused`: the main job and other commands.

Without a command, or with options only, the main job runs. The command `run` runs it too. --help
alone lists the commands.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from eca_fused.cli.common.options import program

# The module of each command, and what it does. The module has main(argv) -> exit status, and is
# imported only when it runs.
COMMANDS = {
    "run": (
        "eca_fused.cli.demo.command",
        "check, time and draw an ECA-ResNet-50 on two photographs; the default",
    ),
    "doctor": (
        "eca_fused.cli.doctor.command",
        "show what is installed and which kernels run here, and test them",
    ),
    "convert": (
        "eca_fused.cli.convert",
        "report what converting a checkpoint or a timm network does; write its weights",
    ),
    "bench": (
        "eca_fused.cli.bench",
        "check and time ECA layers: ours, plain PyTorch, torch.compile and a copy",
    ),
    "plan": (
        "eca_fused.cli.plan",
        "show how the CUDA kernels would run layers; needs no GPU",
    ),
    "tables": (
        "eca_fused.cli.tables.command",
        "count parameters and FLOPs, beside those of the ECA-Net poster",
    ),
    "gates": (
        "eca_fused.cli.gates.command",
        "draw the gates of a network for images of your classes",
    ),
}
# The exit status that shells give a program ended by SIGPIPE and by SIGINT.
READER_GONE = 141
INTERRUPTED = 130
SETTING = "ECA_FUSED_"  # in an error about an environment variable
# In PyTorch's RuntimeErrors for more memory than is available, or than can be counted.
NO_MEMORY = ("can't allocate memory", "out of memory", "calculation overflowed")


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names, or the main job; return its exit status."""
    if list(argv) in (["-h"], ["--help"]):
        print(overview())
        return 0
    name, arguments = "run", list(argv)
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        message = f"error: expected a command ({known}) or options, got {name!r}"
        print(f"{message}; --help lists the commands", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[name][0]).main(arguments))


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<8}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program()} [COMMAND] [OPTION...]",
            "",
            "Efficient Channel Attention for PyTorch as one fused operation.",
            "",
            "commands:",
            *lines,
            "",
            f"`{program()} COMMAND --help` lists the options of a command and shows an example.",
            f"Begin with `{program()} doctor`.",
        ]
    )


def process(argv: Sequence[str]) -> int:
    """main(), with one line on stderr and an exit status for errors from outside the program.

    These are a full disk, a reader that is gone, an interruption, too little memory, or a bad
    environment variable. Any other exception is a bug, and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see eca_fused/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("MPLBACKEND", None)  # pictures are files; matplotlib fails on a name it lacks
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:  # a terminal may lack characters of file names
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main(argv)
        finally:  # also after argparse's exit
            sys.stdout.flush()
    except BrokenPipeError:  # for example, head has read enough
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
    # Python flushes stdout at exit; that must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return status


def too_large(error: BaseException) -> str:
    reason = str(error).partition("\n")[0]
    return f"not enough memory for these sizes: {reason or 'none left'}; use smaller ones"


def script() -> int:
    """The console script `eca-fused`."""
    return process(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(process(sys.argv[1:]))
