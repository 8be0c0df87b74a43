"""Polylepis hybrid models for Hugging Face transformers.

Self-contained (torch, transformers and the two files beside it): copied into every exported folder.
Shapes: b batch, s new tokens, L all tokens so far, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_polylepis import PolylepisConfig
from .layers_polylepis import (
    BackLinear,
    PolylepisAttention,
    PolylepisExperts,
    PolylepisFeedForward,
    PolylepisMamba,
    PolylepisRMSNorm,
    PolylepisRouter,
    compute_dtype,
)


class PolylepisCache:
    """What decoding remembers: a window of inputs and the SSM state of each M, keys and values of each `*`.

    Its size does not grow with the text, but for keys and values.
    """

    is_compileable = False

    def __init__(self, n_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(n_layers)]
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what was row `beam_idx[i]` (beam search)."""
        self.layers = [{n: t.index_select(0, beam_idx.to(t.device)) for n, t in entry.items()} for entry in self.layers]

    def reset(self) -> None:
        self.__init__(len(self.layers))  # type: ignore[misc]


class PolylepisBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x))"""

    def __init__(self, config: PolylepisConfig, index: int) -> None:
        super().__init__()
        self.norm = PolylepisRMSNorm(config.hidden_size, config.norm_eps)
        symbol, sizes = config.pattern[index], config.layer(index)
        if symbol == "M":
            self.mixer: nn.Module = PolylepisMamba(config, index)
        elif symbol == "*":
            self.mixer = PolylepisAttention(config, index)
        elif symbol == "-":
            self.mixer = PolylepisFeedForward(config.hidden_size, sizes["d_ff"], sizes["activation"])
        else:
            self.mixer = PolylepisExperts(config, index)

    def forward(self, x: Tensor, batch: dict[str, Any], cache: dict[str, Tensor] | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), batch, cache)


class PolylepisPreTrainedModel(PreTrainedModel):
    config_class = PolylepisConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PolylepisBlock"]
    _supports_sdpa = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "A_log", "D", "dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh weights as the trainer draws them (the random stream is another)."""
        std = self.config.initializer_range
        if isinstance(module, BackLinear):
            init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))
        elif isinstance(module, nn.Linear | nn.Embedding | PolylepisRouter):
            init.normal_(module.weight, std=std)
        if isinstance(module, PolylepisRouter):
            init.zeros_(module.e_score_correction_bias)
        if isinstance(module, PolylepisRMSNorm):
            init.ones_(module.weight)
        if isinstance(module, PolylepisMamba):
            self._init_mamba(module)

    def _init_mamba(self, mamba: PolylepisMamba) -> None:
        sizes = mamba.sizes
        bound = sizes["d_conv"] ** -0.5
        init.uniform_(mamba.conv1d.weight, -bound, bound)
        init.uniform_(mamba.conv1d.bias, -bound, bound)
        init.ones_(mamba.D)
        uniform = torch.rand_like(mamba.A_log, dtype=torch.float32)
        init.copy_(mamba.A_log, (sizes["a_min"] + uniform * (sizes["a_max"] - sizes["a_min"])).log())
        biases = mamba.dt_bias.values() if isinstance(mamba.dt_bias, nn.ParameterDict) else [mamba.dt_bias]
        for bias in biases:
            uniform = torch.rand_like(bias, dtype=torch.float32)
            dt = (math.log(sizes["dt_min"]) + uniform * math.log(sizes["dt_max"] / sizes["dt_min"])).exp()
            init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))


class PolylepisModel(PolylepisPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: PolylepisConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PolylepisBlock(config, index) for index in range(len(config.pattern))])
        self.norm_f = PolylepisRMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def modality_ids(self, input_ids: Tensor) -> Tensor:
        """The modality of each token, from the vocabulary's ranges; 0 where the configuration has none."""
        result = torch.zeros_like(input_ids)
        vocabulary = self.config.vocabulary
        if vocabulary is None:
            return result
        start = vocabulary["specials"]
        for k, size in enumerate(vocabulary["sizes"]):
            inside = (input_ids >= start) & (input_ids < start + size)
            if k:  # the tokens that open and close a span belong to it
                inside = inside | (input_ids == 2 * k + 2) | (input_ids == 2 * k + 3)
            result = result.masked_fill(inside, k)
            start += size
        return result

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        past_key_values: PolylepisCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [b, s], the new tokens.
            attention_mask: [b, L], 1 for tokens, 0 for padding, those in the cache included.
            position_ids: [b, s]; by default tokens are counted from 0, padding left out.
            modality_ids: [b, s]; by default derived from the vocabulary.
            past_key_values: what the call before returned.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = PolylepisCache(len(self.layers))
        cached = 0 if past_key_values is None else past_key_values.length
        if modality_ids is None:
            modality_ids = self.modality_ids(input_ids)
        batch = self._batch(input_ids, attention_mask, position_ids, cached) | {"modality_ids": modality_ids}
        x = self.embeddings(input_ids)
        states = [x]
        for index, block in enumerate(self.layers):
            x = block(x, batch, None if past_key_values is None else past_key_values.layers[index])
            states.append(x)
        if past_key_values is not None:
            past_key_values.length += input_ids.shape[1]
        x = self.norm_f(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        return BaseModelOutputWithPast(
            last_hidden_state=x, past_key_values=past_key_values, hidden_states=hidden_states
        )

    def _batch(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cached: int
    ) -> dict[str, Any]:
        """What the layers must know: padding [b, s] and who attends to whom [b, 1, s, L] (None: no padding)."""
        b, s = input_ids.shape
        device = input_ids.device
        order = torch.arange(cached + s, device=device)
        padding = attention = None
        if attention_mask is not None and not bool(attention_mask.all()):
            real = attention_mask.to(torch.bool)
            if real.shape != (b, cached + s):
                raise ValueError(f"attention_mask is {tuple(real.shape)}, but {cached} + {s} tokens make {cached + s}")
            padding = ~real[:, cached:]
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, cached:]
        else:
            real = None
            positions = order[cached:].expand(b, s)
        if real is not None or (cached and s > 1):
            past = order <= order[cached:, None]
            itself = order == order[cached:, None]  # padding attends to itself only, so that no row is empty
            attention = (past & (itself | real[:, None, None])) if real is not None else past[None, None]
        return {
            "padding": padding,
            "attention": attention,
            "position_ids": positions if position_ids is None else position_ids,
        }


class PolylepisForCausalLM(PolylepisPreTrainedModel, GenerationMixin):
    """The model with its output projection, which is not tied to the embedding."""

    def __init__(self, config: PolylepisConfig) -> None:
        super().__init__(config)
        self.model = PolylepisModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        past_key_values: PolylepisCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [b, s, V], −∞ for the vocabulary's padding; with labels [b, s] (−100: none) also the mean loss.

        Labels are the tokens themselves, shifted in here. `num_items_in_batch` turns the mean into sum / that number.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            modality_ids=modality_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        used = self.config.used_vocab_size
        if used < logits.shape[-1]:
            unused = torch.arange(logits.shape[-1], device=logits.device) >= used
            logits = logits.masked_fill(unused, -torch.inf)
        loss = None
        if labels is not None:
            wide = logits[:, :-1].to(compute_dtype(logits)).flatten(0, 1)
            items = kwargs.get("num_items_in_batch")
            reduction = "mean" if items is None else "sum"
            loss = F.cross_entropy(wide, labels[:, 1:].flatten().to(wide.device), reduction=reduction)
            loss = loss if items is None else loss / items
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` is to let the first forward make the cache: transformers' own has no place for every pattern."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PolylepisCache | None = None,
        attention_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tokens that are not in the cache yet; modalities given for the prompt, derived for what follows it."""
        modalities = self.model.modality_ids(input_ids)
        if modality_ids is not None:
            known = min(modality_ids.shape[1], modalities.shape[1])
            modalities = torch.cat((modality_ids[:, :known].to(modalities), modalities[:, known:]), dim=1)
        new = slice(0 if past_key_values is None else past_key_values.length, None)
        return {
            "input_ids": input_ids[:, new].contiguous(),
            "modality_ids": modalities[:, new].contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1 if logits_to_keep is None else logits_to_keep,
        }
