"""Configuration of a Polylepis hybrid model. Self-contained: copied into every exported folder."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

SECTIONS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {
        "expand": 2,
        "width": None,
        "d_state": 128,
        "head_dim": 64,
        "n_groups": 8,
        "d_conv": 4,
        "chunk_size": 128,
        "routed": [],
        "a_min": 1.0,
        "a_max": 16.0,
        "dt_min": 1e-3,
        "dt_max": 1e-1,
    },
    "attention": {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "rope_base": None},
    "mlp": {"d_ff": 16384, "activation": "relu2"},
    "moe": {
        "n_experts": 8,
        "top_k": 2,
        "d_ff": 4096,
        "d_ff_shared": 4096,
        "scale": 1.0,
        "activation": "relu2",
        "router": "sigmoid",
        "renormalise": True,
        "n_groups": 1,
        "top_groups": 1,
        "partition": {},
    },
}


class PolylepisConfig(PreTrainedConfig):
    """A stack with one layer per character of `pattern`: M (Mamba-2), * (attention), - (MLP), E (experts).

    Args:
        pattern: one character per layer.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding, padding included.
        used_vocab_size: ids that mean something; the logits of the others are −∞.
        modalities: names of the routed parameters' entries, in bank order; id 0 is the first.
        vocabulary: where each modality's tokens lie: `specials` ids first, then `sizes[k]` ids of modality k in order;
            the special ids 2k+2 and 2k+3 open and close a span of modality k ≥ 1. None: every token is modality 0
            unless `modality_ids` says otherwise.
        mamba, attention, mlp, moe: sizes of each kind of layer (`DEFAULTS` for what is left out).
        layer_overrides: layer number (a string, as in JSON) → changed sizes of that layer.
        norm_eps, initializer_range: of every RMSNorm; standard deviation of fresh weights.

    Raises:
        ValueError: a character that names no layer, or sizes that no layer has.
    """

    model_type = "polylepis"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        pattern: str = "M*-",
        hidden_size: int = 64,
        vocab_size: int = 1024,
        used_vocab_size: int | None = None,
        modalities: list[str] | None = None,
        vocabulary: dict[str, Any] | None = None,
        mamba: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        mlp: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        layer_overrides: dict[str, dict[str, Any]] | None = None,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(set(pattern) - set(SECTIONS))
        if unknown or not pattern:
            raise ValueError(f"pattern {pattern!r}: need one character per layer, out of M * - E; not {unknown}")
        if tie_word_embeddings:
            raise ValueError("Polylepis models do not tie their embeddings")
        self.pattern = pattern
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(pattern)
        self.vocab_size = vocab_size
        self.used_vocab_size = vocab_size if used_vocab_size is None else used_vocab_size
        self.modalities = list(modalities or ["text"])
        self.vocabulary = vocabulary
        given = {"mamba": mamba, "attention": attention, "mlp": mlp, "moe": moe}
        for section, values in given.items():
            unknown = sorted(set(values or {}) - set(DEFAULTS[section]))
            if unknown:
                raise ValueError(f"{section}: unknown sizes {unknown}; it has {sorted(DEFAULTS[section])}")
            setattr(self, section, {**DEFAULTS[section], **(values or {})})
        self.layer_overrides = {str(index): dict(values) for index, values in (layer_overrides or {}).items()}
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=False,
            **kwargs,
        )

    def layer(self, index: int) -> dict[str, Any]:
        """Sizes of layer `index`, its overrides applied."""
        return {**getattr(self, SECTIONS[self.pattern[index]]), **self.layer_overrides.get(str(index), {})}
