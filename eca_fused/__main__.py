"""`python -m eca_fused`: the main job, and commands beside it.

Without a command, or with options only, the main job runs; it is also there as the command `run`.
"""

import importlib
import os
import sys
from collections.abc import Sequence

# The module of each command has main(argv) -> exit status, and is imported only when it runs.
COMMANDS = {
    "run": "eca_fused.demo.command",
    "gates": "eca_fused.gates_command",
    "plan": "eca_fused.plan_command",
    "tables": "eca_fused.tables_command",
}
READER_GONE = 141  # what shells give for a program that SIGPIPE ends


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


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # such as head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = READER_GONE
    sys.exit(status)
