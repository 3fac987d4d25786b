"""How commands name themselves and take their options."""

import argparse
import os
import re
import sys
from pathlib import Path

__all__ = ["SCRIPT", "Options", "picture", "positive", "program"]

SCRIPT = "eca-fused"  # [project.scripts] of pyproject.toml
ENDINGS = (".pdf", ".png", ".svg")


def program() -> str:
    """How the program was started."""
    started = os.path.basename(sys.argv[0]) if sys.argv else ""
    return SCRIPT if started == SCRIPT else "python -m eca_fused"


class Options(argparse.ArgumentParser):
    """The options of a command; --help ends with examples, each on a line of its own.

    Args:
        command: its name; "" for the program itself.
        description: what it does.
        status: what its exit statuses mean.
        examples: arguments, without the name of the program.
    """

    def __init__(self, command: str, description: str, status: str, examples: list[str]) -> None:
        super().__init__(
            prog=f"{program()} {command}".rstrip(),
            description=description,
            epilog=f"Exit status: {status}.",
        )
        self.examples = examples

    def format_help(self) -> str:
        lines = [f"  {program()} {example}".rstrip() for example in self.examples]
        return super().format_help() + "\nexamples:\n" + "\n".join(lines) + "\n"


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    """The file of a picture."""
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(
            f"expected a file that ends with {', '.join(ENDINGS)}, got {text!r}"
        )
    return path
