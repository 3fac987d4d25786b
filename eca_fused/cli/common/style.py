"""How pictures look."""

import io
from pathlib import Path
from typing import Any

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "RED", "SKY", "STYLE", "save"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#666666"
RED, PURPLE, BLACK = "#d55e00", "#cc79a7", "#000000"

STYLE: dict[Any, Any] = {  # of matplotlib.rc_context()
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "savefig.dpi": 160,
    "text.parse_math": False,  # a class may be called $100
}


def save(figure: Any, path: Path) -> None:
    """Write a picture in the format that the file's ending names.

    Raises:
        OSError: it cannot be written. Matplotlib's own writers raise other errors on a full disk.
    """
    made = io.BytesIO()
    figure.savefig(made, format=path.suffix[1:].lower())
    path.write_bytes(made.getvalue())
