"""Using other projects' ECA modules and checkpoints: convert(), revert(), load_checkpoint()."""

from eca_fused.conversion.checkpoints import CheckpointError, load_checkpoint
from eca_fused.conversion.modules import Conversion, convert, revert

__all__ = ["CheckpointError", "Conversion", "convert", "load_checkpoint", "revert"]
