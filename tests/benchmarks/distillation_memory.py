"""Peak memory of a distillation step beside a plain policy step:  python -m tests.benchmarks.distillation_memory

A model of SmolLM2-135M's shape with random weights (30 layers of 576, vocabulary 49152), float32: one update on the same
answers by the real learner, each kind in a process of its own. Shown are the process's largest resident size, and what of it
came with the update: the rest is weights, gradients and optimiser state, which all kinds share, and in mode hidden the
teacher's two heads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

KINDS = ("policy", "scalar", "topk", "hidden")
VOCABULARY, HIDDEN, LAYERS, HEADS = 49152, 576, 30, 9
IDS = 64
TARGET = 1.5
MIB = 2**20


def main() -> int:
    """Measure every kind and print the table; exit status 1 when a kind takes more than the target."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.distillation_memory")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="response tokens of each")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.folder, options.rollouts, options.tokens)))
        return 0
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch))
        for kind in KINDS:
            command = [sys.executable, "-m", "tests.benchmarks.distillation_memory", "--kind", kind, "--folder", scratch]
            sizes = [f"--rollouts={options.rollouts}", f"--tokens={options.tokens}"]
            text = subprocess.run([*command, *sizes], check=True, stdout=subprocess.PIPE, text=True).stdout
            found[kind] = json.loads(text.strip().splitlines()[-1])
    tokens = options.rollouts * options.tokens
    title = f"{tokens} response tokens, V {VOCABULARY}"
    table = Table("step", "peak MiB", "of policy", "with the update MiB", "of policy", title=title)
    for kind, sizes in found.items():
        ratios = {name: sizes[name] / found["policy"][name] for name in ("peak", "update")}
        table.add_row(kind, f"{sizes['peak']:.0f}", f"{ratios['peak']:.2f}", f"{sizes['update']:.0f}", f"{ratios['update']:.2f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(json.dumps(found))
    return int(any(sizes["peak"] > TARGET * found["policy"]["peak"] for sizes in found.values()))


def write_model(folder: Path) -> None:
    """A Llama of SmolLM2-135M's shape; its random weights do not change what it takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(kind: str, folder: Path, rollouts: int, tokens: int) -> dict[str, float]:
    """Largest resident size of this process in MiB, whole and beyond what it was before its first update."""
    import torch

    from rl.batch import pack_rollouts
    from rl.guidance import Guidance, HeadSources
    from rl.learner import Learner
    from rl.process_group import join_process_group
    from rl.replay import Distillation, Task
    from rl.settings import LearnerSettings, LossSettings
    from tests.builders import make_lease, make_prompt, make_rollout

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    join_process_group(deadline_s=60)
    torch.manual_seed(0)
    heads = HeadSources(folder, folder, VOCABULARY) if kind == "hidden" else None
    learner = Learner(folder, LearnerSettings(tokens_per_microbatch=1024), LossSettings(), dtype="float32", heads=heads)
    leases = [make_lease(prompt=make_prompt(i, token_ids=(5, 6, 7)), group=i) for i in range(rollouts)]
    ids = torch.randint(0, VOCABULARY, (rollouts, tokens)).tolist()
    rows = [make_rollout(lease, generated=row, logp_T=[-10.8] * tokens) for lease, row in zip(leases, ids, strict=True)]
    batch = pack_rollouts(rows, torch.randn(rollouts), torch.zeros(rollouts))
    count = batch.tokens
    columns = {
        "scalar": lambda: {"teacher_logp_T": torch.full((count,), -10.8), "alpha_T": torch.ones(count)},
        "topk": lambda: {
            "alpha_T": torch.ones(count), "id_TK": torch.arange(IDS).expand(count, IDS).contiguous(),
            "teacher_logp_TK": torch.full((count, IDS), -10.8), "tail_T": torch.full((count,), -0.01),
        },
        "hidden": lambda: {"dpo_hidden_TH": torch.randn(count, HIDDEN), "reverse_hidden_TH": torch.randn(count, HIDDEN)},
    }  # fmt: skip
    task = Task()
    if kind != "policy":
        batch = replace(batch, guidance=Guidance(weight_T=batch.loss_mask_T.float(), **columns[kind]()))
        terms = Distillation(mode=kind, rollouts=(rollouts,), vocabulary=VOCABULARY)  # type: ignore[arg-type]
        task = Task(objective="distillation", distillation=terms)
    before = _resident()
    learner.update(batch, global_tokens=[int(batch.loss_mask_T.sum())], total_updates=None, task=task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak, "update": peak - before}


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


if __name__ == "__main__":
    sys.exit(main())
