"""Stage 1: one node by itself, without rendezvous, so that a sick node cannot hide behind a hanging start."""

from __future__ import annotations

import csv
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from ...data.dataset import Dataset
from ...parallel.model import count_parameters
from ...pretrain.config import RunConfig, to_yaml
from ...pretrain.prepare import open_data
from ..snapshot import code_hash
from .report import Check, Report, Thresholds, guarded

GIB, MIB = 2**30, 2**20
BYTES_PER_PARAMETER = 12  # a checkpoint: weight and two moments in float32
WRITE_MB = 64
GPU_FIELDS = (
    "index", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending", "clocks_throttle_reasons.hw_slowdown", "clocks_throttle_reasons.hw_thermal_slowdown",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is examined: the run (or None), processes on this node, the folder, the thresholds."""

    config: RunConfig | None
    procs: int
    folder: Path
    limits: Thresholds

    @property
    def uses_gpus(self) -> bool:
        device = self.config.train.device if self.config else "auto"
        return device == "cuda" or (
            device == "auto" and (torch.cuda.is_available() or bool(shutil.which("nvidia-smi")))
        )


def node_name() -> str:
    """As the scheduler calls this machine, its host name otherwise."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def examine_node(subject: Subject) -> Report:
    """Every check of stage 1."""
    checks: list[tuple[str, Callable[[Subject], Check]]] = [
        ("memory", check_memory),
        ("shared memory", check_shm),
        ("open files", check_open_files),
        ("locked memory", check_locked_memory),
        ("disk space", check_space),
        ("disk speed", check_write_speed),
        ("data", check_data),
        ("clock", check_clock),
        ("network", check_network),
        ("rendezvous port", check_port),
        ("NCCL variables", check_nccl_environment),
        ("kernels", check_kernels),
        ("product", check_product),
    ]
    found = [guarded(name, lambda c=check: c(subject)) for name, check in checks]  # type: ignore[misc]
    if subject.uses_gpus:
        found += list(check_gpus(subject))
    else:
        found.append(Check("GPUs", "skip", "", "the run uses the CPU"))
    return Report(node_name(), found, facts(subject.config))


def facts(config: RunConfig | None) -> dict[str, str]:
    """What must be the same on every node."""
    import hashlib

    found = {"python": platform.python_version(), "torch": torch.__version__, "code": code_hash()}
    for name in ("megatron-core", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    if config is not None:
        found["configuration"] = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]
    return found


def check_memory(subject: Subject) -> Check:
    free, need = psutil.virtual_memory().available / GIB, subject.limits.free_memory_gib * subject.procs
    text = f"{free:.1f} GiB free"
    return Check("memory", "ok" if free >= need else "fail", text, f"{need:g} GiB for {subject.procs} processes")


def check_shm(subject: Subject) -> Check:
    size = shutil.disk_usage("/dev/shm").free / GIB
    least = subject.limits.shm_gib
    return Check("shared memory", "ok" if size >= least else "warn", f"{size:.1f} GiB in /dev/shm", f"{least:g} GiB")


def check_open_files(subject: Subject) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= subject.limits.open_files
    text = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Check("open files", "ok" if enough else "warn", text, f"ulimit -n {subject.limits.open_files}")


def check_locked_memory(subject: Subject) -> Check:
    """InfiniBand registers memory, and fails obscurely where it may not."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited")
    has_ib = any(Path("/sys/class/infiniband").glob("*"))
    return Check("locked memory", "fail" if has_ib else "ok", f"{soft // 1024} KiB",
                 "InfiniBand needs ulimit -l unlimited" if has_ib else "no InfiniBand here")  # fmt: skip


def check_space(subject: Subject) -> Check:
    """Room for the checkpoints that the run keeps, and the one that is being written."""
    free = shutil.disk_usage(_existing(subject.folder)).free / GIB
    if subject.config is None:
        return Check("disk space", "ok", f"{free:.1f} GiB free", "no configuration given")
    one = count_parameters(subject.config.model) * BYTES_PER_PARAMETER / GIB
    train = subject.config.train
    kept = train.keep or (train.steps // train.checkpoint_every if train.checkpoint_every else 1)
    need = one * (kept + 1)
    detail = f"{kept} + 1 checkpoints of {one:.2f} GiB need {need:.1f} GiB"
    return Check("disk space", "ok" if free >= need else "fail", f"{free:.1f} GiB free", detail)


def check_write_speed(subject: Subject) -> Check:
    folder = _existing(subject.folder)
    file = folder / f".doctor.{node_name()}.{os.getpid()}"
    block = os.urandom(MIB)
    started = time.perf_counter()
    try:
        with open(file, "wb") as out:
            for _ in range(WRITE_MB):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        speed = WRITE_MB / (time.perf_counter() - started)
    finally:
        file.unlink(missing_ok=True)
    least = subject.limits.write_mb_per_second
    return Check("disk speed", "ok" if speed >= least else "warn", f"{speed:.0f} MB/s with fsync", f"{least:g} MB/s")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def check_data(subject: Subject) -> Check:
    """Opens the data set, and reads the first and the last sample of the split."""
    config = subject.config
    if config is None:
        return Check("data", "skip", "", "no configuration given")
    dataset = open_data(config)
    if not isinstance(dataset, Dataset):
        return Check("data", "ok", "made up (mock)")
    split = dataset.split(config.data.split)
    read = sum(len(split.tokens(sample)) for sample in (0, len(split) - 1))
    return Check("data", "ok", f"{len(split):,} samples in {config.data.path}; the first and last, {read} tokens, read")


def check_clock(subject: Subject) -> Check:
    """Whether something keeps the clock; by how much it is off only stage 2 can tell."""
    try:
        result = subprocess.run(
            ["timedatectl", "show", "-p", "NTPSynchronized", "--value"], capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return Check("clock", "skip", "", "no timedatectl; stage 2 measures the skew")
    if result.returncode != 0:
        return Check("clock", "skip", "", "timedatectl does not answer; stage 2 measures the skew")
    synchronised = result.stdout.strip() == "yes"
    return Check("clock", "ok" if synchronised else "warn", "synchronised" if synchronised else "not synchronised")


def check_network(subject: Subject) -> Check:
    """Which interface leads to the head; a host name that means 127.0.0.1 keeps nodes apart."""
    several = int(os.environ.get("SLURM_NNODES", "1")) > 1
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"]
    head = os.environ.get("MASTER_ADDR")
    if head:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((head, 9))  # sends nothing, but asks the routing table
            own = probe.getsockname()[0]
        owner = next((n for n, found in psutil.net_if_addrs().items() if any(a.address == own for a in found)), "?")
        bad = several and own.startswith("127.")
        detail = "loopback cannot reach other nodes" if bad else f"up: {', '.join(up) or 'loopback alone'}"
        return Check("network", "fail" if bad else "ok", f"{owner} ({own}) leads to {head}", detail)
    addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    local = all(address.startswith("127.") or address == "::1" for address in addresses)
    return Check("network", "warn" if local and several else "ok", f"{socket.gethostname()} is {', '.join(addresses)}",
                 f"up: {', '.join(up) or 'loopback alone'}")  # fmt: skip


def check_port(subject: Subject) -> Check:
    port = os.environ.get("MASTER_PORT")
    if port is None or os.environ.get("SLURM_NODEID", "0") != "0":
        return Check("rendezvous port", "skip", "", "not the head" if port else "MASTER_PORT is not set")
    with socket.socket() as probe:
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            return Check("rendezvous port", "fail", port, f"{error.strerror}; set MASTER_PORT to a free one")
    return Check("rendezvous port", "ok", f"{port} is free")


def check_nccl_environment(subject: Subject) -> Check:
    """Names of interfaces and adapters that are not there are NCCL's least readable failure."""
    found = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))}
    there = {
        "SOCKET_IFNAME": list(psutil.net_if_stats()),
        "IB_HCA": [p.name for p in Path("/sys/class/infiniband").glob("*")],
    }
    for name, value in found.items():
        known = there.get(name.partition("_")[2])
        if known is None or value.startswith("^"):
            continue
        exact = value.startswith("=")
        for part in value.lstrip("=").split(","):
            wanted = part.partition(":")[0]
            if not any(one == wanted if exact else one.startswith(wanted) for one in known):
                return Check("NCCL variables", "fail", f"{name}={value}", f"there is {', '.join(known) or 'none'}")
    return Check("NCCL variables", "ok", ", ".join(f"{n}={v}" for n, v in sorted(found.items())) or "none set")


def check_kernels(subject: Subject) -> Check:
    """The scan runs, forward and backward, and gives numbers."""
    from ...kernels.ssd import ssd

    device = "cuda" if subject.uses_gpus and torch.cuda.is_available() else "cpu"
    x = torch.randn(1, 32, 2, 8, device=device, requires_grad=True)
    dt, A = torch.rand(1, 32, 2, device=device), -torch.rand(2, device=device)
    B, C = torch.randn(1, 32, 1, 16, device=device), torch.randn(1, 32, 1, 16, device=device)
    y = ssd(x, dt, A, B, C)
    assert isinstance(y, torch.Tensor)  # no final states were asked for
    y.sum().backward()
    assert x.grad is not None
    good = bool(x.grad.isfinite().all())
    return Check("kernels", "ok" if good else "fail", f"scan on {device}" + ("" if good else " gives NaN"))


def check_product(subject: Subject) -> Check:
    """One matrix product, timed, and checked for NaN; stage 2 compares the ranks'."""
    device = torch.device("cuda" if subject.uses_gpus and torch.cuda.is_available() else "cpu")
    seconds, flops, good = time_product(device)
    return Check("product", "ok" if good else "fail", f"{flops / seconds / 1e12:.3f} TFLOP/s on {device}",
                 "" if good else "gives NaN")  # fmt: skip


def time_product(device: torch.device, trials: int = 5) -> tuple[float, float, bool]:
    """Best of `trials` products: seconds, FLOPs, and whether the result is finite."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, out = float("inf"), a
    for _ in range(trials + 1):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        out = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best, 2.0 * size**3, bool(out.isfinite().all())


def check_gpus(subject: Subject) -> Iterator[Check]:
    """Number, errors, throttling and stray memory, as nvidia-smi tells them; copies between host and devices."""
    try:
        text = _nvidia_smi()
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        yield Check("GPUs", "fail", type(error).__name__, "nvidia-smi gives no answer")
        return
    gpus = [dict(zip(GPU_FIELDS, map(str.strip, row), strict=True)) for row in csv.reader(text.splitlines()) if row]
    enough = len(gpus) >= subject.procs
    names = ", ".join(sorted({gpu["name"] for gpu in gpus}))
    yield Check("GPUs", "ok" if enough else "fail", f"{len(gpus)} × {names}", f"{subject.procs} processes")
    bad: list[str] = []
    for gpu in gpus:
        if gpu["ecc.errors.uncorrected.volatile.total"] not in ("0", "[N/A]", "N/A", "[Not Supported]"):
            bad.append(f"GPU {gpu['index']}: {gpu['ecc.errors.uncorrected.volatile.total']} uncorrected ECC errors")
        if gpu["retired_pages.pending"] == "Yes":
            bad.append(f"GPU {gpu['index']}: a page waits to be retired, reset it")
        bad += [f"GPU {gpu['index']}: {name.rpartition('.')[2]}" for name in GPU_FIELDS[-2:] if gpu[name] == "Active"]
        if float(gpu["memory.used"]) > subject.limits.gpu_stray_mib:
            bad.append(f"GPU {gpu['index']}: {gpu['memory.used']} MiB held by another process")
    yield Check("GPU health", "fail" if bad else "ok", "; ".join(bad[:4]) or "no errors, no throttling, no strays")
    yield guarded("XID", _xid)
    if torch.cuda.is_available():
        yield guarded("host to device", lambda: _copies(subject))


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _xid() -> Check:
    """The driver's own error reports since boot."""
    result = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=30)
    if result.returncode != 0:
        return Check("XID", "skip", "", "dmesg is not readable here")
    lines = [line for line in result.stdout.splitlines() if "NVRM: Xid" in line]
    return Check("XID", "warn" if lines else "ok", f"{len(lines)} reports", lines[-1][:120] if lines else "")


def _copies(subject: Subject) -> Check:
    """Pinned memory to each device; and between neighbours, whether they see each other."""
    host = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    slowest = float("inf")
    for index in range(torch.cuda.device_count()):
        device = torch.empty_like(host, device=f"cuda:{index}")
        for _ in range(3):
            torch.cuda.synchronize(index)
            started = time.perf_counter()
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize(index)
            seconds = time.perf_counter() - started
        slowest = min(slowest, host.numel() / seconds / 1e9)
    count = torch.cuda.device_count()
    blind = sum(not torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b)
    least = subject.limits.host_to_device_gb_per_second
    peers = f"{blind} pairs of GPUs cannot see each other" if blind else "all GPUs see each other"
    return Check("host to device", "ok" if slowest >= least and not blind else "warn", f"{slowest:.1f} GB/s", peers)
