"""Exported folders: what transformers computes from them, what is refused, what the proof catches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.hf.export import export, parse_size
from polylepis.checkpoints.hf.reference import reference_logits
from polylepis.checkpoints.hf.targets import caution, choose_target, refusal
from polylepis.checkpoints.hf.verify import modality_of, probe_length, probe_tokens, transformers_module, verify
from polylepis.checkpoints.sharded import model_tensors
from polylepis.checkpoints.transforms import Tensors
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mamba import MambaConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")

VOCABULARY = {"modalities": ["text", "image", "voice"], "sizes": [10, 7, 5], "specials": 32, "vocab_multiple": 16}
ONE_GROUP = MambaConfig(d_state=6, head_dim=4, n_groups=1, chunk_size=8)
UNEVEN = MambaConfig(width=24, d_state=6, head_dim=4, n_groups=2, chunk_size=8)
WIDE = AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=8)
GROUPED = MoEConfig(n_experts=8, top_k=3, d_ff=8, d_ff_shared=12, n_groups=4, top_groups=2, renormalise=False)
GELU, SWIGLU = MLPConfig(20, "gelu"), MLPConfig(20, "swiglu")
GRANITE = MoEConfig(5, 2, d_ff=8, d_ff_shared=12, activation="swiglu", router="softmax", bias_update_rate=0.0)
ROPE = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, rope_base=100.0)


def small(pattern: str, routed: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    experts = MoEConfig(n_experts=4, top_k=2, d_ff=8, d_ff_shared=12, scale=1.5)
    return toy(pattern, routed, **({"vocab_size": 54, "moe": experts} | changes))


def granite(field: str, value: Any, **more: Any) -> ModelConfig:
    """A model that Granite could hold but for one setting of its experts."""
    return small("ME*E", moe=dataclasses.replace(GRANITE, **{field: value}, **more))


HYBRID = small("M-M*--ME")
ROUTED = small("M*-ME", ALL_ROUTED)


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors as a checkpoint holds them, selection biases that matter."""
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"))
    tensors = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model_tensors(model).items()}
    for name, tensor in tensors.items():
        if name.endswith("selection_bias") and config.moe.bias_update_rate:
            tensor.copy_(torch.linspace(-0.2, 0.2, tensor.numel()))
    return tensors


def round_trip(
    config: ModelConfig, folder: Path, target: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """Export and verify; the report."""
    tensors = tensors_of(config)
    vocabulary = options.pop("vocabulary", VOCABULARY)
    export(config, Tensors(tensors), folder, vocabulary=vocabulary, target=target, dtype=dtype, **options)
    return verify(folder, config, reference_logits(config, Tensors(tensors), dtype), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("config", "target", "expected"),
    [
        (small("MMM", mamba=ONE_GROUP), None, "Mamba2ForCausalLM"),
        (HYBRID, None, "NemotronHForCausalLM"),
        (small("M--*M-", mlp=GELU), None, "NemotronHForCausalLM"),
        (small("*-E"), None, "NemotronHForCausalLM"),
        (small("M-*-M-", mlp=SWIGLU), None, "GraniteMoeHybridForCausalLM"),
        (small("ME*EME", moe=GRANITE), None, "GraniteMoeHybridForCausalLM"),
        (small("*EME", moe=dataclasses.replace(GRANITE, top_k=1), attention=ROPE), None, "GraniteMoeHybridForCausalLM"),
        (small("*-M-M-", mlp=SWIGLU, attention=ROPE), None, "GraniteMoeHybridForCausalLM"),
        (small("*-M-", mlp=SWIGLU, attention=WIDE), "granite", "GraniteMoeHybridForCausalLM"),
        (small("M*-", mamba=UNEVEN), None, "NemotronHForCausalLM"),
        (small("M-", mamba=UNEVEN), "polylepis", "PolylepisForCausalLM"),
        (ROUTED, None, "PolylepisForCausalLM"),
        (small("M-M*E", mlp=SWIGLU, attention=ROPE), None, "PolylepisForCausalLM"),
        (small("M*E", moe=GROUPED), None, "NemotronHForCausalLM"),
        (small("M*E", moe=dataclasses.replace(GROUPED, router="softmax")), None, "PolylepisForCausalLM"),
        (small("MM-"), None, "PolylepisForCausalLM"),
        (HYBRID, "polylepis", "PolylepisForCausalLM"),
    ],
    ids=lambda value: value.pattern if isinstance(value, ModelConfig) else str(value),
)
def test_transformers_computes_what_we_compute(
    config: ModelConfig, target: str | None, expected: str, tmp_path: Path
) -> None:
    report = round_trip(config, tmp_path / "hf", target)
    assert report["class"] == expected and report["passed"]
    assert report["gates"][0]["value"] <= 2e-5 and len(report["gates"]) == 3
    assert report["tokens"] > 2 * 8 and report["tokens"] % 8
    assert json.loads((tmp_path / "hf" / "export_report.json").read_text()) == report
    assert os.listdir(tmp_path) == ["hf"]


def test_mamba2_with_groups(tmp_path: Path) -> None:
    """transformers up to 5.21.1 ignores groups in the gated norm: the card says so, and 5.23 must pass the gate."""
    config = small("MM")
    assert choose_target(config) == "mamba2"
    assert "5.23 is right" in str(caution(config, "mamba2")) and caution(small("MM", mamba=ONE_GROUP), "mamba2") is None
    import transformers

    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 23):
        assert round_trip(config, tmp_path / "hf")["class"] == "Mamba2ForCausalLM"
        assert "**Beware:**" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "target", "reason"),
    [
        (small("MM*"), "mamba2", "the pattern MM\\* has layers other than M"),
        (small("MM-"), "nemotron_h", "has none"),
        (ROUTED, "nemotron_h", "layer 0 routes z, x, B, C, dt, dt_bias, out by modality"),
        (small("MM", mamba=UNEVEN), "mamba2", "inner width 24, not a multiple of d_model 16"),
        (small("M-M*", mlp=SWIGLU), "granite", "not made of such pairs"),
        (small("M-*E", mlp=SWIGLU, moe=GRANITE), "granite", "has both - and E"),
        (small("ME*E"), "granite", "layer 1 has experts that are relu2 under a sigmoid router"),
        (granite("partition", {"text": 2, "image": 2, "voice": 1}), "granite", "partitioned by modality"),
        (granite("scale", 1.5), "granite", "layer 1 has expert weights that sum to 1.5"),
        (granite("renormalise", False), "granite", "expert weights that are not renormalised"),
        (granite("bias_update_rate", 1e-3), "granite", r"a selection bias \(bias_update_rate 0.001\)"),
        (granite("d_ff", 10), "granite", "layer 1 has experts of 16 × 10"),
        (granite("d_ff_shared", 0), "granite", "layer 1 has no shared expert"),
        (granite("n_groups", 2, n_experts=6), "granite", "layer 1 chooses experts in 2 groups"),
        (small("M--*", mlp=SWIGLU), "granite", "the pattern M--\\* is not made of such pairs"),
        (small("M-*-"), "granite", "layer 1 is a relu2 MLP, and its own are swiglu"),
        (small("M-M-", mlp=SWIGLU), "granite", "has none"),
        (small("M-*-", ("x",), mlp=SWIGLU), "granite", "layer 0 routes x by modality"),
        (small("*-*-", mlp=SWIGLU, layers={2: {"rope_base": 10.0}}), "granite", "layers 0 and 2, both \\*, differ"),
        (small("MM", ("z",)), "mamba2", "layer 0 routes z by modality"),
        (small("M*", attention=ROPE), "nemotron_h", "layer 1 has rotary embeddings"),
        (small("M*-", mlp=SWIGLU), "nemotron_h", "layer 2 is a swiglu MLP"),
        (small("M*-E", mlp=GELU), "nemotron_h", "one activation for MLPs \\(gelu\\) and experts"),
        (small("M*E", layers={2: {"d_ff": 10}}), "nemotron_h", "layer 2 has experts of 16 × 10"),
        (small("M*E", layers={2: {"n_experts": 1, "top_k": 1}}), "nemotron_h", "layer 2 has 1 experts"),
        (small("M*E", moe=dataclasses.replace(GROUPED, activation="swiglu")), "nemotron_h", "swiglu under a"),
        (small("M*--", layers={3: {"d_ff": 12}}), "nemotron_h", "layers 2 and 3, both -, differ in size"),
        (small("MM", mamba=ONE_GROUP, layers={1: {"d_state": 4}}), "mamba2", "layers 0 and 1, both M, differ in size"),
    ],
)
def test_a_target_that_cannot_hold_the_model_is_refused(config: ModelConfig, target: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        choose_target(config, target)
    assert choose_target(config) == "polylepis" or refusal(config, choose_target(config)) is None


def test_a_selection_bias_that_granite_has_no_place_for_is_refused(tmp_path: Path) -> None:
    """Left by an earlier training: the configuration says there is none, the checkpoint has one."""
    config = small("ME*E", moe=GRANITE)
    tensors = tensors_of(config)
    tensors["layers.3.mixer.selection_bias"][1] = 0.03
    with pytest.raises(CheckpointError, match=r"layers\.3\.mixer\.selection_bias is not zero \(up to 0\.03\)"):
        export(config, Tensors(tensors), tmp_path / "hf", target="granite")
    assert not os.listdir(tmp_path)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(CheckpointError, match="accepted are mamba2, nemotron_h, granite, polylepis"):
        choose_target(HYBRID, "llama")
    assert choose_target(small("M*M", layers={2: {"chunk_size": 4}})) == "nemotron_h"  # tiling is nobody's business


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (HYBRID, "backbone.layers.0.mixer.A_log"),
        (HYBRID, "backbone.layers.7.mixer.gate.e_score_correction_bias"),
        (HYBRID, "backbone.layers.3.mixer.k_proj.weight"),
        (ROUTED, "model.layers.0.mixer.in_proj.B.voice.weight"),
        (ROUTED, "model.layers.4.mixer.experts.2.down_proj.weight"),
        (ROUTED, "model.layers.0.mixer.dt_bias.image"),
    ],
)
def test_a_corrupted_tensor_is_noticed(config: ModelConfig, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    tensors = tensors_of(config)
    export(config, Tensors(tensors), folder, vocabulary=VOCABULARY)
    reference = reference_logits(config, Tensors(tensors))
    assert verify(folder, config, reference, vocabulary=VOCABULARY)["passed"]
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the export is not the model: max abs logit difference"):
        verify(folder, config, reference, vocabulary=VOCABULARY)
    assert not json.loads((folder / "export_report.json").read_text())["passed"]


def test_missing_and_left_over_tensors_are_noticed(tmp_path: Path) -> None:
    folder, tensors = tmp_path / "hf", tensors_of(ROUTED)
    export(ROUTED, Tensors(tensors), folder, vocabulary=VOCABULARY)
    reference = reference_logits(ROUTED, Tensors(tensors))
    weights = load_file(folder / "model.safetensors")
    weights["stranger"] = weights.pop("model.norm_f.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing or left over, model\.norm_f\.weight first"):
        verify(folder, ROUTED, reference, vocabulary=VOCABULARY)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        verify(folder, ROUTED, reference, vocabulary=VOCABULARY)


def test_a_routed_model_without_a_vocabulary_is_verified_with_given_modalities(tmp_path: Path) -> None:
    report = round_trip(ROUTED, tmp_path / "hf", vocabulary=None)
    assert report["passed"] and report["modalities in them"] == ["image", "text", "voice"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocabulary"] is None


@pytest.mark.parametrize("config", [HYBRID, ROUTED], ids=["nemotron_h", "polylepis"])
def test_bfloat16_keeps_what_is_small_and_sensitive(config: ModelConfig, tmp_path: Path) -> None:
    report = round_trip(config, tmp_path / "hf", dtype=torch.bfloat16)
    assert report["passed"]  # against our model with the same rounded weights
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    single = {name.split(".mixer.")[-1] for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert {name.split(".")[0] for name in single} == {"A_log", "D", "dt_bias", "gate"}
    assert "gate.e_score_correction_bias" in single and "gate.weight" not in single
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=config is ROUTED)
    assert model.dtype == torch.bfloat16 and model(torch.tensor([[1, 40, 45]])).logits.isfinite().any()


def test_shards_and_their_index(tmp_path: Path) -> None:
    report = round_trip(ROUTED, tmp_path / "hf", max_shard_size="20KB")
    assert report["passed"]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1 and {file.name for file in files} == set(index["weight_map"].values())
    total = 0
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert {name for name, owner in index["weight_map"].items() if owner == file.name} == set(shard.keys())
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())
    assert index["metadata"]["total_size"] == total
    assert parse_size("1.5MB") == 1_500_000
    for wrong in ("2", "GB", "0GB", "-1KB", "2GiB"):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(wrong)


def test_generation_never_emits_the_vocabularys_padding(tmp_path: Path) -> None:
    """The library's classes compute logits for it; its rows may even be the largest."""
    from transformers import AutoModelForCausalLM

    tensors = tensors_of(HYBRID)
    tensors["lm_head.weight"][54:] *= 100
    export(HYBRID, Tensors(tensors), tmp_path / "hf", vocabulary=VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([[1, 40, 41, 42]])
    assert int(model(prompt).logits[0, -1].argmax()) >= 54
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).max() < 54


def test_what_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    tensors, folder = tensors_of(HYBRID), tmp_path / "hf"
    export(HYBRID, Tensors(tensors), folder)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(HYBRID, Tensors(tensors), folder)
    assert (folder / "mine.txt").exists()
    export(HYBRID, Tensors(tensors), folder, force=True)
    assert not (folder / "mine.txt").exists() and os.listdir(tmp_path) == ["hf"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # nobody is locked out of the weights


def test_tensors_and_vocabulary_of_another_model_are_refused(tmp_path: Path) -> None:
    tensors, out = tensors_of(ROUTED), tmp_path / "hf"
    with pytest.raises(
        CheckpointError, match=r"one tensor does not fit \(nothing was written\): layers\.0\.mixer\.D is missing"
    ):
        export(ROUTED, Tensors({n: t for n, t in tensors.items() if n != "layers.0.mixer.D"}), out)
    with pytest.raises(CheckpointError, match="stranger is not of this model"):
        export(ROUTED, Tensors(tensors | {"stranger": tensors["layers.0.mixer.D"]}), out)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight is \(3,\), the model needs \(16,\)"):
        export(ROUTED, Tensors(tensors | {"final_norm.weight": torch.ones(3)}), out)
    with pytest.raises(CheckpointError, match="vocabulary has 55 ids, but the model knows 54"):
        export(ROUTED, Tensors(tensors), out, vocabulary=VOCABULARY | {"sizes": [10, 7, 6]})
    with pytest.raises(CheckpointError, match="modalities are"):
        export(ROUTED, Tensors(tensors), out, vocabulary=VOCABULARY | {"modalities": ["text", "voice", "image"]})
    assert not os.listdir(tmp_path)  # nothing half-written is left behind


def test_transformers_absent_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.14.1")
    with pytest.raises(CheckpointError, match=r"pip install transformers>=5\.15\.1"):
        transformers_module()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install polylepis\[hf\]"):
        transformers_module()


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.startswith("polylepis") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
prompt = torch.tensor([[1, 40, 4, 45, 46]])
print(model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist())
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
loaded = again.state_dict()
assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
torch.testing.assert_close(again(prompt).logits, model(prompt).logits, rtol=1e-5, atol=1e-5)
"""


def test_a_stranger_loads_it_without_our_package_or_a_network(tmp_path: Path) -> None:
    tensors = tensors_of(ROUTED)
    export(ROUTED, Tensors(tensors), tmp_path / "model", vocabulary=VOCABULARY, tokenizer_files=[Path(__file__)])
    assert (tmp_path / "model" / Path(__file__).name).is_file()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "copy")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout.splitlines()[-1])
    logits = reference_logits(ROUTED, Tensors(tensors))
    ids = torch.tensor(tokens[:5])
    for expected in tokens[5:]:
        kinds = torch.tensor([modality_of(int(token), VOCABULARY) for token in ids])
        assert int(logits(ids, kinds)[-1].argmax()) == expected
        ids = torch.cat((ids, torch.tensor([expected])))


def test_probes_span_all_modalities_and_no_whole_number_of_chunks() -> None:
    import random

    for chunk in (1, 2, 3, 8, 64, 128):
        config = small("M", mamba=dataclasses.replace(ONE_GROUP, chunk_size=chunk))
        length = probe_length(config)
        assert length > 2 * chunk and (chunk == 1 or length % chunk)
    tokens, kinds = probe_tokens(ROUTED, VOCABULARY, probe_length(ROUTED), random.Random(0))
    assert set(kinds.tolist()) == {0, 1, 2} and int(tokens.max()) < 54
    assert [modality_of(int(token), VOCABULARY) for token in tokens] == kinds.tolist()
    assert [modality_of(token, VOCABULARY) for token in (0, 3, 4, 7, 8, 31, 32, 41, 42, 49, 53)] == [
        *(0, 0, 1, 2, 0, 0, 0, 0, 1, 2, 2),
    ]
