"""A folder of files as a data set: text, captioned pictures and sounds become shards, by as many workers as there are.

The files are cut into tasks, and each task makes one shard. What a task makes depends on its files alone: workers may
be processes of one machine or of a job array, may be killed, and may be started again; finished shards are not redone.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from filelock import FileLock

from .adopt import meaning, save_meaning
from .compose import Composer
from .dataset import Dataset
from .documents import SKIPPED, write_shard
from .errors import DataError
from .files import write_atomic
from .index import ShardIndex, index_path
from .learn import learn_meaning
from .manifest import MANIFEST, codec_file, write_manifest
from .tasks import EncodeConfig, Task, plan_tasks
from .tokenizer import HubTokenizer, TextTokenizer

PLAN, LOCK = "encode.json", "encode.lock"
_NOTHING = ".nothing"  # beside a shard's name: its files hold no document


def encode_folder(
    source: Path,
    out: Path,
    config: EncodeConfig,
    *,
    like: Path | None = None,
    tokenizer: Path | None = None,
    workers: int = 1,
    worker: int | None = None,
) -> Iterator[tuple[str, int, int]]:
    """Encodes a folder into a data set; a second call goes on where the first was cut off.

    Args:
        source: folder of .txt, .md, .rst, .jsonl (field "text"), .parquet (column "text"), pictures, sounds, .csv
            (columns of numbers), .safetensors (tensor "latents" [n, width]), byte files, webdataset tars of these, and
            Megatron's .bin with .idx (whose ids are then the given tokenizer's); NAME.txt beside NAME.png or another
            of these is its caption.
        out: folder to make.
        like: a data set whose tokenizer and codecs to use, so that both can be mixed; or
        tokenizer: a sentencepiece model or tokenizer.json for text alone; without both they are trained on the source.
        workers: processes, or the size of the job array.
        worker: this member of the array, 0..workers-1; None runs all on this machine.

    Yields:
        (shard, documents, tokens) as shards are finished or found finished. The manifest is written once all are there.

    Raises:
        DataError: a file that cannot be read or encoded (named), or an `out` that belongs to something else.
    """
    if workers < 1 or (worker is not None and not 0 <= worker < workers):
        raise DataError(f"workers >= 1 and worker in 0..workers-1 are needed, got {workers} and {worker}")
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{out} lies in {source}, and would be read itself; choose a folder outside")
    tasks = plan_tasks(source, config).tasks
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    alone = FileLock(out / LOCK)  # members of a job array start together, and end together
    try:
        with alone:
            composer = _claim(source, out, config, tasks, like, tokenizer)
            mine = tasks if worker is None else tasks[worker::workers]
            for task in [task for task in mine if not _done(out, task)][:1]:
                _part(out, task).touch()  # a job at work: no other takes the folder over
    finally:
        _leave_no_trace(out, fresh)
    if (out / MANIFEST).exists():
        yield from (_counts(out, task) for task in mine)
    elif worker is None and workers > 1:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            arguments = ([source] * len(mine), [out] * len(mine), [config] * len(mine), [composer] * len(mine), mine)
            yield from pool.map(run_task, *arguments)
    else:
        yield from (run_task(source, out, config, composer, task) for task in mine)
    with alone:
        if not (out / MANIFEST).exists() and all(_done(out, task) for task in tasks):
            _finish(source, out, config, composer, tasks)
    if (out / MANIFEST).exists():
        (out / LOCK).unlink(missing_ok=True)


def _end_with_parent() -> None:
    """Ends this worker when the process that started the job is gone, killed perhaps: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_task(source: Path, out: Path, config: EncodeConfig, composer: Composer, task: Task) -> tuple[str, int, int]:
    """Makes one shard, if it is not there; returns (its name, documents, tokens)."""
    if not _done(out, task):
        try:
            write_shard(source, out, config, composer, task)
        finally:
            _part(out, task).unlink(missing_ok=True)
        if not (out / task.shard).exists():
            write_atomic(out / (task.shard + _NOTHING), b"")
    return _counts(out, task)


def _part(out: Path, task: Task) -> Path:
    return out / (task.shard + ".part")


def _done(out: Path, task: Task) -> bool:
    return (out / task.shard).exists() or (out / (task.shard + _NOTHING)).exists()


def _counts(out: Path, task: Task) -> tuple[str, int, int]:
    if not (out / task.shard).exists():
        return task.shard, 0, 0
    index = ShardIndex.load(index_path(out / task.shard))
    return task.shard, len(index), int(index.lengths.sum())


def _finish(source: Path, out: Path, config: EncodeConfig, composer: Composer, tasks: list[Task]) -> None:
    """Writes the manifest of all shards; DataError, and the folder is free again, where no document was found."""
    splits: dict[str, list[ShardIndex]] = {}
    for task in tasks:
        if (out / task.shard).exists():
            splits.setdefault(task.split, []).append(ShardIndex.load(index_path(out / task.shard)))
    if "train" in splits:
        write_manifest(
            out,
            name=source.name,
            generator={"name": "encode", "version": 2, "source": source.name, "max_tokens": config.max_tokens},
            provenance={"text": f"files of {source.name}"},
            composer=composer,
            splits=splits,
        )
    for task in tasks:
        (out / (task.shard + _NOTHING)).unlink(missing_ok=True)
    if not splits:
        _release(out)
    if "train" not in splits:
        raise DataError(f"{source} holds no document for split train (blank texts?)")


def _leave_no_trace(out: Path, fresh: bool) -> None:
    """After a refusal: neither the lock nor a folder that was not there before."""
    if not (out / PLAN).exists():
        (out / LOCK).unlink(missing_ok=True)
        if fresh and not any(out.iterdir()):
            out.rmdir()


def _claim(
    source: Path, out: Path, config: EncodeConfig, tasks: list[Task], like: Path | None, tokenizer: Path | None
) -> Composer:
    """The composer of this job, after `out` was found free, of the same job, or of one that never made a shard."""
    settings = repr((config, str(like), str(tokenizer), tasks)).encode()
    plan = json.dumps({"job": hashlib.sha256(settings).hexdigest(), "shards": len(tasks)}).encode()
    if (out / PLAN).exists() and (out / PLAN).read_bytes() != plan:
        if any(out.glob("*.tar*")):
            raise DataError(f"{out} belongs to another encode job (other files or settings); choose another folder")
        _release(out)
    if (out / PLAN).exists():
        return _meaning(source, out, config, tasks, like, tokenizer)
    if any(entry.name != LOCK for entry in out.iterdir()):
        raise DataError(f"{out} is not empty and belongs to no encode job; choose another folder")
    write_atomic(out / PLAN, plan)
    try:
        return _meaning(source, out, config, tasks, like, tokenizer)
    except BaseException:  # a job that never began: other files or settings may have the folder
        _release(out)
        raise


def _release(out: Path) -> None:
    """Makes the folder of a job without a shard free again."""
    for name in (PLAN, TextTokenizer.file, HubTokenizer.file):
        (out / name).unlink(missing_ok=True)
    for path in out.glob(codec_file("*")):
        path.unlink()


def _meaning(
    source: Path, out: Path, config: EncodeConfig, tasks: list[Task], like: Path | None, tokenizer: Path | None
) -> Composer:
    """The given tokenizer and codecs, or those learnt from the source; saved in `out`."""
    composer = meaning(like, tokenizer) if like or tokenizer else learn_meaning(source, config, tasks, out)
    for unit in () if config.skip_bad else (unit for task in tasks for unit in task.units):
        modality = config.modality(unit.file)
        if modality != "text" and modality not in composer.codecs:
            raise DataError(
                f"{source / unit.file}: {like or tokenizer} has no codec for {modality}, only for "
                f"{', '.join(composer.vocabulary.modalities)}; take such files out, or leave them out by --skip-bad"
            )
    save_meaning(out, composer)
    return composer


def finished(out: Path) -> Dataset | None:
    """The data set, once all workers are done."""
    return Dataset.open(out) if (out / MANIFEST).exists() else None


def skipped(out: Path) -> int:
    """How many documents were left out so far, see `EncodeConfig.skip_bad`."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob(f"*{SKIPPED}"))
