"""`polylepis convert` and `polylepis checkpoint …`. Heavy imports wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import CheckpointError

if TYPE_CHECKING:
    from .convert import Proof


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", "to", type=click.Choice(["hf"]), help="Export the run PATH to this format: hf, for Hugging Face.")
@click.option(
    "--from",
    "source",
    type=click.Choice(["hf", "mamba_ssm", "megatron"]),
    help="Import PATH, a folder of this format, as a run.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make.  [default: RUN/hf; needed to import]")
@click.option(
    "--target",
    type=click.Choice(["mamba2", "nemotron_h", "granite", "polylepis"]),
    help="The class to export to.  [default: the first of transformers' own that can hold the model, ours otherwise]",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--max-shard-size", default="2GB", show_default=True, help="Of one weight file.")
@click.option(
    "--modality", help="Export what this modality's tokens see (text, say): a dense model, its code unneeded."
)
@click.option(
    "--proof",
    type=click.Choice(["auto", "full", "shrunk"]),
    default="auto",
    show_default=True,
    help="Compare logits of the model (three copies in memory) or of a small one of its structure; auto: by size.",
)
@click.option("--no-tokenizer", is_flag=True, help="Leave the tokenizer out.")
@click.option("--name", help="Of the imported run.  [default: the folder's name]")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Import: move the vocabulary's rows to where this data set, of the same tokenizer, has their tokens.",
)
@click.option("--force", is_flag=True, help="Replace a folder that exists.")
def convert(
    path: Path,
    to: str | None,
    source: str | None,
    out: Path | None,
    target: str | None,
    dtype: str,
    max_shard_size: str,
    modality: str | None,
    proof: Proof,
    no_tokenizer: bool,
    name: str | None,
    data: Path | None,
    force: bool,
) -> None:
    """Export a run to Hugging Face format, or import a foreign checkpoint as a run.

    An export reads the newest checkpoint tensor by tensor, reads back what it wrote, loads it with transformers and
    compares it with our model. The command fails, and says why, if transformers computes anything else than we do;
    export_report.json in the folder has the numbers. An import opens pickles without executing them.
    """
    if (to is None) == (source is None):
        raise CheckpointError("say either --to hf (export a run) or --from hf | mamba_ssm | megatron (import)")
    if data is not None and source is None:
        raise CheckpointError("--data belongs to an import (--from); an export reads the data set of its run")
    from . import convert as work

    if source is not None:
        if out is None:
            raise CheckpointError("an import needs --out, the run folder to make")
        print_table(work.from_foreign(source, path, out, name=name, data=data, force=force))
        return

    import torch

    rows = work.to_hf(
        path,
        out or path / ("hf" if modality is None else f"hf-{modality}"),
        target=target,
        dtype=getattr(torch, dtype),
        max_shard_size=max_shard_size,
        modality=modality,
        proof=proof,
        tokenizer=not no_tokenizer,
        force=force,
    )
    print_table(list(rows.items()))


@click.command("eval")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, help="Names of the harness's tasks, or of your own, with commas between.")
@click.option("--include", type=click.Path(path_type=Path), help="A folder with task files of your own.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--max-length", type=int, help="Tokens of context.  [default: that of training]")
@click.option("--limit", type=int, help="Examples per task.")
def evaluate_export(
    folder: Path,
    tasks: str,
    include: Path | None,
    device: str,
    batch_size: int,
    max_length: int | None,
    limit: int | None,
) -> None:
    """Run lm-evaluation-harness on FOLDER, a Hugging Face export, offline (needs the extra `eval`)."""
    from .hf.harness import evaluate_export as run

    options: dict[str, Any] = {"include": include, "device": device, "batch_size": batch_size}
    results = run(folder, tasks.split(","), max_length=max_length, limit=limit, **options)
    print_table([(f"{task} {name}", f"{v:.4g}") for task, row in results.items() for name, v in row.items()])


def print_table(rows: Sequence[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


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
