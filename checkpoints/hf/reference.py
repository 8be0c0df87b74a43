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
from ..transforms import Source, Tensors, stream
from .layout import stored_dtype

Logits = Callable[[Tensor, Tensor], Tensor]  # tokens [s], modality ids [s] → logits [s, V]


def reference_logits(config: ModelConfig, tensors: Source, dtype: torch.dtype = torch.float32) -> Logits:
    """Logits of our model on the CPU in float32, its weights rounded to what an export in `dtype` stores.

    Raises:
        CheckpointError: a tensor is absent or has another shape.
    """
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"))
    fill(model, {name: tensor.to(stored_dtype(name, dtype)) for name, tensor in stream(tensors)})
    return logits_of(model)


def fresh_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """A fresh model's logical tensors, small ones away from their initial value so that none could be mistaken."""
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    experts = [index for index, symbol in enumerate(config.symbols) if symbol == "E"]
    # Where training does not move it, a selection bias is zero, and a target may have no place for it.
    moving = {f"layers.{i}.mixer.selection_bias" for i in experts if config.layer(i)[1].bias_update_rate}
    for name, tensor in model_tensors(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        noise = torch.rand(whole.shape, generator=generator) * 0.2
        moves = whole.dim() == 1 and (name in moving or not name.endswith("selection_bias"))
        tensors[name] = whole.detach() + noise if moves else whole.detach()
    return Tensors(tensors)


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
