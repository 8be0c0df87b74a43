"""Our own model on one process, as the function that an export is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...parallel.engines.fsdp import build_model
from ...parallel.layout import Layout
from ...parallel.mesh import MeshConfig, build_mesh
from ...parallel.model import HybridModel, ModelConfig
from ..errors import CheckpointError
from ..sharded import model_tensors
from .layout import Entry

Logits = Callable[[Tensor, Tensor], Tensor]  # tokens [s], modality ids [s] → logits [s, V]


def reference_logits(config: ModelConfig, tensors: Mapping[str, Tensor], plan: list[Entry]) -> Logits:
    """Logits of our model on the CPU in float32, its weights rounded to what the export stores.

    Args:
        config: the model.
        tensors: its logical tensors.
        plan: the export's entries, which say how each tensor is stored.

    Raises:
        CheckpointError: a tensor is absent or has another shape.
    """
    stored = {source: entry.dtype for entry in plan for source in entry.sources}
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"))
    fill(model, {name: tensor.to(stored[name]) for name, tensor in tensors.items()})
    return logits_of(model)


def fill(model: HybridModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole logical tensors into a model on one process.

    Raises:
        CheckpointError: a tensor is absent or has another shape.
    """
    for name, target in model_tensors(model).items():
        if name not in tensors or tensors[name].shape != target.shape:
            found = tuple(tensors[name].shape) if name in tensors else "absent"
            raise CheckpointError(f"{name} is {found} in the checkpoint and {tuple(target.shape)} in the model")
        local = target.to_local() if isinstance(target, DTensor) else target
        with torch.no_grad():
            local.copy_(tensors[name])


def logits_of(model: HybridModel) -> Logits:
    """The model's forward over one unpadded document."""

    @torch.no_grad()
    def logits(tokens_s: Tensor, modality_ids_s: Tensor) -> Tensor:
        length = tokens_s.shape[0]
        batch = {
            "modality_ids": modality_ids_s[None],
            "doc_ids": torch.zeros(1, length, dtype=torch.int64),
            "position_ids": torch.arange(length)[None],
        }
        layout = Layout.from_batch(batch, len(model.config.modalities), model.mesh.device)
        training = model.training
        model.eval()
        try:
            return model(tokens_s, layout)
        finally:
            model.train(training)

    return logits
