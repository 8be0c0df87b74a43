"""`state-spaces/mamba2-*`: `pytorch_model.bin` and a `config.json` in the terms of the package mamba_ssm."""

from __future__ import annotations

from pathlib import Path

from ...parallel.kinds.mamba import MambaConfig
from ...parallel.model import ModelConfig
from ..hf.layout import imported
from ..maps import Fan
from ..transforms import Rule, Source, Transformed
from .base import Foreign, Settings, checked, inner_width, read_json, vocab_multiple
from .hf import open_weights


def read(folder: Path) -> Foreign:
    """A folder of that layout; pure Mamba-2 and Mamba-2 with attention layers.

    Raises:
        CheckpointError: not such a folder, a Mamba-1 model, or settings that our layers cannot express.
    """
    settings = Settings(folder / "config.json", read_json(folder / "config.json"))
    ssm = Settings(f"{settings.where}, ssm_cfg", settings.get("ssm_cfg", default={}))
    if ssm.get("layer", default="Mamba1") != "Mamba2":
        raise settings.refuse(f"ssm_cfg.layer is {ssm.get('layer', default='Mamba1')!r}, not 'Mamba2'")
    settings.only("rms_norm", True)
    for name, value in {"rmsnorm": True, "norm_before_gate": False, "bias": False, "conv_bias": True}.items():
        ssm.only(name, value)
    ssm.only("D_has_hdim", False)
    if settings.get("d_intermediate", default=0):
        raise settings.refuse("d_intermediate > 0: gated MLPs inside of each layer")
    if settings.get("attn_layer_idx"):
        raise settings.refuse("attn_layer_idx: attention layers with convolution and partial rotary embeddings")
    d, layers = settings.need("d_model"), settings.need("n_layer")
    multiple = settings.get("pad_vocab_size_multiple", default=8)
    used = settings.need("vocab_size")
    rows = -(-used // multiple) * multiple
    inner = ssm.get("d_ssm", default=ssm.get("expand", default=2) * d)
    if inner != ssm.get("expand", default=2) * d:
        raise settings.refuse(f"ssm_cfg.d_ssm {inner} leaves a part of the inner width as an MLP")
    config = checked(
        settings,
        ModelConfig(
            pattern="M" * layers,
            d_model=d,
            vocab_size=used,
            vocab_multiple=vocab_multiple(rows) if vocab_multiple(rows) > rows - used else multiple,
            norm_eps=settings.get("norm_epsilon", default=1e-5),
            mamba=MambaConfig(
                d_state=ssm.get("d_state", default=128),
                head_dim=ssm.get("headdim", default=64),
                n_groups=ssm.get("ngroups", default=1),
                d_conv=ssm.get("d_conv", default=4),
                chunk_size=ssm.get("chunk_size", default=256),
                **inner_width(settings, d, inner),
            ),
        ),
    )
    weights = open_weights(folder)
    notes = []
    rules = [Rule(("backbone.embedding.weight",), ("backbone.embeddings.weight",))]
    if settings.get("tie_embeddings", default=True):
        notes.append("embeddings were tied and are not any more: lm_head starts as a copy")
        rules = _untied(weights)
    if settings.get("residual_in_fp32", default=True):
        notes.append("the residual stream was float32 there; here it has the precision of the run")
    return Foreign(
        config, imported(config, "mamba2", Transformed(weights, rules)), 4096, tuple(notes), f"mamba_ssm, {folder.name}"
    )


def _untied(weights: Source) -> list[Rule]:
    """The file holds a tied projection twice, or once."""
    targets = ("backbone.embeddings.weight", "lm_head.weight")
    drop = [Rule(("lm_head.weight",), ())] if "lm_head.weight" in weights.specs() else []
    return [Rule(("backbone.embedding.weight",), targets, Fan((2,))), *drop]
