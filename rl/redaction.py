"""Takes secrets out of text before it reaches any sink: console, log, config.yaml, samples, MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "[redacted]"

_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{8,}"
    r"|sk-[A-Za-z0-9_-]{8,}"
    r"|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")

# Names that hold a secret. `tokens`, `tokenizer` and a bare `key` are not such names, nor are the special tokens of a tokenizer.
_SECRET_NAME = re.compile(
    r"(?i:secret|passw(?:or)?d|passphrase|api_?key)|(?i:(?:^|[\W_])token\d*$)|(?i:[\W_]key\d*$)|^KEY$|[a-z](?:Token|Key)$"
)
_HARMLESS_NAME = re.compile(r"(?i)(?:^|[\W_])(?:bos|eos|pad|unk|sep|cls|mask|image|next|last|first|per)_token$")
_QUOTED = r"""\\"[^"\\\n]*\\"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'"""
_ASSIGNMENT = re.compile(rf"""(?P<name>[A-Za-z][\w.-]*)(?P<by>\\?["']?\s*[:=]\s*)(?P<value>{_QUOTED}|[^\s,;&"'{{}}\[\]()]+)""")
_OPTION = re.compile(r"--(?P<name>[a-z][\w-]*)(?P<by>\s+)(?P<value>[^\s-]\S*)")
# A value that fills the rest of a YAML line may hold blanks.
_WHOLE_LINE = re.compile(r"""^(?P<name>[ \t-]*[\w.-]+)(?P<by>:[ \t]+)(?P<value>[^"'\s{[|>].*)$""", re.MULTILINE)
# A run of hex long enough for a key is taken out, unless its name says that it is a public hash.
_LONG_HEX = re.compile(
    r"""(?P<public>\b(?:revision|commit|sha-?256|checksum|digest|hash|id|run_id|prompt_id)["']?\s*[:=]\s*["']?|\bsnapshots/)?"""
    r"""(?<![0-9a-zA-Z])(?P<hex>(?=[0-9a-fA-F]*[a-fA-F])(?=[0-9a-fA-F]*[0-9])[0-9a-fA-F]{32,})(?![0-9a-zA-Z])"""
)
_PUBLIC_NAME = re.compile(r"^(?:.*_)?(?:revision|commit|sha256|checksum|digest|hash|id)$")
# Shorter values of secret variables are words like "true" that also stand in innocent text.
_SHORTEST_SECRET = 8
_NO_VALUE = frozenset(("null", "None", "true", "false", '""', "''"))


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or field called `name` (``HF_TOKEN``, ``api-key``) is expected to hold a secret."""
    return bool(_SECRET_NAME.search(name)) and not _HARMLESS_NAME.search(name)


def redact(text: str) -> str:
    """Replace every secret in `text` by ``[redacted]``.

    Secrets are: the values of environment variables with secret names; well-known key shapes (``hf_``, ``sk-``, GitHub, AWS,
    JWT, private keys); logins in URLs; ``name: value`` and ``name=value`` where the name says token, secret, password or key;
    and hex of 32 digits or more that is not named as a public hash. Over-redaction is harmless, so doubtful cases are taken out.
    """
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    text = _SHAPES.sub(MASK, text)
    text = _URL_LOGIN.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    for pattern in (_WHOLE_LINE, _OPTION, _ASSIGNMENT):
        text = pattern.sub(_without_value, text)
    return _LONG_HEX.sub(lambda m: m.group() if m["public"] else MASK, text)


def redact_tree(value: Any, *, name: str = "") -> Any:
    """Redact every string of nested mappings and lists, using keys as names; numbers, None and booleans pass unchanged."""
    if isinstance(value, Mapping):
        return {key: redact_tree(inner, name=str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner, name=name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret_name(name):
        return MASK
    if _PUBLIC_NAME.match(name) and _LONG_HEX.fullmatch(value):
        return value
    return redact(value)


def _environment_secrets() -> list[str]:
    secrets = [value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _SHORTEST_SECRET]
    return sorted(secrets, key=len, reverse=True)


def _without_value(match: re.Match[str]) -> str:
    name, value = match["name"].strip(" \t-"), match["value"]
    if not is_secret_name(name) or value in _NO_VALUE or value.startswith(("[redacted", '"[redacted', "'[redacted")):
        return match.group()
    quote = next((q for q in ('\\"', '"', "'") if value.startswith(q)), "")
    head = match.group()[: -len(value)]
    return f"{head}{quote}{MASK}{quote}"
