"""Our package `kernels` shares its name with a distribution that transformers probes: it must not be mistaken for it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "import kernels, transformers.utils.import_utils as probe; "
    "print(kernels.__file__); print(kernels.__version__); print(probe.is_kernels_available())"
)


def _run(command: list[str], *, cwd: Path, python_path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, f"{command} failed:\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that no build folder is left behind."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = ["pyproject.toml", "README.md", "LICENSE", "rl", "rollout", "reward", "kernels", "configs", "launch"]
    _run(["cp", "-r", *tracked, str(source)], cwd=ROOT)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*pip, "--wheel-dir", str(folder), str(source)], cwd=folder)
    (built,) = folder.glob("budget_rl-*.whl")
    return built


def test_transformers_does_not_take_our_kernels_for_the_hub_package_in_the_checkout() -> None:
    place, version, available = _run([sys.executable, "-c", PROBE], cwd=ROOT).split("\n")[:3]
    assert Path(place).is_relative_to(ROOT)
    assert (version, available) == ("0.0.0", "False")


def test_transformers_does_not_take_our_kernels_for_the_hub_package_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    _run(pip, cwd=elsewhere)
    place, version, available = _run([sys.executable, "-c", PROBE], cwd=elsewhere, python_path=site).split("\n")[:3]
    assert Path(place).is_relative_to(site)
    assert (version, available) == ("0.0.0", "False")


def test_the_kernels_need_torch_and_nothing_else() -> None:
    """Import them and run one of each kind, with every other package of ours and of theirs made impossible to import."""
    probe = (
        "import sys\n"
        "for name in ('rl', 'rollout', 'reward', 'launch', 'ray', 'verl', 'vllm', 'deepspeed', 'transformers', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "import torch, kernels\n"
        "kernels.linear_logprob_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64))\n"
        "kernels.group_normalised_advantage(torch.ones(2), torch.zeros(2, dtype=torch.int64))\n"
        "print('triton' in sys.modules)"
    )
    assert _run([sys.executable, "-c", probe], cwd=ROOT).strip() == "False"


def test_the_version_stays_below_the_one_transformers_looks_for(wheel: Path) -> None:
    major, minor = (int(part) for part in wheel.name.split("-")[1].split(".")[:2])
    assert (major, minor) < (0, 10)


def test_the_wheel_carries_every_configuration_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {path.relative_to(ROOT).as_posix() for folder in ("configs", "launch") for path in (ROOT / folder).rglob("*.yaml")}
    assert "configs/quickstart.yaml" in shipped
    assert shipped <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "rl", "rollout", "reward", "kernels", "configs", "launch",
    }  # fmt: skip


def test_the_wheel_installs_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "budget-rl = launch.command:main" in archive.read(entry_points).decode()
