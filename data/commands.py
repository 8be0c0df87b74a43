"""`polylepis data …`: build, index, validate and inspect data sets. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Build, index, check and look at data sets."""


@data.command()
@click.argument("name", type=click.Choice(["quickstart"]))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/quickstart/shards"),
    show_default=True,
    help="Folder to make.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Splits, speakers and captions.")
@click.option("--force", is_flag=True, help="Replace another data set that lies in the folder.")
def build(name: str, out: Path, seed: int, force: bool) -> None:
    """Make a data set without any download, in seconds.

    NAME is `quickstart`: prose of Python's manual, scikit-learn's handwritten digits with captions, and the digits
    spoken by a synthetic voice. The same seed gives the same bytes; a folder that holds it already is left as it is.
    """
    from tqdm import tqdm

    from .corpus import build_quickstart

    # Nothing is drawn before the first stage: a refusal then stays one clear line.
    with tqdm(total=5, desc=name, delay=1e-6, bar_format="{desc}: stage {n}/{total} {elapsed}{postfix}") as bar:

        def stage(line: str) -> None:
            if line.endswith("up to date"):
                click.echo(line)
                return
            bar.set_postfix_str(line)
            bar.update()

        dataset = build_quickstart(out, seed=seed, force=force, progress=stage)
    for split in dataset.splits.values():
        click.echo(f"{out}: {split.name:8s} {len(split):7,d} documents {split.lengths.sum():9,d} tokens")
    click.echo(f"identity {dataset.identity[:16]}, vocabulary {dataset.vocabulary.size}")


@data.command()
@click.argument("shards", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="SHARDS...")
def index(shards: tuple[Path, ...]) -> None:
    """Rebuild the sidecar index of tars, from the tars alone.

    Refuses truncated or damaged tars, interleaved and duplicate keys, and tars that are not those of the manifest
    beside them. Give several: polylepis data index runs/quickstart/shards/*.tar
    """
    from tqdm import tqdm

    from .index import index_path
    from .maintenance import index_shards

    for tar, found in tqdm(index_shards(shards), total=len(shards), desc="index", unit="shard"):
        tokens = int(found.lengths.sum())
        with tqdm.external_write_mode():
            click.echo(f"{index_path(tar)}: {len(found):,d} samples, {tokens:,d} tokens")


@data.command()
@click.argument("path", type=click.Path(path_type=Path, file_okay=False))
def validate(path: Path) -> None:
    """Read a whole data set and check all of it.

    Hashes of all files, indices against the tars, and every sample: its tokens, their modalities, and that text and
    codes can be decoded.
    """
    from tqdm import tqdm

    from .dataset import Dataset

    dataset = Dataset.open(path)
    total = sum(len(split) for split in dataset.splits.values())
    with tqdm(total=total, desc="validate", unit="sample") as bar:
        for _, count in dataset.validate():
            bar.update(count)
    click.echo(f"{path}: {total:,d} samples are good; identity {dataset.identity[:16]}")


@data.command()
@click.argument("path", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True, help="Row length for packing.")
@click.option("--window", type=click.IntRange(min=1), default=2048, show_default=True, help="Documents per window.")
@click.option("--samples", type=click.IntRange(min=0), default=5, show_default=True, help="Samples to show.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order to judge and show.")
def inspect(path: Path, seq_len: int, window: int, samples: int, seed: int) -> None:
    """Show what a data set holds: shards, tokens per modality, packing, and a few decoded samples."""
    from .dataset import Dataset
    from .maintenance import describe

    for line in describe(Dataset.open(path), seq_len=seq_len, window=window, samples=samples, seed=seed):
        click.echo(line)
