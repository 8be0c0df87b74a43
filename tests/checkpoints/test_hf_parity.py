"""What transformers' own classes compute from an export beyond logits: gradients, and batches padded on the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.hf.layout import export_rules
from polylepis.checkpoints.hf.reference import fill, fresh_tensors
from polylepis.checkpoints.hf.targets import CLASSES, Target
from polylepis.checkpoints.transforms import Tensors, Transformed, in_memory
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mamba import MambaConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from polylepis.parallel.parts import named_parts, split_bank
from toys import toy

pytest.importorskip("transformers", minversion="5.23")

EXPERTS = MoEConfig(n_experts=4, top_k=2, d_ff=8, d_ff_shared=12, scale=1.5)
ROPE = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, rope_base=100.0)
ONE_GROUP = MambaConfig(d_state=6, head_dim=4, n_groups=1, chunk_size=8)
SWIGLU = MLPConfig(20, "swiglu")
GRANITE = MoEConfig(5, 2, d_ff=8, d_ff_shared=12, activation="swiglu", router="softmax", bias_update_rate=0.0)
MODELS: dict[str, tuple[Target, ModelConfig]] = {
    "mamba2": ("mamba2", toy("MM", modalities=("text",), mamba=ONE_GROUP)),
    "mamba2 in groups": ("mamba2", toy("MM", modalities=("text",))),
    "nemotron_h": ("nemotron_h", toy("M-M*--ME", modalities=("text",), moe=EXPERTS)),
    "granite": ("granite", toy("M-*-M-", modalities=("text",), mlp=SWIGLU)),
    "granite with experts": ("granite", toy("ME*EME", modalities=("text",), moe=GRANITE)),
    "granite with rope": ("granite", toy("*-M-", modalities=("text",), mlp=SWIGLU, attention=ROPE)),
}
LENGTH = 21  # two chunks of 8 and an odd rest


def theirs(config: ModelConfig, tensors: Tensors, target: Target, folder: Path) -> Any:
    """The export, as transformers' own class opens it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export(config, tensors, folder, target=target))
    assert type(model).__name__ == CLASSES[target] and model.dtype == torch.float32
    return model


def random_tokens(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, 45, (rows, length), generator=torch.Generator().manual_seed(seed))


def our_loss_and_gradients(config: ModelConfig, tensors: Tensors, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the rows, and its gradients by the names of our logical tensors; in float64.

    In float32 ours is itself 1e-5 away from that where a gradient is a small sum of large terms (`A_log`).
    """
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"), dtype=torch.float64)
    fill(model, in_memory(tensors))
    rows, length = tokens.shape
    batch = {
        "modality_ids": torch.zeros_like(tokens),
        "doc_ids": torch.zeros_like(tokens),
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    layout = Layout.from_batch(batch, 1, torch.device("cpu"))
    losses = model(tokens.flatten(), layout, tokens.roll(-1, dims=1).flatten()).view(rows, length)
    loss = losses[:, :-1].sum() / (rows * (length - 1))
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter, part in named_parts(model):
        found.update(split_bank(parameter.grad, part, name))
    return loss.detach().float(), {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_equal_transformers(name: str, tmp_path: Path) -> None:
    """The rules rename, reshape and concatenate, so gradients obey them as weights do."""
    target, config = MODELS[name]
    tensors = fresh_tensors(config, seed=3)
    model = theirs(config, tensors, target, tmp_path / "hf").train()
    tokens = random_tokens(2, LENGTH, 1)
    loss, gradients = our_loss_and_gradients(config, tensors, tokens)
    # Their own `labels=` would count the vocabulary's padding in the softmax, which no token is ever in.
    logits = model(tokens, use_cache=False).logits[:, :-1, : config.vocab_size]
    other = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    other.backward()
    torch.testing.assert_close(other.detach(), loss, rtol=1e-5, atol=0)

    if name == "granite with experts":  # no parameter, and the rules read it beside the router
        gradients |= {n: torch.zeros(5) for n in tensors.specs() if n.endswith("selection_bias")}
    rules = [rule for rule in export_rules(config, target) if set(rule.sources) <= gradients.keys()]
    assert sum(len(rule.sources) for rule in rules) == len(gradients)
    expected = in_memory(Transformed(Tensors(gradients), rules))
    found = on_disk(model, target)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        error = (found[key] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and error <= 1e-5, f"{key}: {error}"


def on_disk(model: Any, target: Target) -> dict[str, Tensor]:
    """Gradients by the names that the class has on disk: NemotronH stacks its experts in memory."""
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        key = name.replace("model.", "backbone.", 1) if target == "nemotron_h" else name
        if ".block_sparse_moe." in name:
            result[granite_on_disk(name)] = parameter.grad
        elif key.endswith((".experts.up_proj", ".experts.down_proj")):
            stem, leaf = key.rsplit(".", 1)
            result |= {f"{stem}.{j}.{leaf}.weight": gradient for j, gradient in enumerate(parameter.grad)}
        else:
            result[key] = parameter.grad
    return result


def granite_on_disk(name: str) -> str:
    name = name.replace("experts.gate_up_proj", "input_linear.weight").replace("router.", "router.layer.")
    return name.replace("experts.down_proj", "output_linear.weight")


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(name: str, tmp_path: Path) -> None:
    """Logits, and cached generation of a padded batch, against each row alone by full recomputation."""
    target, config = MODELS[name]
    model = theirs(config, fresh_tensors(config, seed=3), target, tmp_path / "hf").eval()
    long, short, pad = random_tokens(1, 19, 1), random_tokens(1, 11, 2), 8
    batch = torch.cat((long, torch.cat((torch.zeros(1, pad, dtype=torch.int64), short), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    with torch.no_grad():
        together = model(batch, attention_mask=mask, use_cache=False).logits
        for row, alone in ((together[0], long), (together[1, pad:], short)):
            torch.testing.assert_close(row, model(alone, use_cache=False).logits[0], rtol=0, atol=1e-4)
        greedy = model.generate(batch, attention_mask=mask, max_new_tokens=7, do_sample=False, eos_token_id=None)
        for row, alone in ((greedy[0], long), (greedy[1, pad:], short)):
            for _ in range(7):
                best = model(alone, use_cache=False).logits[:, -1:, : config.vocab_size].argmax(-1)
                alone = torch.cat((alone, best), dim=1)
            assert row.tolist() == alone[0].tolist()
