"""State-space duality in equivalent forms: chunked (training), step (decoding), matrix (distillation), reference."""

from .api import ssd, ssd_core, ssd_step
from .mixer import ssd_mixer
from .reference import ssd_matrix, ssd_reference
from .segments import Segment, combine, enter, summarise

__all__ = [
    "Segment",
    "combine",
    "enter",
    "ssd",
    "ssd_core",
    "ssd_matrix",
    "ssd_mixer",
    "ssd_reference",
    "ssd_step",
    "summarise",
]
