"""`polylepis convert RUN --to hf`: from a run folder to a verified export, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from polylepis.checkpoints.commands import convert
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.sharded import save_checkpoint
from polylepis.data.tokenizer import TextTokenizer
from polylepis.parallel.engines.fsdp import build_model
from polylepis.parallel.mesh import MeshConfig, build_mesh
from polylepis.parallel.model import ModelConfig
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")

TEXTS = ["the quick brown fox jumps over the lazy dog", "Größe, façade, 漢字 and 123 numbers"] * 20
TOKENIZER = TextTokenizer.train(TEXTS, 300)
SIZES = [TOKENIZER.vocab_size, 7, 5]
VOCABULARY = {"modalities": ["text", "image", "voice"], "sizes": SIZES, "specials": 32, "vocab_multiple": 16}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the trainer leaves it, with its data set."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = toy("ME*-", ALL_ROUTED, vocab_size=32 + sum(SIZES), layers={3: {"d_ff": 12}})
    model = build_model(config, build_mesh(MeshConfig(dp_shard=1), "cpu"), seed=3)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (4, 9):
        save_checkpoint(folder / "checkpoints", model, optimizer, {"step": step})
        with torch.no_grad():
            model.final_norm.weight *= 1.5
    data = folder / "shards"
    data.mkdir()
    (data / "manifest.json").write_text(json.dumps({"vocabulary": VOCABULARY}))
    TOKENIZER.save(data / "tokenizer.model")
    for name in ("image.codec.npz", "voice.codec.npz", "train-00000.tar"):
        (data / name).write_bytes(name.encode())
    # through JSON, as the trainer writes it: tuples become lists
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    settings = {
        "schema": 1,
        "name": "small",
        "model": written,
        "data": {"path": str(data), "seq_len": 48, "global_batch": 4},
    }
    settings["optim"] = {"lr": 2e-3, "schedule": "cosine"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "small")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(convert, [str(a) for a in arguments])


def test_one_modality_exports_as_a_library_model(run: Path) -> None:
    result = call(run, "--to", "hf", "--modality", "text")
    assert result.exit_code == 0, result.output
    report = json.loads((run / "hf-text" / "export_report.json").read_text())
    assert report["passed"] and report["class"] in ("NemotronHForCausalLM", "PolylepisForCausalLM")
    assert not list((run / "hf-text").glob("*.part"))
    assert isinstance(call(run, "--to", "hf", "--modality", "smell").exception, CheckpointError)


def test_a_run_is_converted_and_verified(run: Path) -> None:
    result = call(run, "--to", "hf")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "PolylepisForCausalLM" in result.output and "equal ours" in result.output
    folder = run / "hf"
    assert {"config.json", "tokenizer.model", "image.codec.npz", "voice.codec.npz"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "train-00000.tar").exists()
    report = json.loads((folder / "export_report.json").read_text())
    assert report["passed"] and report["modalities in them"] == ["image", "text", "voice"]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["vocabulary"] == VOCABULARY and settings["max_position_embeddings"] == 48
    assert settings["layer_overrides"] == {"3": {"d_ff": 12}}
    card = (folder / "README.md").read_text()
    first = 32 + SIZES[0]
    assert (
        "| step | 9 |" in card and f"- image: ids {first} to {first + 6}; a span opens with 4 and closes with 5" in card
    )
    assert "| tokens | 1,728 at most (padding included) |" in card and "| learning rate | 0.002 (cosine) |" in card

    from safetensors.torch import load_file

    weight = load_file(folder / "model.safetensors")["model.norm_f.weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, 1.5))  # the newest checkpoint


def test_other_folder_dtype_and_shards(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "model"
    result = call(run, "--to", "hf", "--out", out, "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (out / "model.safetensors.index.json").is_file() and not (run / "hf").exists()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_gives_our_ids_through_autotokenizer(run: Path) -> None:
    from transformers import AutoTokenizer

    assert call(run, "--to", "hf").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "hf", trust_remote_code=True)
    for text in (*TEXTS[:2], "dog\n\tsmall \u2581 漢字 語 \U0001f600", ""):
        expected = [32 + i for i in TOKENIZER.encode(text)]
        assert tokenizer(text, add_special_tokens=False).input_ids == expected
        assert tokenizer(text).input_ids == [1, *expected]  # as every document of training begins
        assert tokenizer.decode(expected) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer("<|image|> <|/voice|>", add_special_tokens=False).input_ids == [
        4,
        32 + TOKENIZER.encode(" ")[0],
        7,
    ]
    assert call(run, "--to", "hf", "--force", "--no-tokenizer").exit_code == 0
    assert not (run / "hf" / "tokenizer.json").exists() and not (run / "hf" / "tokenizer.model").exists()


def test_a_large_model_is_proven_by_a_small_one_and_says_so(run: Path) -> None:
    result = call(run, "--to", "hf", "--modality", "text", "--proof", "shrunk")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "a small model of the same structure, not of this one" in result.output
    report = json.loads((run / "hf-text" / "export_report.json").read_text())
    assert report["passed"] and report["proof"].startswith("logits of a small model")
    assert (run / "hf-text" / "tokenizer.json").exists()  # its ids are those of the data set


def test_a_data_set_that_is_gone_is_said(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["path"] = "gone"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    result = call(run, "--to", "hf")
    assert result.exit_code == 0 and "no data set in gone" in result.output


def refused(*arguments: str | Path) -> str:
    """The one line of a refusal."""
    result = call(*arguments)
    assert isinstance(result.exception, CheckpointError) and result.exception.exit_code == 2
    line = str(result.exception)
    assert "\n" not in line
    return line


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    assert "say either --to hf" in refused(run) and "say either" in refused(run, "--to", "hf", "--from", "hf")
    assert "needs --out" in refused(run, "--from", "hf")
    assert refused(tmp_path / "none", "--to", "hf") == f"{tmp_path / 'none'}: no such run folder"
    assert "no config.yaml" in refused(tmp_path, "--to", "hf")
    line = refused(run, "--to", "hf", "--target", "nemotron_h")
    assert "layer 0 routes" in line and "the nearest that can is PolylepisForCausalLM (--target polylepis)" in line
    (run / "hf").mkdir()
    assert "give --force" in refused(run, "--to", "hf")
    assert call(run, "--to", "hf", "--force").exit_code == 0
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    (run / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    assert "no finished checkpoint" in refused(run, "--to", "hf", "--force")


def test_a_configuration_that_is_none(run: Path) -> None:
    for text in ("model: 3", "model: {pattern: M}\ndata: {}", "a: [", "model: {pattern: M, width: 3}\ndata: {path: x}"):
        (run / "config.yaml").write_text(text)
        assert "not the configuration of a run" in refused(run, "--to", "hf")


def test_a_failed_proof_fails_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polylepis.checkpoints.hf import layout
    from polylepis.checkpoints.maps import Scale

    rules = layout.export_rules

    def wrong(config: ModelConfig, target: layout.Target) -> list[layout.Rule]:
        made = rules(config, target)
        return [
            dataclasses.replace(rule, map=rule.map.then(Scale(-1.0))) if "o_proj" in rule.targets[0] else rule
            for rule in made
        ]

    monkeypatch.setattr(layout, "export_rules", wrong)
    assert "the export is not the model" in refused(run, "--to", "hf")
    assert not json.loads((run / "hf" / "export_report.json").read_text())["passed"]
