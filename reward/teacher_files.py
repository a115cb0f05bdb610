"""The files of a teacher: where its models lie, whether their tokenizers are the student's, whether adapters can share a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.adapters import CONFIG, WEIGHTS, check_adapter, is_adapter
from reward.heads import refuse_head, tensor_files
from rl.errors import ConfigError, ModelError
from rl.models import MODEL_SUFFIXES, has_tokenizer
from rl.teacher_settings import TeacherSettings

_LOCAL = ("/", ".", "~")
SAVE_TOKENIZER = "save the student's there with tokenizer.save_pretrained(folder)"


@dataclass(frozen=True)
class Sources:
    """Where the models of a teacher come from: an absolute folder or a hub id; None for one that a run is yet to make."""

    dpo: str | None
    reverse: str | None
    base: str | None = None


def check_teacher(settings: TeacherSettings, student_folder: Path, *, trust_remote_code: bool = False) -> Sources:
    """Refuse, before anything is started, a teacher that cannot work beside the student; reads tokenizers and configurations.

    Of a hub model everything but its weights is downloaded (an adapter whole). Returns the sources with absolute paths, as
    `reward.teacher_actor.TeacherActor.start` takes them: an actor does not run in the driver's folder. Raises ConfigError for a
    missing folder, an adapter without a base or a base without adapters, an adapter of more than inner layers, a tokenizer that
    differs from the student's, a head that the mode cannot use, or more ids than the vocabulary has; ModelError for a tokenizer
    that cannot be read.
    """
    from transformers import AutoConfig

    student = load_tokenizer(str(student_folder), "model.path", trust_remote_code=trust_remote_code)
    check_ids(settings, vocabulary_size(student))
    config = AutoConfig.from_pretrained(str(student_folder), trust_remote_code=trust_remote_code)
    refuse_head("model.path", config, plain=settings.mode != "scalar")
    sources = Sources(*(_absolute(getattr(settings, name)) for name in ("dpo", "reverse", "base")))
    for name in ("dpo", "reverse", "base"):
        if getattr(sources, name) is not None:
            _check_source(settings, sources, name, student, trust_remote_code)
    return sources


def check_ids(settings: TeacherSettings, vocabulary: int) -> None:
    """Raise ConfigError where mode topk asks for more ids than there are."""
    wanted = settings.top_k + settings.student_k
    if settings.mode == "topk" and wanted > vocabulary:
        raise ConfigError(
            f"distil.teacher.top_k={settings.top_k} and distil.teacher.student_k={settings.student_k} are {wanted} ids, and the "
            f"vocabulary has {vocabulary}",
            fix="ask for fewer, or use distil.teacher.mode=hidden",
        )


def _check_source(settings: TeacherSettings, sources: Sources, name: str, student: Any, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    key = f"distil.teacher.{name}"
    adapter = sources.base is not None and name != "base"
    source = getattr(sources, name)
    folder = source_folder(settings, name, source, adapter=adapter, weights=False, trust_remote_code=trust_remote_code)
    if adapter:
        check_adapter(folder, key)
        return
    check_model(folder, key)
    own = load_tokenizer(str(folder), key, trust_remote_code=trust_remote_code)
    check_same_tokenizer(student, own, key)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    refuse_head(key, config, plain=settings.mode == "hidden")


def check_model(folder: Path, name: str) -> None:
    """Raise ConfigError unless ``folder`` looks like a Hugging Face model; ``name`` says whose it is."""
    if is_adapter(folder):
        raise ConfigError(
            f"{name}={folder} is a LoRA adapter, and there is no base to put it on",
            fix="set distil.teacher.base to the model it was trained on (then distil.teacher.dpo and .reverse are both adapters)",
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}={folder} is no model folder: it has no config.json", fix="name a Hugging Face model folder")
    if not has_tokenizer(folder):
        raise ConfigError(f"{name}={folder} has no tokenizer", fix=SAVE_TOKENIZER)


def source_folder(
    settings: TeacherSettings,
    name: str,
    source: str,
    *,
    adapter: bool = False,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of one of the models (``name``: dpo, reverse or base), downloaded if ``source`` is a hub id.

    ``adapter``: it is to be put on a base. Without ``weights`` those of a model are left out. Raises ConfigError for a folder
    that does not exist or holds no safetensors, a hub id that cannot be had, or a hub model whose code is to be run and whose
    commit is not pinned.
    """
    key = f"distil.teacher.{name}"
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file() and not tensor_files(path):
            raise ConfigError(f"{key}={path} holds no safetensors weights", fix="save the model with save_pretrained")
        return path
    if source.startswith(_LOCAL):
        raise ConfigError(f"{key}: there is no folder {path}", fix="name a model folder, or a hub id user/name")
    # A source that the run made itself is a folder; only one that the settings name can have a revision.
    revision = getattr(settings, f"{name}_revision") if getattr(settings, name) is not None else None
    if trust_remote_code and revision is None and not adapter:
        raise ConfigError(
            f"{key}={source} would run code from the hub, and no commit is pinned",
            fix=f"set {key}_revision to the commit whose code you have read",
        )
    if adapter:
        patterns = [CONFIG, WEIGHTS]
    else:
        kinds = MODEL_SUFFIXES | ({".py"} if trust_remote_code else set())
        patterns = sorted(f"*{kind}" for kind in kinds if weights or kind != ".safetensors")
    return _from_hub(key, source, revision, patterns)


def _from_hub(key: str, source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen kinds; all mean that the model cannot be had
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{key}={source} is no folder here, and it cannot be had from the hub: {reason}",
            fix="check the spelling and the network, or give a local folder",
        ) from error


def _absolute(source: str | None) -> str | None:
    if source is None:
        return None
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def load_tokenizer(source: str, name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder; ``name`` says whose it is. Raises ModelError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file, a missing package: each its own kind, some of them plain Exception
        raise ModelError(
            f"{name}: no tokenizer could be loaded from {source} ({error})",
            fix=SAVE_TOKENIZER,
        ) from error


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id: what every head is cut to, since further rows belong to no token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokenizer(student: Any, teacher: Any, name: str) -> None:
    """Raise ConfigError unless both map every token to the same id and mark the same tokens as special (padding aside).

    Two vocabularies of one size need not be the same, and a teacher that reads other words scores noise, silently.
    """
    here: Mapping[str, int] = student.get_vocab()
    there: Mapping[str, int] = teacher.get_vocab()
    differing = [token for token in here.keys() | there.keys() if here.get(token) != there.get(token)]
    fix = "train the teacher from the student's start model, with its tokenizer unchanged"
    if differing:
        ids = {token: (here.get(token, there.get(token)), token) for token in differing}
        first = min(differing, key=lambda token: ids[token])
        raise ConfigError(
            f"{name}: its tokenizer is not the student's; they differ in {len(differing)} tokens, first in {first!r}, which is "
            f"{_id(here, first)} in the student's and {_id(there, first)} in the teacher's",
            fix=fix,
        )
    special_here, special_there = (_special(tokenizer) for tokenizer in (student, teacher))
    if special_here != special_there:
        kind = min(k for k in special_here.keys() | special_there.keys() if special_here.get(k) != special_there.get(k))
        raise ConfigError(
            f"{name}: its tokenizer has the student's tokens but other special ones: {kind} is "
            f"{special_here.get(kind)!r} in the student's and {special_there.get(kind)!r} in the teacher's",
            fix=fix,
        )


def _special(tokenizer: Any) -> dict[str, Any]:
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if role.endswith("_token")}
    roles.pop("pad_token", None)  # tools set it as they like, and no response holds it
    return {role: str(token) for role, token in roles.items()}


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "absent"
