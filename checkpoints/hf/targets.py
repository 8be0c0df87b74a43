"""Which Hugging Face class can hold a model, and its `config.json`.

Two library classes hold most un-routed models; what they cannot hold goes to our own class, whose code travels with
the weights. Reasons for each refusal were measured with transformers 5.15.1 and 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch

from ...parallel.kinds import KINDS
from ...parallel.model import ModelConfig
from ..errors import CheckpointError

Target = Literal["mamba2", "nemotron_h", "granite", "polylepis"]
TARGETS: tuple[Target, ...] = get_args(Target)  # in order of preference
CLASSES: Mapping[Target, str] = {
    "mamba2": "Mamba2ForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "granite": "GraniteMoeHybridForCausalLM",
    "polylepis": "PolylepisForCausalLM",
}
PAD, BOS, EOS = 0, 1, 2
TRAINING_ONLY = ("bias_update_rate", "aux_sequence", "aux_global", "z_loss", "capacity_factor")
# How tokens choose experts: NemotronH has one such router for the whole model.
ROUTER = ("router", "renormalise", "n_groups", "top_groups", "partition", "activation")
# What the library classes have once for the whole model. Tiling and initial values are not among it.
SIZES: Mapping[str, tuple[str, ...]] = {
    "M": ("expand", "width", "d_state", "head_dim", "n_groups", "d_conv"),
    "*": ("n_heads", "n_kv_heads", "head_dim", "rope_base"),
    "-": ("d_ff", "activation"),
    "E": ("n_experts", "top_k", "d_ff", "d_ff_shared", "scale", *ROUTER),
}


def choose_target(config: ModelConfig, wanted: str | None = None) -> Target:
    """The class to export to: `wanted`, or the first that can hold the model.

    Raises:
        CheckpointError: `wanted` is unknown or cannot hold the model; says why, and which can.
    """
    nearest = next(t for t in TARGETS if refusal(config, t) is None)
    if wanted is None:
        return nearest
    for target in TARGETS:
        if target == wanted:
            reason = refusal(config, target)
            if reason is not None:
                raise CheckpointError(
                    f"{CLASSES[target]} cannot hold this model: {reason}; the nearest that can is {CLASSES[nearest]} "
                    f"(--target {nearest})"
                )
            return target
    raise CheckpointError(f"unknown target {wanted!r}; accepted are {', '.join(TARGETS)}")


def refusal(config: ModelConfig, target: Target) -> str | None:
    """Why `target` cannot hold the model, or None."""
    if target == "polylepis":
        return None
    reason = {"mamba2": _not_mamba2, "nemotron_h": _not_nemotron_h, "granite": _not_granite}[target](config)
    return _routed(config) or reason or _not_uniform(config)


def _layers(config: ModelConfig) -> Iterator[tuple[int, str, Any]]:
    for index, symbol in enumerate(config.symbols):
        yield index, symbol, config.layer(index)[1]


def _not_mamba2(config: ModelConfig) -> str | None:
    if set(config.symbols) != {"M"}:
        return f"the pattern {config.symbols} has layers other than M"
    return _uneven_width(config)


def _uneven_width(config: ModelConfig) -> str | None:
    for index, symbol, layer in _layers(config):
        if symbol == "M" and layer.d_inner(config.shape) % config.d_model:
            inner = layer.d_inner(config.shape)
            return f"layer {index} has the inner width {inner}, not a multiple of d_model {config.d_model}"
    return None


def _not_nemotron_h(config: ModelConfig) -> str | None:
    symbols = config.symbols
    if "*" not in symbols:
        return f"its cache counts tokens in a * layer, and the pattern {symbols} has none"
    activations = set()
    for index, symbol, layer in _layers(config):
        if symbol == "*" and layer.rope_base is not None:
            return f"layer {index} has rotary embeddings"
        if symbol == "-" and layer.activation == "swiglu":
            return f"layer {index} is a swiglu MLP"
        if symbol == "-":
            activations.add(layer.activation)
        if symbol == "E" and (layer.n_experts < 2 or layer.d_ff_shared < 1):
            return f"layer {index} has {layer.n_experts} experts and a shared one of width {layer.d_ff_shared}"
        if symbol == "E" and (layer.router != "sigmoid" or layer.partition or layer.activation != "relu2"):
            kinds = (
                "partitioned by modality" if layer.partition else f"{layer.activation} under a {layer.router} router"
            )
            return f"layer {index} has experts that are {kinds}; its own are relu2 under one sigmoid router"
        if symbol == "E" and (reason := _uneven_experts(config, index, layer)):
            return reason
    if "E" in symbols and activations - {"relu2"}:
        return f"it has one activation for MLPs ({', '.join(sorted(activations))}) and experts (relu2)"
    return None


def _uneven_experts(config: ModelConfig, index: int, layer: Any) -> str | None:
    if layer.d_ff % 8 or config.d_model % 8:
        return f"layer {index} has experts of {config.d_model} × {layer.d_ff}; its grouped GEMM needs multiples of 8"
    return None


def _not_granite(config: ModelConfig) -> str | None:
    symbols = config.symbols
    if len(symbols) % 2 or set(symbols[::2]) - set("M*") or set(symbols[1::2]) - set("-E"):
        return f"each of its layers is M or * and then - or E, and the pattern {symbols} is not made of such pairs"
    if len(set(symbols[1::2])) > 1:
        return f"all of its layers have experts or none has, and the pattern {symbols} has both - and E"
    if "*" not in symbols:
        return f"its cache counts tokens in a * layer, and the pattern {symbols} has none"
    for index, symbol, layer in _layers(config):
        if symbol == "-" and layer.activation != "swiglu":
            return f"layer {index} is a {layer.activation} MLP, and its own are swiglu"
        if symbol == "E" and (reason := _not_granite_experts(layer)):
            return f"layer {index} {reason}"
        if symbol == "E" and (reason := _uneven_experts(config, index, layer)):
            return reason
    return _uneven_width(config)


def _not_granite_experts(layer: Any) -> str | None:
    """Its router takes the softmax of the chosen logits, which is a softmax over all that is renormalised."""
    if layer.partition:
        return "has experts that are partitioned by modality"
    if layer.activation != "swiglu" or layer.router != "softmax":
        return f"has experts that are {layer.activation} under a {layer.router} router; its own are swiglu, softmax"
    if not layer.renormalise or layer.scale != 1:
        total = f"sum to {layer.scale:g}" if layer.renormalise else "are not renormalised"
        return f"has expert weights that {total}; its own sum to 1"
    if layer.n_groups > 1:
        return f"chooses experts in {layer.n_groups} groups, which its router does not"
    if layer.d_ff_shared < 1:
        return "has no shared expert, and its layers always have one"
    if layer.bias_update_rate:
        return f"balances experts by a selection bias (bias_update_rate {layer.bias_update_rate:g}), which it has not"
    return None


def _routed(config: ModelConfig) -> str | None:
    for index, symbol, layer in _layers(config):
        if symbol == "M" and layer.routed:
            return f"layer {index} routes {', '.join(layer.routed)} by modality"
    return None


def _not_uniform(config: ModelConfig) -> str | None:
    """What no library class can hold: layers of one kind that differ."""
    sizes: dict[str, tuple[int, tuple[Any, ...]]] = {}
    for index, symbol, layer in _layers(config):
        values = tuple(getattr(layer, name) for name in SIZES[symbol])
        first, known = sizes.setdefault(symbol, (index, values))
        if known != values:
            return f"layers {first} and {index}, both {symbol}, differ in size"
    return None


def caution(config: ModelConfig, target: Target) -> str | None:
    """What a user of this export must know about other software, or None."""
    groups = max((config.layer(i)[1].n_groups for i, symbol in enumerate(config.symbols) if symbol == "M"), default=1)
    if target == "mamba2" and groups > 1:
        return (
            f"transformers up to 5.21.1 normalises all {groups} groups of a Mamba2ForCausalLM at once, which is "
            f"silently wrong; 5.23 is right"
        )
    if target == "nemotron_h" and "gelu" in {layer.activation for _, symbol, layer in _layers(config) if symbol == "-"}:
        return "vLLM's NemotronH computes relu2 whatever mlp_hidden_act says (here gelu); transformers is right"
    if target == "granite":
        attention = first_layer(config, "*")
        if attention.n_heads * attention.head_dim != config.d_model:
            return f"vLLM takes {config.d_model} / {attention.n_heads} as head_dim, not {attention.head_dim}"
    return None


def config_json(
    config: ModelConfig, target: Target, vocabulary: Mapping[str, Any] | None, dtype: torch.dtype, context: int
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        config: a model that `target` can hold.
        vocabulary: ranges of the modalities (`Vocabulary.to_json`), or None.
        dtype: of the stored weights.
        context: the sequence length of training, for those who ask.
    """
    common = {
        "architectures": [CLASSES[target]],
        "model_type": "granitemoehybrid" if target == "granite" else target,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.padded_vocab,
        "used_vocab_size": config.vocab_size,
        "vocabulary": None if vocabulary is None else dict(vocabulary),
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.symbols),
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    builders = {"mamba2": _mamba2, "nemotron_h": _nemotron_h, "granite": _granite, "polylepis": _polylepis}
    return common | builders[target](config, context)


def first_layer(config: ModelConfig, symbol: str) -> Any:
    """Configuration of the first layer of a kind, its defaults where the pattern has none."""
    index = config.symbols.find(symbol)
    return getattr(config, KINDS[symbol].section) if index < 0 else config.layer(index)[1]


def _expand(config: ModelConfig) -> int:
    """Inner width over d_model, which only NemotronH does not need to be whole (it multiplies heads and head_dim)."""
    return max(1, first_layer(config, "M").d_inner(config.shape) // config.d_model)


def _mamba2(config: ModelConfig, context: int) -> dict[str, Any]:
    mamba = first_layer(config, "M")
    return {
        "state_size": mamba.d_state,
        "num_heads": mamba.n_heads(config.shape),
        "head_dim": mamba.head_dim,
        "n_groups": mamba.n_groups,
        "expand": _expand(config),
        "conv_kernel": mamba.d_conv,
        "chunk_size": mamba.chunk_size,
        "use_conv_bias": True,
        "use_bias": False,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "max_position_embeddings": context,
    }


def _nemotron_h(config: ModelConfig, context: int) -> dict[str, Any]:
    """Aliases and legacy names: NVIDIA's own code, vLLM, SGLang and every transformers since 5.6 read this."""
    mamba, attention = first_layer(config, "M"), first_layer(config, "*")
    mlp, moe = first_layer(config, "-"), first_layer(config, "E")
    result = {
        "hybrid_override_pattern": config.symbols,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_head_dim": attention.head_dim,
        "attention_bias": False,
        "intermediate_size": mlp.d_ff,
        "mlp_hidden_act": mlp.activation if "-" in config.symbols else "relu2",
        "mlp_bias": False,
        "use_bias": False,
        "ssm_state_size": mamba.d_state,
        "mamba_num_heads": mamba.n_heads(config.shape),
        "mamba_head_dim": mamba.head_dim,
        "n_groups": mamba.n_groups,
        "mamba_n_groups": mamba.n_groups,
        "conv_kernel": mamba.d_conv,
        "mamba_d_conv": mamba.d_conv,
        "expand": _expand(config),
        "mamba_expand": _expand(config),
        "chunk_size": mamba.chunk_size,
        "mamba_chunk_size": mamba.chunk_size,
        "use_conv_bias": True,
        "mamba_hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "rms_norm_eps": config.norm_eps,
        # NemotronH clamps dt from below at time_step_min, we do not; 0 would fail where it takes the logarithm.
        "time_step_min": 1e-30,
        "time_step_max": mamba.dt_max,
        "time_step_floor": 1e-4,
        "rescale_prenorm_residual": False,
        "residual_in_fp32": False,
        "max_position_embeddings": context,
    }
    if "E" in config.symbols:
        result |= {
            "n_routed_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_ff,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": moe.d_ff_shared,
            "routed_scaling_factor": moe.scale,
            "norm_topk_prob": moe.renormalise,
            "n_group": moe.n_groups,
            "topk_group": moe.top_groups,
        }
    return result


def _granite(config: ModelConfig, context: int) -> dict[str, Any]:
    """Its multipliers at 1, but for the one that scales attention. Layer types by their older names, as vLLM reads."""
    mamba, attention, mlp, moe = (first_layer(config, symbol) for symbol in "M*-E")
    experts = "E" in config.symbols
    names = {"M": "mamba", "*": "attention"}
    result = {
        "num_hidden_layers": len(config.symbols) // 2,
        "layer_types": [names[symbol] for symbol in config.symbols[::2]],
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": attention.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "position_embedding_type": "nope" if attention.rope_base is None else "rope",
        "num_local_experts": moe.n_experts if experts else 0,
        "num_experts_per_tok": moe.top_k if experts else 0,
        "intermediate_size": moe.d_ff if experts else mlp.d_ff,
        "shared_intermediate_size": moe.d_ff_shared if experts else mlp.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "mamba_n_heads": mamba.n_heads(config.shape),
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.n_groups,
        "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv,
        "mamba_expand": _expand(config),
        "mamba_chunk_size": mamba.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "max_position_embeddings": context,
    }
    if attention.rope_base is not None:
        base = attention.rope_base
        result |= {"rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base}}
    return result


def _polylepis(config: ModelConfig, context: int) -> dict[str, Any]:
    def inference(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in TRAINING_ONLY}

    sections = ("mamba", "attention", "mlp", "moe")
    sizes = {section: inference(dataclasses.asdict(getattr(config, section))) for section in sections}
    overrides = {str(index): inference(values) for index, values in sorted(config.layers.items())}
    code = "modeling_polylepis"
    return {
        "auto_map": {
            "AutoConfig": "configuration_polylepis.PolylepisConfig",
            "AutoModel": f"{code}.PolylepisModel",
            "AutoModelForCausalLM": f"{code}.PolylepisForCausalLM",
        },
        "pattern": config.symbols,
        "modalities": list(config.modalities),
        "norm_eps": config.norm_eps,
        **sizes,
        "layer_overrides": overrides,
        "max_position_embeddings": context,
    }
