"""What `polylepis convert` does: a run to a verified Hugging Face folder, a foreign checkpoint to a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ..parallel.model import ModelConfig
    from .transforms import Source

Proof = Literal["auto", "full", "shrunk"]
FULL_PROOF_LIMIT = 500_000_000
"""Parameters up to which `auto` compares logits of the model itself: three copies in float32, 6 GB at the limit."""


@dataclass(frozen=True)
class Run:
    """What an export needs of a run folder.

    Attributes:
        checkpoint: its newest finished one.
        config: the model.
        data: its data folder.
        context: its sequence length.
        values: the whole configuration, as written.
    """

    checkpoint: Path
    config: ModelConfig
    data: Path
    context: int
    values: Mapping[str, Any]


def open_run(run: Path) -> Run:
    """A run folder, opened.

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
        data = values.get("data", {})
        folder, context = Path(data.get("path", "")), int(data.get("seq_len", 4096))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not the configuration of a run ({' '.join(str(error).split())})") from error
    if not folder.is_absolute() and not folder.exists() and (run / folder).exists():
        folder = run / folder
    return Run(checkpoint, config, folder, context, values)


def data_files(folder: Path) -> tuple[Mapping[str, Any] | None, list[Path]]:
    """The vocabulary of a data folder, its tokenizer and codecs; none where the folder is not there any more."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None, []
    try:
        vocabulary = json.loads(manifest.read_text())["vocabulary"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{manifest}: no vocabulary in it") from error
    tokenizers = [folder / name for name in ("tokenizer.model", "tokenizer.json")]
    return vocabulary, [*(path for path in tokenizers if path.is_file()), *sorted(folder.glob("*.codec.npz"))]


def training_facts(run: Path, opened: Run) -> dict[str, Any]:
    """Lines of the model card: what the checkpoint's manifest and the run's configuration say of the training."""
    from .manifest import read_manifest

    manifest = read_manifest(opened.checkpoint)
    step, data, train, optim = (
        manifest.get("step"),
        *(opened.values.get(section) or {} for section in ("data", "train", "optim")),
    )
    facts: dict[str, Any] = {"run": run.name, "step": "unknown" if step is None else f"{step:,}"}
    if step and data.get("global_batch") and data.get("seq_len"):
        facts["tokens"] = f"{step * data['global_batch'] * data['seq_len']:,} at most (padding included)"
    if data.get("seq_len"):
        facts["sequence length"] = f"{data['seq_len']:,}"
    if train.get("precision"):
        facts["precision"] = f"{train['precision']}, parameters and optimizer float32"
    if optim.get("lr"):
        facts["learning rate"] = f"{optim['lr']:g} ({optim.get('schedule', 'schedule unknown')})"
    facts["checkpoint written by"] = f"torch {manifest.get('torch', 'unknown')}"
    return facts


def to_hf(
    run: Path,
    out: Path,
    *,
    target: str | None,
    dtype: torch.dtype,
    max_shard_size: str,
    modality: str | None,
    proof: Proof,
    tokenizer: bool,
    force: bool,
) -> dict[str, Any]:
    """Export the newest checkpoint of `run` and prove the result; the report's values by name, for a table.

    Raises:
        CheckpointError: nothing to export, a target that cannot hold it, or a proof that fails.
    """
    opened = open_run(run)
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already; give --force to replace it, or another folder with --out")

    from ..parallel.model import count_parameters
    from .hf.export import export
    from .hf.targets import caution, choose_target
    from .hf.verify import transformers_module
    from .sources import Distributed
    from .surgery import select_modality
    from .transforms import Transformed

    transformers_module()
    config = opened.config
    tensors: Source = Distributed(opened.checkpoint)
    if modality is not None:
        config, rules = select_modality(config, modality)
        tensors = Transformed(tensors, rules)
    chosen = choose_target(config, target)
    vocabulary, files = data_files(opened.data)
    routed = vocabulary if modality is None else None  # a dense model derives nothing from the others' ranges
    export(
        config,
        tensors,
        out,
        vocabulary=routed,
        text_vocabulary=vocabulary,
        dtype=dtype,
        target=chosen,
        tokenizer_files=files if tokenizer else [f for f in files if not f.name.startswith("tokenizer.")],
        facts=training_facts(run, opened),
        context=opened.context,
        max_shard_size=max_shard_size,
        force=force,
    )
    full = proof == "full" or (proof == "auto" and count_parameters(config) <= FULL_PROOF_LIMIT)
    report = prove(out, config, tensors, chosen, dtype, routed, full)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    rows: dict[str, Any] = {"folder": out, "from": opened.checkpoint, "class": report["class"]}
    rows["weights"] = f"{size / 1e6:.1f} MB {str(dtype).removeprefix('torch.')}, every tensor read back"
    if warning := caution(config, chosen):
        rows["beware"] = warning
    for gate in report["gates"]:
        number = isinstance(gate["value"], float)
        rows[gate["name"]] = f"{gate['value']:.2e} (allowed {gate['limit']:.0e})" if number else "equal ours"
    if report["proof"] != "full":
        rows["proof"] = report["proof"]
    if vocabulary is None:
        rows["note"] = f"no data set in {opened.data}: exported without vocabulary and tokenizer"
    return rows


def prove(
    out: Path,
    config: ModelConfig,
    tensors: Source,
    target: Any,
    dtype: torch.dtype,
    vocabulary: Mapping[str, Any] | None,
    full: bool,
) -> dict[str, Any]:
    """Compare what transformers computes with what we do: of the model itself, or of a small one of the same structure.

    The tensors of the export have been read back in either case, so what the small model proves is the layout: that
    this pattern, these kinds, head and group counts arrive where transformers expects them.

    Returns:
        The report, which is also written to the folder.
    """
    import torch.distributed as dist

    from ..parallel.shrink import shrink_model
    from .hf.export import export
    from .hf.reference import fresh_tensors, reference_logits
    from .hf.verify import verify, write_report

    alone = not dist.is_initialized()
    try:
        if full:
            return verify(out, config, reference_logits(config, tensors, dtype), vocabulary=vocabulary)
        small = shrink_model(config)
        with tempfile.TemporaryDirectory(prefix="polylepis-") as scratch:
            twin = fresh_tensors(small)
            folder = export(small, twin, Path(scratch) / "twin", dtype=dtype, target=target)
            report = verify(folder, small, reference_logits(small, twin, dtype))
    finally:
        if alone and dist.is_initialized():
            dist.destroy_process_group()
    report["proof"] = "logits of a small model of the same structure, not of this one; --proof full compares this one"
    write_report(out, report)
    return report


def from_foreign(
    kind: str, path: Path, out: Path, *, name: str | None, data: Path | None, force: bool
) -> Sequence[tuple[str, Any]]:
    """Import a foreign checkpoint as a run folder; rows for a table.

    Raises:
        CheckpointError: not such a checkpoint, or an architecture that our layers cannot express.
    """
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists already; give --force to replace it, or another folder with --out")
    from .foreign.run import import_run

    return import_run(kind, path, out, name or out.name, data)
