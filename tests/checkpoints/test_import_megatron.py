"""Import from Megatron-LM: both layouts, uneven stages, sharded experts; and pickles that would like to be executed."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from polylepis.checkpoints.commands import convert
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.foreign import megatron
from polylepis.checkpoints.hf.reference import fresh_tensors
from polylepis.checkpoints.manifest import newest_checkpoint
from polylepis.checkpoints.restricted import Inert, load_torch, read_index
from polylepis.checkpoints.sources import Distributed, TorchFile
from polylepis.checkpoints.transforms import in_memory
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mamba import MambaConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.model import ModelConfig
from ranks import run_ranks

CONFIG = ModelConfig(
    pattern="M*E-M",
    d_model=16,
    vocab_size=45,
    vocab_multiple=16,
    mamba=MambaConfig(d_state=6, head_dim=4, n_groups=2),
    attention=AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=6),
    mlp=MLPConfig(20),
    moe=MoEConfig(n_experts=4, top_k=2, d_ff=12, d_ff_shared=8, scale=1.5),
)


class Precision(argparse.Namespace):
    """Stands for an enum of Megatron's that only its own package could build."""


def arguments(config: ModelConfig, tp: int, pp: int, **changes: Any) -> argparse.Namespace:
    swiglu = config.mlp.activation == "swiglu"
    values = {
        "hybrid_override_pattern": config.symbols,
        "hidden_size": config.d_model,
        "num_layers": len(config.symbols),
        "padded_vocab_size": config.padded_vocab,
        "vocab_size": config.vocab_size,
        "mamba_state_dim": config.mamba.d_state,
        "mamba_head_dim": config.mamba.head_dim,
        "mamba_num_groups": config.mamba.n_groups,
        "num_attention_heads": config.attention.n_heads,
        "group_query_attention": True,
        "num_query_groups": config.attention.n_kv_heads,
        "kv_channels": config.attention.head_dim,
        "ffn_hidden_size": config.mlp.d_ff,
        "squared_relu": config.mlp.activation == "relu2",
        "swiglu": swiglu,
        "num_experts": config.moe.n_experts if "E" in config.symbols else None,
        "moe_router_topk": config.moe.top_k,
        "moe_ffn_hidden_size": config.moe.d_ff,
        "moe_shared_expert_intermediate_size": config.moe.d_ff_shared,
        "moe_router_topk_scaling_factor": config.moe.scale,
        "moe_router_score_function": "sigmoid",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "none",
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "params_dtype": torch.bfloat16,
        "fp8": Precision(kind="none"),
        "seq_length": 96,
    }
    return argparse.Namespace(**(values | changes))


def rank_share(tensor: Tensor, tp: int, rank: int, dim: int = 0) -> Tensor:
    size = tensor.shape[dim] // tp
    return tensor.narrow(dim, rank * size, size).clone()


def layer_of_rank(
    config: ModelConfig, t: dict[str, Tensor], index: int, tp: int, rank: int, ep: int, e: int
) -> dict[str, Tensor]:
    """What one rank's module of layer `index` holds, written out after Megatron's modules, not after our rules."""
    ours, symbol = f"layers.{index}.mixer.", config.symbols[index]
    norm = t[f"layers.{index}.norm.weight"]

    def share(name: str, dim: int = 0) -> Tensor:
        return rank_share(t[ours + name], tp, rank, dim)

    if symbol == "M":
        packed = torch.cat([share(f"in_proj.{p}.weight") for p in ("z", "x", "B", "C", "dt")])
        conv = {leaf: torch.cat([share(f"conv.{p}.{leaf}") for p in "xBC"]) for leaf in ("weight", "bias")}
        return {
            "mixer.in_proj.layer_norm_weight": norm,
            "mixer.in_proj.weight": packed,
            "mixer.conv1d.weight": conv["weight"][:, None],
            "mixer.conv1d.bias": conv["bias"],
            **{f"mixer.{n}": share(n) for n in ("A_log", "D", "dt_bias", "norm.weight")},
            "mixer.out_proj.weight": share("out_proj.weight", 1),
        }
    if symbol == "*":
        width, queries = config.attention.head_dim, config.attention.n_heads // config.attention.n_kv_heads
        groups = []
        for group in range(rank * config.attention.n_kv_heads // tp, (rank + 1) * config.attention.n_kv_heads // tp):
            q = t[ours + "q_proj.weight"][group * queries * width : (group + 1) * queries * width]
            k, v = (t[f"{ours}{p}_proj.weight"][group * width : (group + 1) * width] for p in "kv")
            groups += [q, k, v]
        return {
            "self_attention.linear_qkv.layer_norm_weight": norm,
            "self_attention.linear_qkv.weight": torch.cat(groups),
            "self_attention.linear_proj.weight": share("o_proj.weight", 1),
        }
    if symbol == "-":
        up = [share(f"{p}_proj.weight") for p in (("gate", "up") if config.mlp.activation == "swiglu" else ("up",))]
        return {
            "mlp.linear_fc1.layer_norm_weight": norm,
            "mlp.linear_fc1.weight": torch.cat(up),
            "mlp.linear_fc2.weight": share("down_proj.weight", 1),
        }
    each = config.moe.n_experts // ep
    experts = {}
    for j in range(each):
        experts[f"mlp.experts.linear_fc1.weight{j}"] = share(f"up_proj.weight.experts.{e * each + j}")
        experts[f"mlp.experts.local_experts.{j}.linear_fc2.weight"] = share(
            f"down_proj.weight.experts.{e * each + j}", 1
        )
    return {
        "pre_mlp_layernorm.weight": norm,
        "mlp.router.weight": t[ours + "router.weight"],
        "mlp.router.expert_bias": t[ours + "selection_bias"],
        "mlp.shared_experts.linear_fc1.weight": share("shared.up_proj.weight"),
        "mlp.shared_experts.linear_fc2.weight": share("shared.down_proj.weight", 1),
        **experts,
    }


def write_pickled(
    folder: Path, config: ModelConfig, tp: int, stages: list[list[int]], ep: int = 1, **changes: Any
) -> dict[str, Tensor]:
    """`iter_0000007/mp_rank_*` as Megatron-LM saves; `stages` are the layers of each pipeline stage."""
    tensors = in_memory(fresh_tensors(config, seed=9))
    folder.mkdir(exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    for rank in range(tp):
        for stage, layers in enumerate(stages):
            for e in range(ep):
                model: dict[str, Any] = {}
                if stage == 0:
                    model["embedding.word_embeddings.weight"] = rank_share(tensors["embed.weight"], tp, rank)
                for local, index in enumerate(layers):
                    held = layer_of_rank(config, tensors, index, tp, rank, ep, e)
                    model |= {f"decoder.layers.{local}.{name}": value for name, value in held.items()}
                    model[f"decoder.layers.{local}.mlp.linear_fc1._extra_state"] = b"te"
                if stage == len(stages) - 1:
                    model["decoder.final_norm.weight"] = tensors["final_norm.weight"]
                    model["output_layer.weight"] = rank_share(tensors["lm_head.weight"], tp, rank)
                parts = [
                    f"{rank:02d}",
                    *([f"{stage:03d}"] if len(stages) > 1 else []),
                    *([f"{e:03d}"] if ep > 1 else []),
                ]
                place = folder / "iter_0000007" / f"mp_rank_{'_'.join(parts)}"
                place.mkdir(parents=True)
                args = arguments(config, tp, len(stages), **changes)
                values = {
                    "args": args,
                    "checkpoint_version": 3.0,
                    "iteration": 7,
                    "model": model,
                    "rng_state": [object()],
                }
                torch.save(values, place / "model_optim_rng.pt")
    return tensors


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


SWIGLU = ModelConfig(**{**CONFIG.__dict__, "pattern": "M-*-", "mlp": MLPConfig(20, "swiglu"), "moe": MoEConfig()})


@pytest.mark.parametrize(
    ("config", "tp", "stages", "ep"),
    [
        (CONFIG, 1, [[0, 1, 2, 3, 4]], 1),
        (CONFIG, 2, [[0], [1, 2, 3], [4]], 1),
        (CONFIG, 2, [[0, 1, 2, 3, 4]], 2),
        (CONFIG, 2, [[0, 1], [2, 3, 4]], 2),
        (SWIGLU, 2, [[0, 1], [2, 3]], 1),
    ],
    ids=["one file", "tp2 pp3 uneven", "tp2 ep2", "tp2 pp2 ep2", "swiglu tp2 pp2"],
)
def test_files_of_ranks(config: ModelConfig, tp: int, stages: list[list[int]], ep: int, tmp_path: Path) -> None:
    expected = write_pickled(tmp_path, config, tp, stages, ep)
    foreign = megatron.read(tmp_path)
    assert foreign.config.symbols == config.symbols and foreign.context == 96
    assert (foreign.config.vocab_size, foreign.config.padded_vocab) == (45, 48)
    assert_same(in_memory(foreign.tensors), expected)


def test_naive_concatenation_of_the_ranks_is_wrong(tmp_path: Path) -> None:
    """What a converter without partition sizes would do: silently another model, z and x interleaved."""
    expected = write_pickled(tmp_path, CONFIG, 2, [[0, 1, 2, 3, 4]])
    files = sorted((tmp_path / "iter_0000007").glob("*/model_optim_rng.pt"))
    name = "decoder.layers.0.mixer.in_proj.weight"
    naive = torch.cat([load_torch(file)["model"][name] for file in files])
    parts = [expected[f"layers.0.mixer.in_proj.{p}.weight"] for p in ("z", "x", "B", "C", "dt")]
    assert naive.shape == torch.cat(parts).shape and not torch.equal(naive, torch.cat(parts))
    for part, wrong in zip(parts, naive.split([len(p) for p in parts]), strict=True):
        assert not torch.equal(part, wrong)


def test_the_command_makes_a_run_of_it(tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    expected = write_pickled(tmp_path / "megatron", CONFIG, 2, [[0, 1], [2, 3, 4]])
    arguments_ = [tmp_path / "megatron", "--from", "megatron", "--out", tmp_path / "run"]
    result = CliRunner().invoke(convert, [str(a) for a in arguments_])
    assert result.exit_code == 0, repr(result.exception)
    assert "Megatron-LM (mp_rank), iter_0000007" in result.output and "M*E-M" in result.output
    assert_same(in_memory(Distributed(newest_checkpoint(tmp_path / "run" / "checkpoints") or Path())), expected)


def save_distributed(folder: str, config: ModelConfig, tensors: str) -> None:
    """One tensor-parallel rank's share, through megatron-core's own dist_checkpointing."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, tp = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    t = torch.load(tensors)
    state: dict[str, Any] = {"args": arguments(config, tp, 1), "checkpoint_version": 3.0}

    def add(key: str, local: Tensor, dim: int | None = None, stack: tuple[int, int] | None = None) -> None:
        offsets = [(0, *stack)] if stack else []
        if dim is not None:
            offsets.append((dim + len(offsets), rank, tp))
        replica = 0 if dim is not None else rank
        extra = {"prepend_axis_num": 1} if stack else {}
        state[f"{key}/{stack}"] = ShardedTensor.from_rank_offsets(
            key, local.contiguous(), *offsets, replica_id=(0, replica, 0), **extra
        )

    add("embedding.word_embeddings.weight", rank_share(t["embed.weight"], tp, rank), 0)
    add("output_layer.weight", rank_share(t["lm_head.weight"], tp, rank), 0)
    add("decoder.final_norm.weight", t["final_norm.weight"])
    sizes = {"in_proj.weight": ("z", "x", "B", "C", "dt"), "conv1d.weight": "xBC", "conv1d.bias": "xBC"}
    columns = ("mixer.out_proj.weight", "self_attention.linear_proj.weight", "linear_fc2.weight")
    for index in range(len(config.symbols)):
        for name, value in layer_of_rank(config, t, index, tp, rank, 1, 0).items():
            key = f"decoder.layers.{index}.{name}"
            leaf = name.removeprefix("mixer.")
            if leaf in sizes and name.startswith("mixer."):
                stem = "conv." if "conv" in leaf else "in_proj."
                lengths = [len(t[f"layers.{index}.mixer.{stem}{p}.{leaf.split('.')[1]}"]) // tp for p in sizes[leaf]]
                for part, piece in zip(sizes[leaf], value.split(lengths), strict=True):
                    add(f"{key}.{part}", piece, 0)
            elif "experts.linear_fc1.weight" in name and "shared" not in name:
                j = int(name.rsplit("weight", 1)[1])
                add(
                    f"decoder.layers.{index}.mlp.experts.experts.linear_fc1.weight", value, 0, (j, config.moe.n_experts)
                )
            elif "local_experts" in name:
                j = int(name.split(".")[3])
                add(
                    f"decoder.layers.{index}.mlp.experts.experts.linear_fc2.weight", value, 1, (j, config.moe.n_experts)
                )
            elif "norm_weight" in name or "layernorm" in name or "router" in name:
                add(key, value)
            else:
                add(key, value, 1 if name.endswith(columns) else 0)
    torch.cuda.synchronize = lambda *_: None  # its writer insists, also where there is no GPU
    dist_checkpointing.save(state, folder)


def test_a_distributed_checkpoint_of_megatron_core(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.dist_checkpointing")
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    expected = in_memory(fresh_tensors(CONFIG, seed=9))
    torch.save(expected, tmp_path / "tensors.pt")
    run_ranks(2, save_distributed, str(folder), CONFIG, str(tmp_path / "tensors.pt"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    foreign = megatron.read(tmp_path)
    assert foreign.origin == "Megatron-LM (torch_dist), iter_0000003"
    assert_same(in_memory(foreign.tensors), expected)


class Bomb:
    """Executes a command when an ordinary unpickler opens it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return __import__("os").system, (f"touch {self.marker}",)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    marker, bomb = tmp_path / "executed", Bomb(tmp_path / "executed")
    write_pickled(tmp_path, CONFIG, 1, [[0, 1, 2, 3, 4]])
    file = next((tmp_path / "iter_0000007").glob("*/model_optim_rng.pt"))
    values = torch.load(file, weights_only=False)
    torch.save(values | {"surprise": bomb}, file)
    opened = load_torch(file)
    assert isinstance(opened["surprise"], Inert) and opened["surprise"].given == (f"touch {marker}",)
    assert isinstance(opened["args"].fp8, Inert) and opened["args"].fp8.kind == "none"
    assert megatron.read(tmp_path).config.symbols == "M*E-M"
    torch.save(values | {"surprise": bomb}, file, _use_new_zipfile_serialization=False)
    assert megatron.read(tmp_path).config.symbols == "M*E-M"

    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system\); nothing was executed"):
        read_index(tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="holds a system, not the index"):
        Distributed(tmp_path / "dcp")
    (tmp_path / "bin").mkdir()
    with pytest.raises(CheckpointError, match="not a mapping"):
        torch.save(bomb, tmp_path / "bin" / "pytorch_model.bin")
        TorchFile.open(tmp_path / "bin" / "pytorch_model.bin")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match="TorchScript program"):
        load_torch(tmp_path / "program.pt")
    assert not marker.exists()
    with open(file, "rb") as stream:
        assert stream.read(1)
    torch.load(file, weights_only=False)
    assert marker.exists()  # the bomb is one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"moe_router_score_function": "softmax"}, "moe_router_score_function is 'softmax'"),
        ({"hybrid_override_pattern": "M*E--"}, r"hybrid_override_pattern is M\*E--, but the layers are M\*E-M"),
        ({"kv_channels": 8}, r"layers\.1\.self_attention|cannot be parts of"),
        ({"mamba_state_dim": 8}, "cannot be parts of"),
        ({"tensor_model_parallel_size": 4}, "files of tp 2, pp 1, but args say tp 4, pp 1"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is 'learned_absolute'"),
    ],
)
def test_what_cannot_be_imported_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_pickled(tmp_path, CONFIG, 2, [[0, 1, 2, 3, 4]], **changes)
    with pytest.raises(CheckpointError, match=message):
        megatron.read(tmp_path)


def regroup(folder: Path, pp: int, virtual: int, **changes: Any) -> None:
    """Stage v·pp + p of a pickled checkpoint becomes `model{v}` of pipeline rank p, as Megatron interleaves."""
    place = folder / "iter_0000007"
    for rank in range(2):
        opened = [
            torch.load(place / f"mp_rank_{rank:02d}_{s:03d}" / "model_optim_rng.pt", weights_only=False)
            for s in range(pp * virtual)
        ]
        for stage in range(pp * virtual):
            shutil.rmtree(place / f"mp_rank_{rank:02d}_{stage:03d}")
        for p in range(pp):
            values = {k: v for k, v in opened[p].items() if k != "model"}
            values |= {f"model{v}": opened[v * pp + p]["model"] for v in range(virtual)}
            sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": virtual}
            vars(values["args"]).update(sizes | changes)
            target = place / f"mp_rank_{rank:02d}_{p:03d}" / "model_optim_rng.pt"
            target.parent.mkdir()
            torch.save(values, target)


def test_virtual_pipeline_stages(tmp_path: Path) -> None:
    expected = write_pickled(tmp_path, CONFIG, 2, [[0], [1, 2], [3], [4]])
    regroup(tmp_path, 2, 2)
    assert_same(in_memory(megatron.read(tmp_path).tensors), expected)
    file = tmp_path / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt"
    values = torch.load(file, weights_only=False)
    del values["model0"]
    torch.save(values, file)
    with pytest.raises(CheckpointError, match="holds model1; expected is model, or model0, model1 and so on"):
        megatron.read(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000007")
    write_pickled(tmp_path, CONFIG, 2, [[0], [1, 2], [3], [4]])
    regroup(tmp_path, 2, 2, virtual_pipeline_model_parallel_size=4)
    with pytest.raises(CheckpointError, match=r"files of \[2\] virtual pipeline stages, but args say 4"):
        megatron.read(tmp_path)


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    write_pickled(tmp_path, CONFIG, 2, [[0, 1], [2, 3, 4]])
    folder = tmp_path / "iter_0000007"
    for file in sorted(folder.glob("*/model_optim_rng.pt")):
        values = torch.load(file, weights_only=False)
        values["model"] = {
            n: v for n, v in values["model"].items() if "conv1d" not in n and n != "decoder.final_norm.weight"
        }
        torch.save(values, file)
    with pytest.raises(CheckpointError, match=r"9 tensors are missing: .*final_norm.*conv1d\.bias"):
        megatron.read(tmp_path)
    write_pickled(tmp_path / "more", CONFIG, 1, [[0, 1, 2, 3, 4]])
    file = next((tmp_path / "more").glob("*/*/model_optim_rng.pt"))
    values = torch.load(file, weights_only=False)
    values["model"]["decoder.layers.0.mixer.in_proj.bias"] = torch.zeros(3)
    torch.save(values, file)
    with pytest.raises(
        CheckpointError,
        match=r"1 tensors are of no layer that we know: tp0\.ep0:decoder\.layers\.0\.mixer\.in_proj\.bias",
    ):
        megatron.read(tmp_path / "more")
    (folder / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ranks \(tp, pp, ep\) \[\(1, 1, 0\)\] have no file"):
        megatron.read(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(CheckpointError, match="names iter_0000008, which is not there"):
        megatron.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        megatron.read(tmp_path / "empty")
