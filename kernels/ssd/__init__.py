"""State-space duality in equivalent forms: chunked (training), step (decoding), matrix (distillation), reference."""

from .api import ssd, ssd_core, ssd_step
from .reference import ssd_matrix, ssd_reference

__all__ = ["ssd", "ssd_core", "ssd_matrix", "ssd_reference", "ssd_step"]
