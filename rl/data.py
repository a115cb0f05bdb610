"""Where problems come from: a reasoning-gym task, a hub data set or a local file, each through Hugging Face `datasets`.

The three parts handed out (training, held-out, extra) never share a question. Nothing here imports torch, so that a
configuration can be checked before any worker starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import BudgetRLError
from rl.settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from reasoning_gym.dataset import ProceduralDataset

GYM_PREFIX = "reasoning_gym:"
FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
CHUNK = 1024  # entries per generator: some tasks draw by their size, so a fixed one keeps question i the same for any request
DRY_DRAWS = 4096  # so many draws in a row without a new question: the task is taken to be exhausted
SEED_STRIDE = 100_000_000  # reasoning-gym seeds entry i with seed + i; neighbouring data.seed values must not overlap


class DataError(BudgetRLError):
    """Problems could not be had; the message says why and what to change."""


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    question: str
    answer: str
    entry_json: str
    """JSON of the whole reasoning-gym entry or data set row, for graders that need more than the answer."""
    other_answers: tuple[str, ...] = ()
    """Further reference answers; any one is right."""

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the question: the same in every run."""
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Problems:
    """Three parts that share no question, compared with white space normalised."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    """Depends on the source, `data.seed` and `data.held_out` only, so that every command evaluates on the same ones."""
    extra: tuple[Problem, ...]
    """For the warm start."""


def load_problems(data: DataSettings, *, extra: int = 0) -> Problems:
    """Load distinct problems and split them into `held_out`, `train` (at most `data.size`) and `extra`.

    A generated task yields exactly `data.size` training problems; a file or hub data set as many as it has, up to that.
    The order is a function of the source and `data.seed`.

    Raises:
        DataError: unknown task, file, column or split; an unreachable hub; an empty source; too few distinct questions.
    """
    if data.source.startswith(GYM_PREFIX):
        wanted = data.held_out + data.size + extra
        rows = list(_problems(_generated(data, wanted), "question", "answer", entry_column="entry"))
        train_size = data.size
    else:
        dataset = read_rows(data.source, data.split)
        for column in (data.question_column, data.answer_column):
            _check_column(dataset, column, data)
        ordered = dataset.shuffle(seed=data.seed)
        limit = data.held_out + data.size + extra
        rows = _first_distinct(_problems(ordered, data.question_column, data.answer_column, entry_column=None), limit)
        train_size = len(rows) - data.held_out - extra
        if train_size < 1:
            raise DataError(
                f"{data.source} has {len(rows)} distinct questions; data.held_out={data.held_out}"
                f"{f' and {extra} for the warm start' if extra else ''} leave none to train on: lower data.held_out"
            )
    train_end = data.held_out + train_size
    return Problems(
        train=tuple(rows[data.held_out : train_end]), held_out=tuple(rows[: data.held_out]), extra=tuple(rows[train_end:])
    )


def normalise(question: str) -> str:
    """The question with every run of white space made one space: the key by which questions are told apart."""
    return " ".join(question.split())


def _first_distinct(problems: Iterable[Problem], limit: int) -> list[Problem]:
    seen: dict[str, Problem] = {}
    for problem in problems:
        seen.setdefault(normalise(problem.question), problem)
        if len(seen) == limit:
            break
    return list(seen.values())


def _problems(dataset: Dataset, question: str, answer: str, *, entry_column: str | None) -> Iterator[Problem]:
    for index, row in enumerate(dataset):
        assert isinstance(row, Mapping)
        answers = row[answer] if isinstance(row[answer], list) else [row[answer]]
        if row[question] is None or not answers or None in answers:
            empty = question if row[question] is None else answer
            raise DataError(f"row {index} has no value in column {empty!r}; remove such rows from the data set")
        entry = row[entry_column] if entry_column else to_json(row)
        first, *others = map(str, answers)
        yield Problem(question=str(row[question]), answer=first, entry_json=entry, other_answers=tuple(others))


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------


def _generated(data: DataSettings, wanted: int) -> Dataset:
    """`wanted` distinct entries of a task as a Dataset with the columns question, answer and entry (JSON)."""
    from datasets import Dataset  # here, not above: it takes seconds to import, and a config check must not wait for it

    found: dict[str, dict[str, str]] = {}
    draws = dry = 0
    while dry < DRY_DRAWS:
        first_seed = data.seed * SEED_STRIDE + draws
        for entry in _generator(data, first_seed):
            key = normalise(entry["question"])
            dry = dry + 1 if key in found else 0
            if key not in found:
                found[key] = _gym_row(entry)
            if len(found) == wanted:
                return Dataset.from_list(list(found.values()))
        draws += CHUNK
    raise DataError(
        f"{data.source} with {data.task or 'its default parameters'} gave {len(found)} distinct questions in {draws} draws, but "
        f"{wanted} are needed (training + held-out + warm start); make the task larger in data.task, or lower data.size"
    )


def _gym_row(entry: Mapping[str, Any]) -> dict[str, str]:
    # Some tasks have no single answer and are scored from their metadata; their answer is empty, not missing.
    answer = "" if entry["answer"] is None else str(entry["answer"])
    return {"question": str(entry["question"]), "answer": answer, "entry": to_json(entry)}


def _generator(data: DataSettings, seed: int) -> ProceduralDataset:
    from reasoning_gym.factory import DATASETS, create_dataset

    task = data.source.removeprefix(GYM_PREFIX)
    if task not in DATASETS:
        raise DataError(f"data.source: reasoning-gym has no task {task!r}{nearest(task, DATASETS)}")
    reserved = {"seed", "size"} & data.task.keys()
    if reserved:
        name = min(reserved)
        raise DataError(f"data.task.{name} is not a task parameter here; set data.{name} instead")
    known = {f.name for f in fields(DATASETS[task][1])} - {"seed", "size"}
    for name in data.task:
        if name not in known:
            raise DataError(f"data.task: {task} has no parameter {name!r}{nearest(name, known)}")
    try:
        return create_dataset(task, seed=seed, size=CHUNK, **data.task)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(f"data.task: {task} refuses {data.task}: {error}") from error


# ---- files and the hub -----------------------------------------------------------------------------------------------


def read_rows(source: str, split: str, *, key: str = "data") -> Dataset:
    """The rows of a .parquet/.json/.jsonl file, or of a split of a hub data set (`owner/name` or `owner/name:configuration`).

    key: the section of the configuration that `source` and `split` stand in, for messages.

    Raises:
        DataError: no such file, data set or split; an unreachable hub; a file that cannot be read; no rows.
    """
    path = Path(source).expanduser()
    dataset = _read_file(path, key) if path.suffix in FILE_BUILDERS else _read_hub(source, split, key)
    if not len(dataset):
        raise DataError(f"{source} holds no rows")
    return dataset


def _read_file(path: Path, key: str) -> Dataset:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{key}.source: no file {path}{nearest(path.name, siblings, show_all=False)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} holds no rows")
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(f"{path} could not be read as {path.suffix[1:]}: {error.__cause__ or error}") from error
    assert isinstance(dataset, Dataset)
    return dataset


def _read_hub(source: str, split: str, key: str) -> Dataset:
    """A hub data set, `owner/name` or `owner/name:configuration`."""
    if source.startswith(("/", ".", "~")) or Path(source).exists():
        raise DataError(f"{key}.source {source}: only {', '.join(FILE_BUILDERS)} files can be read; convert it to one of them")
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, configuration = source.partition(":")
    try:
        dataset = load_dataset(name, configuration or None, split=split)
    except DatasetNotFoundError as error:
        other = ", or `reasoning_gym:<task>`" if key == "data" else ""
        raise DataError(
            f"{key}.source: the hub has no data set {name!r} (or it is private); check the spelling, or log in, "
            f"or give a local .parquet/.json/.jsonl file{other}"
        ) from error
    except OSError as error:
        raise DataError(
            f"{key}.source: could not fetch {name!r} from the hub ({type(error).__name__}: {error}); check the network, or "
            f"download the data set elsewhere and give its .parquet/.json/.jsonl file as {key}.source"
        ) from error
    except ValueError as error:  # unknown split or configuration: the library's message lists those that exist
        raise DataError(f"{key}.source {source}, {key}.split {split!r}: {error}") from error
    assert isinstance(dataset, Dataset)
    return dataset


def _check_column(dataset: Dataset, column: str, data: DataSettings) -> None:
    if column not in dataset.column_names:
        key = "question_column" if column == data.question_column else "answer_column"
        raise DataError(f"data.{key}: {data.source} has no column {column!r}{nearest(column, dataset.column_names)}")


def nearest(name: str, known: Iterable[str], *, show_all: bool = True) -> str:
    """The end of an error message: the nearest name and, when there are few, all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} (there are: {', '.join(names)})" if show_all and len(names) <= 30 else hint


def to_json(value: Any) -> str:
    """Any nested value as JSON; what JSON cannot hold (dates, big objects, keys that are not text) becomes its `str`."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # bool before int is not needed: both are JSON. NaN and infinities are not, so they go through str like the rest.
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and abs(value) < float("inf")):
        return value
    return str(value)
