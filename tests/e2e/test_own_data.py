from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Finished
from tests.e2e.runs import ROOT, RUN_DEADLINE_S, Workplace, records, step_records


@pytest.fixture(scope="module")
def exported(workplace: Workplace, own_data: Finished) -> Path:
    """The run's last checkpoint as a Hugging Face folder, by the command line."""
    assert own_data.code == 0, own_data.console
    folder = workplace.folder / "exported"
    launched = workplace.budget_rl("export", str(own_data.checkpoint), str(folder))
    assert launched.wait() == 0, launched.text
    assert f"exported to {folder}" in launched.text
    return folder


def test_a_run_learns_from_a_file_with_columns_of_its_own(own_data: Finished) -> None:
    assert own_data.code == 0, own_data.console
    steps = step_records(own_data.folder)
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["verdict/malformed"] < 1 for record in steps)
    for sample in records(own_data.folder / "samples.jsonl"):
        assert sample["prompt"].startswith("State the final answer")
        assert (sample["verdict"] == "correct") == (sample["extracted"] == sample["gold"])


def test_the_exported_folder_holds_a_model_its_tokenizer_and_a_card(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert "manifest.json" not in names


def test_transformers_and_vllm_load_the_exported_folder_and_agree(exported: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = tokenizer.encode("State the final answer to the following arithmetic problem: 5 + 3 + 1 =")
    prefill = tokenizer.encode("<think>", add_special_tokens=False)
    # In a process of its own: vLLM binds its process's threads to cores and leaves a process group behind.
    command = [sys.executable, "-m", "tests.e2e.generate_once", str(exported), json.dumps(ids), json.dumps(prefill)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    sequence = torch.tensor([[*ids, *answer["response_ids"]]])
    start = len(ids) + len(prefill)
    with torch.no_grad():
        logp_TV = model(sequence).logits[0, start - 1 : -1].log_softmax(-1)
    expected_T = logp_TV.gather(1, sequence[0, start:, None]).squeeze(1)
    assert len(answer["logp"]) == len(expected_T) > 0
    torch.testing.assert_close(torch.tensor(answer["logp"]), expected_T, atol=1e-3, rtol=0)


def test_eval_measures_a_checkpoint_with_and_without_budgets(workplace: Workplace, own_data: Finished) -> None:
    launched = workplace.budget_rl("eval", str(own_data.checkpoint), "eval.problems=8", "eval.samples=1")
    assert launched.wait() == 0, launched.text
    figures = json.loads(launched.text.strip().splitlines()[-1])
    assert figures.keys() >= {f"eval/{part}{name}" for part in ("", "32/", "64/", "96/") for name in ("accuracy", "tokens")}
    assert 0 <= figures["eval/accuracy"] <= 1
    assert 0 < figures["eval/tokens"] <= 160
