"""After an export: lm-evaluation-harness with a task of one's own, and the serving snippet of the docs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from polylepis.checkpoints.commands import evaluate_export
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.hf.reference import fresh_tensors, reference_logits
from polylepis.data.tokenizer import TextTokenizer
from polylepis.parallel.model import ModelConfig
from toys import toy

pytest.importorskip("transformers", minversion="5.15.1")

TOKENIZER = TextTokenizer.train(["one two three four five six seven"] * 30, 300)
CONFIG = toy("M*-", modalities=("text",), vocab_size=32 + TOKENIZER.vocab_size)
VOCABULARY = {"modalities": ["text"], "sizes": [TOKENIZER.vocab_size], "specials": 32, "vocab_multiple": 16}
TASK = """
task: local_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["four", "seven"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer.model")
    files = [tmp_path / "tokenizer.model"]
    return export(
        CONFIG, fresh_tensors(CONFIG), tmp_path / "hf", vocabulary=VOCABULARY, tokenizer_files=files, context=64
    )


def log_likelihood(config: ModelConfig, prompt: str, choice: str) -> float:
    """Of the choice's tokens after the prompt, from our own model."""
    start = [1, *(32 + i for i in TOKENIZER.encode(prompt))]
    whole = [1, *(32 + i for i in TOKENIZER.encode(f"{prompt} {choice}"))]
    ids = torch.tensor(whole)
    logs = reference_logits(config, fresh_tensors(config))(ids, torch.zeros_like(ids)).log_softmax(-1)
    return sum(float(logs[k - 1, whole[k]]) for k in range(len(start), len(whole)))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_harness_runs_a_local_task_offline(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (extra `eval`)")
    questions = ["one two three", "five six", "two one"]
    # The right answer of each question is the one that our own model finds likelier, so accuracy must be 1.
    answers = [int(log_likelihood(CONFIG, q, "seven") > log_likelihood(CONFIG, q, "four")) for q in questions]
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) for q, a in zip(questions, answers, strict=True)]
    data.write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    arguments = [str(folder), "--tasks", "local_likelihood", "--include", str(tmp_path / "tasks")]
    result = CliRunner().invoke(evaluate_export, arguments)
    assert result.exit_code == 0, repr(result.exception)
    row = next(line for line in result.output.splitlines() if "acc,none" in line)
    assert row.split()[-1] == "1"
    for wrong, message in (
        ([*arguments[:2], "no_such_task"], "no task no_such_task in the harness; give the folder"),
        ([*arguments, "--max-length", "1"], "the harness cannot run local_likelihood"),
        ([*arguments[:2], "hellaswag"], "the data of hellaswag is not on this machine"),
    ):
        result = CliRunner().invoke(evaluate_export, wrong)
        assert isinstance(result.exception, CheckpointError), result.output
        assert message in str(result.exception) and "\n" not in str(result.exception)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    for place, message in ((tmp_path, "no config.json in it; export a run first"),):
        result = CliRunner().invoke(evaluate_export, [str(place), "--tasks", "x"])
        assert isinstance(result.exception, CheckpointError) and message in str(result.exception)
    for option, message in (
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--limit", "-1"], "--limit is -1"),
        (["--max-length", "0"], "--max-length is 0"),
        (["--device", "gpu"], "no such device; accepted are cpu, cuda"),
        (["--device", "cuda:99"], "CUDA devices here"),
    ):
        result = CliRunner().invoke(evaluate_export, [str(folder), "--tasks", "x", *option])
        assert isinstance(result.exception, CheckpointError) and message in str(result.exception)
    (folder / "tokenizer.json").unlink()
    result = CliRunner().invoke(evaluate_export, [str(folder), "--tasks", "x"])
    assert isinstance(result.exception, CheckpointError) and "no tokenizer.json" in str(result.exception)


def test_text_in_text_out(folder: Path) -> None:
    """What a server does: texts of different lengths in one batch, left-padded, decoded again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["one two three four", "six"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][1, 0] == 0 and batch["input_ids"][1, 0] == 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    for row, text in zip(together, texts, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert row[-6:].tolist() == alone[-6:].tolist()
        assert tokenizer.decode(alone, skip_special_tokens=True).startswith(text)
        assert int(alone.max()) < CONFIG.vocab_size and math.isfinite(float(model(alone[None]).logits.max()))
