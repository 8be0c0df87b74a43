"""One quickstart data set per session, and cheap copies of it that a test may damage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polylepis.data import corpus
from polylepis.data.dataset import Dataset
from polylepis.data.shards import Sample, ShardWriter
from polylepis.data.vocabulary import Vocabulary
from ranks import PRELOAD

# One fork server serves workers and ranks of all tests: whoever starts it first, it has imported everything.
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the default quickstart data set; read only."""
    path = tmp_path_factory.mktemp("quickstart") / "shards"
    corpus.build_quickstart(path)
    return path


@pytest.fixture(scope="session")
def dataset(quickstart: Path) -> Dataset:
    return Dataset.open(quickstart)


@pytest.fixture(scope="session")
def build_small() -> Callable[..., Dataset]:
    """`build_quickstart` on a sixth of the digits and a tenth of the prose: a second instead of ten."""
    images, digits = corpus.load_digits()
    sections = corpus.prose_sections()[::10]

    def build(out: Path, **options: Any) -> Dataset:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpus, "load_digits", lambda: (images[:300], digits[:300]))
            patch.setattr(corpus, "prose_sections", lambda: sections)
            return corpus.build_quickstart(out, **options)

    return build


@pytest.fixture(scope="session")
def small(build_small: Callable[..., Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small data set of the same kind; read only."""
    path = tmp_path_factory.mktemp("small") / "shards"
    build_small(path)
    return path


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the small data set by hard links; only the named files are real copies, to be changed."""

    def copy(*changing: str) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(small, target, copy_function=os.link)
        for name in changing:
            os.unlink(target / name)
            shutil.copyfile(small / name, target / name)
        return target

    return copy


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small shard of random documents without any corpus, tokenizer or codec."""

    def write(n: int = 8, *, folder: Path | None = None, seed: int = 0) -> Path:
        folder = folder or tmp_path
        folder.mkdir(exist_ok=True)
        vocabulary = Vocabulary(("text", "image"), (300, 16))
        rng = np.random.default_rng(seed)
        with ShardWriter(folder, "train", vocabulary, {"vocabulary": vocabulary.fingerprint}) as writer:
            for i in range(n):
                text = rng.integers(32, 332, rng.integers(3, 20))
                image = np.concatenate(([4], rng.integers(332, 348, 4), [5]))
                tokens = np.concatenate(([1], text, image, [2]))
                spans = [("text", len(text)), ("image", len(image))]
                writer.write(Sample(f"doc-{i:03d}", "test", tokens, spans, text=f"number {i}"))
        return folder / "train-00000.tar"

    return write
