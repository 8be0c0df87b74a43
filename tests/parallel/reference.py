"""An independent oracle: the model written naively, document by document, token by token where it matters.

It shares nothing with the system but the names of the logical tensors and the configuration's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polylepis.parallel.model import ModelConfig

Tensors = dict[str, Tensor]


def reference_loss(config: ModelConfig, tensors: Tensors, batch: dict[str, Tensor], total_weight: float) -> Tensor:
    """Σ w·ℓ / W over the documents of a batch, each computed alone."""
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(batch["tokens"].shape[0]):
        docs = batch["doc_ids"][row]
        for doc in sorted(set(docs.tolist()) - {-1}):
            at = (docs == doc).nonzero()[:, 0]
            logits = document_logits(config, tensors, batch["tokens"][row, at], batch["modality_ids"][row, at])
            log_p = logits.log_softmax(dim=-1)
            labels, weights = batch["labels"][row, at], batch["loss_weight"][row, at].double()
            loss = loss - (log_p[torch.arange(len(at)), labels] * weights).sum() / total_weight
    return loss


def document_logits(config: ModelConfig, tensors: Tensors, tokens: Tensor, modality: Tensor) -> Tensor:
    x = tensors["embed.weight"][tokens]
    for index in range(len(config.symbols)):
        kind, layer = config.layer(index)
        prefix = f"layers.{index}."
        own = {n.removeprefix(prefix + "mixer."): t for n, t in tensors.items() if n.startswith(prefix + "mixer.")}
        h = rms(x, tensors[prefix + "norm.weight"], config.norm_eps)
        x = x + {"M": mamba, "*": attention, "-": mlp, "E": moe}[kind.symbol](layer, config, own, h, modality)
    logits = rms(x, tensors["final_norm.weight"], config.norm_eps) @ tensors["lm_head.weight"].T
    return logits[:, : config.vocab_size]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def by_token(own: Tensors, name: str, config: ModelConfig, modality: Tensor, t: int) -> Tensor:
    return own[f"{name}.{config.modalities[int(modality[t])]}"] if name not in own else own[name]


def mamba(layer: Any, config: ModelConfig, own: Tensors, h: Tensor, modality: Tensor) -> Tensor:
    n, heads = h.shape[0], layer.n_heads(config.shape)
    inner, groups = layer.d_inner(config.shape), layer.n_groups

    def projected(name: str, source: Tensor) -> Tensor:
        return torch.stack([by_token(own, name, config, modality, t) @ source[t] for t in range(n)])

    z, x, B, C, dt = (projected(f"in_proj.{p}.weight", h) for p in ("z", "x", "B", "C", "dt"))
    dt = dt + torch.stack([by_token(own, "dt_bias", config, modality, t) for t in range(n)])
    x, B, C = (conv(v, own[f"conv.{p}.weight"], own[f"conv.{p}.bias"]) for p, v in (("x", x), ("B", B), ("C", C)))
    dt, A = (1 + dt.exp()).log(), -own["A_log"].exp()
    state = torch.zeros(heads, layer.head_dim, layer.d_state, dtype=h.dtype)
    outputs = []
    for t in range(n):
        b, c = (v[t].view(groups, -1).repeat_interleave(heads // groups, dim=0) for v in (B, C))
        x_t = x[t].view(heads, -1)
        state = state * (dt[t] * A).exp()[:, None, None] + dt[t][:, None, None] * x_t[:, :, None] * b[:, None, :]
        outputs.append(((state * c[:, None, :]).sum(-1) + own["D"][:, None] * x_t).reshape(-1))
    y = torch.stack(outputs) * z * z.sigmoid()
    y = rms(y.view(n, groups, -1), torch.ones(inner // groups, dtype=h.dtype), config.norm_eps).view(n, -1)
    return projected("out_proj.weight", y * own["norm.weight"])


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width, rows = weight.shape[1], []
    for t in range(x.shape[0]):
        taps = [weight[:, width - 1 - k] * x[t - k] for k in range(width) if t - k >= 0]
        value = torch.stack(taps).sum(0) + bias
        rows.append(value * value.sigmoid())
    return torch.stack(rows)


def attention(layer: Any, config: ModelConfig, own: Tensors, h: Tensor, modality: Tensor) -> Tensor:
    n, repeat = h.shape[0], layer.n_heads // layer.n_kv_heads
    q, k, v = ((h @ own[f"{p}_proj.weight"].T).view(n, -1, layer.head_dim) for p in "qkv")
    if layer.rope_base is not None:
        q, k = (rotated(x, layer.rope_base) for x in (q, k))
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / layer.head_dim**0.5
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1) @ own["o_proj.weight"].T


def rotated(x: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def mlp(layer: Any, config: ModelConfig, own: Tensors, h: Tensor, modality: Tensor) -> Tensor:
    up = h @ own["up_proj.weight"].T
    if layer.activation == "swiglu":
        gate = h @ own["gate_proj.weight"].T
        up = gate * gate.sigmoid() * up
    elif layer.activation == "gelu":
        up = 0.5 * up * (1 + torch.erf(up / 2**0.5))
    else:
        up = up.clamp(min=0) ** 2
    return up @ own["down_proj.weight"].T


def moe(layer: Any, config: ModelConfig, own: Tensors, h: Tensor, modality: Tensor) -> Tensor:
    scores = (h @ own["router.weight"].T).sigmoid()
    rows = []
    for t in range(h.shape[0]):
        biased = (scores[t] + own["selection_bias"].double()).detach()
        chosen = biased.argsort(descending=True)[: layer.top_k].tolist()
        total = sum(scores[t, e] for e in chosen)
        y = torch.zeros_like(h[t])
        for e in chosen:
            up = (own[f"up_proj.weight.experts.{e}"] @ h[t]).clamp(min=0) ** 2
            y = y + scores[t, e] / total * layer.scale * (own[f"down_proj.weight.experts.{e}"] @ up)
        shared = (own["shared.up_proj.weight"] @ h[t]).clamp(min=0) ** 2
        rows.append(y + own["shared.down_proj.weight"] @ shared)
    return torch.stack(rows)
