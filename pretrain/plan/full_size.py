"""The full-size plan without memory: every layer's forward and backward on fake tensors, its collectives counted.

Each distinct layer runs once, at its real sizes, in one process that plays a rank of tp × cp whose collectives go
nowhere. Shapes are the model's own; what was sent is compared with the formulas of `parallel/volume.py`, so a plan is
refused where code and formula disagree. Expert layers choose by value, which fake tensors do not have: theirs are
taken from the formulas, and said so.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...parallel.errors import PlanError
from ...parallel.kinds.moe import MoEConfig
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh, MeshConfig, build_mesh
from ...parallel.model import HybridModel
from ...parallel.pipeline.stage import Stage
from ...parallel.volume import Volume, ends_volume, layer_volume
from ..config import RunConfig, load_config

# What torch calls the collectives; the beginnings of its operators' names.
NAMES = {
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "allreduce": "all_reduce",
}


class _Count(TorchDispatchMode):
    """Counts c10d operations and the bytes of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = Volume()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            ours = next((ours for theirs, ours in NAMES.items() if name.lstrip("_").startswith(theirs)), None)
            if ours is not None:
                tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
                largest = max(tensors, key=Tensor.numel)
                self.volume.add(ours, largest.numel(), largest.element_size())
        return func(*args, **(kwargs or {}))


def walk(config: RunConfig) -> dict[str, Any]:
    """Run the plan's layers on fake tensors; `config` has its mesh resolved.

    Returns:
        `layers`: for each layer the calls and bytes of its forward and of forward and backward, `counted` where they
        were; `ends` the same of embedding and output projection together.

    Raises:
        PlanError: a layer sends something else than the formulas say.
    """
    # A CPU's scan works in blocks by the number of threads; with many threads one block is a whole micro-batch.
    torch.set_num_threads(64)
    mesh_config = MeshConfig(dp_shard=1, cp=config.mesh.cp, tp=config.mesh.tp)
    _join_fake_group(mesh_config.n_processes)
    mesh, model = build_mesh(mesh_config, "cpu", config.context), config.model
    rows, length = config.data.micro_batch, config.data.seq_len
    n, total = len(model.symbols), rows * length
    batch = {
        "doc_ids": torch.zeros(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    batch["modality_ids"] = torch.arange(length).expand(rows, -1) % len(model.modalities)
    layout = Layout.from_batch(batch, len(model.modalities), mesh)
    itemsize = torch.empty((), dtype=config.train.compute_dtype).element_size()

    def compare(what: str, counted: Volume, expected: Volume) -> None:
        if (+counted.calls, +counted.bytes) != (+expected.calls, +expected.bytes):
            raise PlanError(
                f"rehearse: {what} sends {dict(counted.calls)} ({dict(counted.bytes)} bytes), but the formulas say "
                f"{dict(expected.calls)} ({dict(expected.bytes)} bytes)"
            )

    done: dict[tuple[str, str], dict[str, Any]] = {}
    layers = []
    for index, symbol in enumerate(model.symbols):
        key = (symbol, repr(model.layers.get(index)))
        if key not in done:
            expected = _sum(layer_volume(model, index, config.mesh, config.context, total, itemsize))
            if isinstance(model.layer(index)[1], MoEConfig):
                done[key] = _entry(expected, None)
            else:
                forward, both = _run(config, mesh, Stage(1, 3, index, index + 1), layout)
                compare(f"layer {index} ({symbol})", forward, expected)
                done[key] = _entry(forward, both)
        layers.append(done[key])
    whole = _run(config, mesh, Stage(0, 2, 0, 0), layout), _run(config, mesh, Stage(1, 2, n, n), layout)
    forward, both = _sum([first for first, _ in whole]), _sum([second for _, second in whole])
    compare("embedding and output projection", forward, ends_volume(model, mesh_config, total, itemsize))
    return {"layers": layers, "ends": _entry(forward, both)}


def _join_fake_group(size: int) -> None:
    # torch's own stand-in for a process group whose collectives do nothing; shapes are right, values are not.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


def _run(config: RunConfig, mesh: Mesh, stage: Stage, layout: Layout) -> tuple[Volume, Volume]:
    """What a stage sends in its forward, and in forward and backward."""
    dtype, tokens = config.train.compute_dtype, layout.seq_idx.numel()
    mode, counter = FakeTensorMode(allow_non_fake_inputs=True), _Count()
    with mode, counter:
        model = HybridModel(config.model, mesh, stage, config.recompute).to_empty(device="cpu").to(dtype)
        ids = torch.zeros(tokens, dtype=torch.long)
        x = ids if stage.embeds else torch.empty(tokens // mesh.tp_size, config.model.d_model, dtype=dtype)
        out = model(x if stage.embeds else x.requires_grad_(), layout, ids if stage.predicts else None)
        forward = Volume(Counter(counter.volume.calls), Counter(counter.volume.bytes))
        out.backward(torch.empty_like(out))
    short = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if short:
        raise PlanError(f"rehearse: {', '.join(short[:3])} got no gradient")
    return forward, counter.volume


def _sum(volumes: Sequence[Volume]) -> Volume:
    total = Volume()
    for volume in volumes:
        total.calls.update(volume.calls)
        total.bytes.update(volume.bytes)
    return total


def _entry(forward: Volume, both: Volume | None) -> dict[str, Any]:
    whole = both or _sum([forward, forward])  # the backward of each is a collective of the same size
    return {"counted": both is not None, "forward": vars(forward), "both": vars(whole)}


def main(arguments: Sequence[str]) -> int:
    """The worker: CONFIG OUT."""
    result = walk(load_config(arguments[0]))
    Path(arguments[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except Exception as error:
        if getattr(error, "exit_code", None) is None:
            raise
        print(f"polylepis: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
