"""The exported modelling code against the trainer's model, in float64: forward, every gradient, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.hf.layout import export_rules
from polylepis.checkpoints.hf.targets import config_json
from polylepis.checkpoints.sharded import model_tensors
from polylepis.checkpoints.transforms import Tensors, Transformed, in_memory
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.kinds.attention import AttentionConfig
from polylepis.parallel.kinds.mlp import MLPConfig
from polylepis.parallel.kinds.moe import MoEConfig
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig
from polylepis.parallel.parts import named_parts, split_bank
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")

VOCABULARY = {"modalities": ["text", "image", "voice"], "sizes": [10, 7, 5], "specials": 32, "vocab_multiple": 16}
ROPE = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, rope_base=100.0)
PARTITIONED = MoEConfig(
    n_experts=7,
    top_k=2,
    d_ff=10,
    d_ff_shared=12,
    activation="swiglu",
    partition={"text": 2, "image": 1, "voice": 3, "shared": 1},
)
GROUPED = MoEConfig(
    n_experts=6, top_k=2, d_ff=10, d_ff_shared=12, router="softmax", renormalise=False, n_groups=3, top_groups=2
)
MODELS = {
    "everything routed": toy("M*-ME", ALL_ROUTED, vocab_size=54),
    "rope, swiglu": toy("M*-M", ("z", "dt_bias"), vocab_size=54, attention=ROPE, mlp=MLPConfig(20, "swiglu")),
    "gelu, out": toy("M--*", ("out", "B"), vocab_size=54, mlp=MLPConfig(20, "gelu")),
    "nothing routed": toy("ME", (), vocab_size=54, layers={1: {"n_experts": 4, "scale": 0.7}}),
    "partitioned experts, swiglu": toy("M*E", ("z",), vocab_size=54, moe=PARTITIONED),
    "softmax experts in groups": toy("ME", (), vocab_size=54, moe=GROUPED),
    "no mamba": toy("*-", (), vocab_size=54),
}
ROUTED = MODELS["everything routed"]


def trainer(config: ModelConfig) -> HybridModel:
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"), dtype=torch.float64)
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
    return model


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def exported(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (or gradients) under their exported names, nothing rounded."""
    rules = [rule for rule in export_rules(config, "polylepis") if set(rule.sources) <= tensors.keys()]
    return in_memory(Transformed(Tensors(tensors), rules))


def hf_config(config: ModelConfig, vocabulary: dict[str, Any] | None = VOCABULARY) -> Any:
    from polylepis.checkpoints.hf.configuration_polylepis import PolylepisConfig

    return PolylepisConfig(**config_json(config, "polylepis", vocabulary, torch.float64, 64))


def translate(config: ModelConfig, model: HybridModel, vocabulary: dict[str, Any] | None = VOCABULARY) -> Any:
    from polylepis.checkpoints.hf.modeling_polylepis import PolylepisForCausalLM

    other = PolylepisForCausalLM(hf_config(config, vocabulary)).double()
    other.load_state_dict(exported(config, whole(model_tensors(model))))
    return other.eval()


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 54, (rows, length), generator=torch.Generator().manual_seed(seed))


def modalities(tokens: Tensor) -> Tensor:
    """Written out, from the vocabulary's table."""
    table = torch.zeros(64, dtype=torch.int64)
    table[[4, 5]], table[42:49] = 1, 1
    table[[6, 7]], table[49:54] = 2, 2
    return table[tokens]


def loss_of(model: HybridModel, tokens: Tensor) -> Tensor:
    rows, length = tokens.shape
    batch = {
        "modality_ids": modalities(tokens),
        "doc_ids": torch.zeros(rows, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    layout = Layout.from_batch(batch, 3, torch.device("cpu"))
    losses = model(tokens.flatten(), layout, tokens.roll(-1, dims=1).flatten()).view(rows, length)
    return losses[:, :-1].sum() / (rows * (length - 1))


def gradients(model: HybridModel) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, parameter, part in named_parts(model):
        result.update(split_bank(parameter.grad, part, name))
    return whole(result)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_equal_the_trainers(name: str) -> None:
    config = MODELS[name]
    ours = trainer(config)
    theirs = translate(config, ours).train()
    tokens = random_tokens(2, 21)
    loss = loss_of(ours, tokens)
    loss.backward()
    output = theirs(tokens, labels=tokens)
    output.loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    expected = exported(config, gradients(ours))
    found = dict(theirs.named_parameters())
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        error = (found[key].grad - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= 1e-9, f"{key}: {error}"


def test_an_absent_modality_has_a_gradient_of_zero() -> None:
    theirs = translate(ROUTED, trainer(ROUTED)).train()
    tokens = random_tokens(1, 12) % 10 + 32  # text only
    theirs(tokens, labels=tokens).loss.backward()
    mixer = theirs.model.layers[0].mixer
    for parameter in (mixer.in_proj["z"]["image"].weight, mixer.out_proj["voice"].weight, mixer.dt_bias["image"]):
        assert parameter.grad is not None and parameter.grad.abs().max() == 0
    assert mixer.in_proj["z"]["text"].weight.grad.abs().max() > 0


def test_padding_of_the_vocabulary_is_never_predicted() -> None:
    logits = translate(ROUTED, trainer(ROUTED))(random_tokens(1, 5)).logits
    assert logits.shape[-1] == 64
    assert torch.isneginf(logits[..., 54:]).all() and logits[..., :54].isfinite().all()


@pytest.mark.parametrize("name", ["everything routed", "rope, swiglu"])
def test_pieces_through_the_cache_equal_the_whole(name: str) -> None:
    model = translate(MODELS[name], trainer(MODELS[name]))
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache, found = None, []
        for piece in tokens.split([19, 1, 1, 2, 7], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["everything routed", "rope, swiglu"])
def test_left_padding_changes_nothing(name: str) -> None:
    model = translate(MODELS[name], trainer(MODELS[name]))
    long, short = random_tokens(1, 19, 1), random_tokens(1, 11, 2)
    padded = torch.cat((torch.full((1, 8), 40), short), dim=1)
    batch, mask = torch.cat((long, padded)), torch.ones(2, 19, dtype=torch.int64)
    mask[1, :8] = 0
    with torch.no_grad():
        together = model(batch, attention_mask=mask).logits
        for row, alone in ((together[0], long), (together[1, 8:], short)):
            torch.testing.assert_close(row, model(alone).logits[0], rtol=0, atol=1e-11)
    greedy = model.generate(batch, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    for row, alone in ((greedy[0], long), (greedy[1, 8:], short)):
        assert row.tolist() == naive(model, alone, 9)


def naive(model: Any, tokens: Tensor, new: int, kinds: Tensor | None = None) -> list[int]:
    """Greedy decoding by full recomputation, modalities written out."""
    kinds = modalities(tokens) if kinds is None else kinds
    with torch.no_grad():
        for _ in range(new):
            logits = model(tokens, modality_ids=kinds, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
            kinds = torch.cat((kinds, modalities(tokens[:, -1:])), dim=1)
    return tokens[0].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_recomputation(name: str) -> None:
    model = translate(MODELS[name], trainer(MODELS[name]))
    prompt = random_tokens(1, 13)
    model.generation_config.eos_token_id = None
    for use_cache in (True, False):
        found = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert found[0].tolist() == naive(model, prompt, 12)


def test_given_modalities_win_over_the_vocabulary() -> None:
    model = translate(ROUTED, trainer(ROUTED))
    prompt = random_tokens(1, 13)
    kinds = (modalities(prompt) + 1) % 3
    model.generation_config.eos_token_id = None
    expected = naive(model, prompt, 12, kinds)
    for use_cache in (True, False):
        found = model.generate(prompt, modality_ids=kinds, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert found[0].tolist() == expected
    assert expected != naive(model, prompt, 12)


def test_beam_search_with_the_cache_equals_without() -> None:
    model = translate(ROUTED, trainer(ROUTED))
    prompt = random_tokens(2, 9)
    beams = [
        model.generate(prompt, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use).tolist()
        for use in (True, False)
    ]
    assert beams[0] == beams[1]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = random_tokens(1, 12)
    found = []
    for checkpointed in (False, True):
        model = translate(ROUTED, trainer(ROUTED)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_hidden_states_tuples_and_summed_losses() -> None:
    model = translate(ROUTED, trainer(ROUTED))
    tokens = random_tokens(2, 7)
    output = model(tokens, labels=tokens, output_hidden_states=True)
    assert len(output.hidden_states) == len(ROUTED.symbols) + 1
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1])[..., :54], output.logits[..., :54])
    assert model(tokens, return_dict=False)[0].shape == (2, 7, 64)
    summed = model(tokens, labels=tokens, num_items_in_batch=5).loss
    torch.testing.assert_close(summed, output.loss * 12 / 5)
    assert model(tokens, logits_to_keep=1).logits.shape == (2, 1, 64)


def test_a_mask_of_another_length_is_refused() -> None:
    model = translate(ROUTED, trainer(ROUTED))
    with pytest.raises(ValueError, match="attention_mask is"):
        model(random_tokens(1, 7), attention_mask=torch.tensor([[0, 1, 1]]))


def test_save_and_load_round_trip(tmp_path: Any) -> None:
    from polylepis.checkpoints.hf.modeling_polylepis import PolylepisForCausalLM

    model = translate(ROUTED, trainer(ROUTED)).float()
    tokens = random_tokens(1, 19)
    model.save_pretrained(tmp_path / "a")
    again = PolylepisForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    # transformers 5.24 leaves weights where they lie in the file: other alignment, other last bits of a product
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    half = PolylepisForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    kept = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert {name.rsplit(".mixer.")[-1].split(".")[0] for name in kept} == {"A_log", "D", "dt_bias", "gate"}
    assert not any(name.endswith("gate.weight") for name in kept)
    output = half(tokens, labels=tokens)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits - model(tokens).logits)[..., :54].abs().max() < 0.3
    half.save_pretrained(tmp_path / "b")
    third = PolylepisForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert third.config.modalities == ["text", "image", "voice"]
    for name, tensor in half.state_dict().items():
        assert torch.equal(third.state_dict()[name], tensor), name
        assert third.state_dict()[name].dtype == tensor.dtype, name


def test_fresh_weights_start_as_the_trainers() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from polylepis.checkpoints.hf.register import register

    register()
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(ROUTED))
    assert type(AutoModel.from_config(hf_config(ROUTED))).__name__ == "PolylepisModel"
    assert AutoConfig.for_model("polylepis").model_type == "polylepis"
    ours = exported(ROUTED, whole(model_tensors(trainer(ROUTED))))
    for name, tensor in model.state_dict().items():
        assert tensor.shape == ours[name].shape
        if name.endswith("e_score_correction_bias"):
            assert not tensor.any()
        elif name.endswith("A_log"):
            assert 1 <= tensor.exp().min() < tensor.exp().max() <= 16
        elif "dt_bias" in name:
            dt = torch.nn.functional.softplus(tensor)
            assert 0.99e-3 <= dt.min() < dt.max() <= 1.01e-1
        elif tensor.numel() < 100 or not ours[name].std():
            assert abs(tensor.double().mean() - ours[name].mean()) <= 1.5 * ours[name].std(), name
        else:
            assert 0.7 <= tensor.double().std() / ours[name].std() <= 1.4, name


def test_the_configuration_refuses_what_it_does_not_know() -> None:
    from polylepis.checkpoints.hf.configuration_polylepis import PolylepisConfig

    with pytest.raises(ValueError, match="one character per layer"):
        PolylepisConfig(pattern="MX")
    with pytest.raises(ValueError, match="unknown sizes"):
        PolylepisConfig(pattern="M", mamba={"state": 3})
    with pytest.raises(ValueError, match="do not tie"):
        PolylepisConfig(pattern="M", tie_word_embeddings=True)
