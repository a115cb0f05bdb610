"""How fast the kernels are, beside plain torch, verl and TRL:  python -m tests.benchmarks.kernels [--parts head advantage gpu]

`head`: log-prob and entropy from hidden states, forward and backward, at two shapes; seconds, and peak memory beyond inputs,
outputs and their gradients. `advantage`: 4096 rollouts. `gpu`, where there is one: every Triton kernel beside plain torch,
measured copy bandwidth and matrix rate; it needs torch, triton and rich only, and verl's kernel takes part if verl is installed.
All candidates of a table take turns in this process (TRL's functions in its own environment, one process a round); on the CPU
every result is checked against plain torch before its time counts. Exit status 0 when every target is met, 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kernels
from tests.benchmarks.head_work import make_inputs, measure_head

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("head", "advantage", "gpu")
SHAPES = {"SmolLM2-like": (2048, 576, 49_152), "Qwen-like": (512, 896, 151_936)}
"""Tokens, hidden size, vocabulary."""
TIME_TARGETS = {"SmolLM2-like": 0.85, "Qwen-like": 1.05}
"""Most of plain torch's time that ours may take."""
MEMORY_TARGET = 0.1
ROLLOUTS, GROUP, WIDTH = 4096, 16, 1024
CALLS = 10
"""Calls in a row of each advantage estimator before the next one takes its turn."""
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    met = True
    for part in options.parts:
        report = {"head": head, "advantage": advantage, "gpu": gpu}[part](options)
        met = met and report["met"]
        print(json.dumps(report))
    return 0 if met else 1


# -- log-prob and entropy from hidden states ---------------------------------------------------------------------------------


def _plain(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(h @ w.T, dim=-1)
    return logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)


def _verl(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    logits = h @ w.T
    return logprobs_from_logits(logits, target), entropy_from_logits(logits)


def _verl_fused(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(h, w, target)


CANDIDATES: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "plain torch": _plain,
    "ours (eager)": lambda h, w, t: kernels.linear_logprob_entropy(h, w, t, backend="eager"),  # pyright: ignore
    "verl torch_functional": _verl,
    "verl FusedLinearForPPO": _verl_fused,
}


def head(options: argparse.Namespace) -> dict[str, Any]:
    """Both shapes; returns the report."""
    report: dict[str, Any] = {"benchmark": "kernels-head", "threads": options.threads, "shapes": {}, "met": True}
    for name, shape in SHAPES.items():
        inputs = make_inputs(*shape)
        expected = measure_head(_plain, inputs)[2]
        seconds: dict[str, list[float]] = {}
        extra: dict[str, float] = {}
        for _ in range(options.rounds):
            for candidate, call in CANDIDATES.items():
                took, peak, found = measure_head(call, inputs)
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
                seconds.setdefault(candidate, []).append(took)
                extra[candidate] = max(extra.get(candidate, 0.0), peak)
            if TRL_PYTHON.exists():
                took, peak = measure_trl(shape, options.threads)
                seconds.setdefault("TRL", []).append(took)
                extra["TRL"] = max(extra.get("TRL", 0.0), peak)
        rows = {c: {"seconds": statistics.median(s), "extra_mb": extra[c]} for c, s in seconds.items()}
        plain, ours = rows["plain torch"], rows["ours (eager)"]
        ratio, memory = ours["seconds"] / plain["seconds"], ours["extra_mb"] / plain["extra_mb"]
        faster = all(ours["seconds"] < row["seconds"] for c, row in rows.items() if c.startswith(("verl", "TRL")))
        met = ratio <= TIME_TARGETS[name] and memory <= MEMORY_TARGET and faster
        report["shapes"][name] = {
            "shape": shape, "rows": rows, "time_ratio": ratio, "memory_ratio": memory, "faster_than_verl_and_trl": faster,
            "met": met,
        }  # fmt: skip
        report["met"] = report["met"] and met
        table = Table("candidate", "seconds", "of plain", "extra MB", title=f"{name}: T, H, V = {shape}, forward + backward")
        for candidate, row in rows.items():
            share = row["seconds"] / plain["seconds"]
            table.add_row(candidate, f"{row['seconds']:.2f}", f"{share:.2f}x", f"{row['extra_mb']:.0f}")
        _print(table)
        print(f"  time {ratio:.2f}x of plain (target {TIME_TARGETS[name]}), memory {memory:.3f}x (target {MEMORY_TARGET}), "
              f"faster than verl and TRL: {faster}: {'met' if met else 'MISSED'}")
    return report


def measure_trl(shape: tuple[int, int, int], threads: int) -> tuple[float, float]:
    """TRL's own functions in its own environment: seconds and MB."""
    script = Path(__file__).with_name("trl_head.py")
    command = [str(TRL_PYTHON), "-P", str(script), *map(str, shape), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL's side failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["extra_mb"]


# -- advantage ---------------------------------------------------------------------------------------------------------------


def advantage(options: argparse.Namespace) -> dict[str, Any]:
    """Group statistics alone and with the broadcast to tokens; returns the report."""
    import numpy as np
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_grpo_vectorized_outcome_advantage

    generator = torch.Generator().manual_seed(0)
    reward = torch.randint(0, 5, (ROLLOUTS,), generator=generator).float()
    group = torch.arange(ROLLOUTS) // GROUP
    budget = torch.tensor([512.0, 1024.0, 2048.0, 2560.0]).repeat_interleave(GROUP // 4).repeat(ROLLOUTS // GROUP)
    ceiling = torch.full((ROLLOUTS,), 3.0)
    start = torch.arange(ROLLOUTS + 1) * WIDTH
    names = np.array([f"prompt-{int(g)}" for g in group], dtype=object)

    def verl_by(call: Callable[..., Any], width: int) -> Callable[[], torch.Tensor]:
        scores, mask = torch.zeros(ROLLOUTS, width), torch.ones(ROLLOUTS, width)
        scores[:, -1] = reward
        return lambda: call(scores, mask, names, epsilon=1e-6)[0]

    packed = {"start_N": start, "tokens": ROLLOUTS * WIDTH}
    loop, vectorised = compute_grpo_outcome_advantage, compute_grpo_vectorized_outcome_advantage
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "verl loop": verl_by(loop, 1),
        "verl vectorised": verl_by(vectorised, 1),
        "ours": lambda: kernels.group_normalised_advantage(reward, group),
        "ours, two levels": lambda: kernels.hierarchical_advantage(reward, group, budget, ceiling),
        "verl vectorised, to tokens": verl_by(vectorised, WIDTH),
        "ours, to tokens": lambda: kernels.group_normalised_advantage(reward, group, **packed),
        "ours, two levels, to tokens": lambda: kernels.hierarchical_advantage(reward, group, budget, ceiling, **packed),
    }
    expected = rows["verl loop"]().flatten()
    for name in ("verl vectorised", "ours"):
        torch.testing.assert_close(rows[name]().flatten(), expected, atol=1e-5, rtol=1e-4)
    for name in ("verl vectorised, to tokens", "ours, to tokens"):
        torch.testing.assert_close(rows[name]().view(ROLLOUTS, WIDTH)[:, 0], expected, atol=1e-5, rtol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, call in rows.items():
            call()  # what ran before has left the caches full of its own
            for _ in range(CALLS):
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "loop / ours": (ms["verl loop"] / ms["ours"], 100.0),
        "vectorised / ours": (ms["verl vectorised"] / ms["ours"], 5.0),
        "vectorised / ours, to tokens": (ms["verl vectorised, to tokens"] / ms["ours, to tokens"], 1.0),
    }
    table = Table("estimator", "ms", title=f"{ROLLOUTS} rollouts in groups of {GROUP}; tokens: {WIDTH} each")
    for name, value in ms.items():
        table.add_row(name, f"{value:.3f}")
    _print(table)
    for name, (ratio, target) in ratios.items():
        print(f"  {name}: {ratio:.1f}x (target {target:g}x): {'met' if ratio >= target else 'MISSED'}")
    met = all(ratio >= target for ratio, target in ratios.values())
    return {"benchmark": "kernels-advantage", "ms": ms, "ratios": {n: r for n, (r, _) in ratios.items()}, "met": met}


# -- GPU ---------------------------------------------------------------------------------------------------------------------

GPU_SHAPE = 4096, 2048, 151_936
"""Tokens, hidden size, vocabulary of the comparison with plain torch."""
Step = Callable[[], Any]


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Against what this GPU can do; a report that says so where there is none."""
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here; nothing was measured")
        return {"benchmark": "kernels-gpu", "skipped": "no CUDA device", "met": True}
    name = torch.cuda.get_device_name()
    rows = {}
    title = f"{name}: T, H, V = {GPU_SHAPE}, bfloat16"
    table = Table("forward + backward", "ms", "plain torch", "MB", "plain torch", title=title)
    for work, (ours, plain) in _against_plain().items():
        ms = [1e3 * _gpu_seconds(call, options.rounds) for call in (ours, plain)]
        mb = [_gpu_peak(call) / 2**20 for call in (ours, plain)]
        rows[work] = {"ms": ms[0], "plain_ms": ms[1], "mb": mb[0], "plain_mb": mb[1]}
        table.add_row(work, *(f"{ms[k]:.2f}" for k in (0, 1)), *(f"{mb[k]:.0f}" for k in (0, 1)))
    _print(table)
    torch.cuda.empty_cache()
    times, figures = _against_device(options.rounds)
    for figure, (value, limit, sign) in figures.items():
        ok = value >= limit if sign == ">=" else value <= limit
        print(f"  {figure}: {value:.3f} (target {sign} {limit}): {'met' if ok else 'MISSED'}")
    met = all(v >= limit if sign == ">=" else v <= limit for v, limit, sign in figures.values())
    return {"benchmark": "kernels-gpu", "device": name, "rows": rows, "ms": {n: 1e3 * t for n, t in times.items()},
            "figures": {n: v for n, (v, _, _) in figures.items()}, "met": met}  # fmt: skip


def _against_plain() -> dict[str, tuple[Step, Step]]:
    """Each kernel and the same work in plain torch."""
    from kernels import triton_bucket

    tokens, width, vocabulary = GPU_SHAPE
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype) * scale

    target = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    logits = normal(tokens, vocabulary, scale=2.0).requires_grad_()
    student, dpo, reverse = [(normal(tokens, width), normal(vocabulary, width, scale=0.03)) for _ in range(3)]
    leaves = [x.requires_grad_() for x in student]
    rule, sample = kernels.TemperatureRule(0.0, 1.0, 1.0, tau=0.05), normal(256, vocabulary, dtype=torch.float32)
    reward, group = normal(ROLLOUTS, dtype=torch.float32), torch.arange(ROLLOUTS, device="cuda") // GROUP
    start = torch.arange(ROLLOUTS + 1, device="cuda") * WIDTH

    def step(values: Callable[[], tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> Step:
        def run() -> None:
            for leaf in inputs:
                leaf.grad = None
            sum(value.mean() for value in values()).backward()  # pyright: ignore
            for leaf in inputs:
                leaf.grad = None

        return run

    def plain(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = torch.log_softmax(z.float(), dim=-1)
        return logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(dim=-1)

    def alignment(backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.linear_alignment_kl((leaves[0], leaves[1]), dpo, reverse, r=2.0, backend=backend)[:1]

    ids = torch.arange(64, device="cuda").expand(tokens, 64).contiguous()
    teacher, tail = torch.full((tokens, 64), -5.0, device="cuda"), torch.full((tokens,), -1.0, device="cuda")

    def bucketed(kernel: Callable[..., torch.Tensor]) -> Callable[[], tuple[torch.Tensor]]:
        return lambda: (kernel(leaves[0], leaves[1], ids, teacher, tail),)

    def advantage(backend: str) -> torch.Tensor:
        return kernels.group_normalised_advantage(reward, group, start_N=start, tokens=ROLLOUTS * WIDTH, backend=backend)

    return {
        "log-prob, entropy of logits": (
            step(lambda: kernels.logprob_entropy(logits, target), [logits]), step(lambda: plain(logits), [logits]),
        ),
        "log-prob, entropy of hidden states": (
            step(lambda: kernels.linear_logprob_entropy(leaves[0], leaves[1], target), leaves),
            step(lambda: plain(leaves[0] @ leaves[1].T), leaves),
        ),
        "alignment KL of hidden states": (
            step(lambda: alignment("triton"), leaves), step(lambda: alignment("reference"), leaves),
        ),
        "bucketed KL of hidden states, 64 ids": (
            step(bucketed(triton_bucket.from_hidden), leaves),
            step(bucketed(partial(kernels.linear_bucket_kl, backend="reference")), leaves),
        ),
        "shaping 256 rows, float32": (
            lambda: kernels.shape_logits_(sample, temperature_rule=rule),
            lambda: kernels.shape_logits_(sample, temperature_rule=rule, backend="reference"),
        ),
        f"{ROLLOUTS} advantages to {WIDTH} tokens each (plain: eager)": (lambda: advantage("triton"), lambda: advantage("eager")),
    }  # fmt: skip


def _against_device(rounds: int) -> tuple[dict[str, float], dict[str, tuple[float, float, str]]]:
    """Seconds, and figures as (value, target, sign)."""
    logits = torch.randn(8192, 151_936, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(logits.shape[1], (logits.shape[0],), device="cuda")
    temperature, bias = torch.rand(len(target), device="cuda") + 0.5, torch.randn(len(target), device="cuda")
    shaped: dict[str, Any] = {"temperature_T": temperature, "bias_ids": torch.arange(5, device="cuda"), "bias_T": bias}
    rule = kernels.TemperatureRule(0.0, 1.0, 1.0, tau=0.05)
    size = logits.numel() * logits.element_size()
    sample = torch.randn(256, logits.shape[1], device="cuda")
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128_256, 4096, device="cuda", dtype=torch.bfloat16) * 0.02
    label = target % len(weight)
    copy = torch.empty_like(logits)
    calls: dict[str, Step] = {
        "copy": lambda: copy.copy_(logits),
        "logits": lambda: kernels.logprob_entropy(logits, target),
        "logits, shaped": lambda: kernels.logprob_entropy(logits, target, **shaped),
        "shape_logits_": lambda: kernels.shape_logits_(sample, temperature_rule=rule),
        "read + write": lambda: sample.mul_(1.0),
        "matmul": lambda: hidden @ weight.T,
        "hidden": lambda: kernels.linear_logprob_entropy(hidden, weight, label),
    }
    try:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    except ImportError as error:
        print(f"  verl's Triton kernel does not take part: {error}")
    else:
        calls["hidden, verl"] = lambda: linear_cross_entropy(hidden, weight, label, 1.0, "none")
    times = {name: _gpu_seconds(call, rounds) for name, call in calls.items()}
    figures = {
        "logits, of copy bandwidth": (size / times["logits"] / (2 * size / times["copy"]), 0.85, ">="),
        "hidden, of bf16 matrix rate": (times["matmul"] / times["hidden"], 0.60, ">="),
        "cost of temperature and bias": (times["logits, shaped"] / times["logits"] - 1, 0.03, "<="),
        "shape_logits_, of read + write": (times["shape_logits_"] / times["read + write"], 1.2, "<="),
    }
    if "hidden, verl" in times:
        figures["hidden, of verl's Triton kernel's time"] = times["hidden"] / times["hidden, verl"], 1.3, "<="
    return times, figures


def _gpu_peak(call: Step) -> int:
    """Bytes held at once beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _gpu_seconds(call: Step, rounds: int) -> float:
    """Of one call among a few in a row: what the host does for the next call overlaps with what the GPU does for this one."""
    for _ in range(3):
        call()
    times, row = [], 4
    for _ in range(max(rounds, 7)):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(row):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (1e3 * row))
    return statistics.median(times)


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    sys.exit(main())
