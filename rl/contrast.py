"""T-REG's two prompts for every answer, the credit its tokens get from them, and the test that the credit has the right sign.

The answer's token ids stand unchanged behind both prompts; a frozen model scores them; the arithmetic is reward/treg.py's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from transformers import PreTrainedTokenizerBase

from reward.treg import token_reward
from rl.data import DataError
from rl.errors import BudgetRLError, ConfigError
from rl.guidance import TeacherRequest
from rl.preference_settings import ContrastSettings
from rl.prompts import PromptEncoder

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ContrastRequests:
    """What to ask the frozen model about a number of answers."""

    better: TeacherRequest
    """The answers kept, in order, each behind the prompt that asks for a better one."""
    worse: TeacherRequest
    """The same answers behind the prompt that asks for a worse one."""
    credited_R: torch.Tensor
    """bool (R): response tokens that can get credit: neither special nor part of a prefill."""
    kept_N: torch.Tensor
    """bool (N): which of the answers these are; the others have no room in the model's context."""

    @property
    def too_long(self) -> int:
        """Answers left out, to be counted."""
        return int((~self.kept_N).sum())

    def credits(self, better_logp_R: torch.Tensor, worse_logp_R: torch.Tensor) -> list[torch.Tensor | None]:
        """The token rewards of each answer: float32 (its length) in [-1/2, 1/2], or None for one that was left out.

        The log-probs are the frozen model's for the response tokens of ``better`` and ``worse``; nats. Special tokens and the
        prefill get 0. Raises ValueError for another number of log-probs, or for one that is NaN or +inf.
        """
        if better_logp_R.shape != self.credited_R.shape:
            raise ValueError(f"{self.credited_R.numel()} log-probs were asked for, and there are {tuple(better_logp_R.shape)}")
        credit_R = token_reward(better_logp_R, worse_logp_R).float().cpu() * self.credited_R
        lengths = self.better.start_N.diff() - self.better.prompt_length_N
        of_kept = iter(credit_R.split(lengths.tolist()))
        return [next(of_kept) if kept else None for kept in self.kept_N.tolist()]


class ContrastEncoder:
    """Puts answers behind the two prompts, encoded as training prompts are.

    max_length: the model's context in tokens. eos_ids: end-of-sequence ids beside the tokenizer's special ones. section: where
    the templates stand in the configuration, for messages.
    """

    def __init__(
        self,
        contrast: ContrastSettings,
        encoder: PromptEncoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        eos_ids: Collection[int] = (),
        section: str = "treg.contrast",
    ) -> None:
        self._templates = {"better": contrast.better, "worse": contrast.worse}
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._section = section
        self.special_ids = frozenset(tokenizer.all_special_ids) | frozenset(eos_ids)
        """Ids that never get credit."""

    def check(self, question: str, response_ids: Sequence[int]) -> None:
        """Try the templates on one answer, before anything starts.

        Raises:
            ConfigError: a template that the tokenizer cannot spell, or spells with unknown tokens; two that read alike; prompts
                that leave no room for an answer.
        """
        unknown, draft = self._tokenizer.unk_token_id, self._draft(response_ids)
        prompts = {name: self._encode(name, question, draft) for name in self._templates}
        for name, ids in prompts.items():
            if unknown is not None and unknown in ids and unknown not in (*self._encoder.encode(question), *response_ids):
                raise ConfigError(
                    f"{self._section}.{name} has words that the tokenizer of model.path does not know",
                    fix="write it in words that the model was trained on",
                )
            if len(ids) >= self._max_length:
                raise ConfigError(
                    f"{self._section}.{name} makes a prompt of {len(ids)} tokens, and the model reads at most {self._max_length}",
                    fix="shorten the template, leave {draft} out of it, or lower data.max_prompt_length or rollout.max_length",
                )
        if prompts["better"] == prompts["worse"]:
            raise ConfigError(
                f"{self._section}.better and .worse read alike, so that every token reward would be 0",
                fix="change one of them",
            )

    def requests(
        self, questions: Sequence[str], responses: Sequence[Sequence[int]], *, prefill_N: Sequence[int] | None = None
    ) -> ContrastRequests:
        """What to ask about these answers to these questions.

        prefill_N: how many tokens of each answer we put there ourselves; they get no credit (None: none). An answer is left out
        where it does not fit into the model's context behind one of the prompts.

        Raises:
            ValueError: numbers of questions, answers and prefills that differ.
            ConfigError: a template that the tokenizer cannot spell with this question.
        """
        prefills = [0] * len(responses) if prefill_N is None else prefill_N
        if not len(questions) == len(responses) == len(prefills):
            raise ValueError(f"{len(questions)} questions, {len(responses)} answers, {len(prefills)} prefills")
        behind: dict[str, list[tuple[tuple[int, ...], Sequence[int]]]] = {name: [] for name in self._templates}
        credited: list[bool] = []
        kept: list[bool] = []
        for question, response, prefill in zip(questions, responses, prefills, strict=True):
            draft = self._draft(response)
            prompts = {name: self._encode(name, question, draft) for name in self._templates}
            kept.append(max(map(len, prompts.values())) + len(response) <= self._max_length)
            if kept[-1]:
                for name, prompt in prompts.items():
                    behind[name].append((prompt, response))
                credited += [place >= prefill and token not in self.special_ids for place, token in enumerate(response)]
        return ContrastRequests(
            better=_request(behind["better"]),
            worse=_request(behind["worse"]),
            credited_R=torch.tensor(credited, dtype=torch.bool),
            kept_N=torch.tensor(kept, dtype=torch.bool),
        )

    def _draft(self, response_ids: Sequence[int]) -> str:
        if not any("{draft}" in template for template in self._templates.values()):
            return ""
        return str(self._tokenizer.decode(list(response_ids), skip_special_tokens=True)).strip()

    def _encode(self, name: str, question: str, draft: str) -> tuple[int, ...]:
        values = {"question": question, "draft": draft}
        # in one pass, so that a question with {draft} in it stays as it is
        text = re.sub(r"\{(question|draft)\}", lambda found: values[found[1]], self._templates[name])
        try:
            return self._encoder.encode(text)
        except DataError as error:
            raise ConfigError(
                f"{self._section}.{name}: {error.cause}",
                fix="write the template in words that the tokenizer of model.path can spell",
            ) from error


def _request(rows: Sequence[tuple[tuple[int, ...], Sequence[int]]]) -> TeacherRequest:
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in rows], dtype=torch.int64)
    return TeacherRequest(
        token_T=torch.tensor([token for prompt, response in rows for token in (*prompt, *response)], dtype=torch.int64),
        start_N=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_length_N=torch.tensor([len(prompt) for prompt, _ in rows], dtype=torch.int64),
    )


# ---- the self-test ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corruption:
    """An answer with some tokens replaced."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    """Where; empty where nothing could be replaced."""


@dataclass(frozen=True)
class SignTest:
    """How often a token of an answer earned more than the token put in its place."""

    share: float
    """Share of the places where it did; equal is not more. NaN where there are no places."""
    places: int
    lower: float
    """Lower end of Wilson's 95 % confidence interval of the share; 0 where there are no places."""


def number_ids(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> frozenset[int]:
    """The ids in these answers whose text has a digit, special ones left out."""
    special = set(tokenizer.all_special_ids)
    return frozenset(
        token
        for token in {token for answer in answers for token in answer} - special
        if any(character.isdigit() for character in tokenizer.decode([token]))
    )


def corrupt(
    answers: Sequence[Sequence[int]],
    *,
    number_ids: Collection[int],
    fixed_ids: Collection[int] = (),
    prefill_N: Sequence[int] | None = None,
    share: float = 0.2,
    seed: int = 0,
) -> list[Corruption]:
    """The answers with some of their numbers replaced by other numbers that occur in them.

    Of each answer ``share`` of its number tokens, at least one, become another number token of these answers, drawn evenly from
    the distinct ones. In an answer without numbers, or where all answers have one and the same, it is any token of the answers
    instead. An answer keeps its length; tokens of ``fixed_ids`` (special ones) and of the prefill stay. The result is a function
    of the arguments.

    Raises ValueError for a share outside (0, 1], or another number of prefills than answers.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    prefills = [0] * len(answers) if prefill_N is None else prefill_N
    fixed = frozenset(fixed_ids)
    free = [
        [place for place, token in enumerate(answer) if place >= prefill and token not in fixed]
        for answer, prefill in zip(answers, prefills, strict=True)
    ]
    everything = sorted({answer[place] for answer, places in zip(answers, free, strict=True) for place in places})
    numbers = [token for token in everything if token in number_ids]
    corrupted = []
    for index, (answer, places) in enumerate(zip(answers, free, strict=True)):
        rng = random.Random(f"corrupt/{seed}/{index}")
        of_numbers = [place for place in places if answer[place] in numbers]
        among, pool = (of_numbers, numbers) if of_numbers and len(numbers) > 1 else (places, everything)
        count = min(len(among), max(1, round(share * len(among)))) if len(pool) > 1 else 0
        chosen = sorted(rng.sample(among, count))
        ids = list(answer)
        for place in chosen:
            ids[place] = rng.choice([token for token in pool if token != answer[place]])
        corrupted.append(Corruption(tuple(ids), tuple(chosen)))
    return corrupted


def sign_test(
    original: Sequence[torch.Tensor | None], corrupted: Sequence[torch.Tensor | None], places: Sequence[Sequence[int]]
) -> SignTest:
    """Compare the credits of answers with those of their corruptions at the places where they differ.

    original, corrupted: of each answer the token rewards (its length), or None where it was left out, which leaves its places
    out. places: of each answer where it was corrupted. The interval is Wilson's (1927) at 95 %, two-sided.
    """
    above = count = 0
    for before_T, after_T, where in zip(original, corrupted, places, strict=True):
        if before_T is None or after_T is None:
            continue
        index = torch.tensor(list(where), dtype=torch.int64)
        above += int((before_T.cpu()[index] > after_T.cpu()[index]).sum())
        count += len(where)
    if not count:
        return SignTest(share=float("nan"), places=0, lower=0.0)
    return SignTest(share=above / count, places=count, lower=_wilson_lower(above, count))


def check_sign(test: SignTest, *, section: str = "treg") -> None:
    """Refuse token rewards that do not tell right tokens from wrong ones more often than chance.

    Raises:
        BudgetRLError: the lower end of the interval is not above one half.
    """
    if test.lower > 0.5:
        return
    advice = f"change {section}.contrast.better and .worse, or go on without the test with {section}.self_test=false"
    if not test.places:
        raise BudgetRLError("T-REG's self-test had no answer with a token to replace, so that it shows nothing", fix=advice)
    raise BudgetRLError(
        f"T-REG's token rewards preferred the right token to a wrong one at {test.share:.0%} of {test.places} places "
        f"(95 % interval from {test.lower:.0%}): they do not tell right from wrong",
        fix=advice,
    )


def _wilson_lower(successes: int, trials: int) -> float:
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / trials))
