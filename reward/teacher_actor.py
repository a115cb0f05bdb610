"""The teacher worker: both frozen models of AlignDistil in one process; the driver makes it a Ray actor."""

from __future__ import annotations

from pathlib import Path

import torch

from reward.frozen import FrozenModel, check_tokens, in_order, plan_passes, response_positions
from reward.teacher import TeacherCard, check_request, compose_answer, join_answers
from reward.teacher_files import check_adapter, check_ids, check_model, check_same_tokenizer, load_tokenizer, source_folder
from rl.guidance import TeacherAnswer, TeacherRequest
from rl.teacher_settings import TeacherSettings


class TeacherActor:
    """Scores response tokens by two frozen models and the teacher composed of them; `start` before anything else.

    ``dtype``: float32 or bfloat16, of both models; composing is in float32. ``tokens_per_pass`` None is the settings'.
    """

    def __init__(
        self, settings: TeacherSettings, *, dtype: str, tokens_per_pass: int | None = None, trust_remote_code: bool = False
    ) -> None:
        self._settings = settings
        self._dtype = dtype
        self._tokens_per_pass = tokens_per_pass or settings.tokens_per_pass
        self._trust_remote_code = trust_remote_code
        self._models: tuple[FrozenModel, FrozenModel] | None = None

    def start(self, student_folder: str, dpo: str, reverse: str, base: str | None = None) -> TeacherCard:
        """Load both models: two whole ones, or with ``base`` two LoRA adapters on one base in memory.

        Each source is a folder or a hub id (`reward.teacher_files.check_teacher` gives absolute ones). Raises ConfigError for
        what `check_teacher` refuses, and for a model whose logits are not its head times its hidden states.
        """
        student = load_tokenizer(student_folder, "model.path", trust_remote_code=self._trust_remote_code)
        if base is None:
            first, second = self._whole("dpo", dpo, student), self._whole("reverse", reverse, student)
            parameters = first.parameters + second.parameters
        else:
            adapters = self._adapter("dpo", dpo), self._adapter("reverse", reverse)
            first = self._whole("base", base, student, adapter=adapters[0])
            second = first.beside(adapters[1])
            parameters = second.parameters
        check_ids(self._settings, first.vocab)
        self._models = first, second
        return TeacherCard(first.vocab, (first.head.shape[1], second.head.shape[1]), parameters)

    def score(self, request: TeacherRequest) -> TeacherAnswer:
        """What the teacher finds of the request's response tokens, on CPU; which columns, `settings.mode` says.

        Raises ValueError for a request whose parts do not fit, BudgetRLError for a sequence longer than a model's context or a
        token that the tokenizer does not have.
        """
        settings, models = self._settings, self._started()
        check_request(request, mode=settings.mode, vocabulary=models[0].vocab)
        check_tokens(request.token_T, models[0].vocab)
        target_R = request.token_T[response_positions(request.start_N, request.prompt_length_N)]
        nowhere = torch.zeros(0, dtype=torch.int64)
        answers, places = [self._answer(models, tuple(m.head[:0] for m in models), target_R, request, nowhere)], [nowhere]
        for part in plan_passes(request.token_T, request.start_N, request.prompt_length_N, self._tokens_per_pass):
            hidden = tuple(model.states(part) for model in models)
            answers.append(self._answer(models, hidden, target_R, request, part.index_P))
            places.append(part.index_P)
        columns = vars(join_answers(answers))
        return TeacherAnswer(**{name: in_order([value], places) for name, value in columns.items() if value is not None})

    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output heads (V, H) of the two models on CPU, cut to the tokenizer's size: what mode hidden needs at the learner.

        Where the model folders can be reached, `reward.heads.read_head` reads the same from there.
        """
        first, second = (model.head for model in self._started())
        # Copies: a view would travel with the rows that were cut off.
        copy = first.cpu().clone()
        return copy, copy if second.data_ptr() == first.data_ptr() else second.cpu().clone()

    def _answer(
        self,
        models: tuple[FrozenModel, FrozenModel],
        hidden: tuple[torch.Tensor, ...],
        target_R: torch.Tensor,
        request: TeacherRequest,
        index_P: torch.Tensor,
    ) -> TeacherAnswer:
        """About the tokens ``index_P`` of the request, whose hidden states these are; on CPU."""
        settings, device = self._settings, hidden[0].device
        found = compose_answer(
            settings.mode,
            (hidden[0], hidden[1]),
            (models[0].output, models[1].output),
            target_R[index_P].to(device),
            None if request.id_RK is None else request.id_RK[index_P].to(device),
            r=settings.r,
            eps=settings.eps,
            top_k=settings.top_k,
        )
        return TeacherAnswer(**{name: value.cpu() for name, value in vars(found).items() if value is not None})

    def _whole(self, name: str, source: str, student: object, *, adapter: Path | None = None) -> FrozenModel:
        """One of the models, once its tokenizer has proved to be the student's."""
        key = f"distil.teacher.{name}"
        folder = source_folder(self._settings, name, source, trust_remote_code=self._trust_remote_code)
        check_model(folder, key)
        tokenizer = load_tokenizer(str(folder), key, trust_remote_code=self._trust_remote_code)
        check_same_tokenizer(student, tokenizer, key)
        return FrozenModel.load(
            folder,
            dtype=self._dtype,
            device="cuda" if self._settings.gpus_per_worker > 0 else "cpu",
            trust_remote_code=self._trust_remote_code,
            adapter=adapter,
            tokens_per_pass=self._tokens_per_pass,
            plain=self._settings.mode == "hidden",
        )

    def _adapter(self, name: str, source: str) -> Path:
        folder = source_folder(self._settings, name, source, adapter=True)
        check_adapter(folder, f"distil.teacher.{name}")
        return folder

    def _started(self) -> tuple[FrozenModel, FrozenModel]:
        if self._models is None:
            raise RuntimeError("TeacherActor.start must come first: no models are loaded")
        return self._models
