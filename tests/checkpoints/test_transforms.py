"""Transforms: upcycling keeps the function, selecting a modality undoes it, rules stream and compose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.hf.reference import fill
from polylepis.checkpoints.sharded import model_tensors
from polylepis.checkpoints.transforms import Rule, cast, route_modalities, select_modality, transform
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import HybridModel, ModelConfig
from toys import ALL_ROUTED, toy, toy_batch


def build(config: ModelConfig, seed: int = 1) -> HybridModel:
    return build_model(config, build_mesh(MeshConfig(), "cpu"), seed=seed, dtype=torch.float64)


def tensors_of(model: HybridModel) -> dict[str, Tensor]:
    return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in model_tensors(model).items()}


def losses(model: HybridModel, text_only: bool = False) -> Tensor:
    batch = toy_batch([[13, 1, 9], [20]], 24)
    if text_only:
        batch["modality_ids"].zero_()
    layout = Layout.from_batch(batch, len(model.config.modalities), model.mesh)
    return model(batch["tokens"].reshape(-1), layout, batch["labels"].reshape(-1))


@pytest.mark.parametrize("routed", [ALL_ROUTED, ("z", "dt_bias"), ("out",)], ids=str)
def test_upcycling_keeps_the_function_and_selection_undoes_it(routed: tuple[str, ...]) -> None:
    dense = build(toy("M*-EM", modalities=("text",)))
    config, rules = route_modalities(dense.config, ("text", "image", "voice"), routed)
    upcycled = build(config, seed=2)
    fill(upcycled, dict(transform(rules, tensors_of(dense).items())))
    torch.testing.assert_close(losses(upcycled), losses(dense, text_only=True), rtol=1e-12, atol=1e-12)
    back, inverse = select_modality(config, "text")
    assert back == dense.config
    round_trip = dict(transform(inverse, transform(rules, tensors_of(dense).items())))
    expected = tensors_of(dense)
    assert round_trip.keys() == expected.keys()
    assert all(torch.equal(round_trip[name], expected[name]) for name in expected)


def test_selecting_text_equals_the_routed_model_on_text() -> None:
    routed = build(toy("M-*M", ALL_ROUTED, layers={3: {"routed": ("x", "out"), "d_state": 10}}))
    config, rules = select_modality(routed.config, "text")
    assert config.layers == {3: {"d_state": 10}} and config.modalities == ("text",)
    alone = build(config, seed=2)
    fill(alone, dict(transform(rules, tensors_of(routed).items())))
    torch.testing.assert_close(losses(alone, True), losses(routed, True), rtol=1e-12, atol=1e-12)


def test_cast_keeps_what_is_sensitive() -> None:
    tensors = dict(transform(cast(torch.bfloat16), tensors_of(build(toy("ME", ALL_ROUTED))).items()))
    kept = {name.split("mixer.")[-1] for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert kept == {"A_log", "D", "dt_bias.text", "dt_bias.image", "dt_bias.voice", "selection_bias"}


def test_rules_stream_and_the_first_match_wins() -> None:
    rules = [Rule(r"a\.(\d)", (r"b.\1", r"c.\1"), lambda t: 2 * t), Rule(r"a\..*", ()), Rule("never", ("x",))]
    source = iter([("a.1", torch.ones(1)), ("a.x", torch.ones(1)), ("d", torch.ones(1))])
    stream = transform(rules, source)
    assert next(stream)[0] == "b.1"
    assert len(list(source)) == 2  # nothing beyond the first tensor has been read
    assert [(name, float(t)) for name, t in stream] == [("c.1", 2.0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route_modalities(toy("M", ALL_ROUTED), ("text", "image")), "routed by modality already"),
        (lambda: route_modalities(toy("M", modalities=("text",)), ("image", "text")), "do not extend the model's"),
        (
            lambda: select_modality(toy("M", ALL_ROUTED), "video"),
            "no modality 'video' in the model; it has text, image",
        ),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        call()  # type: ignore[operator]
