"""TRL's side of the comparison: GRPOTrainer on given prompts, with .venv-trl's python; writes one JSON line per step.

A script of its own, without imports from this project: TRL lives in another environment. Run by tests/benchmarks/trl.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Stopwatch(TrainerCallback):
    """Splits a step at the reward function: what comes before it is generation, what comes after is learning.

    GRPOTrainer generates inside the step, between `on_step_begin` and the reward function, with the very weights that it trains:
    there is nothing to sync.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.begun = self.generated = self.scored = 0.0
        self.tokens = self.correct = self.answers = 0
        self.__name__ = "correct"  # GRPOTrainer names a reward by it

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        ended = time.perf_counter()
        line = {
            "step_s": ended - self.begun, "generate_s": self.generated - self.begun, "score_s": self.scored - self.generated,
            "learn_s": ended - self.scored, "sync_s": 0.0, "tokens": self.tokens, "accuracy": self.correct / self.answers,
        }
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def __call__(self, completion_ids: list[list[int]], answer: list[str], **named: Any) -> list[float]:
        self.generated = time.perf_counter()
        rewards = [
            float(last_word(self.tokenizer.decode(ids, skip_special_tokens=True)) == expected)
            for ids, expected in zip(completion_ids, answer, strict=True)
        ]
        self.tokens = sum(len(ids) for ids in completion_ids)
        self.correct, self.answers = int(sum(rewards)), len(rewards)
        self.scored = time.perf_counter()
        return rewards


def last_word(text: str) -> str:
    """The answer: the last word, after the thinking if there was any, without punctuation around it."""
    words = text.rpartition("</think>")[2].split()
    return words[-1].strip(".,!?*$=") if words else ""


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The prompts as TRL wants them, text; refused if its tokenizer would not read the ids that the other side reads."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        found = tokenizer(text=[row["prompt"]])["input_ids"][0]
        if list(found) != row["ids"]:
            raise SystemExit(f"the sides would not do the same work: {row['prompt']!r} is {found} here and {row['ids']} there")
    return Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])


def configure(options: argparse.Namespace) -> GRPOConfig:
    """GRPO as the other side runs it; what only costs time (logging, saving) is off, checkpointed activations are an option."""
    return GRPOConfig(
        output_dir=str(options.out.parent / "trl-output"), use_cpu=True, use_vllm=False, bf16=options.dtype == "bfloat16",
        per_device_train_batch_size=options.batch, gradient_accumulation_steps=options.rollouts // options.batch,
        num_generations=options.samples, max_completion_length=options.cap, temperature=1.0, max_steps=options.steps,
        num_iterations=1, beta=0.0, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, delta=None, max_grad_norm=1.0,
        learning_rate=options.lr, lr_scheduler_type="constant", weight_decay=options.weight_decay,
        gradient_checkpointing=bool(options.checkpointing), shuffle_dataset=False, dataloader_pin_memory=False, report_to="none",
        save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=options.seed,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--prompts", "--out"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--threads", "--steps", "--samples", "--rollouts", "--batch", "--checkpointing", "--cap", "--seed"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--lr", "--weight-decay"):
        parser.add_argument(name, type=float, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # TRL's bfloat16 is mixed precision: float32 weights under autocast. Its default, too.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    stopwatch = Stopwatch(tokenizer, options.out)
    trainer = GRPOTrainer(
        model=model, reward_funcs=[stopwatch], args=configure(options), train_dataset=load_prompts(options.prompts, tokenizer),
        processing_class=tokenizer, callbacks=[stopwatch],
    )
    trainer.train()


if __name__ == "__main__":
    main()
