"""Stage 2, all ranks together: `torchrun … -m polylepis.launch.doctor.ranks [CONFIG] --out FOLDER`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import init_process_group
from ...pretrain.config import RunConfig, load_config
from .node import facts, node_name, time_product
from .report import Check, Report, Status, Thresholds, compare_facts, table

MIB = 2**20
PINGS = 8
SHOWN_LATE = 10.0  # seconds after which a network file system may show what another node wrote


@dataclass(frozen=True)
class Ranks:
    """This rank among all.

    Attributes:
        nodes: the node of every rank.
        leaders: the first rank of every node, or every rank where there is one node.
    """

    rank: int
    size: int
    device: torch.device
    nodes: list[str]
    leaders: list[int]

    @classmethod
    def meet(cls, device: torch.device) -> Ranks:
        nodes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(nodes, node_name())
        leaders = [nodes.index(node) for node in dict.fromkeys(nodes)]
        everyone = list(range(len(nodes)))
        return cls(dist.get_rank(), len(nodes), device, nodes, leaders if len(leaders) > 1 else everyone)

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def label(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"


def examine_ranks(config: RunConfig | None, limits: Thresholds, folder: Path) -> Report:
    """Every check of stage 2; the same report on all ranks."""
    started = time.perf_counter()
    kind = config.train.device if config is not None and config.train.device != "auto" else None
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    init_process_group(kind, timeout=120.0)
    ranks = Ranks.meet(device)
    joined = max(ranks.gather(time.perf_counter() - started))

    count = f"{ranks.size} ranks on {len(set(ranks.nodes))} node(s) in {joined:.1f} s"
    checks, bad = [Check("rendezvous", "ok", count), check_head(ranks)], set[str]()
    gathered = ranks.gather(facts(config))
    same, odd = compare_facts({ranks.label(rank): found for rank, found in enumerate(gathered)})
    checks.append(same)
    bad |= {ranks.nodes[rank] for rank in range(ranks.size) if ranks.label(rank) in odd}
    checks += check_all_reduce(ranks, limits)
    for examine in (check_pairs, check_clocks, check_spread):
        check, named = examine(ranks, limits)
        checks.append(check)
        bad |= named if check.status == "fail" else set()
    seen, blind = check_folder_shared(ranks, folder)
    checks.append(seen)
    return Report("ranks", checks, {}, sorted(bad | blind))


def check_head(ranks: Ranks) -> Check:
    """With several machines the head's address must not be loopback."""
    head = os.environ.get("MASTER_ADDR", "")
    hosts = set(ranks.gather(socket.gethostname()))
    addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(head, None)}) if head else []
    local = bool(addresses) and all(ipaddress.ip_address(a.partition("%")[0]).is_loopback for a in addresses)
    return Check("head", "fail" if local and len(hosts) > 1 else "ok", f"{head or 'none'} is {', '.join(addresses)}")


def check_all_reduce(ranks: Ranks, limits: Thresholds) -> list[Check]:
    """Sums are right, and how fast: bus bandwidth, 2 (n - 1) / n of the bytes over the time, as nccl-tests count it."""
    expected = ranks.size * (ranks.size + 1) / 2
    small = torch.full((1000,), float(ranks.rank + 1), device=ranks.device)
    dist.all_reduce(small)
    wrong = [rank for rank, good in enumerate(ranks.gather(bool((small == expected).all()))) if not good]
    told = f"Σ of {ranks.size} ranks" if not wrong else f"wrong on {', '.join(map(ranks.label, wrong[:4]))}"
    checks = [Check("all-reduce", "fail" if wrong else "ok", told)]
    sizes = limits.all_reduce_mb if ranks.device.type == "cuda" else limits.all_reduce_mb[:1]
    speed, said = 0.0, []
    for size in sizes:
        tensor = torch.zeros(size * MIB // 4, device=ranks.device)
        best = float("inf")
        for _ in range(4):  # the first warms up
            dist.barrier()
            ranks.wait()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            ranks.wait()
            best = min(best, time.perf_counter() - started)
        seconds = max(ranks.gather(best))
        speed = 2 * (ranks.size - 1) / ranks.size * tensor.nbytes / seconds / 1e9
        said.append(f"{size} MB {speed:.2f} GB/s")
    least = limits.all_reduce_gb_per_second
    status: Status = "ok" if ranks.size == 1 or speed >= least else "fail"
    checks.append(Check("bus bandwidth", status, ", ".join(said), f"at least {least:g} GB/s" if least else ""))
    return checks


def rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds of disjoint pairs (the circle method): n - 1 rounds, n where n is odd."""
    seats: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def check_pairs(ranks: Ranks, limits: Thresholds) -> tuple[Check, set[str]]:
    """Each two nodes exchange, disjoint pairs at a time; a node all of whose links are slow is named."""
    size = limits.pair_mb if ranks.device.type == "cuda" else 1
    out = torch.zeros(size * MIB // 4, device=ranks.device)
    back = torch.empty_like(out)
    mine: dict[int, float] = {}
    for pairs in rounds(ranks.leaders):
        peer = next((b if a == ranks.rank else a for a, b in pairs if ranks.rank in (a, b)), None)
        for trial in range(3):
            dist.barrier()
            if peer is None:
                continue
            ranks.wait()
            started = time.perf_counter()
            operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, back, peer)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            ranks.wait()
            if trial:  # the first connects
                mine[peer] = min(mine.get(peer, float("inf")), time.perf_counter() - started)
    times = [found for found in ranks.gather(mine) if found]
    links = dict(zip(ranks.leaders, times, strict=True)) if times else {}
    return judge_pairs(ranks, links, size, limits)


def judge_pairs(
    ranks: Ranks, links: dict[int, dict[int, float]], size: int, limits: Thresholds
) -> tuple[Check, set[str]]:
    """`links[a][b]`: seconds in which a and b exchanged `size` MB each way."""
    if len(links) < 2:
        return Check("pairs", "skip", "", "one rank has no peers"), set()
    own = {rank: statistics.median(peers.values()) for rank, peers in links.items()}
    # Of the nodes' medians, not of all links: of four nodes' links half are a slow one's.
    usual = statistics.median(own.values())
    slow = [rank for rank, seconds in own.items() if seconds * limits.slow_pair > usual]
    count = len(links) * (len(links) - 1) // 2
    value = f"{count} links, median {size * MIB / usual / 1e9:.2f} GB/s each way"
    if len(links) < 4:  # with three, the two links of a slow node are the majority
        return Check("pairs", "ok", value, "too few nodes to name a slow one"), set()
    told = ", ".join(f"{ranks.label(rank)} {size * MIB / own[rank] / 1e9:.2f} GB/s" for rank in slow[:4])
    return Check("pairs", "fail" if slow else "ok", value, told), {ranks.nodes[rank] for rank in slow}


def check_clocks(ranks: Ranks, limits: Thresholds) -> tuple[Check, set[str]]:
    """Every leader's clock against rank 0's, by the quickest of several pings (Cristian's algorithm)."""
    others = [rank for rank in ranks.leaders if rank]
    skew, best = 0.0, float("inf")
    stamp = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    for other in others:
        for _ in range(PINGS):
            if ranks.rank == other:
                sent = time.time()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                theirs, received = float(stamp), time.time()
                if received - sent < best:
                    skew, best = (sent + received) / 2 - theirs, received - sent
            elif ranks.rank == 0:
                dist.recv(stamp, other)
                stamp.fill_(time.time())
                dist.send(stamp, other)
    found = {rank: value for rank, value in enumerate(ranks.gather(skew)) if rank in others}
    if not found:
        return Check("clock skew", "skip", "", "one rank has no peers"), set()
    worst = max(found, key=lambda rank: abs(found[rank]))
    ok = abs(found[worst]) <= limits.clock_skew_seconds
    detail = "" if ok else f"at most {limits.clock_skew_seconds:g} s against rank 0"
    value = f"{found[worst] * 1000:+.1f} ms, {ranks.label(worst)}"
    return Check("clock skew", "ok" if ok else "warn", value, detail), set()


def check_spread(ranks: Ranks, limits: Thresholds) -> tuple[Check, set[str]]:
    """The same product on every rank at the same time; the slowest against the median."""
    dist.barrier()
    seconds, _, _ = time_product(ranks.device)
    times = ranks.gather(seconds)
    usual = statistics.median(times)
    worst = max(range(ranks.size), key=times.__getitem__)
    ratio = times[worst] / usual
    slow = ratio > limits.gemm_spread and ranks.size > 1
    value = f"slowest {ratio:.2f} × the median, {ranks.label(worst)}"
    return Check("product spread", "warn" if slow else "ok", value, f"at most {limits.gemm_spread:g}"), set()


def check_folder_shared(ranks: Ranks, folder: Path) -> tuple[Check, set[str]]:
    """Rank 0 writes a word, every rank must read it: a run folder on a node's own disk loses checkpoints."""
    file = folder / ".shared"
    word = [f"{time.time_ns()}" if ranks.rank == 0 else ""]
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(word[0])
    dist.broadcast_object_list(word, src=0)
    end = time.monotonic() + SHOWN_LATE
    while not (seen := _reads(file, word[0])) and time.monotonic() < end:
        time.sleep(0.2)
    blind = [rank for rank, saw in enumerate(ranks.gather(seen)) if not saw]
    if ranks.rank == 0:
        file.unlink()
    told = f"not seen by {', '.join(map(ranks.label, blind[:4]))}" if blind else f"all see {folder}"
    return Check("shared folder", "fail" if blind else "ok", told), {ranks.nodes[rank] for rank in blind}


def _reads(file: Path, word: str) -> bool:
    try:
        return file.read_text() == word
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Entry point of each rank; rank 0 writes `ranks.json` and prints the table. 1 where something fails."""
    parser = argparse.ArgumentParser(prog="polylepis.launch.doctor.ranks")
    parser.add_argument("config", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--thresholds", type=Path)
    parser.add_argument("--quiet", action="store_true", help="write the report, say nothing, end with 0")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        config = load_config(options.config) if options.config else None
        report = examine_ranks(config, Thresholds.read(options.thresholds), options.out)
        if dist.get_rank() == 0:
            report.write(options.out)
            if not options.quiet:
                print(table([report]), flush=True)
        return int(report.status == "fail") if not options.quiet else 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
