"""The pattern grammar, the published strings, parameter counts."""

from __future__ import annotations

import pytest

from polylepis.parallel.errors import PlanError
from polylepis.parallel.model import count_parameters, flops_per_token
from polylepis.parallel.pattern import parse_pattern, pattern_from_ratios
from polylepis.pretrain.config import load_config, recipe_names

HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
HYBRID_800M = "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"


def test_published_patterns_character_for_character() -> None:
    assert pattern_from_ratios(56, 4 / 56, 0.5) == HYBRID_8B
    assert pattern_from_ratios(48, 0.08, 0.5) == HYBRID_800M
    assert load_config("mamba2-hybrid-8b").model.pattern == HYBRID_8B
    assert load_config("mamba2-hybrid-800m").model.pattern == HYBRID_800M


@pytest.mark.parametrize(
    ("layers", "attention", "mlp"), [(1, 0, 0), (10, 1, 0), (10, 0, 1), (7, 0.3, 0.3), (12, 0, 0.5)]
)
def test_ratios_give_the_counts_asked_for(layers: int, attention: float, mlp: float) -> None:
    pattern = pattern_from_ratios(layers, attention, mlp)
    assert len(pattern) == layers
    assert pattern.count("*") == round(layers * attention)
    assert pattern.count("-") == round(layers * mlp)


@pytest.mark.parametrize("bad", ["MX", "M M", "", "|", "M/M"])
def test_refused_patterns(bad: str) -> None:
    with pytest.raises(PlanError, match=r"model\.pattern"):
        parse_pattern(bad)


def test_refused_ratios() -> None:
    with pytest.raises(PlanError, match="8 attention and 8 MLP layers do not fit into 10"):
        pattern_from_ratios(10, 0.8, 0.8)


def closed_form(name: str) -> int:
    """Parameters from the sizes alone, written out independently of the registry."""
    model = load_config(name).model
    d, m, vocab = model.d_model, model.mamba, -(-model.vocab_size // 1024) * 1024
    inner = m.expand * d
    heads, bc, copies = inner // m.head_dim, m.n_groups * m.d_state, len(model.modalities) if m.routed else 1
    mamba = copies * (d * (2 * inner + 2 * bc + heads) + heads + inner * d)
    mamba += (m.d_conv + 1) * (inner + 2 * bc) + 2 * heads + inner
    a = model.attention
    attention = 2 * d * a.head_dim * (a.n_heads + a.n_kv_heads)
    mlp = 2 * d * model.mlp.d_ff
    e = model.moe
    moe = d * e.n_experts + 2 * d * (e.n_experts * e.d_ff + e.d_ff_shared)
    per_kind = {"M": mamba, "*": attention, "-": mlp, "E": moe}
    return 2 * vocab * d + d + sum(per_kind[symbol] + d for symbol in model.symbols)


def test_hybrid_8b_has_the_published_size() -> None:
    assert count_parameters(load_config("mamba2-hybrid-8b").model) == 8_654_517_248


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_the_closed_form_size(name: str) -> None:
    assert count_parameters(load_config(name).model) == closed_form(name)


def test_routing_adds_parameters_but_no_flops() -> None:
    routed = load_config("mixture-of-mamba-94m").model
    dense = load_config("mixture-of-mamba-94m", ["model.mamba.routed=[]"]).model
    shared = sum(part.numel for part in dense.parts().values())
    copies = sum(part.numel * 2 // 3 for part in routed.parts().values() if part.entries)
    assert copies > 0 and count_parameters(routed) == shared + copies
    assert flops_per_token(routed, 100) == flops_per_token(dense, 100)
