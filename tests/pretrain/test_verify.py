"""The certificate is worth something: it is given to right plans, and every injected fault loses it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from polylepis.launch.cli import main
from polylepis.parallel import context as context_module
from polylepis.parallel import model as model_module
from polylepis.parallel.engines import pipeline as pipeline_module
from polylepis.parallel.kinds import mamba_context
from polylepis.parallel.layout import Layout
from polylepis.parallel.mesh import ContextConfig, MeshConfig, build_mesh
from polylepis.pretrain import train as train_module
from polylepis.pretrain import verify as verify_module
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.verify import Measurement, certificate, compare, measure, verification
from ranks import forked_workers, run_ranks


def plan(**axes: int) -> RunConfig:
    mesh = MeshConfig(**{"dp_shard": 1, **axes})
    context = ContextConfig(mamba="state", attention="gather")
    config = load_config("quickstart", ["model.pattern=M*-E"])
    return verification(replace(config, mesh=mesh, context=context), mesh.n_processes)


def measured(config: RunConfig, fault: str = "") -> Measurement:
    """One fp64 step, with a fault injected into this rank."""
    inject(fault)
    return measure(config, build_mesh(config.mesh, "cpu", config.context), torch.float64)


def inject(fault: str) -> None:
    """Break one rule of the parallel stack in this process."""
    if fault == "missing Partial":
        original = model_module.local
        model_module.local = lambda parameter, partial=False: original(parameter)  # type: ignore[assignment]
    elif fault in ("wrong divide factor", "averaged reduction"):
        build = train_module.build_model

        def build_faulty(*args: object, **kwargs: object) -> torch.nn.Module:
            model = build(*args, **kwargs)  # type: ignore[arg-type]
            layers = [m for m in model.modules() if isinstance(m, FSDPModule)]
            for module in layers if fault == "averaged reduction" else layers[:1]:
                module.set_gradient_divide_factor(2.0)
            return model

        pipeline_module.build_model = build_faulty  # type: ignore[assignment]
        train_module.build_model = build_faulty  # type: ignore[assignment]
    elif fault == "halo off by one":
        exchange = mamba_context.exchange_halo

        def shifted(x: Tensor, *args: object) -> Tensor:
            return exchange(x, *args).roll(1, dims=1)  # type: ignore[arg-type]

        mamba_context.exchange_halo = shifted  # type: ignore[assignment]
    elif fault == "document reset forgotten":
        cut = context_module.cut

        def forgetful(*args: object) -> context_module.Context:
            result = cut(*args)  # type: ignore[arg-type]
            everything = tuple(True for _ in result.unbroken)
            return replace(result, continues=everything, unbroken=everything, entering=torch.ones_like(result.entering))

        Layout.from_batch.__globals__["cut"] = forgetful
    elif fault == "reversed segments":
        gathered = context_module.Context.gathered_order.fget  # type: ignore[attr-defined]
        context_module.Context.gathered_order = property(lambda self: gathered(self).flip(0))  # type: ignore[method-assign]
    else:
        assert not fault, fault


@pytest.fixture(scope="module")
def expected() -> Callable[[RunConfig], Measurement]:
    """The same step on one process, computed once per configuration."""
    known: dict[str, Measurement] = {}

    def alone(config: RunConfig) -> Measurement:
        single = replace(config, mesh=MeshConfig(dp_shard=1))
        key = repr(single)
        if key not in known:
            (known[key],) = run_ranks(1, measured, single)
        return known[key]

    return alone


FAULTS = [
    ("", {"tp": 2}),
    ("", {"cp": 2}),
    ("", {"dp_shard": 2}),
    ("", {"pp": 2}),
    ("averaged reduction", {"pp": 2, "dp_shard": 2}),
    ("missing Partial", {"tp": 2}),
    ("wrong divide factor", {"dp_shard": 2}),
    ("averaged reduction", {"dp_shard": 2}),
    ("halo off by one", {"cp": 2}),
    ("document reset forgotten", {"cp": 2}),
    ("reversed segments", {"cp": 2}),
]


@pytest.mark.parametrize(("fault", "axes"), FAULTS, ids=[f"{fault or 'none'} {axes}" for fault, axes in FAULTS])
def test_faults_lose_the_certificate(
    fault: str, axes: dict[str, int], expected: Callable[[RunConfig], Measurement]
) -> None:
    config = plan(**axes)
    for result in run_ranks(config.mesh.n_processes, measured, config, fault):
        lines = compare(result, expected(config), torch.float64)
        text = certificate(config, lines)
        if fault:
            assert not all(line.passed for line in lines), text
            assert "NOT EQUAL: do not train on this plan" in text
        else:
            assert all(line.passed for line in lines), text
            assert text.endswith("verdict: equal")


def test_adam_alone_would_have_hidden_an_averaged_reduction(expected: Callable[[RunConfig], Measurement]) -> None:
    """Why gradients are compared and not only the step: Adam's step is scale-free."""
    config = plan(dp_shard=2)
    faulty = run_ranks(2, measured, config, "averaged reduction")[0]
    lines = {line.quantity: line for line in compare(faulty, expected(config), torch.float64)}
    assert lines["gradients"].worst > 0.4
    assert lines["optimizer step"].worst < 0.05


def test_differences_that_cannot_be_ordered_fail() -> None:
    good = Measurement(1.0, 1.0, {"a": torch.ones(2)}, {"a": torch.ones(2)}, {})
    nan = replace(good, gradients={"a": torch.tensor([1.0, math.nan])})
    missing = replace(good, gradients={"a": torch.ones(2), "b": torch.ones(1)})
    for bad, where in ((nan, "a"), (missing, "b")):
        line = compare(bad, good, torch.float64)[2]
        assert line.worst == math.inf and line.where == where and not line.passed


def test_plan_keeps_its_axes() -> None:
    config = load_config("mamba2-hybrid-8b", ["mesh={tp: 4, dp_shard: 64, dp_replicate: 2}"])
    small = verification(config, 512)
    assert small.mesh == MeshConfig(dp_replicate=2, dp_shard=2, tp=4)
    assert small.model.pattern == config.model.pattern and small.model.d_model == 64
    with pytest.raises(ConfigError, match="needs 32 processes on this machine, more than 16; override an axis"):
        verification(load_config("mamba2-hybrid-8b", ["mesh={tp: 8, cp: 4, dp_shard: 1}"]), 32)


@pytest.mark.parametrize("workers", ["forked", pytest.param("started", marks=pytest.mark.full)])
def test_the_command(workers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if workers == "forked":
        monkeypatch.setattr(verify_module, "run_workers", forked_workers)
    assert main(["verify", "quickstart", "mesh={tp: 1, cp: 2, dp_shard: 1}"]) == 0
    output = capsys.readouterr().out
    assert "cp 2 × tp 1" in output and output.strip().endswith("verdict: equal")
    assert output.count(" ok") == 9


def test_the_command_with_stages_and_recompute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts are replayed though the forwards of stages interleave and layers are run again."""
    monkeypatch.setattr(verify_module, "run_workers", forked_workers)
    options = ["mesh={pp: 2, dp_shard: 1}", "model.pattern=ME*E", "pipeline.schedule=interleaved"]
    recompute = "recompute={mamba: full, attention: selective, moe: full}"
    assert main(["verify", "quickstart", *options, recompute]) == 0
    output = capsys.readouterr().out
    assert "plan: pp 2 (interleaved) × " in output and output.strip().endswith("verdict: equal")
    assert output.count(" ok") == 9


@pytest.mark.full
def test_the_8b_recipe_at_tp_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "mamba2-hybrid-8b"]) == 0
    assert "tp 4" in capsys.readouterr().out


def test_an_excess_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = verify_module.Line("float64", "gradients", 1e-3, 1e-9, "layers.0.norm.weight")
    monkeypatch.setattr(verify_module, "verify_config", lambda *args: (plan(tp=2), [line]))
    assert main(["verify", "quickstart"]) == 1
    output = capsys.readouterr().out
    assert "EXCEEDED  layers.0.norm.weight" in output and "NOT EQUAL" in output


def test_deepspeed_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="engine=fsdp2"):
        verification(replace(load_config("quickstart"), engine="deepspeed"), 2)
