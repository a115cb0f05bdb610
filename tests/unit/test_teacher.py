"""The teacher worker: its modes against the definitions, traffic, what it refuses; and its settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import kernels
from reward.frozen import response_positions
from reward.heads import Head, read_head
from reward.teacher import check_request, compose_answer
from reward.teacher_actor import TeacherActor
from reward.teacher_files import Sources, check_same_tokenizer, check_teacher
from rl.alignment import compose_teacher, contrastive_reward
from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError, ModelError
from rl.guidance import TeacherRequest
from rl.teacher_settings import TeacherSettings
from tests.small_models import RAGGED, V, batch, merged, one_by_one, save_adapter, save_model

SCALAR = ("teacher_logp_R", "alpha_R", "dpo_logp_R", "reverse_logp_R")
TOPK = ("alpha_R", "dpo_logp_R", "reverse_logp_R", "id_RK", "teacher_logp_RK", "tail_R")
R = sum(response for _, response in RAGGED)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Student, DPO model and a wider reverse-DPO model; heads of the first two are padded by 8 rows."""
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_model(root / "student", seed=1, vocab_size=V + 8),
        "dpo": save_model(root / "dpo", seed=2, vocab_size=V + 8),
        "reverse": save_model(root / "reverse", seed=3, hidden_size=32),
    }


def _actor(models: dict[str, Path], **settings: Any) -> TeacherActor:
    actor = TeacherActor(TeacherSettings(**settings), dtype="float32")
    actor.start(str(models["student"]), str(models["dpo"]), str(models["reverse"]))
    return actor


def _request(id_RK: torch.Tensor | None = None) -> TeacherRequest:
    return TeacherRequest(*batch(RAGGED), id_RK=id_RK)


def _logits(folder: Path) -> torch.Tensor:
    """Of all response rows by transformers, a sequence at a time, cut to the tokenizer: (R, V)."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_T, start_N, _ = batch(RAGGED)
    rows = []
    for (prompt, response), start in zip(RAGGED, start_N.tolist(), strict=False):
        with torch.no_grad():
            logits = lm(input_ids=token_T[None, start : start + prompt + response]).logits[0, :, :V]
        rows.append(logits[prompt - 1 : prompt + response - 1])
    return torch.cat(rows)


def _targets() -> torch.Tensor:
    token_T, start_N, prompt_length_N = batch(RAGGED)
    return token_T[response_positions(start_N, prompt_length_N)][:, None]


def test_scalar_returns_what_the_definition_says_of_each_token(models: dict[str, Path]) -> None:
    answer = _actor(models, mode="scalar", r=20.0, tokens_per_pass=20).score(_request())
    assert [name for name, value in vars(answer).items() if value is not None] == list(SCALAR)
    log_star, alpha = compose_teacher(_logits(models["dpo"]), _logits(models["reverse"]), r=20.0)
    # alpha is around 10 here: it multiplies what float32 leaves of the two models' difference.
    torch.testing.assert_close(answer.teacher_logp_R, log_star.gather(1, _targets())[:, 0], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(answer.alpha_R, alpha, atol=1e-4, rtol=1e-4)
    token_T = batch(RAGGED)[0]
    for name, found in (("dpo", answer.dpo_logp_R), ("reverse", answer.reverse_logp_R)):
        torch.testing.assert_close(found, one_by_one(models[name], RAGGED, token_T), atol=1e-5, rtol=0)
    assert answer.bytes == 16 * R
    assert answer.dpo_logp_R is not None and answer.reverse_logp_R is not None
    assert contrastive_reward(answer.dpo_logp_R, answer.reverse_logp_R).abs().max() > 0.01


def test_topk_answers_for_the_ids_asked_about_and_adds_its_own_likeliest_of_the_rest(models: dict[str, Path]) -> None:
    student = _logits(models["student"])
    asked = kernels.top_ids(student, torch.eye(V), 5)
    answer = _actor(models, mode="topk", r=2.0, top_k=3, student_k=5).score(_request(asked))
    assert [name for name, value in vars(answer).items() if value is not None] == sorted(TOPK, key=list(vars(answer)).index)
    assert answer.id_RK is not None and answer.teacher_logp_RK is not None and answer.tail_R is not None
    assert answer.id_RK.dtype == torch.int32 and answer.id_RK.shape == (R, 8)
    assert torch.equal(answer.id_RK[:, :5], asked)
    log_star, _ = compose_teacher(_logits(models["dpo"]), _logits(models["reverse"]), r=2.0)
    ids = answer.id_RK.long()
    torch.testing.assert_close(answer.teacher_logp_RK, log_star.gather(1, ids), atol=1e-3, rtol=1e-4)
    rest = log_star.scatter(1, asked.long(), -torch.inf)
    torch.testing.assert_close(rest.topk(3, dim=1).values, log_star.gather(1, ids[:, 5:]), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(answer.tail_R, log_star.scatter(1, ids, -torch.inf).logsumexp(dim=1), atol=1e-3, rtol=1e-4)
    assert all(len(set(row)) == 8 for row in answer.id_RK.tolist())
    assert torch.logaddexp(answer.teacher_logp_RK.logsumexp(dim=1), answer.tail_R).abs().max() < 1e-5


def test_topk_without_a_question_gives_the_teachers_own(models: dict[str, Path]) -> None:
    answer = _actor(models, mode="topk", r=2.0, top_k=4, student_k=0).score(_request())
    log_star, _ = compose_teacher(_logits(models["dpo"]), _logits(models["reverse"]), r=2.0)
    assert answer.id_RK is not None
    assert torch.equal(answer.id_RK.long(), log_star.topk(4, dim=1).indices)


def test_topk_of_every_id_and_hidden_states_give_the_learner_one_and_the_same_loss(models: dict[str, Path]) -> None:
    """The full KL three ways: from hidden states and heads at the learner, from all V ids, and from whole matrices of logits."""
    lm: Any = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    student_VH = lm.get_output_embeddings().weight.detach()[:V]
    hidden_RH = torch.randn(R, 16, generator=torch.Generator().manual_seed(9))
    hidden = _actor(models, mode="hidden", r=2.0)
    answer = hidden.score(_request())
    scalar = _actor(models, mode="scalar", r=2.0).score(_request())
    for name in ("dpo_logp_R", "reverse_logp_R"):  # what the contrastive reward is made of, in every mode
        torch.testing.assert_close(getattr(answer, name), getattr(scalar, name), atol=1e-5, rtol=0)
    assert answer.teacher_logp_R is None and answer.alpha_R is None and answer.id_RK is None
    assert answer.dpo_hidden_RH is not None and answer.reverse_hidden_RH is not None
    dpo_VH, reverse_VH = hidden.heads()
    kl, alpha = kernels.linear_alignment_kl(
        (hidden_RH, student_VH), (answer.dpo_hidden_RH, dpo_VH), (answer.reverse_hidden_RH, reverse_VH), r=2.0
    )
    every = _actor(models, mode="topk", r=2.0, top_k=V, student_k=0).score(_request())
    assert every.id_RK is not None and every.teacher_logp_RK is not None and every.tail_R is not None
    assert torch.isneginf(every.tail_R).all()
    bucketed = kernels.linear_bucket_kl(hidden_RH, student_VH, every.id_RK, every.teacher_logp_RK, every.tail_R)
    log_star, expected_alpha = compose_teacher(_logits(models["dpo"]), _logits(models["reverse"]), r=2.0)
    log_s = (hidden_RH @ student_VH.T).log_softmax(dim=-1)
    expected = (log_s.exp() * (log_s - log_star)).sum(dim=-1)
    torch.testing.assert_close(kl, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(bucketed, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(alpha, expected_alpha, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(every.alpha_R, expected_alpha, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["scalar", "topk", "hidden"])
def test_passes_and_chunks_change_no_answer(models: dict[str, Path], mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(2, dtype=torch.int32).expand(R, 2) if mode == "topk" else None
    whole = _actor(models, mode=mode, r=2.0).score(_request(ids))
    monkeypatch.setattr("reward.teacher.CHUNK_BYTES", 4 * V * 2)  # two rows
    pieces = TeacherActor(TeacherSettings(mode=mode, r=2.0), dtype="float32", tokens_per_pass=1)
    pieces.start(str(models["student"]), str(models["dpo"]), str(models["reverse"]))
    for name, value in vars(pieces.score(_request(ids))).items():
        expected = getattr(whole, name)
        assert (value is None) == (expected is None)
        if value is not None:
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
            assert not value.is_inference() and value.device.type == "cpu"


@pytest.mark.parametrize("mode", ["scalar", "topk", "hidden"])
def test_a_request_of_no_response_tokens_has_an_answer_of_none(models: dict[str, Path], mode: str) -> None:
    actor = _actor(models, mode=mode, top_k=3)
    nothing = torch.zeros(0, dtype=torch.int64)
    for request in (TeacherRequest(nothing, torch.tensor([0]), nothing), TeacherRequest(*batch([(2, 0)]))):
        answer = actor.score(request)
        assert answer.bytes == 0
        assert {name: len(v) for name, v in vars(answer).items() if v is not None}
        assert answer.id_RK is None or answer.id_RK.shape == (0, 3)


def test_topk_64_of_a_large_vocabulary_travels_in_less_than_a_400th_of_two_full_tensors() -> None:
    """Real answers about three tokens of V = 151936: 32 ids asked about, 32 of the teacher's."""
    generator, vocabulary, tokens = torch.Generator().manual_seed(0), 151_936, 3
    heads = (Head(torch.randn(vocabulary, 4, generator=generator)), Head(torch.randn(vocabulary, 6, generator=generator)))
    hidden = (torch.randn(tokens, 4, generator=generator), torch.randn(tokens, 6, generator=generator))
    asked = torch.stack([torch.randperm(vocabulary, generator=generator)[:32] for _ in range(tokens)]).int()
    target = torch.tensor([0, 5, vocabulary - 1])
    full = torch.zeros(2, tokens, vocabulary, dtype=torch.bfloat16)
    answer = compose_answer("topk", hidden, heads, target, asked, r=30.0, top_k=32)
    assert answer.bytes == tokens * (64 * 8 + 4 * 4)
    assert answer.bytes <= full.numel() * full.element_size() / 400
    scalar = compose_answer("scalar", hidden, heads, target, r=30.0)
    assert scalar.bytes == tokens * 16
    assert answer.dpo_logp_R is not None and scalar.dpo_logp_R is not None
    torch.testing.assert_close(answer.dpo_logp_R, scalar.dpo_logp_R)


def test_a_started_teacher_says_what_it_is_and_hands_its_heads_out(models: dict[str, Path]) -> None:
    actor = TeacherActor(TeacherSettings(), dtype="float32")
    card = actor.start(str(models["student"]), str(models["dpo"]), str(models["reverse"]))
    loaded = [AutoModelForCausalLM.from_pretrained(models[name]) for name in ("dpo", "reverse")]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in loaded]
    assert (card.vocabulary, card.hidden_sizes, card.parameters) == (V, (16, 32), sum(sizes))
    for head_VH, name in zip(actor.heads(), ("dpo", "reverse"), strict=True):
        assert torch.equal(head_VH, read_head(models[name], vocabulary=V))
        assert head_VH.untyped_storage().nbytes() == head_VH.numel() * 4  # nothing that was cut off travels with it


def test_bfloat16_models_are_composed_in_float32(models: dict[str, Path]) -> None:
    """Against the same bfloat16 hidden states and heads multiplied in float64; logits left in bfloat16 would be off by tenths."""
    actor = TeacherActor(TeacherSettings(mode="hidden"), dtype="bfloat16")
    actor.start(str(models["student"]), str(models["dpo"]), str(models["reverse"]))
    answer = actor.score(_request())
    assert answer.dpo_hidden_RH is not None and answer.reverse_hidden_RH is not None
    assert answer.dpo_hidden_RH.dtype == torch.bfloat16 == actor.heads()[0].dtype
    pairs = list(zip((answer.dpo_hidden_RH, answer.reverse_hidden_RH), actor.heads(), strict=True))
    log_star, alpha = compose_teacher(*(h.double() @ w.double().T for h, w in pairs), r=30.0)
    scalar = TeacherActor(TeacherSettings(mode="scalar"), dtype="bfloat16")
    scalar.start(str(models["student"]), str(models["dpo"]), str(models["reverse"]))
    found = scalar.score(_request())
    torch.testing.assert_close(found.teacher_logp_R, log_star.gather(1, _targets())[:, 0].float(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.alpha_R, alpha.float(), atol=1e-4, rtol=1e-4)


def test_two_adapters_on_one_base_teach_as_their_merged_models(models: dict[str, Path], tmp_path: Path) -> None:
    adapters = {name: save_adapter(models["student"], tmp_path / name, seed=i) for i, name in enumerate(("dpo", "reverse"))}
    wholes = {name: merged(models["student"], adapter, tmp_path / f"merged-{name}") for name, adapter in adapters.items()}
    settings = TeacherSettings(
        dpo=str(adapters["dpo"]), reverse=str(adapters["reverse"]), base=str(models["student"]), mode="scalar", r=2.0
    )
    sources = check_teacher(settings, models["student"])
    shared, whole = (TeacherActor(settings, dtype="float32") for _ in range(2))
    assert sources.dpo and sources.reverse
    card = shared.start(str(models["student"]), sources.dpo, sources.reverse, sources.base)
    whole_card = whole.start(str(models["student"]), str(wholes["dpo"]), str(wholes["reverse"]))
    assert card.parameters < 0.7 * whole_card.parameters and card.hidden_sizes == (16, 16)
    one, two = shared.score(_request()), whole.score(_request())
    for name in ("dpo_logp_R", "reverse_logp_R"):
        assert (getattr(one, name) - getattr(two, name)).abs().max() < 1e-5
    torch.testing.assert_close(one.teacher_logp_R, two.teacher_logp_R, atol=1e-3, rtol=1e-4)
    heads = shared.heads()
    assert heads[0] is heads[1] and torch.equal(heads[0], read_head(models["student"], vocabulary=V))


def _with_tokenizer(folder: Path, **change: Any) -> Path:
    """The embedded model under a tokenizer with two tokens swapped, or with other special tokens."""
    save_model(folder)
    tokenizer = tiny_tokenizer()
    if "swap" in change:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in change["swap"]}
        (a, i), (b, j) = ids.items()
        text = text.replace(f'"{a}": {i},', "<<>>").replace(f'"{b}": {j},', f'"{b}": {i},').replace("<<>>", f'"{a}": {j},')
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    elif "added" in change:
        tokenizer.add_tokens([change["added"]])
        tokenizer.save_pretrained(folder)
    else:
        for role, token in change.items():
            setattr(tokenizer, role, token)
        tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_is_not_the_students_is_refused_naming_the_first_token(models: dict[str, Path], tmp_path: Path) -> None:
    swapped = _with_tokenizer(tmp_path / "swapped", swap=(" check", "so"))
    low, high = sorted((tiny_tokenizer().convert_tokens_to_ids(" check"), tiny_tokenizer().convert_tokens_to_ids("so")))
    message = f"teacher.dpo: its tokenizer is not the student's; they differ in 2 tokens, first in .*, which is {low} in the"
    with pytest.raises(ConfigError, match=f"{message} student's and {high} in the teacher's"):
        check_teacher(TeacherSettings(dpo=str(swapped)), models["student"])
    longer = _with_tokenizer(tmp_path / "longer", added="zebra")
    with pytest.raises(ConfigError, match=f"teacher.reverse: .* first in 'zebra', which is absent in the student's and {V} in"):
        check_teacher(TeacherSettings(reverse=str(longer)), models["student"])
    with pytest.raises(ConfigError, match="first in 'zebra'"):  # and by the worker, which may be given others
        TeacherActor(TeacherSettings(), dtype="float32").start(str(models["student"]), str(models["dpo"]), str(longer))
    other_end = _with_tokenizer(tmp_path / "end", eos_token="no")
    with pytest.raises(ConfigError, match="eos_token is '<eos>' in the student's and 'no' in the teacher's"):
        check_teacher(TeacherSettings(dpo=str(other_end)), models["student"])
    other_padding = tiny_tokenizer()
    other_padding.pad_token = "no"
    check_same_tokenizer(tiny_tokenizer(), other_padding, "teacher.dpo")  # no response holds padding


def test_files_that_cannot_work_are_refused_before_anything_starts(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(message: str, kind: type[Exception] = ConfigError, **settings: Any) -> None:
        with pytest.raises(kind, match=message):
            check_teacher(TeacherSettings(**settings), models["student"])

    refused(f"teacher.dpo: there is no folder {tmp_path}/none", dpo=f"{tmp_path}/none")
    refused("teacher.reverse=.* is no model folder: it has no config.json", reverse=str(tmp_path))
    adapter = str(save_adapter(models["student"], tmp_path / "lora"))
    refused("teacher.dpo=.*lora is a LoRA adapter, and there is no base", dpo=adapter)
    refused("teacher.dpo=.* is no LoRA adapter", dpo=str(models["dpo"]), reverse=adapter, base=str(models["student"]))
    refused("teacher.base=.* is a LoRA adapter", dpo=adapter, reverse=adapter, base=adapter)
    head = str(save_adapter(models["student"], tmp_path / "head", target_modules=["q_proj", "lm_head"]))
    refused("teacher.reverse=.* changes more than inner layers", dpo=adapter, reverse=head, base=str(models["student"]))
    refused("distil.teacher.top_k=150 and distil.teacher.student_k=64 are 214 ids", mode="topk", top_k=150, student_k=64)
    bare = save_model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    refused("teacher.dpo=.*bare holds no safetensors weights", dpo=str(bare))
    save_model(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).rename(bare / f"no-{name}")
    refused("teacher.dpo=.*bare has no tokenizer", dpo=str(bare))
    (bare / "tokenizer.json").write_text("{")
    refused("teacher.dpo: no tokenizer could be loaded", ModelError, dpo=str(bare))


def test_capped_heads_are_refused_where_a_mode_wants_plain_ones(models: dict[str, Path], tmp_path: Path) -> None:
    import json

    config = json.loads((models["dpo"] / "config.json").read_text())
    folder = save_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    cases: list[tuple[Any, Path]] = [("hidden", models["student"]), ("hidden", folder), ("topk", folder)]
    for mode, student in cases:
        with pytest.raises(ConfigError, match="caps its logits .final_logit_softcapping=30"):
            check_teacher(TeacherSettings(dpo=str(folder), mode=mode), student)
    check_teacher(TeacherSettings(dpo=str(folder), mode="topk"), models["student"])
    check_teacher(TeacherSettings(dpo=str(folder), mode="scalar"), folder)
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    with pytest.raises(ConfigError, match="scales its logits"):
        check_teacher(TeacherSettings(dpo=str(folder), mode="scalar"), models["student"])


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="teacher.dpo=no-such/model is no folder here, and it cannot be had from the hub"):
        check_teacher(TeacherSettings(dpo="no-such/model"), models["student"])
    with pytest.raises(ConfigError, match="teacher.dpo=runs/a/b is no folder here"):  # not even a name that the hub could have
        check_teacher(TeacherSettings(dpo="runs/a/b"), models["student"])
    with pytest.raises(ConfigError, match="would run code from the hub, and no commit is pinned"):
        check_teacher(TeacherSettings(dpo="no-such/model"), models["student"], trust_remote_code=True)


def test_sources_are_absolute_and_those_to_come_are_none(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models["dpo"].parent)
    assert check_teacher(TeacherSettings(dpo="dpo"), models["student"]) == Sources(str(models["dpo"].resolve()), None)
    assert check_teacher(TeacherSettings(), models["student"]) == Sources(None, None)


def test_requests_whose_parts_do_not_fit_are_named(models: dict[str, Path]) -> None:
    request = _request()
    check: dict[str, Any] = {"mode": "topk", "vocabulary": V}
    ids = torch.arange(3, dtype=torch.int32).expand(R, 3)
    check_request(replace(request, id_RK=ids), **check)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"start_N": request.start_N[:-1]}, "start_N runs over"),
        ({"prompt_length_N": request.prompt_length_N[:-1]}, "prompt_length_N has shape .4,"),
        ({"id_RK": ids[:-1]}, f"id_RK must have shape .{R}, K."),
        ({"id_RK": ids + V - 2}, "distinct ids"),
        ({"id_RK": ids.clone().fill_(1)}, "distinct ids"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            check_request(replace(request, **change), **check)
    with pytest.raises(ValueError, match="id_RK is what mode topk asks about; the mode is hidden"):
        _actor(models).score(replace(request, id_RK=ids))
    with pytest.raises(RuntimeError, match="start must come first"):
        TeacherActor(TeacherSettings(), dtype="float32").score(request)


def test_settings_that_contradict_themselves_are_refused() -> None:
    for settings, message in (
        ({"base": "a/b", "dpo": "a/c"}, "teacher.reverse names none"),
        ({"dpo_revision": "abc"}, "distil.teacher.dpo_revision is set and distil.teacher.dpo is not"),
        ({"eps": 0.0}, "eps"),
        ({"mode": "full"}, "mode"),
    ):
        with pytest.raises(ValidationError, match=message):
            TeacherSettings.model_validate(settings)


def test_settings_load_neither_torch_nor_ray() -> None:
    code = "import sys; import rl.teacher_settings; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
