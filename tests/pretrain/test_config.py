"""Configuration: strict, one line per mistake, every recipe valid, round trips."""

from __future__ import annotations

from pathlib import Path

import pytest

from polylepis.parallel.mesh import MeshConfig
from polylepis.pretrain.config import differing_keys, load_config, recipe_names, to_yaml
from polylepis.pretrain.errors import ConfigError
from polylepis.pretrain.optim import OptimConfig
from polylepis.pretrain.shrink import shrink


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    config.model.check(config.mesh.tp)
    config.optim.check()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config
    assert load_config(str(tmp_path)) == config  # a run folder


@pytest.mark.parametrize("name", recipe_names())
def test_shrunk_recipes_keep_their_structure(name: str) -> None:
    full, small = load_config(name), shrink(load_config(name))
    small.model.check(small.mesh.tp)
    assert small.model.pattern == full.model.pattern
    assert small.model.mamba.routed == full.model.mamba.routed
    assert small.model.mamba.n_groups == full.model.mamba.n_groups
    assert small.model.attention.n_heads == full.model.attention.n_heads
    assert small.model.mlp.activation == full.model.mlp.activation
    assert small.model.modalities == full.model.modalities


def test_overrides() -> None:
    config = load_config("quickstart", ["train.steps=7", "mesh.tp=1", "model.mamba.routed=[z, out]", "name=other"])
    assert (config.train.steps, config.mesh, config.name) == (7, MeshConfig(dp_shard=1), "other")
    assert config.model.mamba.routed == ("z", "out")
    layered = load_config("quickstart", ["model.layers.0={d_state: 8}"])
    assert layered.model.layers == {0: {"d_state": 8}}


MISTAKES = {
    "train.stepz=3": "train.stepz: unknown key; nearest is steps (command line)",
    "model.mamba.d_stat=3": "model.mamba.d_stat: unknown key; nearest is d_state (command line)",
    "train.steps=ten": "train.steps: input should be a valid integer, not 'ten' (command line)",
    "model.mlp.activation=relu": "model.mlp.activation: input should be 'relu2', 'gelu' or 'swiglu', not 'relu'",
    "data.sources.web={pathh: x}": "data.sources.web.pathh: unknown key; nearest is path (command line)",
    "data.stages=[{stepz: 3}]": "data.stages.0.stepz: unknown key",
    "steps": "steps: an override is written section.key=value",
    "seed.x=1": "seed.x=1: seed is a value, not a section",
    "qqqq=1": "qqqq: unknown key; accepted: name, folder, model",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_clear_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert str(caught.value).startswith(MISTAKES[override])
    assert "\n" not in str(caught.value)


def test_mistakes_in_files_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = to_yaml(load_config("quickstart"))
    file.write_text(text.replace("d_model:", "d_modle:"))
    with pytest.raises(ConfigError, match=rf"model\.d_modle: unknown key; nearest is d_model \({file}\)"):
        load_config(str(file))
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping of sections, found list"):
        load_config(str(file))
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(file))
    file.write_text(text.replace("schema: 1", "schema: 9"))
    with pytest.raises(ConfigError, match="schema 9, but this version reads schema 1"):
        load_config(str(file))
    with pytest.raises(ConfigError, match=r"did you mean quickstart\?"):
        load_config("quickstrat")


def test_differing_keys() -> None:
    old, new = load_config("quickstart"), load_config("quickstart", ["optim.lr=0.5", "train.steps=3"])
    assert differing_keys(old, new) == [f"optim.lr: {old.optim.lr} → 0.5", f"train.steps: {old.train.steps} → 3"]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule: str) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup=10, schedule=schedule)  # type: ignore[arg-type]
    factors = [config.factor(step, 100) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert all(0.1 <= f <= 1.0 for f in factors)
    assert config.factor(100, 100) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"lr": 1.0, "min_lr": 2.0}, "need 0 ≤ min_lr ≤ lr"), ({"clip": -1.0}, "must not be negative")],
)
def test_optimizer_refusals(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values).check()  # type: ignore[arg-type]
