"""Import from Hugging Face and mamba_ssm: what transformers computes, we compute; and back again, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from torch import Tensor

from polylepis.checkpoints.commands import convert
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.foreign import hf, mamba_ssm
from polylepis.checkpoints.foreign.base import vocab_multiple
from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.hf.layout import exported_shapes
from polylepis.checkpoints.hf.reference import fresh_tensors, reference_logits
from polylepis.checkpoints.hf.targets import Target, config_json
from polylepis.checkpoints.manifest import newest_checkpoint
from polylepis.checkpoints.sharded import load_checkpoint, save_checkpoint
from polylepis.checkpoints.sources import Distributed
from polylepis.checkpoints.transforms import in_memory
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig, config_from_mapping
from polylepis.pretrain.config import load_config
from ranks import run_ranks
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")

NEMOTRON = {
    "model_type": "nemotron_h",
    "vocab_size": 96,
    "hidden_size": 32,
    "hybrid_override_pattern": "M-*--EM",
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "ssm_state_size": 6,
    "mamba_num_heads": 10,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "time_step_min": 1e-30,
    "bos_token_id": 1,
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 80,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 4,
    "n_groups": 2,
    "state_size": 6,
    "chunk_size": 8,
    "tie_word_embeddings": True,
}
GRANITE = {
    "model_type": "granitemoehybrid",
    "vocab_size": 72,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "shared_intermediate_size": 24,
    "intermediate_size": 24,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 8,
    "mamba_d_head": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "position_embedding_type": "rope",
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}
EXPERTS = MoEConfig(6, 2, d_ff=8, d_ff_shared=12, activation="swiglu", router="softmax", bias_update_rate=0.0)
GRANITE_EXPERTS = GRANITE | {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.25,
}
FOREIGN = {"nemotron_h": NEMOTRON, "mamba2": MAMBA2, "granite": GRANITE, "granite with experts": GRANITE_EXPERTS}


def theirs(values: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers, away from its initial values, saved by transformers itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rest = {name: value for name, value in values.items() if name != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **rest))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter + 0.2 * torch.rand_like(parameter) if parameter.dim() == 1 else 4 * parameter)
            if "A_log" in name or "dt_bias" in name:
                parameter.copy_(torch.rand_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
    model.to(dtype).save_pretrained(folder)
    return model.eval()


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(convert, [str(a) for a in arguments])


@pytest.mark.parametrize("name", FOREIGN)
def test_we_compute_what_transformers_computes(name: str, tmp_path: Path) -> None:
    values = FOREIGN[name]
    model = theirs(values, tmp_path / "theirs")
    foreign = hf.read(tmp_path / "theirs")
    tokens = torch.randint(0, values["vocab_size"], (21,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).logits[0]
    ours = reference_logits(foreign.config, foreign.tensors)(tokens, torch.zeros_like(tokens))
    assert expected.abs().max() > 0.1
    assert (ours[:, : values["vocab_size"]] - expected).abs().max() <= 2e-5
    assert bool(foreign.notes) == (values is not NEMOTRON)


@pytest.mark.parametrize("name", FOREIGN)
def test_folders_with_other_names_are_read_too(name: str, tmp_path: Path) -> None:
    """`model.` for `backbone.`, experts stacked as in memory, one pickled file."""
    values = FOREIGN[name]
    model = theirs(values, tmp_path / "theirs")
    expected = in_memory(hf.read(tmp_path / "theirs").tensors)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    state = model.state_dict()
    if values["model_type"] == "nemotron_h":
        assert "model.layers.5.mixer.experts.up_proj" in state
    if values is GRANITE_EXPERTS:
        assert "model.layers.2.block_sparse_moe.experts.gate_up_proj" in state
    if values.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    torch.save(state, other / "pytorch_model.bin")
    found = in_memory(hf.read(other).tensors)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def sharded(run: str, config: ModelConfig, mesh: MeshConfig) -> None:
    """Load an imported run on a mesh and save it from there, as a step of training would."""
    model = build_model(config, build_mesh(mesh, "cpu"), seed=5)
    checkpoint = newest_checkpoint(Path(run) / "checkpoints")
    assert checkpoint is not None
    load_checkpoint(checkpoint, model)
    save_checkpoint(Path(run) / "checkpoints", model, torch.optim.AdamW(model.parameters()), {"step": 3, "data": {}})


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (toy("M-*ME", (), modalities=("text",), moe=MoEConfig(4, 2, 8, 12)), MeshConfig(dp_shard=1, tp=2)),
        (toy("M*-ME", ALL_ROUTED), MeshConfig(dp_shard=2)),
        (toy("MM", (), modalities=("text",), vocab_size=48), MeshConfig(dp_shard=2)),
        (toy("M-*-", (), modalities=("text",), mlp=MLPConfig(20, "swiglu")), MeshConfig(dp_shard=1, tp=2)),
        (
            toy("ME*E", (), modalities=("text",), moe=EXPERTS),
            MeshConfig(dp_shard=2, ep=2),
        ),
    ],
    ids=["nemotron_h tp2", "polylepis fsdp2", "mamba2 fsdp2", "granite tp2", "granite experts ep2"],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_import_shard_export_is_the_same_bits(
    config: ModelConfig, mesh: MeshConfig, dtype: str, tmp_path: Path
) -> None:
    tensors = fresh_tensors(config, seed=4)
    first = export(config, tensors, tmp_path / "first", dtype=getattr(torch, dtype))
    run = tmp_path / "run"
    result = call(first, "--from", "hf", "--out", run)
    assert result.exit_code == 0, result.output + repr(result.exception)
    values = yaml.safe_load((run / "config.yaml").read_text())
    imported = config_from_mapping(values["model"])
    assert imported.symbols == config.symbols and imported.padded_vocab == config.padded_vocab
    assert imported.vocab_size == config.vocab_size  # padding of the vocabulary stays padding
    run_ranks(2, sharded, str(run), imported, mesh)
    result = call(run, "--to", "hf", "--dtype", dtype, "--out", tmp_path / "again", "--proof", "shrunk")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (first, tmp_path / "again"))
        assert {k: v for k, v in before.items() if v != after.get(k)} == {}


def original(folder: Path, tied: bool, **ssm: Any) -> dict[str, Tensor]:
    """A folder in the layout of state-spaces/mamba2-*, from a model of transformers."""
    model = theirs(MAMBA2 | {"tie_word_embeddings": tied}, folder / "hf")
    state = {n.replace("embeddings.weight", "embedding.weight"): t for n, t in model.state_dict().items()}
    settings = {
        "d_model": 16,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 77,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 2, "chunk_size": 8, **ssm},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(state, folder / "pytorch_model.bin")
    return model.state_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_layout_of_mamba_ssm(tied: bool, tmp_path: Path) -> None:
    state = original(tmp_path, tied)
    foreign = mamba_ssm.read(tmp_path)
    config = foreign.config
    assert (config.vocab_size, config.padded_vocab, config.symbols, config.mamba.n_groups) == (77, 80, "MM", 2)
    tensors = in_memory(foreign.tensors)
    z, x = (tensors[f"layers.1.mixer.in_proj.{p}.weight"] for p in "zx")
    packed = state["backbone.layers.1.mixer.in_proj.weight"]
    assert torch.equal(packed[:32], z) and torch.equal(packed[32:64], x)
    assert torch.equal(tensors["lm_head.weight"], state["lm_head.weight"])
    if tied:
        assert torch.equal(tensors["embed.weight"], tensors["lm_head.weight"]) and "tied" in foreign.notes[0]
    result = call(tmp_path, "--from", "mamba_ssm", "--out", tmp_path / "run")
    assert result.exit_code == 0 and "mamba_ssm" in result.output
    stored = in_memory(Distributed(newest_checkpoint(tmp_path / "run" / "checkpoints") or Path()))
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[n], tensors[n]) for n in tensors)


PUBLISHED = {
    # From the models' own config.json; sizes that only training needs are left out.
    "nvidia/Nemotron-H-8B": {
        "model_type": "nemotron_h",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "num_hidden_layers": 52,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 21504,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
    },
    "nvidia/Nemotron-H-4B": {  # its inner width is 7/3 of the hidden size
        "model_type": "nemotron_h",
        "vocab_size": 131072,
        "hidden_size": 3072,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        "num_hidden_layers": 52,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "ssm_state_size": 128,
        "mamba_num_heads": 112,
        "mamba_head_dim": 64,
        "n_groups": 8,
    },
    "NemotronH with experts": {
        "model_type": "nemotron_h",
        "vocab_size": 131072,
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEM*EME",
        "num_hidden_layers": 7,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 1856,
        "ssm_state_size": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
    "state-spaces/mamba2-2.7b in HF names": {
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 2560,
        "num_hidden_layers": 64,
        "num_heads": 80,
        "head_dim": 64,
        "n_groups": 1,
        "state_size": 128,
        "chunk_size": 256,
    },
    "granite-4.0-h-tiny": {  # four of its forty layers
        "model_type": "granitemoehybrid",
        "vocab_size": 100352,
        "hidden_size": 1536,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "shared_intermediate_size": 1024,
        "intermediate_size": 512,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "attention_multiplier": 0.0078125,
        "position_embedding_type": "nope",
    },
    "granite-4.0-h-micro": {
        "model_type": "granitemoehybrid",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "shared_intermediate_size": 8192,
        "intermediate_size": 8192,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 64,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "attention_multiplier": 0.015625,
        "position_embedding_type": "nope",
    },
}
GRANITE_NAMES = (
    ("router.weight", "router.layer.weight"),
    ("experts.gate_up_proj", "input_linear.weight"),
    ("experts.down_proj", "output_linear.weight"),
)


def names_on_disk(model: Any, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that a class's tensors have in files, which are older than those in memory."""
    result: dict[str, tuple[int, ...]] = {}
    for key, tensor in model.state_dict().items():
        if kind == "nemotron_h":
            key = key.replace("model.", "backbone.", 1)
            if key.endswith((".experts.up_proj", ".experts.down_proj")):
                stem, leaf = key.rsplit(".", 1)
                result |= {f"{stem}.{j}.{leaf}.weight": tuple(tensor.shape[1:]) for j in range(tensor.shape[0])}
                continue
        for memory, disk in GRANITE_NAMES:
            key = key.replace(f"block_sparse_moe.{memory}", f"block_sparse_moe.{disk}")
        result[key] = tuple(tensor.shape)
    return result


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_are_those_of_the_real_class(name: str) -> None:
    """Every expected key present, none extra, shapes equal; on the meta device, no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = PUBLISHED[name]
    rest = {key: value for key, value in values.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **rest))
    config, target = hf.described(values)
    assert exported_shapes(config, target) == names_on_disk(model, values["model_type"])


PUBLISHED_OURS = [*PUBLISHED, "mixture-of-mamba-1.5b"]


@pytest.mark.parametrize("name", PUBLISHED_OURS)
def test_an_export_has_the_names_of_the_class_that_its_config_makes(name: str) -> None:
    """`config.json` as written → the real class on the meta device: its keys, none extra, none absent."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from polylepis.checkpoints.hf.register import register

    register()
    target: Target = "polylepis"
    if name in PUBLISHED:
        config, target = hf.described(PUBLISHED[name])
    else:
        config = load_config(name).model
    values = config_json(config, target, None, torch.bfloat16, 4096)
    rest = {key: value for key, value in values.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **rest))
    assert type(model).__name__ == values["architectures"][0]
    assert names_on_disk(model, values["model_type"]) == exported_shapes(config, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not imported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ({"use_bias": True}, "use_bias is True"),
        ({"time_step_limit": [0.01, 0.1]}, "clamps the time steps"),
        ({"hybrid_override_pattern": "MX"}, "character 'X' at position 1"),
        ({"ssm_state_size": None}, "no ssm_state_size in it"),
        ({"n_groups": 3}, "heads are not divisible by n_groups 3"),
        ({"num_attention_heads": 2}, r"2 tensors do not fit \(nothing was written\).*q_proj"),
        ({"hybrid_override_pattern": "M-*--EM-"}, r"3 tensors do not fit.*layers\.7\.norm\.weight is missing"),
        ({"hybrid_override_pattern": "M-*--E"}, r"9 tensors do not fit.*layers\.6.* is not of this model"),
    ],
)
def test_what_cannot_be_imported_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs(NEMOTRON, tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(NEMOTRON | changes))
    result = call(tmp_path / "theirs", "--from", "hf", "--out", tmp_path / "run")
    assert isinstance(result.exception, ValueError) and getattr(result.exception, "exit_code", 0) == 2
    assert "\n" not in str(result.exception)
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("ssm", "top", "message"),
    [
        ({"layer": "Mamba1"}, {}, "ssm_cfg.layer is 'Mamba1'"),
        ({"norm_before_gate": True}, {}, "norm_before_gate is True"),
        ({"d_ssm": 16}, {}, "d_ssm 16"),
        ({}, {"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({}, {"d_intermediate": 64}, "d_intermediate"),
        ({}, {"rms_norm": False}, "rms_norm is False"),
    ],
)
def test_mamba_ssm_models_that_are_others(
    ssm: dict[str, Any], top: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"d_model": 16, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba2", **ssm}, **top}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        mamba_ssm.read(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for arguments, message in (
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path / "a"], "no config.json in it"),
    ):
        result = call(*arguments, "--from", "hf", "--out", tmp_path / "run")
        assert isinstance(result.exception, CheckpointError) and message in str(result.exception)
    (tmp_path / "a" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        hf.read(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(MAMBA2))
    with pytest.raises(CheckpointError, match="neither"):
        hf.read(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"nonsense" * 9)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        hf.read(tmp_path / "a")
    assert [vocab_multiple(size) for size in (256000, 50288, 131072, 77, 48)] == [1024, 16, 1024, 1, 16]
