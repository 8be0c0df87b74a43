"""What is really sent: counts and bytes equal the formulas, the summary travels while z is projected, nothing leaks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from equivalence import SEQ_LEN, start_experts
from polylepis.parallel.context import StateExchange
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.mamba import Mamba, MambaConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.vocab import vocab_parallel_cross_entropy
from polylepis.parallel.volume import Volume, forward_volume
from ranks import run_ranks
from toys import ALL_ROUTED, toy, toy_batch

EXPERTS = MoEConfig(n_experts=4, top_k=2, d_ff=8, d_ff_shared=8)
EVEN = (9.0, 0.0, 9.0, 0.0)  # every token to one expert of each of two ranks
GROUPS = MambaConfig(d_state=6, head_dim=4, n_groups=4, chunk_size=8, routed=ALL_ROUTED)
ONE_GROUP = MambaConfig(d_state=6, head_dim=4, n_groups=1, chunk_size=8)


class CountCollectives(TorchDispatchMode):
    """Counts c10d operations and the bytes of their larger side."""

    NAMES = {"allgather": "all_gather", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter"}
    NAMES |= {"alltoall": "all_to_all", "all_to_all": "all_to_all", "allreduce": "all_reduce"}

    def __init__(self) -> None:
        super().__init__()
        self.volume = Volume()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = str(func)
        if packet.startswith("c10d."):
            name = next(
                (ours for theirs, ours in self.NAMES.items() if packet[5:].lstrip("_").startswith(theirs)), None
            )
            if name is not None:
                tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
                largest = max(tensors, key=torch.Tensor.numel)
                self.volume.add(name, largest.numel(), largest.element_size())
        return func(*args, **(kwargs or {}))


def forward_counts(
    config: ModelConfig, mesh_config: MeshConfig, context: ContextConfig
) -> tuple[Counter[str], Counter[str]]:
    mesh = build_mesh(mesh_config, "cpu", context)
    model = build_model(config, mesh)
    if "E" in config.symbols and mesh.ep_size > 1:
        start_experts(model, EVEN)
    batch = toy_batch([[13, 1, 9], [20]], SEQ_LEN)
    layout = Layout.from_batch(batch, 3, mesh)
    tokens, labels = (layout.mine(batch[n].reshape(-1)) for n in ("tokens", "labels"))
    model(tokens, layout, labels)  # FSDP's first forward sets itself up
    for block in (*model.layers.values(), model):
        block.unshard()  # parameters are gathered already: what is counted is activations
    with CountCollectives() as counter:
        model(tokens, layout, labels)
    return counter.volume.calls, counter.volume.bytes


CASES = {
    "tp": (toy("M*-E"), MeshConfig(dp_shard=1, tp=2), ContextConfig()),
    "tp beyond groups": (toy("M", mamba=ONE_GROUP), MeshConfig(dp_shard=1, tp=2), ContextConfig()),
    "cp state": (toy("MM-"), MeshConfig(dp_shard=1, cp=2), ContextConfig(mamba="state")),
    "cp state zigzag": (toy("M"), MeshConfig(dp_shard=1, cp=2), ContextConfig("zigzag", "state")),
    "cp heads": (
        toy("M*", mamba=GROUPS),
        MeshConfig(dp_shard=1, cp=2),
        ContextConfig(mamba="heads", attention="heads"),
    ),
    "cp gather": (toy("*"), MeshConfig(dp_shard=1, cp=2), ContextConfig(attention="gather")),
    "ep": (toy("EE", moe=EXPERTS), MeshConfig(dp_shard=2, ep=2), ContextConfig()),
    "ep x tp": (toy("E", moe=EXPERTS), MeshConfig(dp_shard=2, tp=2, ep=2), ContextConfig()),
    "tp x cp": (toy("M*", mamba=GROUPS), MeshConfig(dp_shard=1, cp=2, tp=2), ContextConfig(attention="gather")),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_and_bytes_equal_the_formulas(name: str) -> None:
    config, mesh, context = CASES[name]
    expected = forward_volume(config, mesh, context, 2 * SEQ_LEN)
    for calls, sizes in run_ranks(mesh.n_processes, forward_counts, config, mesh, context):
        names = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")
        assert {n: (calls[n], sizes[n]) for n in names} == {n: (expected.calls[n], expected.bytes[n]) for n in names}


def order_of_events(config: ModelConfig) -> list[str]:
    mesh = build_mesh(MeshConfig(dp_shard=1, cp=2), "cpu", ContextConfig(mamba="state"))
    model = build_model(config, mesh)
    events: list[str] = []
    project, start, finish = Mamba.project, StateExchange.__init__, StateExchange.entering_states

    def traced_project(self: Mamba, h: Any, plan: Any, names: Any) -> Any:
        events.append("project " + ",".join(names))
        return project(self, h, plan, names)

    def traced_start(self: StateExchange, *args: Any) -> None:
        start(self, *args)
        events.append("exchange issued")

    def traced_finish(self: StateExchange) -> Any:
        events.append("exchange awaited")
        return finish(self)

    Mamba.project = traced_project  # type: ignore[method-assign]
    StateExchange.__init__ = traced_start  # type: ignore[method-assign,assignment]
    StateExchange.entering_states = traced_finish  # type: ignore[method-assign]
    batch = toy_batch([[13, 1, 9], [20]], SEQ_LEN)
    layout = Layout.from_batch(batch, 3, mesh)
    model(layout.mine(batch["tokens"].reshape(-1)), layout)
    return events


def test_the_summary_travels_while_z_is_projected() -> None:
    for events in run_ranks(2, order_of_events, toy("M")):
        assert events == ["project x,B,C,dt", "exchange issued", "project z", "exchange awaited"]


def leaks(symbol: str, mesh_config: MeshConfig, context: ContextConfig) -> float:
    """The largest derivative of a document's outputs with respect to other documents' inputs, on this rank."""
    mesh = build_mesh(mesh_config, "cpu", context)
    mamba = GROUPS if context.mamba == "heads" else toy("M", ALL_ROUTED).mamba
    block = build_model(toy(symbol, ALL_ROUTED, mamba=mamba), mesh, dtype=torch.float64).layers["0"]
    batch = toy_batch([[13, 1, 9], [20]], SEQ_LEN)
    layout = Layout.from_batch(batch, 3, mesh)
    # Flat documents, numbered over rows; each tp rank holds its run of this context rank's tokens.
    docs = (batch["doc_ids"] + 10 * torch.arange(2)[:, None]).where(batch["doc_ids"] >= 0, -1).reshape(-1)
    docs = layout.mine(docs).chunk(mesh.tp_size)[mesh.tp_rank]
    x = torch.randn(len(docs), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    worst, seen = 0.0, False
    for doc in (0, 1, 2, 10):
        leaf = x.clone().requires_grad_()
        block(leaf, layout)[docs == doc].square().sum().backward()
        assert leaf.grad is not None
        worst = max(worst, float(leaf.grad[docs != doc].abs().max()) if bool((docs != doc).any()) else 0.0)
        seen = seen or bool(leaf.grad.any())
    assert seen
    return worst


@pytest.mark.parametrize(
    ("mesh", "context"),
    [
        (MeshConfig(dp_shard=1, tp=2), ContextConfig()),
        (MeshConfig(dp_shard=1, cp=2), ContextConfig("zigzag", "state", "gather")),
        (MeshConfig(dp_shard=1, cp=2), ContextConfig("contiguous", "heads", "heads")),
    ],
    ids=["tp", "cp state", "cp heads"],
)
@pytest.mark.parametrize("symbol", ["M", "*", "-", "E"])
def test_documents_stay_apart_under_every_axis(symbol: str, mesh: MeshConfig, context: ContextConfig) -> None:
    assert run_ranks(2, leaks, symbol, mesh, context) == [0.0, 0.0]


def sharded_cross_entropy() -> float:
    rank = dist.get_rank()
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, dim=1)[rank]
    group = dist.group.WORLD
    assert group is not None
    return float(vocab_parallel_cross_entropy(logits, torch.tensor([3]), group))


def test_vocabulary_shards_are_one_softmax() -> None:
    """Megatron-LM#7452: gathered logits fed to a vocab-parallel loss gave 1.1333369 for this case."""
    assert run_ranks(2, sharded_cross_entropy) == [pytest.approx(0.4401897, abs=1e-7)] * 2
