"""Foreign tokenizers: their ids in an export, and imported models on data sets of ours; files alone, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from polylepis.checkpoints.commands import convert
from polylepis.checkpoints.errors import CheckpointError
from polylepis.checkpoints.foreign import hf
from polylepis.checkpoints.foreign.vocabulary import onto_data
from polylepis.checkpoints.hf.export import export
from polylepis.checkpoints.hf.reference import fresh_tensors, reference_logits
from polylepis.checkpoints.hf.tokenizer import write_tokenizer
from polylepis.checkpoints.transforms import in_memory
from polylepis.data.tokenizer import HubTokenizer
from polylepis.launch.cli import main
from polylepis.pretrain.config import load_config
from polylepis.pretrain.meter.tracker import read_metrics
from polylepis.pretrain.train import train
from ranks import run_ranks
from toys import ALL_ROUTED, toy

pytest.importorskip("transformers", minversion="5.15.1")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "one two three, four five six seven eight nine ten; zwölf Boxkämpfer jagen Viktor quer über den Deich \U0001f600"


def hub_tokenizer(kind: str, size: int = 300) -> Any:
    """What a published model has beside its weights, trained on a line of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        found = Tokenizer(models.BPE())
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet)
    else:
        found = Tokenizer(models.Unigram())
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    found.train_from_iterator([TEXT] * 9, trainer)
    found.add_tokens(["<late>"])
    return found


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_of_the_hub_keeps_its_ids_shifted(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hub_tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    ours = HubTokenizer.load(tmp_path / "tokenizer.json")
    vocabulary = {"modalities": ["text", "image"], "sizes": [ours.vocab_size, 7], "specials": 32, "vocab_multiple": 16}
    write_tokenizer(tmp_path / "out", [tmp_path / "tokenizer.json"], vocabulary, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "six<late> seven", "漢字 \n\t two", "", "</s> one"):
        expected = [32 + i for i in ours.encode(text)]
        assert theirs(text, add_special_tokens=False).input_ids == expected
        assert theirs(text).input_ids == [1, *expected]
        assert theirs.decode(expected, skip_special_tokens=False) == ours.decode([i - 32 for i in expected])
    assert theirs("<|image|><|/image|>", add_special_tokens=False).input_ids == [4, 5]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    with pytest.raises(CheckpointError, match=f"has {ours.vocab_size} ids, but the vocabulary has 9 text ids"):
        write_tokenizer(tmp_path / "out", [tmp_path / "tokenizer.json"], vocabulary | {"sizes": [9, 7]}, 64)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json whose ids can be shifted"):
        write_tokenizer(tmp_path / "out", [tmp_path / "tokenizer.json"], vocabulary, 64)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A NemotronH as its publisher would have it: ids from 0, its own begin and end, a tokenizer.json."""
    folder = tmp_path / "published"
    config = toy("M*-", modalities=("text",), vocab_size=320)
    export(config, fresh_tensors(config, seed=2), folder, context=32)
    hub_tokenizer("bpe").save(str(folder / "tokenizer.json"))
    values = json.loads((folder / "config.json").read_text())
    del values["used_vocab_size"], values["vocabulary"]
    (folder / "config.json").write_text(
        json.dumps(values | {"pad_token_id": None, "bos_token_id": 11, "eos_token_id": [12, 3]})
    )
    return folder


def data_set(folder: Path, tokenizer: Path, modalities: tuple[str, ...] = ("text",)) -> Path:
    """As much of a data set as an import reads."""
    folder.mkdir()
    size = HubTokenizer.load(tokenizer).vocab_size
    sizes = [size, *(5 + k for k in range(len(modalities) - 1))]
    vocabulary = {"modalities": list(modalities), "sizes": sizes, "specials": 32, "vocab_multiple": 16}
    (folder / "manifest.json").write_text(json.dumps({"vocabulary": vocabulary}))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.mark.parametrize("modalities", [("text",), ("text", "image", "voice")])
def test_every_token_computes_what_it_did(published: Path, modalities: tuple[str, ...], tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", published / "tokenizer.json", modalities)
    before = hf.read(published)
    after = onto_data(before, published, data)
    size = HubTokenizer.load(published / "tokenizer.json").vocab_size
    assert after.config.vocab_size == 32 + size + (11 if len(modalities) > 1 else 0)
    assert after.config.modalities == modalities and "text id k there is 32 + k here" in after.notes[-1]
    tokens = torch.cat((torch.tensor([11]), torch.randint(0, size, (20,), generator=torch.Generator().manual_seed(1))))
    zeros = torch.zeros_like(tokens)
    expected = reference_logits(before.config, before.tensors)(tokens, zeros)
    here = tokens + 32
    here[0] = 1  # ours begins with 1, which is a copy of theirs
    found = reference_logits(after.config, after.tensors)(here, zeros)
    assert torch.equal(found[:, 32 : 32 + size], expected[:, :size])
    assert torch.equal(found[:, 1], expected[:, 11]) and torch.equal(found[:, 2], expected[:, 12])
    embedding = in_memory(after.tensors)["embed.weight"]
    fresh = embedding[[0, *range(3, 32), *range(32 + size, len(embedding))]]
    assert 0 < (fresh - embedding[32 : 32 + size].mean(0)).abs().max() < 0.1


def test_an_import_onto_a_data_set_trains_and_exports(published: Path, tmp_path: Path) -> None:
    """The whole way: encode with the model's own tokenizer, import, train, export with the tokenizer's new ids."""
    from transformers import AutoTokenizer

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n".join([TEXT] * 60))
    source, data, run = tmp_path / "texts", tmp_path / "data", tmp_path / "run"
    assert (
        main(
            [
                "data",
                "encode",
                str(source),
                str(data),
                "--max-tokens",
                "24",
                "--tokenizer",
                str(published / "tokenizer.json"),
            ]
        )
        == 0
    )
    assert main(["convert", str(published), "--from", "hf", "--out", str(run), "--data", str(data)]) == 0
    changes = ["train.steps=2", "train.device=cpu", "tracking.wandb=disabled"]
    config = load_config(str(run), [*changes, "data.global_batch=2", "data.micro_batch=1", "optim.lr=1e-3"])
    assert config.data.path == str(data)
    run_ranks(1, train, config)
    losses = [line["loss"] for line in read_metrics(run)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert main(["convert", str(run), "--to", "hf"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert tokenizer("six seven").input_ids == [1, *(32 + i for i in hub_tokenizer("bpe").encode("six seven").ids)]


def test_our_own_exports_onto_a_larger_data_set(tmp_path: Path) -> None:
    config = toy("M*", ALL_ROUTED, vocab_size=32 + 10 + 7 + 5)
    old = {"modalities": ["text", "image", "voice"], "sizes": [10, 7, 5], "specials": 32, "vocab_multiple": 16}
    folder = export(config, fresh_tensors(config), tmp_path / "hf", vocabulary=old)
    (tmp_path / "data").mkdir()
    new = old | {"sizes": [10, 9, 5]}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"vocabulary": new}))
    after = onto_data(hf.read(folder), folder, tmp_path / "data")
    assert after.config.vocab_size == 56 and after.vocabulary == new
    rows, before = in_memory(after.tensors)["embed.weight"], in_memory(hf.read(folder).tensors)["embed.weight"]
    assert torch.equal(rows[:49], before[:49]) and torch.equal(rows[51:56], before[49:54])
    (tmp_path / "data" / "manifest.json").write_text(
        json.dumps({"vocabulary": new | {"modalities": [*old["modalities"], "touch"], "sizes": [10, 9, 5, 3]}})
    )
    with pytest.raises(CheckpointError, match=r"is routed by \['text', 'image', 'voice'\], but"):
        onto_data(hf.read(folder), folder, tmp_path / "data")


def test_data_sets_of_other_tokenizers_are_refused(published: Path, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", published / "tokenizer.json")

    def refused(message: str) -> None:
        arguments = [str(published), "--from", "hf", "--out", str(tmp_path / "run"), "--data", str(data)]
        result = CliRunner().invoke(convert, arguments)
        assert isinstance(result.exception, CheckpointError), result.output
        with pytest.raises(CheckpointError, match=message):
            raise result.exception
        assert not (tmp_path / "run").exists()

    vocabulary = json.loads((data / "manifest.json").read_text())["vocabulary"]
    (data / "manifest.json").write_text(json.dumps({"vocabulary": vocabulary | {"sizes": [999]}}))
    refused("the vocabulary has 999 text ids, but the model has 320 rows")
    hub_tokenizer("bpe", 290).save(str(data / "tokenizer.json"))
    refused("is another tokenizer than")
    (data / "tokenizer.json").unlink()
    refused("was not tokenised with .*; make it with polylepis data encode --tokenizer")
    (data / "manifest.json").write_text("{}")
    refused("no vocabulary in its manifest.json")
    (data / "manifest.json").unlink()
    refused("no manifest.json in it")
    result = CliRunner().invoke(convert, [str(tmp_path), "--to", "hf", "--data", str(data)])
    assert isinstance(result.exception, CheckpointError) and "--data belongs to an import" in str(result.exception)
