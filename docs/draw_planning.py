"""Draws docs/images/planning.png and prints the tables of docs/planning.md. Run it from the repository's root."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from polylepis.parallel.mesh import ContextConfig, MeshConfig
from polylepis.parallel.pipeline.config import PipelineConfig
from polylepis.parallel.pipeline.cost import Roofline, Setting, layer_seconds
from polylepis.parallel.pipeline.devices import GIB, find_device
from polylepis.parallel.pipeline.partition import equal_counts, part_sums, partition
from polylepis.pretrain.config import RunConfig, load_config
from polylepis.pretrain.plan.estimate import Estimate, estimate
from polylepis.pretrain.plan.picture import paint
from polylepis.pretrain.plan.report import title

RECIPE = "mamba2-hybrid-8b"


def plan(
    mesh: MeshConfig, micro_batch: int, schedule: str = "1f1b", rows: int = 256, cuts: tuple[int, ...] = ()
) -> RunConfig:
    config = load_config(RECIPE)
    chunks = 1 if schedule == "1f1b" else 2
    return replace(
        config,
        mesh=mesh,
        pipeline=PipelineConfig(schedule, chunks, cuts),  # type: ignore[arg-type]
        data=replace(config.data, micro_batch=micro_batch, global_batch=rows),
    )


def cuts() -> None:
    """Cuts by cost against equal numbers of layers."""
    model, timing = load_config(RECIPE).model, Roofline(find_device("h100"))
    setting = Setting(MeshConfig(dp_shard=1, tp=2), 4096, 2048.5, context=ContextConfig())
    costs = layer_seconds(model, setting, timing)
    print("| PP | dearest stage, equal counts | dearest stage, cut by cost | ideal | cuts |")
    for n in (4, 8):
        ours = partition(costs, n)
        equal, best = (1e3 * max(part_sums(costs, cut)) for cut in (equal_counts(56, n), ours))
        print(
            f"| {n} | {equal:.1f} ms | {best:.1f} ms (−{1 - best / equal:.0%}) | {1e3 * sum(costs) / n:.1f} ms | "
            f"{list(ours)} |"
        )


def decision() -> list[Estimate]:
    """64 GPUs: the candidates that the text compares."""
    device = Roofline(find_device("h100"))
    counts = equal_counts(56, 2)
    found = [
        estimate(plan(MeshConfig(1, 16, 1, 4, 1), 4), device),
        estimate(plan(MeshConfig(4, 4, 1, 2, 2), 1, cuts=counts), device),
        estimate(plan(MeshConfig(4, 4, 1, 2, 2), 1), device),
        estimate(plan(MeshConfig(4, 4, 1, 2, 2), 1, "interleaved"), device),
    ]
    print("| plan | step s | tokens/s/GPU | MFU | pipeline idle | GiB |")
    for e in found:
        print(
            f"| {title(e)} | {e.seconds:.3f} | {e.tokens / e.seconds / 64:,.0f} | {e.mfu:.1%} | "
            f"{e.timeline.bubble:.1%} | {e.peak / GIB:.1f} |"
        )
    return found


def scaling() -> None:
    """Weak scaling: rows grow with the GPUs, so that every data-parallel rank always has 16."""
    device = Roofline(find_device("h100"))
    print("| GPUs | rows a step | step s | tokens/s | MFU | idle | exposed communication | of linear |")
    first = 0.0
    for gpus in (8, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        dp = gpus // 4
        shard = min(dp, 4)
        e = estimate(plan(MeshConfig(dp // shard, shard, 1, 2, 2), 1, "interleaved", rows=16 * dp), device)
        rate = e.tokens / e.seconds
        first = first or rate / gpus
        sent = sum(v for k, v in e.parts.items() if k.endswith("parallel")) / e.seconds
        print(
            f"| {gpus:,} | {16 * dp:,} | {e.seconds:.3f} | {rate:,.0f} | {e.mfu:.1%} | {e.timeline.bubble:.1%} | "
            f"{sent:.1%} | {rate / gpus / first:.1%} |"
        )
    print("strong scaling, 256 rows:")
    for gpus, mesh, schedule in (
        (64, MeshConfig(4, 4, 1, 2, 2), "interleaved"),
        (256, MeshConfig(8, 4, 1, 4, 2), "interleaved"),
        (1024, MeshConfig(16, 4, 1, 4, 4), "interleaved"),
        (4096, MeshConfig(16, 4, 4, 4, 4), "interleaved"),
    ):
        e = estimate(plan(mesh, 1, schedule), device)
        print(
            f"| {gpus:,} | {title(e)} | {e.seconds:.3f} | {e.tokens / e.seconds:,.0f} | {e.mfu:.1%} | "
            f"{e.timeline.bubble:.1%} |"
        )


def main() -> None:
    cuts()
    found = decision()
    scaling()
    figure = Figure(figsize=(12, 5.4), dpi=110, layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    names = ("1F1B, 28 layers each", "1F1B, cut by cost", "interleaved, 2 chunks per rank, cut by cost")
    for axes, one, name in zip(rows, found[1:], names, strict=True):
        paint(axes, one.timeline, name, legend=axes is rows[0])
        axes.set_xlim(0, max(e.timeline.seconds for e in found[1:]))
    for axes in rows[:-1]:
        axes.set_xlabel("")
    figure.savefig("docs/images/planning.png")


if __name__ == "__main__":
    main()
