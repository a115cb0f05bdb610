"""What a composed teacher says of response tokens, from the hidden states and heads of its two models: no model in sight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import kernels
from reward.heads import Head
from rl.alignment import compose_teacher
from rl.guidance import TeacherAnswer, TeacherMode, TeacherRequest

CHUNK_BYTES = 64 * 2**20
"""Float32 logits of one model that are held at a time; composing holds about five such matrices."""


@dataclass(frozen=True)
class TeacherCard:
    """What the driver and the learners need to know of a teacher that has started."""

    vocabulary: int
    """Tokens of the tokenizer: heads, the student's too, are cut to it."""
    hidden_sizes: tuple[int, int]
    """Width of the hidden states of the DPO and of the reverse-DPO model."""
    parameters: int
    """Of all that is in memory; a base under two adapters counts once."""


def compose_answer(
    mode: TeacherMode,
    hidden: tuple[torch.Tensor, torch.Tensor],
    heads: tuple[Head, Head],
    target_R: torch.Tensor,
    id_RK: torch.Tensor | None = None,
    *,
    r: float,
    eps: float = 1e-3,
    top_k: int = 32,
) -> TeacherAnswer:
    """The answer of the teacher composed of two models (`rl.alignment.compose_teacher`) about R response tokens.

    hidden: final hidden states (R, H) of the DPO and the reverse-DPO model at the positions that predict the tokens; H may
    differ. heads: theirs, of one vocabulary. target_R (R) integer: the tokens. id_RK (R, K) integer, distinct in each row: ids
    that the student asks about (topk), to which the teacher adds the ``top_k`` likeliest of all others. Composed in float32 a few
    rows at a time; for ``hidden`` nothing is, only the tokens' log-probs are computed. Columns are on the hidden states' device.
    """
    if mode == "hidden":
        logps = [
            kernels.linear_logprob_entropy(hidden_RH, head.weight_VH, target_R)[0]
            for hidden_RH, head in zip(hidden, heads, strict=True)
        ]
        return TeacherAnswer(
            dpo_logp_R=logps[0], reverse_logp_R=logps[1], dpo_hidden_RH=hidden[0], reverse_hidden_RH=hidden[1]
        )
    parts = []
    for part in _chunks(target_R.numel(), heads[0].weight_VH.shape[0]):
        logits = [head.logits(hidden_RH[part]) for head, hidden_RH in zip(heads, hidden, strict=True)]
        asked = None if id_RK is None else id_RK[part].long()
        parts.append(_compose(mode, logits, target_R[part].long()[:, None], asked, r=r, eps=eps, top_k=top_k))
    return join_answers(parts)


def join_answers(answers: Sequence[TeacherAnswer]) -> TeacherAnswer:
    """The answers about several portions of tokens as one; all of one mode."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in vars(answers[0])}
    return TeacherAnswer(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


def check_request(request: TeacherRequest, *, mode: TeacherMode, vocabulary: int) -> None:
    """Raise ValueError for a request whose parts do not fit each other or the mode."""
    tokens, sequences = request.token_T.numel(), request.start_N.numel() - 1
    ends = (int(request.start_N[0]), int(request.start_N[-1])) if sequences >= 0 else None
    if ends != (0, tokens) or request.prompt_length_N.shape != (sequences,):
        raise ValueError(
            f"start_N runs over {ends} and prompt_length_N has shape {tuple(request.prompt_length_N.shape)}; "
            f"with {tokens} tokens and {sequences} sequences they must be (0, {tokens}) and ({sequences},)"
        )
    if request.id_RK is None:
        return
    if mode != "topk":
        raise ValueError(f"id_RK is what mode topk asks about; the mode is {mode}")
    responses = tokens - int(request.prompt_length_N.sum())
    if request.id_RK.dim() != 2 or request.id_RK.shape[0] != responses:
        raise ValueError(f"id_RK must have shape ({responses}, K), one row per response token, got {tuple(request.id_RK.shape)}")
    sorted_RK = request.id_RK.long().sort(dim=1).values
    if bool(((sorted_RK < 0) | (sorted_RK >= vocabulary)).any()) or bool(sorted_RK.diff(dim=1).eq(0).any()):
        raise ValueError(f"id_RK must hold distinct ids of [0, {vocabulary}) in each row")


def _compose(
    mode: TeacherMode,
    logits: list[torch.Tensor],
    target_R1: torch.Tensor,
    id_RK: torch.Tensor | None,
    *,
    r: float,
    eps: float,
    top_k: int,
) -> TeacherAnswer:
    """The answer about one chunk of rows."""
    log_star_RV, alpha_R = compose_teacher(logits[0], logits[1], r=r, eps=eps)
    dpo_logp_R, reverse_logp_R = ((z.gather(1, target_R1) - z.logsumexp(dim=1, keepdim=True))[:, 0] for z in logits)
    if mode == "scalar":
        return TeacherAnswer(
            teacher_logp_R=log_star_RV.gather(1, target_R1)[:, 0],
            alpha_R=alpha_R,
            dpo_logp_R=dpo_logp_R,
            reverse_logp_R=reverse_logp_R,
        )
    asked_RK = target_R1[:, :0] if id_RK is None else id_RK
    asked_logp_RK = log_star_RV.gather(1, asked_RK)
    # What is left after the ids asked about, and then after the teacher's own, is what the tail is made of.
    rest_RV = log_star_RV.scatter_(1, asked_RK, -torch.inf)
    own_logp_RK, own_RK = rest_RV.topk(top_k, dim=1)
    tail_R = rest_RV.scatter_(1, own_RK, -torch.inf).logsumexp(dim=1)
    return TeacherAnswer(
        id_RK=torch.cat([asked_RK, own_RK], dim=1).int(),
        teacher_logp_RK=torch.cat([asked_logp_RK, own_logp_RK], dim=1),
        tail_R=tail_R,
        alpha_R=alpha_R,
        dpo_logp_R=dpo_logp_R,
        reverse_logp_R=reverse_logp_R,
    )


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, max(rows, 1), size):  # once for no rows, whose answer has columns too
        yield slice(start, min(start + size, rows))
