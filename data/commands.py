"""`polylepis data …`: make, check and look at data sets. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
@click.option(
    "--tokenizer", type=click.Path(path_type=Path, dir_okay=False), help="Adopt: sentencepiece model or .json."
)
@click.option(
    "--like", type=click.Path(path_type=Path, file_okay=False), help="Adopt: with this data set's vocabulary."
)
@click.option("--text", default="txt", show_default=True, help="Adopt: extension of the members that hold the text.")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="Adopt: longer texts are cut.")
@click.option("--split", default="train", show_default=True, help="Adopt: name of the split.")
def index(
    shards: tuple[Path, ...], tokenizer: Path | None, like: Path | None, text: str, max_tokens: int, split: str
) -> None:
    """Rebuild the sidecar index of tars from the tars alone, or adopt foreign webdataset tars.

    Refuses truncated or damaged tars, interleaved and duplicate keys, and tars that are not those of the manifest
    beside them. With --tokenizer or --like, a folder of foreign tars becomes a data set; the tars are only read.
    Give all of a folder: polylepis data index folder/*.tar
    """
    from tqdm import tqdm

    from .adopt import adopt
    from .index import index_path
    from .maintenance import index_shards

    foreign = tokenizer is not None or like is not None
    work = (
        adopt(shards, tokenizer=tokenizer, like=like, extension=text, max_tokens=max_tokens, split=split)
        if foreign
        else index_shards(shards)
    )
    for tar, found in tqdm(work, total=len(shards), desc="index", unit="shard"):
        tokens = int(found.lengths.sum())
        with tqdm.external_write_mode():
            click.echo(f"{index_path(tar)}: {len(found):,d} samples, {tokens:,d} tokens")


@data.command()
@click.argument("source", type=click.Path(path_type=Path, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--like", type=click.Path(path_type=Path, file_okay=False), help="Use this data set's tokenizer and codecs."
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path, dir_okay=False), help="Text only: model or tokenizer.json."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, or array size.")
@click.option("--worker", type=click.IntRange(min=0), help="This member of a job array; without it all run here.")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="Longer texts are cut between words.")
@click.option("--heldout", type=float, default=0.0, show_default=True, help="Share of files (documents) held out.")
@click.option("--text-vocab", type=int, default=8192, show_default=True, help="Pieces, where a tokenizer is trained.")
@click.option("--image-codes", type=int, default=512, show_default=True, help="Codes, where an image codec is trained.")
@click.option(
    "--voice-model", default="", help="Folder of a pretrained Mimi or EnCodec, instead of a codec trained here."
)
@click.option("--image-model", default="", help="Folder of an AutoencoderKL (latents) or Chameleon (codes).")
@click.option("--image-side", type=click.IntRange(min=1), default=32, show_default=True, help="Pixels of a picture.")
@click.option("--voice-codes", type=int, default=512, show_default=True, help="Codes, where a codec is trained.")
@click.option("--rate", type=click.IntRange(min=1000), default=16000, show_default=True, help="Hz that sounds become.")
@click.option("--latent-dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--bytes", "byte_files", multiple=True, metavar=".EXT", help="Files of this ending are byte streams.")
@click.option("--series-bins", type=click.IntRange(min=2), default=1024, show_default=True, help="For columns of .csv.")
@click.option("--series-law", type=click.Choice(["mu", "uniform"]), default="mu", show_default=True)
@click.option("--series-range", type=float, nargs=2, help="Bins from low to high; default: what the files span.")
@click.option("--megatron-eod", type=int, metavar="ID", help="Megatron's: leave out this id where it ends a document.")
@click.option("--originals/--no-originals", default=True, show_default=True, help="Store pictures and sounds as well.")
@click.option("--skip-bad", is_flag=True, help="Leave out what cannot be read or does not fit, and list it.")
@click.option("--shard-mb", type=click.FloatRange(min=0, min_open=True), default=64.0, show_default=True)
def encode(
    source: Path,
    out: Path,
    like: Path | None,
    tokenizer: Path | None,
    workers: int,
    worker: int | None,
    max_tokens: int,
    heldout: float,
    text_vocab: int,
    image_codes: int,
    voice_model: str,
    shard_mb: float,
    **kinds: Any,
) -> None:
    """Make a data set of a folder: texts, .jsonl, .parquet, pictures, sounds, .csv, byte files, latents, tars of these.

    NAME.txt beside NAME.png (.wav, .csv, …) is its caption. Latents are .safetensors: one tensor `latents` [n, width].
    Texts, .jsonl and .csv may be packed: .gz, .bz2, .xz, .zst. Cut off or killed, the same command goes on; a job array
    gives every member its --worker and all the same --workers. Without --like or --tokenizer, tokenizer and codecs are
    trained on the folder first.
    """
    import time

    from tqdm import tqdm

    from .codecs import describe_codec
    from .encode import encode_folder, finished, skipped
    from .tasks import EncodeConfig, plan_tasks

    config = EncodeConfig(
        max_tokens=max_tokens,
        heldout=heldout,
        shard_bytes=int(shard_mb * 1e6),
        text_vocab=text_vocab,
        image_codes=image_codes,
        voice_model=voice_model,
        **kinds,
    )
    started, documents, tokens = time.perf_counter(), 0, 0
    plan = plan_tasks(source, config)
    if plan.passed_over:
        files = ", ".join(f"{count} {ends}" for ends, count in plan.passed_over.items())
        click.echo(f"no reader takes: {files}")
    work = encode_folder(source, out, config, like=like, tokenizer=tokenizer, workers=workers, worker=worker)
    for _, more_documents, more_tokens in tqdm(work, total=len(plan.tasks), unit="shard"):
        documents, tokens = documents + more_documents, tokens + more_tokens
    seconds = time.perf_counter() - started
    click.echo(f"{documents:,d} documents, {tokens:,d} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    if left_out := skipped(out):
        click.echo(f"{left_out:,d} documents were left out; {out}/*.skipped.jsonl say which and why")
    dataset = finished(out)
    if dataset is None:
        click.echo(f"{out}: other workers are not done yet")
        return
    for modality, codec in dataset.composer.codecs.items():
        click.echo(f"{modality}: {describe_codec(codec)}")
    for split in ("train", "heldout") if heldout else ("train",):
        found = dataset.splits.get(split)
        count, total = (len(found), int(found.lengths.sum())) if found else (0, 0)
        click.echo(f"{split}: {count:,d} documents, {total:,d} tokens")
    click.echo(f"{out}: identity {dataset.identity[:16]}")


@data.command()
@click.argument("path")
def validate(path: str) -> None:
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
@click.argument("paths", nargs=-1, required=True, metavar="PATHS...")
@click.option("--seq-len", type=click.IntRange(min=2), help="Row length for packing; default: what the longest needs.")
@click.option("--window", type=click.IntRange(min=1), default=2048, show_default=True, help="Documents per window.")
@click.option("--samples", type=click.IntRange(min=0), default=5, show_default=True, help="Samples to show.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order to judge and show.")
def inspect(paths: tuple[str, ...], seq_len: int | None, window: int, samples: int, seed: int) -> None:
    """Show what data sets hold: a tree of tokens per source and modality, packing, and a few decoded samples."""
    from .dataset import Dataset
    from .maintenance import describe, tree

    datasets = [Dataset.open(path) for path in paths]
    for line in tree(dict(zip(paths, datasets, strict=True))):
        click.echo(line)
    for dataset in datasets:
        click.echo()
        longest = max(int(split.lengths.max()) for split in dataset.splits.values())
        row = seq_len or max(256, 1 << (longest - 1).bit_length())
        for line in describe(dataset, seq_len=row, window=window, samples=samples, seed=seed):
            click.echo(line)


@data.command()
@click.argument("path")
@click.option("--split", default="train", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("preview.html"), show_default=True)
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Also write the packs as an SVG.")
@click.option("--samples", type=click.IntRange(min=0), default=24, show_default=True, help="Samples to decode.")
@click.option("--packs", type=click.IntRange(min=0), default=40, show_default=True, help="Packs to draw.")
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Row length for packing.")
@click.option("--window", type=click.IntRange(min=1), default=2048, show_default=True, help="Documents per window.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def preview(
    path: str,
    split: str,
    out: Path,
    picture: Path | None,
    samples: int,
    packs: int,
    seq_len: int,
    window: int,
    seed: int,
) -> None:
    """Write an HTML page: decoded samples with pictures and sounds, and packs with their documents in colour."""
    from .dataset import Dataset
    from .preview import write_picture, write_preview

    dataset = Dataset.open(path)
    for page in filter(None, (out, picture)):
        page.parent.mkdir(parents=True, exist_ok=True)
    write_preview(dataset, split, out, samples=samples, packs=packs, seq_len=seq_len, window=window, seed=seed)
    if picture is not None:
        write_picture(dataset, split, picture, packs=packs, seq_len=seq_len, window=window, seed=seed)
    click.echo(str(out))


def _stream_options(command: Any) -> Any:
    """What `audit` and `simulate` have in common."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Names the order."),
        click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Steps to replay."),
        click.option("--global-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Packs a step."),
        click.option("--window", type=click.IntRange(min=1), default=2048, show_default=True, help="Packing window."),
        click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per pack."),
        click.option("--json", "as_json", is_flag=True, help="One line of JSON."),
        click.argument("sources", nargs=-1, required=True, metavar="PATH[#SPLIT][=WEIGHT]..."),
    ):
        command = option(command)
    return command


@data.command()
@_stream_options
@click.option("--epochs", type=click.IntRange(min=1), default=2, show_default=True, help="Epochs to replay.")
def audit(sources: tuple[str, ...], epochs: int, steps: int, as_json: bool, **settings: int) -> None:
    """Prove from lengths alone that every document comes exactly once per epoch, and that a mix keeps its shares."""
    from .audit import audit as run
    from .audit import describe_audit, parse_sources, to_json
    from .stream import StreamConfig

    mix = parse_sources(sources)
    config = StreamConfig(next(iter(mix.values())).path, sources=mix, micro_batch=1, **settings)  # type: ignore[arg-type]
    result = run(config, epochs=epochs, steps=steps)
    click.echo(to_json(result) if as_json else "\n".join(describe_audit(result)))


@data.command()
@_stream_options
@click.option("--ranks", type=click.IntRange(min=1), default=8, show_default=True, help="Data-parallel ranks.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--cache-gb", type=click.FloatRange(min=0), default=100.0, show_default=True, help="Cache of a node.")
def simulate(
    sources: tuple[str, ...],
    steps: int,
    as_json: bool,
    ranks: int,
    ranks_per_node: int,
    cache_gb: float,
    **settings: int,
) -> None:
    """Forecast what a cluster would read: epochs, tokens, shards and bytes per node, cache hits."""
    from .audit import parse_sources, to_json
    from .audit import simulate as run
    from .stream import StreamConfig

    mix = parse_sources(sources)
    config = StreamConfig(next(iter(mix.values())).path, sources=mix, micro_batch=1, **settings)  # type: ignore[arg-type]
    found = run(config, dp_size=ranks, ranks_per_node=ranks_per_node, steps=steps, cache_bytes=int(cache_gb * 1e9))
    if as_json:
        click.echo(to_json(found))
        return
    for name, epochs in found.epochs.items():
        click.echo(f"{name}: {epochs:.2f} epochs after {steps} steps")
    click.echo(f"{found.tokens_per_step:,.0f} tokens a step")
    click.echo(f"a node reads {found.read_per_step / 1e6:.3f} MB of {found.shards_per_step:.1f} shards a step")
    click.echo(f"the busiest node fetches {found.fetched / 1e6:.1f} MB in all; cache hits {found.hit_rate:.1%}")


@data.command()
@click.argument("path", type=click.Path(path_type=Path, file_okay=False))
@click.option("--split", default="train", show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=20_000, show_default=True, help="Read by each reader.")
@click.option("--position", type=click.IntRange(min=0), default=15_000, show_default=True, help="Where to resume.")
@click.option("--resident", type=click.IntRange(min=1), default=100_000, show_default=True, help="Memory is watched.")
@click.option("--python", metavar="PATH", help="An interpreter that has the other readers' packages.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def bench(
    path: Path, split: str, samples: int, position: int, resident: int, python: str | None, as_json: bool
) -> None:
    """Measure reading here, side by side with webdataset and other readers: rates, resume, planning, memory.

    litdata, mosaicml-streaming and Energon are measured where this Python, or that of --python, has them.
    """
    import json
    import sys

    from .bench import bench as run
    from .bench import report

    counts = {"samples": samples, "position": position, "resident": resident}
    result = run(path, split=split, python=python or sys.executable, **counts)
    click.echo(json.dumps(result) if as_json else report(result))
