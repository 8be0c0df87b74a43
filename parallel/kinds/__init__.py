"""The registry of layer kinds, keyed by their character in the pattern."""

from __future__ import annotations

from types import MappingProxyType

from . import attention, mamba, mlp, moe
from .base import Kind

KINDS = MappingProxyType({kind.symbol: kind for kind in (mamba.KIND, attention.KIND, mlp.KIND, moe.KIND)})

__all__ = ["KINDS", "Kind"]
