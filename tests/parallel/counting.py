"""What a step really does: floating-point operations of matrix products, and collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Count(TorchDispatchMode):
    """Attributes:
    flops: of matrix products, 2 per multiply-add.
    collectives: calls by operator, point-to-point messages left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in PRODUCTS:
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(("send", "recv_", "wait_tensor")):
            self.collectives[name] += 1
        return func(*args, **(kwargs or {}))
