"""What the equivalence tests compare: gradients of the system on a mesh, and those of the naive model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.sharded import model_tensors
from polylepis.parallel.engines.fsdp import build_model, gradient_norm
from polylepis.parallel.kinds.moe import MoE
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh, init_process_group
from polylepis.parallel.model import HybridModel, ModelConfig
from polylepis.parallel.parts import named_parts, whole_entries
from reference import reference_loss
from toys import toy_batch

DOCUMENTS = [[[13, 1, 9], [20]], [[24], [5, 18]], [[2, 2, 2, 2], [11, 12]], [[7], [23, 1]]]
SEQ_LEN = 24


def batches(absent: tuple[int, ...] = (), count: int = len(DOCUMENTS)) -> list[dict[str, Tensor]]:
    """Micro-batches; `absent` modalities are missing from the second and third."""
    documents = itertools.islice(itertools.cycle(DOCUMENTS), count)
    return [toy_batch(docs, SEQ_LEN, seed, absent if seed in (1, 2) else ()) for seed, docs in enumerate(documents)]


def gradients(
    config: ModelConfig,
    mesh_config: MeshConfig,
    dtype: torch.dtype,
    absent: tuple[int, ...],
    context: ContextConfig | None = None,
    count: int = len(DOCUMENTS),
    bias: tuple[float, ...] = (),
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and whole gradients of one step over all micro-batches, split over data-parallel ranks.

    Expert layers start as if a step with uneven loads had gone before, with the selection `bias` where one is given.
    """
    mesh = build_mesh(mesh_config, "cpu", context)
    model = build_model(config, mesh, seed=3, dtype=dtype)
    start_experts(model, bias)
    mine = batches(absent, count)[mesh.dp_rank :: mesh.dp_size]
    total = sum(float(b["loss_weight"].double().sum()) for b in batches(absent, count))
    loss = torch.zeros((), dtype=torch.float64)
    for batch in mine:
        layout = Layout.from_batch(batch, 3, mesh, total)
        tokens, labels, weights = (layout.mine(batch[n].reshape(-1)) for n in ("tokens", "labels", "loss_weight"))
        part = (model(tokens, layout, labels) * weights.to(dtype)).sum() / total
        part.backward()
        loss += part.detach().double()
    dist.all_reduce(loss)
    return float(loss) / mesh.tp_size, gradient_norm(model.parameters()), whole_gradients([model])


def whole_gradients(models: Iterable[HybridModel]) -> dict[str, Tensor]:
    """The gradients of this rank's stages, gathered over the stage's ranks."""
    grads: dict[str, Tensor] = {}
    for name, parameter, spec in (part for model in models for part in named_parts(model)):
        assert isinstance(parameter.grad, DTensor), name
        grads.update(whole_entries(parameter.grad, spec, name))
    return grads


def start_experts(model: HybridModel, bias: tuple[float, ...] = ()) -> None:
    """As if a step with uneven loads had gone before; with this selection bias where one is given."""
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.expert_load.copy_(torch.arange(1.0, 1 + layer.expert_load.numel()).view_as(layer.expert_load))
        if bias:
            layer.selection_bias.copy_(torch.tensor(bias))


def oracle(config: ModelConfig, absent: tuple[int, ...]) -> tuple[float, float, dict[str, Tensor]]:
    init_process_group("cpu")
    model = build_model(config, build_mesh(MeshConfig(), "cpu"), seed=3, dtype=torch.float64)
    tensors = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in model_tensors(model).items()
    }
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if not n.endswith("selection_bias")}
    total = sum(float(b["loss_weight"].double().sum()) for b in batches(absent))
    loss = torch.stack([reference_loss(config, tensors, b, total) for b in batches(absent)]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    full = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
    norm = torch.stack([g.square().sum() for g in full.values()]).sum().sqrt()
    return loss.item(), norm.item(), full


def assert_equal_gradients(actual: Any, expected: Any, tolerance: float) -> None:
    loss, norm, grads = actual
    expected_loss, expected_norm, expected_grads = expected
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    assert abs(norm - expected_norm) <= tolerance * expected_norm
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = float(expected_grads[name].norm())
        difference = float((grad.double() - expected_grads[name].double()).norm())
        if scale == 0:
            assert difference == 0, name
        else:
            assert difference / scale <= tolerance, f"{name}: {difference / scale:.1e}"


def gradients_alone(
    config: ModelConfig,
    dtype: torch.dtype,
    absent: tuple[int, ...] = (),
    count: int = len(DOCUMENTS),
    bias: tuple[float, ...] = (),
) -> Any:
    init_process_group("cpu")
    return gradients(config, MeshConfig(), dtype, absent, None, count, bias)
