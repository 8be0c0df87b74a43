"""Training that starts in an imported run: at step 0, from the weights of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from polylepis.checkpoints.commands import convert
from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.hf.reference import fill, fresh_tensors
from polylepis.checkpoints.manifest import newest_checkpoint, read_manifest
from polylepis.checkpoints.sharded import read_tensors
from polylepis.checkpoints.transforms import in_memory
from polylepis.data.stream import Stream
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.objectives.next_token import next_token
from polylepis.pretrain.prepare import check_all, check_folder, open_data
from polylepis.pretrain.train import train
from ranks import run_ranks
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")

EXPERTS = MoEConfig(n_experts=4, top_k=2, d_ff=8, d_ff_shared=12)


def first_loss(config: RunConfig, model: ModelConfig, tensors: dict[str, torch.Tensor]) -> float:
    """Nats per predicted token of the first global batch, evaluated on one process with these weights."""
    whole = build_model(model, build_mesh(MeshConfig(dp_shard=1), "cpu"), seed=9)
    fill(whole, tensors)
    data = Stream(open_data(config), config.data, dp_rank=0, dp_size=1).next()
    with torch.no_grad():
        total = sum(float(next_token(whole, b, data.total_weight).sums.double().sum()) for b in data.micro_batches)
    return total / sum(data.target_tokens.values())


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (toy("M-*ME", (), modalities=("text",), moe=EXPERTS), MeshConfig(dp_shard=1, tp=2)),
        (toy("M*-ME", ALL_ROUTED), MeshConfig(dp_shard=2)),
    ],
    ids=["nemotron_h tp2", "polylepis fsdp2"],
)
def test_training_starts_from_the_imported_weights(model: ModelConfig, mesh: MeshConfig, tmp_path: Path) -> None:
    tensors = fresh_tensors(model, seed=4)
    run = tmp_path / "run"
    arguments = [str(export(model, tensors, tmp_path / "hf", context=64)), "--from", "hf", "--out", str(run)]
    result = CliRunner().invoke(convert, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    changes = [f"mesh.tp={mesh.tp}", f"mesh.dp_shard={mesh.dp_shard}", "train.steps=2", "train.device=cpu"]
    changes += ["data.global_batch=2", "data.micro_batch=1", "optim.lr=2e-4", "model.moe.aux_global=0.01", "seed=3"]
    config = load_config(str(run), [*changes, "tracking.wandb=disabled"])
    with pytest.raises(
        ConfigError, match=r"imported weights of a model that differs in model\.moe\.top_k: 2 → 1; data"
    ):
        check_folder(load_config(str(run), [*changes, "model.moe.top_k=1"]))
    check_all(config, 2)
    expected = first_loss(config, model, in_memory(tensors))
    run_ranks(2, train, config)

    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step-00000002"
    assert "weights_only" not in read_manifest(checkpoint)
    check_folder(config)
    for change in ("data.global_batch=4", "optim.lr=1e-3", "model.moe.aux_global=0.0"):  # trained: settled
        with pytest.raises(ConfigError, match=f"holds a run that differs in {change.split('=')[0]}"):
            check_folder(load_config(str(run), [*changes, "tracking.wandb=disabled", change]))
    after, steps = read_tensors(checkpoint), read_tensors(checkpoint, "optimizer.")
    assert after.keys() == in_memory(tensors).keys() and steps
    still = [name for name, tensor in in_memory(tensors).items() if torch.equal(after[name], tensor)]
    assert [name for name in still if not name.endswith("selection_bias")] == []
