"""`polylepis convert` and `polylepis checkpoint …`. Heavy imports wait."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import CheckpointError

if TYPE_CHECKING:
    from ..parallel.model import ModelConfig


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "to", type=click.Choice(["hf"]), required=True, help="The format: hf, for Hugging Face.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make.  [default: RUN/hf]")
@click.option(
    "--target",
    type=click.Choice(["nemotron_h", "mamba2", "polylepis"]),
    help="The class to export to.  [default: the first of transformers' own that can hold the model, ours otherwise]",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--max-shard-size", default="2GB", show_default=True, help="Of one weight file.")
@click.option(
    "--modality", help="Export what this modality's tokens see (text, say): a dense model, its code unneeded."
)
@click.option("--force", is_flag=True, help="Replace a folder that exists.")
def convert(
    run: Path,
    to: str,
    out: Path | None,
    target: str | None,
    dtype: str,
    max_shard_size: str,
    modality: str | None,
    force: bool,
) -> None:
    """Convert the newest checkpoint of RUN, load the result with transformers and compare it with our model.

    The command fails, and says why, if transformers computes anything else than we do; export_report.json in the
    folder has the numbers.
    """
    out = out or run / ("hf" if modality is None else f"hf-{modality}")
    checkpoint, config, data, context = open_run(run)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already; give --force to replace it, or another folder with --out")

    import torch
    import torch.distributed as dist

    from .hf.export import export
    from .hf.layout import entries
    from .hf.reference import reference_logits
    from .hf.targets import caution, choose_target
    from .hf.verify import transformers_module, verify
    from .manifest import read_manifest
    from .sharded import read_tensors
    from .transforms import Rule, select_modality, transform

    transformers_module()
    rules: list[Rule] = []
    if modality is not None:
        config, rules = select_modality(config, modality)
    chosen = choose_target(config, target)
    if warning := caution(config, chosen):
        click.echo(f"beware: {warning}", err=True)
    vocabulary, files = data_files(data)
    known = vocabulary is not None
    if modality is not None:
        vocabulary = None  # a dense model derives nothing from the other modalities' ranges
    tensors = dict(transform(rules, read_tensors(checkpoint).items()))
    stored = getattr(torch, dtype)
    facts = {"run": run.name, "step": read_manifest(checkpoint).get("step", "unknown")}
    export(
        config,
        tensors,
        out,
        vocabulary=vocabulary,
        dtype=stored,
        target=chosen,
        tokenizer_files=files,
        facts=facts,
        context=context,
        max_shard_size=max_shard_size,
        force=force,
    )
    alone = not dist.is_initialized()
    try:
        reference = reference_logits(config, tensors, entries(config, chosen, stored))
        report = verify(out, config, reference, vocabulary=vocabulary)
    finally:
        if alone and dist.is_initialized():
            dist.destroy_process_group()
    _print_table(report, {"folder": out, "from": checkpoint}, known, data, dtype)


def _print_table(report: Mapping[str, Any], rows: dict[str, Any], complete: bool, data: Path, dtype: str) -> None:
    out: Path = rows["folder"]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    rows |= {"class": report["class"], "weights": f"{size / 1e6:.1f} MB {dtype}"}
    for gate in report["gates"]:
        value = (
            f"{gate['value']:.2e} (allowed {gate['limit']:.0e})" if isinstance(gate["value"], float) else "equal ours"
        )
        rows[gate["name"]] = value
    if not complete:
        rows["note"] = f"no data set in {data}: exported without vocabulary and tokenizer"
    width = max(map(len, rows))
    for name, row in rows.items():
        click.echo(f"{name:<{width}}  {row}")


def open_run(run: Path) -> tuple[Path, ModelConfig, Path, int]:
    """The newest checkpoint of a run, its model, its data folder, its sequence length.

    Raises:
        CheckpointError: no such run, no finished checkpoint, or a configuration that is none.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    file = run / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{run}: no config.yaml in it, so this is not a run folder")

    import yaml

    from ..parallel.model import config_from_mapping
    from .manifest import newest_checkpoint

    checkpoint = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run}: no finished checkpoint in {run / 'checkpoints'} yet")
    try:
        values = yaml.safe_load(file.read_text())
        sections: dict[str, Any] = {"mamba": {}, "attention": {}, "mlp": {}, "moe": {}, "layers": {}}
        config = config_from_mapping({**sections, "modalities": ["text"], **values["model"]})
        data = values["data"]
        folder, context = Path(data["path"]), int(data.get("seq_len", 4096))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not the configuration of a run ({' '.join(str(error).split())})") from error
    if not folder.is_absolute() and not folder.exists() and (run / folder).exists():
        folder = run / folder
    return checkpoint, config, folder, context


def data_files(folder: Path) -> tuple[Mapping[str, Any] | None, list[Path]]:
    """The vocabulary of a data folder, its tokenizer and codecs; none where the folder is not there any more."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None, []
    try:
        vocabulary = json.loads(manifest.read_text())["vocabulary"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{manifest}: no vocabulary in it") from error
    tokenizer = folder / "tokenizer.model"
    return vocabulary, [*([tokenizer] if tokenizer.is_file() else []), *sorted(folder.glob("*.codec.npz"))]


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, compare, verify and prune them.

    PATH is a checkpoint folder, or a run folder for its newest finished checkpoint.
    """


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every logical tensor of the model.")
def inspect(path: Path, tensors: bool) -> None:
    """Step, position in the data, sizes, versions and logical tensors of a checkpoint, from its manifest."""
    from math import prod

    from .manifest import find_checkpoint, read_manifest
    from .rules import is_of_model

    found = find_checkpoint(path)
    manifest = read_manifest(found)
    model = {n: t for n, t in manifest["tensors"].items() if is_of_model(n)}
    size = sum(file["bytes"] for file in manifest["files"].values())
    data = manifest.get("data") or {}
    rows = {
        "checkpoint": found,
        "step": manifest["step"],
        "parameters": f"{sum(prod(t['shape']) for t in model.values()):,} in {len(model)} logical tensors",
        "files": f"{len(manifest['files'])}, {size / 1e6:,.1f} MB (weights, both moments, random states)",
        "written by": f"polylepis {manifest['polylepis']}, torch {manifest['torch']}, format {manifest['format']}",
        "config": manifest.get("config_hash", "not recorded"),
    }
    if "tokens" in data:
        read = ", ".join(f"{count:,} {name}" for name, count in data["tokens"].items())
        rows["data"] = f"{data['draws']:,} rows drawn; tokens: {read}; {len(data['ledger'])} samples in quarantine"
    for name, value in rows.items():
        click.echo(f"{name:<11} {value}")
    for name, tensor in model.items() if tensors else ():
        dtype, shape = tensor["dtype"].removeprefix("torch."), str(tuple(tensor["shape"]))
        click.echo(f"  {name:<60} {dtype:<10} {shape:<18} {tensor['hash']}  {tensor['placement']}")


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="Compare the files only, not what the tensors in them hold.")
def verify(path: Path, quick: bool) -> None:
    """Read everything back and compare it with the manifest. Exit code 1 where anything differs.

    Every file's bytes are compared with their sha256; then every logical tensor is read, as a run that resumes would
    read it, and its content hash compared with what the ranks held in memory when they saved.
    """
    from .manifest import damages, find_checkpoint, read_manifest
    from .sharded import content_damages

    found = find_checkpoint(path)
    damaged = list(damages(found))
    if not damaged and not quick:
        damaged = list(content_damages(found))
    for line in damaged:
        click.echo(f"{found}: {line}", err=True)
    if damaged:
        raise SystemExit(1)
    manifest = read_manifest(found)
    also = "" if quick else f", {len(manifest['tensors'])} tensors"
    click.echo(f"{found}: whole, {len(manifest['files'])} files{also}")


@checkpoint.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--most", default=20, show_default=True, help="Lines to print, largest difference first.")
@click.option("--quick", is_flag=True, help="By the manifests' hashes alone, without reading any tensor.")
def diff(first: Path, second: Path, most: int, quick: bool) -> None:
    """Compare the weights of two checkpoints, whatever mesh wrote them. Exit code 1 where they differ.

    Which tensors differ is known from the manifests; only those are read, to say by how much.
    """
    from .manifest import find_checkpoint
    from .reader import Reader
    from .rules import is_of_model
    from .sharded import stream_tensors

    readers = [Reader(find_checkpoint(path)) for path in (first, second)]
    a, b = ({n: t for n, t in reader.manifest["tensors"].items() if is_of_model(n)} for reader in readers)
    absent = float("inf")
    lines = [(absent, f"{name}: only in {first if name in a else second}") for name in a.keys() ^ b.keys()]
    differing = sorted(name for name in a.keys() & b.keys() if a[name]["hash"] != b[name]["hash"])
    alike = [name for name in differing if not quick and a[name]["shape"] == b[name]["shape"]]
    pairs = zip(*(stream_tensors(reader, alike) for reader in readers), strict=True)
    for name in differing:
        if name not in alike:
            whats = [f"{t[name]['dtype'].removeprefix('torch.')}{tuple(t[name]['shape'])}" for t in (a, b)]
            lines.append((absent, f"{name}: {whats[0]} {a[name]['hash']} and {whats[1]} {b[name]['hash']}"))
    for (name, one), (_, other) in pairs:
        relative = float((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-300))
        lines.append((relative, f"{name}: differs by {relative:.1e} of its norm"))
    for _, line in sorted(lines, reverse=True)[:most]:
        click.echo(line)
    click.echo(f"{len(lines)} of {len(a.keys() | b.keys())} tensors differ")
    if lines:
        raise SystemExit(1)


@checkpoint.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--keep", default=2, show_default=True, help="How many of the newest to keep, at least 1.")
@click.option("--keep-every", default=0, show_default=True, help="Also keep multiples of this many steps.")
@click.option("--yes", is_flag=True, help="Remove; without it, only say what would go.")
def prune(run: Path, keep: int, keep_every: int, yes: bool) -> None:
    """Remove old checkpoints of a run."""
    from .manifest import complete_checkpoints, discard, superfluous

    if keep < 1 or keep_every < 0:
        raise CheckpointError(f"need --keep ≥ 1 and --keep-every ≥ 0, got {keep} and {keep_every}")
    if not complete_checkpoints(run / "checkpoints"):
        raise CheckpointError(f"{run}: no finished checkpoint in {run / 'checkpoints'}")
    for path in superfluous(run / "checkpoints", keep, keep_every):
        click.echo(f"{'removed' if yes else 'would remove'} {path}")
        if yes:
            discard(path)
