"""Prints the oldest release of each optional package that pyproject.toml allows.

One line of `name==version` for each package of the extras that the tests need, as constraints of
pip. Packages without a bound are left out: the release of torchvision follows torch. It needs
Python 3.11, for tomllib.
"""

import re
from pathlib import Path

EXTRAS = ("demo", "test")
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


def oldest(project: str) -> dict[str, str]:
    """The lower bound of each package, from the text of a pyproject.toml."""
    import tomllib

    extras = tomllib.loads(project)["project"]["optional-dependencies"]
    found = [BOUND.match(requirement) for extra in EXTRAS for requirement in extras[extra]]
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    for name, bound in oldest(path.read_text()).items():
        print(f"{name}=={bound}")
