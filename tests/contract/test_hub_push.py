"""Pushing a model with the real hub client to a hub on this machine: what arrives, and what is said when it does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rl.export import ExportError, PushError, push_folder
from tests.contract.hub_server import TOKEN, Hub, Repository, running_hub

REPO_ID = "tester/tiny-hbpo"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file({"weight": torch.arange(5000, dtype=torch.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Model card\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}\u00e9\n")
    return folder


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The developer's own login must not reach a test; a token has to be put into the environment on purpose."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def push_in_a_new_process(folder: Path, hub: Hub, *, arguments: str = "") -> subprocess.CompletedProcess[str]:
    """Run the push as the command line would; the client reads its environment once, when it is imported."""
    imports = "import sys; from pathlib import Path; from rl.export import push_folder"
    code = f"{imports}; print(push_folder(Path(sys.argv[1]), sys.argv[2]{arguments}))"
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), REPO_ID],
        # Xet is a second storage service beside the hub; without it the client uses the LFS protocol.
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_folder_arrives_byte_for_byte_in_a_private_repository(hub: Hub, model: Path) -> None:
    done = push_in_a_new_process(model, hub)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO_ID]
    assert repository.private
    assert repository.files == bytes_of(model)
    assert repository.commits == ["Upload model trained with budget-rl"]
    assert done.stdout.splitlines()[-1] == f"{hub.endpoint}/{REPO_ID}"


def test_what_leaves_the_machine_is_listed_with_sizes_and_no_token(hub: Hub, model: Path) -> None:
    done = push_in_a_new_process(model, hub, arguments=", private=False")
    assert f"as PUBLIC repository {REPO_ID}" in done.stdout
    assert f"model.safetensors  {(model / 'model.safetensors').stat().st_size:,} bytes" in done.stdout
    assert not hub.repositories[REPO_ID].private
    assert TOKEN not in done.stdout + done.stderr


def test_a_second_push_updates_the_same_repository(hub: Hub, model: Path) -> None:
    assert push_in_a_new_process(model, hub).returncode == 0
    (model / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Second\n")
    assert push_in_a_new_process(model, hub).returncode == 0
    assert hub.repositories[REPO_ID].files == bytes_of(model)
    assert len(hub.objects) == 1


def aim_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def test_a_private_push_into_a_public_repository_is_refused_before_anything_is_sent(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO_ID] = Repository(private=False)
    aim_at(monkeypatch, hub.endpoint)
    with pytest.raises(PushError, match="is public; nothing was sent"):
        push_folder(model, REPO_ID)
    assert hub.repositories[REPO_ID].files == {} and hub.objects == {}


def test_without_a_token_nothing_is_asked_of_the_hub(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with pytest.raises(PushError, match="no Hugging Face token(?s:.*)HF_TOKEN"):
        push_folder(model, REPO_ID)
    assert hub.requests == []


@pytest.mark.parametrize(("status", "reason"), [(401, "refused the token"), (403, "refused to write tester/tiny-hbpo")])
def test_a_refusal_says_what_the_token_lacks(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, status: int, reason: str
) -> None:
    hub.refuse_with = status
    aim_at(monkeypatch, hub.endpoint)
    with pytest.raises(PushError, match=reason) as caught:
        push_folder(model, REPO_ID)
    assert TOKEN not in str(caught.value)


def test_a_refused_upload_names_the_file_and_commits_nothing(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse_uploads = True
    aim_at(monkeypatch, hub.endpoint)
    with pytest.raises(PushError, match="refused to write|model.safetensors"):
        push_folder(model, REPO_ID)
    assert hub.repositories[REPO_ID].commits == []


def test_an_unreachable_hub_is_one_clear_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        # Bound but not listening, so that a connection is refused at once.
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        aim_at(monkeypatch, endpoint)
        with pytest.raises(PushError, match=f"{endpoint} cannot be reached(?s:.*)HF_ENDPOINT"):
            push_folder(model, REPO_ID)


def test_a_folder_with_pickles_or_stray_files_is_not_pushed(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aim_at(monkeypatch, hub.endpoint)
    (model / ".env").write_text("SECRET=1")
    (model / "optim.pt").write_bytes(b"")
    with pytest.raises(ExportError, match=r"\.env, optim\.pt"):
        push_folder(model, REPO_ID)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["name-only", "a/b/c", "../x", "user/na me"])
def test_a_bad_repository_name_is_refused(model: Path, repo_id: str) -> None:
    with pytest.raises(PushError, match="user/name"):
        push_folder(model, repo_id)
