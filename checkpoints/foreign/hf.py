"""Hugging Face folders: Mamba2, NemotronH, GraniteMoeHybrid and our own exports.

The export's rules are read backwards. What other writers do otherwise (`model.` for `backbone.`, stacked experts, tied
embeddings, Granite's multipliers) is brought into the export's form by rules before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...parallel.kinds.attention import AttentionConfig
from ...parallel.kinds.mamba import MambaConfig
from ...parallel.kinds.mlp import MLPConfig
from ...parallel.kinds.moe import MoEConfig
from ...parallel.model import ModelConfig, config_from_mapping
from ...parallel.pattern import parse_pattern
from ..errors import CheckpointError
from ..hf.layout import imported
from ..hf.targets import Target
from ..maps import Each, Fan, Scale, Unstack
from ..sources import Safetensors, TorchFile
from ..transforms import Rule, Source, Transformed
from .base import SUPPORTED, Foreign, Settings, checked, inner_width, read_json, vocab_multiple

Understood = tuple[ModelConfig, Target, list[Rule], list[str]]
LAYER_TYPES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}


def read(folder: Path) -> Foreign:
    """A folder with `config.json` and weights.

    Raises:
        CheckpointError: not such a folder, or an architecture that our layers cannot express.
    """
    values = read_json(folder / "config.json")
    settings = Settings(folder / "config.json", values)
    kind = values.get("model_type")
    if kind not in READERS:
        raise CheckpointError(f"{settings.where}: model_type {kind!r} is not imported; {SUPPORTED} are")
    weights = open_weights(folder)
    config, target, rules, notes = READERS[kind](settings, weights)
    config = checked(settings, config)
    if settings.get("tie_word_embeddings", default=False):
        tied = {"granite": "model.embed_tokens.weight"}.get(target, "backbone.embeddings.weight")
        rules = [*rules, *_untie(tied, weights, rules)]
        notes.append("embeddings were tied and are not any more: lm_head starts as a copy")
    normalised = Transformed(weights, rules) if rules else weights
    return Foreign(
        config,
        imported(config, target, normalised),
        int(settings.get("max_position_embeddings", default=4096)),
        tuple(notes),
        f"{(values.get('architectures') or [kind])[0]}, {folder.name}",
        values.get("vocabulary"),
        (_token(values, "pad"), _token(values, "bos"), _token(values, "eos")),
    )


def _token(values: Mapping[str, Any], name: str) -> int | None:
    """One of the special ids; of several the first."""
    found = values.get(f"{name}_token_id")
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) else None


def open_weights(folder: Path) -> Source:
    """Safetensors, or else a `pytorch_model.bin` by the restricted unpickler.

    Raises:
        CheckpointError: neither is there.
    """
    if any(folder.glob("*.safetensors")):
        return Safetensors(folder)
    if (folder / "pytorch_model.bin").is_file():
        return TorchFile.open(folder / "pytorch_model.bin")
    raise CheckpointError(f"{folder}: neither *.safetensors nor pytorch_model.bin in it")


def _untie(name: str, weights: Source, rules: list[Rule]) -> list[Rule]:
    if "lm_head.weight" in weights.specs() or any("lm_head.weight" in rule.targets for rule in rules):
        return []
    return [Rule((name,), (name, "lm_head.weight"), Fan((2,)))]


def _vocabulary(settings: Settings) -> dict[str, Any]:
    size = settings.need("vocab_size")
    return {"vocab_size": settings.get("used_vocab_size", default=size), "vocab_multiple": vocab_multiple(size)}


def _plain_time_steps(settings: Settings) -> None:
    """Refuse a clamp on dt: our layers have none, and neither has the training of the published models."""
    low, high = settings.get("time_step_limit", default=(0.0, math.inf))
    high = float(high["__float__"]) if isinstance(high, dict) else float(high)
    if float(low) > 1e-6 or not math.isinf(high):
        raise settings.refuse(f"time_step_limit ({low}, {high}) clamps the time steps")


def _mamba2(settings: Settings, weights: Source) -> Understood:
    settings.only("use_bias", False)
    settings.only("use_conv_bias", True)
    settings.only("hidden_act", "silu", "swish")
    _plain_time_steps(settings)
    d = settings.need("hidden_size")
    heads, head_dim = settings.need("num_heads"), settings.need("head_dim")
    mamba = MambaConfig(
        d_state=settings.need("state_size"),
        head_dim=head_dim,
        n_groups=settings.need("n_groups"),
        d_conv=settings.get("conv_kernel", default=4),
        chunk_size=settings.get("chunk_size", default=256),
        **inner_width(settings, d, heads * head_dim),
    )
    config = ModelConfig(
        pattern="M" * settings.need("num_hidden_layers"),
        d_model=d,
        norm_eps=settings.get("layer_norm_epsilon", default=1e-5),
        init_std=settings.get("initializer_range", default=0.1),
        mamba=mamba,
        **_vocabulary(settings),
    )
    return config, "mamba2", [], []


def _pattern(settings: Settings) -> str:
    pattern = settings.get("hybrid_override_pattern")
    if pattern is not None:
        return parse_pattern(pattern)
    types = settings.need("layers_block_type", "layer_types")
    unknown = sorted(set(types) - LAYER_TYPES.keys())
    if unknown:
        raise settings.refuse(f"layers of type {', '.join(unknown)}")
    return "".join(LAYER_TYPES[kind] for kind in types)


def _nemotron_h(settings: Settings, weights: Source) -> Understood:
    for name in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias"):
        settings.only(name, False)
    settings.only("use_conv_bias", True)
    settings.only("mamba_hidden_act", "silu", "swish")
    settings.only("mlp_hidden_act", "relu2", "gelu")
    settings.only("moe_latent_size", 0, settings.get("hidden_size"))
    settings.only("num_nextn_predict_layers", 0)
    settings.only("sliding_window")
    _plain_time_steps(settings)
    pattern, d = _pattern(settings), settings.need("hidden_size")
    heads, head_dim = settings.need("mamba_num_heads"), settings.need("mamba_head_dim")
    moe = MoEConfig()
    if "E" in pattern:
        settings.only("n_shared_experts", 1)
        moe = MoEConfig(
            n_experts=settings.need("n_routed_experts"),
            top_k=settings.need("num_experts_per_tok"),
            d_ff=settings.need("moe_intermediate_size"),
            d_ff_shared=settings.need("moe_shared_expert_intermediate_size"),
            scale=float(settings.get("routed_scaling_factor", default=1.0)),
            renormalise=settings.get("norm_topk_prob", default=True),
            n_groups=settings.get("n_group", default=1),
            top_groups=settings.get("topk_group", default=1),
        )
        if settings.get("mlp_hidden_act", default="relu2") != "relu2":
            raise settings.refuse("experts are not relu2")
    config = ModelConfig(
        pattern=pattern,
        d_model=d,
        norm_eps=settings.get("layer_norm_epsilon", "rms_norm_eps", default=1e-5),
        init_std=settings.get("initializer_range", default=0.02),
        mamba=MambaConfig(
            d_state=settings.need("ssm_state_size"),
            head_dim=head_dim,
            n_groups=settings.need("n_groups", "mamba_n_groups"),
            d_conv=settings.get("conv_kernel", "mamba_d_conv", default=4),
            chunk_size=settings.get("chunk_size", "mamba_chunk_size", default=128),
            **inner_width(settings, d, heads * head_dim),
        ),
        attention=AttentionConfig(
            settings.need("num_attention_heads"),
            settings.need("num_key_value_heads"),
            settings.need("head_dim", "attention_head_dim"),
        ),
        mlp=MLPConfig(settings.need("intermediate_size"), settings.get("mlp_hidden_act", default="relu2")),
        moe=moe,
        **_vocabulary(settings),
    )
    notes = []
    if settings.get("time_step_min", default=0.0) > 1e-6:
        notes.append(
            f"transformers clamps this model's time steps at {settings.get('time_step_min')}; training did not, we do "
            "not, and an export turns the clamp off"
        )
    return config, "nemotron_h", _as_on_disk(weights, pattern, moe.n_experts), notes


def _as_on_disk(weights: Source, pattern: str, n_experts: int) -> list[Rule]:
    """Names as in memory (`model.`, experts stacked) become names as on disk."""
    names = weights.specs()
    rules = []
    for index in (i for i, symbol in enumerate(pattern) if symbol == "E"):
        for prefix in ("model.", "backbone."):
            for stem in ("up_proj", "down_proj"):
                stacked = f"{prefix}layers.{index}.mixer.experts.{stem}"
                if stacked in names:
                    targets = (f"backbone.layers.{index}.mixer.experts.{j}.{stem}.weight" for j in range(n_experts))
                    rules.append(Rule((stacked,), tuple(targets), Unstack()))
    return [*rules, Rule(("model.{rest*}",), ("backbone.{rest*}",))]


def _granite(settings: Settings, weights: Source) -> Understood:
    """Its multipliers are folded into the weights beside them."""
    settings.only("attention_bias", False)
    settings.only("mamba_proj_bias", False)
    settings.only("mamba_conv_bias", True)
    settings.only("hidden_act", "silu", "swish")
    settings.only("position_embedding_type", "nope", "rope")
    _plain_time_steps(settings)
    types = [LAYER_TYPES.get(kind, "?") for kind in settings.need("layer_types", "layers_block_type")]
    if set(types) - set("M*"):
        raise settings.refuse(f"layers of type {', '.join(sorted(set(settings.need('layer_types'))))}")
    d, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    n_experts = settings.get("num_local_experts", default=0)
    rope = settings.get("rope_parameters", "rope_scaling", default={})
    if settings.get("position_embedding_type") == "rope" and rope.get("rope_type", "default") != "default":
        raise settings.refuse(f"rope_type {rope['rope_type']!r}")
    base = float(settings.get("rope_theta", default=rope.get("rope_theta", 10000.0)))
    inner = settings.get("mamba_expand", default=2) * d
    head_dim = settings.get("mamba_d_head", default="auto")
    attention = AttentionConfig(
        heads,
        settings.get("num_key_value_heads", default=heads),
        settings.get("head_dim", default=d // heads),
        base if settings.get("position_embedding_type") == "rope" else None,
    )
    config = ModelConfig(
        pattern="".join(symbol + ("E" if n_experts else "-") for symbol in types),
        d_model=d,
        norm_eps=settings.get("rms_norm_eps", default=1e-6),
        init_std=settings.get("initializer_range", default=0.02),
        mamba=MambaConfig(
            d_state=settings.need("mamba_d_state"),
            head_dim=inner // settings.need("mamba_n_heads") if head_dim == "auto" else head_dim,
            n_groups=settings.need("mamba_n_groups"),
            d_conv=settings.get("mamba_d_conv", default=4),
            chunk_size=settings.get("mamba_chunk_size", default=256),
            **inner_width(settings, d, inner),
        ),
        attention=attention,
        mlp=MLPConfig(settings.need("shared_intermediate_size"), "swiglu"),
        moe=_granite_experts(settings) if n_experts else MoEConfig(),
        **_vocabulary(settings),
    )
    rules, notes = _multipliers(settings, attention.head_dim, len(types), weights)
    if n_experts:
        notes.append("experts have no selection bias there: model.moe.bias_update_rate is 0, and so is every balancing")
    return config, "granite", [*rules, *GRANITE_IN_MEMORY], notes


GRANITE_IN_MEMORY = tuple(
    Rule((f"{{a*}}.block_sparse_moe.{memory}",), (f"{{a*}}.block_sparse_moe.{disk}.weight",))
    for memory, disk in (
        ("experts.gate_up_proj", "input_linear"),
        ("experts.down_proj", "output_linear"),
        ("router.weight", "router.layer"),
    )
)
"""Names of expert layers as transformers has them in memory become names as on disk."""


def _granite_experts(settings: Settings) -> MoEConfig:
    """The softmax of the chosen logits is a softmax over all that is renormalised."""
    return MoEConfig(
        n_experts=settings.need("num_local_experts"),
        top_k=settings.need("num_experts_per_tok"),
        d_ff=settings.need("intermediate_size"),
        d_ff_shared=settings.need("shared_intermediate_size"),
        activation="swiglu",
        router="softmax",
        bias_update_rate=0.0,
    )


def _multipliers(settings: Settings, head_dim: int, n_layers: int, weights: Source) -> tuple[list[Rule], list[str]]:
    attention = settings.get("attention_multiplier", default=1.0) * head_dim**0.5
    residual = settings.get("residual_multiplier", default=1.0)
    embedding = settings.get("embedding_multiplier", default=1.0)
    head = 1 / settings.get("logits_scaling", default=1.0)
    factors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for i in range(n_layers):
        name = f"model.layers.{i}"
        ends = ("shared_mlp.output_linear", "block_sparse_moe.output_linear", "mamba.out_proj", "self_attn.o_proj")
        factors |= {f"{name}.{end}.weight": residual for end in ends}
        factors[f"{name}.self_attn.q_proj.weight"] = attention
    tied = settings.get("tie_word_embeddings", default=False) and "lm_head.weight" not in weights.specs()
    found = weights.specs()
    stacked = {name: name.replace("output_linear.weight", "experts.down_proj") for name in factors}
    rules = [
        Rule((stacked[n] if stacked[n] in found else n,), (n,), Scale(f))
        for n, f in factors.items()
        if abs(f - 1) > 1e-7
    ]
    folded = "Granite's multipliers are folded into the weights beside them, rounded to their dtype"
    notes = [folded] if rules else []
    if tied:
        scaled = Fan((2,)).then(Each((Scale(embedding), Scale(head))))
        untied = Rule(("model.embed_tokens.weight",), ("model.embed_tokens.weight", "lm_head.weight"), scaled)
        rules = [untied, *(rule for rule in rules if rule.targets[0] not in untied.targets)]
    return rules, notes


def _polylepis(settings: Settings, weights: Source) -> Understood:
    values = settings.values
    known = ("expand", "width", "d_state", "head_dim", "n_groups", "d_conv", "chunk_size", "routed")
    spread = ("a_min", "a_max", "dt_min", "dt_max")
    sections = {name: dict(values.get(name) or {}) for name in ("mamba", "attention", "mlp", "moe")}
    sections["mamba"] = {name: value for name, value in sections["mamba"].items() if name in known + spread}
    try:
        config = config_from_mapping(
            {
                "pattern": values["pattern"],
                "d_model": values["hidden_size"],
                "modalities": values.get("modalities") or ["text"],
                "norm_eps": values.get("norm_eps", 1e-5),
                "init_std": values.get("initializer_range", 0.02),
                "layers": values.get("layer_overrides") or {},
                **sections,
                **_vocabulary(settings),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{settings.where}: not the configuration of an export ({error})") from error
    return config, "polylepis", [], []


def described(folder_config: Mapping[str, Any]) -> tuple[ModelConfig, Target]:
    """The model that a `config.json` describes, and the layout of its files; reads no weights."""
    settings = Settings("config.json", folder_config)
    config, target, _, _ = READERS[folder_config["model_type"]](settings, TorchFile({}))
    return config, target


READERS: Mapping[Any, Callable[[Settings, Source], Understood]] = {
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
    "granitemoehybrid": _granite,
    "polylepis": _polylepis,
}
