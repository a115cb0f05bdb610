from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl.redaction import MASK, redact, redact_tree
from rl.run_folder import OutputError, RunFolder, append_lines, read_lines
from rl.settings import OutputSettings
from rl.types import StepReport


def _folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "quickstart")


def test_the_default_folder_lies_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.create(OutputSettings(), "quickstart").path == tmp_path / "budget-rl" / "quickstart"
    assert RunFolder.create(OutputSettings(name="mine"), "quickstart").path == tmp_path / "budget-rl" / "mine"
    assert (tmp_path / "budget-rl" / "mine" / "checkpoints").is_dir()


def test_a_relative_folder_starts_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.resolve(OutputSettings(dir="out/../a"), "x").path == tmp_path / "a"


def test_a_folder_inside_rays_copy_of_the_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "pkg"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(OutputError, match="absolute path"):
        RunFolder.create(OutputSettings(dir="out"), "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.resolve(OutputSettings(), "x").path == tmp_path / "budget-rl" / "x"
    assert RunFolder.resolve(OutputSettings(dir=str(tmp_path / "abs")), "x").path == tmp_path / "abs"


def test_a_full_disk_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"run: the disk is full .* output\.dir"):
        RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "x", minimum_free=10**18)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where the folder should be"):
        RunFolder.create(OutputSettings(dir=str(tmp_path / "file" / "run")), "x")


def test_a_read_only_folder_is_refused() -> None:
    # /sys is read-only for root as well, whom the permission bits of an ordinary folder would not stop.
    with pytest.raises(OutputError, match=r"output folder /sys/kernel/run: .*set output\.dir"):
        RunFolder.create(OutputSettings(dir="/sys/kernel/run"), "x", minimum_free=0)


def test_a_folder_of_the_system_is_refused() -> None:
    with pytest.raises(OutputError, match=r"output folder /proc/none/run: .*set output\.dir"):
        RunFolder.create(OutputSettings(dir="/proc/none/run"), "x", minimum_free=0)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "."])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="no folder name"):
        RunFolder.resolve(OutputSettings(), name)


def test_numbers_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.append_metrics(StepReport(1, {"a": math.nan, "b": math.inf, "c": 0.5}))
    assert folder.metrics.read_text() == '{"step": 1, "a": null, "b": null, "c": 0.5}\n'


def test_metrics_and_samples_after_the_resumed_step_are_cut_away(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for step in range(1, 6):
        folder.append_metrics(StepReport(step, {"train/accuracy": step / 10}))
        folder.append_samples(step, [{"prompt": "2 + 2", "reward": math.nan}, {"prompt": "3 + 3", "reward": 1.0}])
    before = folder.metrics.read_text().splitlines(keepends=True)
    folder.truncate_after(3)
    assert folder.metrics.read_text() == "".join(before[:3])
    assert [line["step"] for line in read_lines(folder.samples)] == [1, 1, 2, 2, 3, 3]
    for step in (4, 5):
        folder.append_metrics(StepReport(step, {"train/accuracy": step / 10}))
    assert folder.metrics.read_text() == "".join(before)
    assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoints", "metrics.jsonl", "samples.jsonl"]


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=80), st.integers(0, 200))
def test_a_line_torn_by_a_crash_never_swallows_the_next(tmp_path_factory: pytest.TempPathFactory, text: str, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "lines.jsonl"
    append_lines(path, [{"step": 1, "text": text}, {"step": 2, "text": text}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: min(first + cut, len(whole) - 1)])
    append_lines(path, [{"step": 3}])
    assert read_lines(path) == [{"step": 1, "text": text}, {"step": 3}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_lines(path)


def test_an_earlier_run_is_set_aside_whole(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for number in (1, 2):
        folder.append_metrics(StepReport(number, {"a": 1.0}))
        assert folder.set_aside_earlier_run() == folder
        assert [p.name for p in folder.path.iterdir()] == ["checkpoints"]
    assert [read_lines(tmp_path / f"run.before-{number}" / "metrics.jsonl")[0]["step"] for number in (1, 2)] == [1, 2]


def test_an_unused_folder_is_not_set_aside(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.set_aside_earlier_run()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_config_keeps_everything_but_secrets(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder.write_config(
        {"model": {"path": "a/b", "revision": revision}, "max_tokens": 5, "data": {"api_key": "canary two words"}}
    )
    written = yaml.safe_load(folder.config.read_text())
    assert written == {"model": {"path": "a/b", "revision": revision}, "max_tokens": 5, "data": {"api_key": MASK}}


HEX = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("text", "canary"),
    [
        ("see hf_CANARYcanary12 there", "CANARY"),
        ("key sk-canary-1234567", "canary"),
        ("API_KEY=canary", "canary"),
        ('{"password": "my canary"}', "canary"),
        ("{'client_secret': 'my canary'}", "canary"),
        (r"{\"api_key\": \"canary\"}", "canary"),
        ("db_password: three canary words", "canary"),
        ("run --hf-token canary --lr 3", "canary"),
        ("https://user:canary@host:5000/path", "canary"),
        ("Authorization: Bearer canarycanary", "canary"),
        (f"value {HEX}", HEX),
    ],
)
def test_a_secret_is_taken_out(text: str, canary: str) -> None:
    assert canary not in redact(text)
    assert MASK in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 2000",
        "train/tokens 77.3",
        "tokenizer: a/b",
        "eos_token: </s>",
        f"revision: {HEX}",
        "1" * 40,
        "a key: value",
        "x = 3",
    ],
)
def test_innocent_text_stays(text: str) -> None:
    assert redact(text) == text


def test_the_value_of_a_secret_variable_is_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "yellow-canary")
    assert redact("a yellow-canary sings") == f"a {MASK} sings"
    assert redact_tree({"notes": ["yellow-canary", 3, None]}) == {"notes": [MASK, 3, None]}


@given(st.text(max_size=200))
def test_redaction_is_idempotent(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def test_samples_hold_no_secret(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.append_samples(1, [{"prompt": "my key is sk-canary-1234567", "parts": {"correct": 1.0}}])
    assert json.loads(folder.samples.read_text()) == {"step": 1, "prompt": f"my key is {MASK}", "parts": {"correct": 1.0}}
