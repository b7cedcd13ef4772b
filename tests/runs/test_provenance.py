"""What is written of code, environment and machine; and what is not, because it is secret."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ablab.config.errors import ConfigError
from ablab.runs import provenance
from ablab.runs.folder import config_of

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "MY_TOKEN": "hunter2-hunter2",
    "AWS_SECRET": "s3cr3t/s3cr3t",
}


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_no_secret_is_anywhere_in_a_runs_folder(command: Callable[..., Any], tmp_path: Path, logger: str) -> None:
    words = ["trainer=smoke", f"logger={logger}", f"name=x{SECRETS['MY_TOKEN']}"]
    if logger == "wandb":
        words += ["logger.wandb.mode=offline"]
    done = command(*words, UNRELATED="a-value-of-the-environment", **SECRETS)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        # the folder's name has MY_TOKEN, as was asked for, and W&B notes where its files are
        values = [value for name, value in SECRETS.items() if name != "MY_TOKEN" or "wandb" not in path.parts]
        for value in (*values, "a-value-of-the-environment"):
            assert value.encode() not in content, f"{value} is in {path}"
    [config] = (tmp_path / "runs").glob("*/config.yaml")
    assert "name: x***" in config.read_text()


def test_what_is_named_like_a_secret_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    monkeypatch.setenv("SHORT_KEY", "on")
    assert provenance.redacted("x=abcdefgh on") == "x=*** on"
    assert provenance.redacted("+wandb.api_key=0123456789 seed=0") == "+wandb.api_key=*** seed=0"
    harmless = "data.tokens=characters num_tokens=200000 characters_per_token: 1.000000"
    assert provenance.redacted(harmless) == harmless


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("git+https://ghp_0123456789@host/a.git", "git+https://***@host/a.git"),
        ("http://me:p@ss@host:80/x", "http://***@host:80/x"),
        ("http://host/x?user=me&access_token=abc", "http://host/x?user=me&access_token=***"),
        ("s3://b/x?X-Amz-Signature=0a&sig=1b", "s3://b/x?X-Amz-Signature=***&sig=***"),
        ("http://host/x@y?author=me http://z", "http://host/x@y?author=me http://z"),
    ],
)
def test_what_is_secret_in_an_address_is_blotted_out(text: str, clean: str) -> None:
    assert provenance.redacted(text) == clean


def test_of_an_error_its_first_line_is_said_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    assert provenance.first_line(OSError("no answer from http://abcdefgh@host/abcdefgh\nmore")) == (
        "no answer from http://***@host/***"
    )
    assert provenance.first_line(OSError()) == "OSError"


def test_what_a_key_names_as_a_secret_is_blotted_out() -> None:
    config = {
        "logger": {"comet": {"api_key": "abcdef123456", "workspace": "lab"}},
        "data": {"token": "hf_abcdef", "num_tokens": 3, "tokens": "characters", "root": "https://me:pw1@host/data"},
        "ablation": {"tune": {"key": "optimizer.lr"}},
    }
    assert provenance.without_secrets(config) == {
        "logger": {"comet": {"api_key": "***", "workspace": "lab"}},
        "data": {"token": "***", "num_tokens": 3, "tokens": "characters", "root": "https://***@host/data"},
        "ablation": {"tune": {"key": "optimizer.lr"}},
    }
    words = ["train.py", "data.token=hf_abcdef", "+logger.comet.api_key=abc", "data.tokens=characters"]
    assert provenance.without_secrets(words) == ["train.py", "data.token=***", "+logger.comet.api_key=***", words[3]]


def test_a_config_whose_secrets_are_blotted_out_can_be_read_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "pa'ss wörd\"x, a passphrase that is longer than a line of YAML takes, and \\ has signs in it " + "x" * 60
    monkeypatch.setenv("DEPLOY_PASSWORD", odd)
    monkeypatch.setenv("CI_REGISTRY_PASSWORD", "lightning")
    done = run(
        "logger=wandb",
        "logger.wandb.notes='${oc.env:DEPLOY_PASSWORD}'",
        "logger.wandb.group='${oc.env:DEPLOY_PASSWORD}'",
    )
    cfg = config_of(done.folder)
    assert (cfg.logger.wandb.notes, cfg.logger.wandb.group) == ("***", "***")
    assert cfg.trainer._target_ == "ablab.trainer.Trainer", "it can be built again"
    for path in (path for path in done.folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert odd[:20].encode() not in content, path
        assert json.dumps(odd)[1:-1].encode() not in content, path


def test_a_config_that_cannot_be_read_is_named(run: Any) -> None:
    done = run()
    (done.folder / "config.yaml").write_text("data: *nothing\n")
    with pytest.raises(ConfigError, match=r"its config\.yaml cannot be read .*; bring it back"):
        config_of(done.folder)


def test_the_environment_names_every_package_and_the_threads() -> None:
    found = json.loads(json.dumps(provenance.environment()))
    assert found["packages"]["torch"] == metadata.version("torch")
    assert {"lightning", "numpy", "pytest"} <= found["packages"].keys()
    assert found["threads"]["torch"] >= 1
    assert found["python"].startswith("3.")
    assert found["processor"]


def test_the_patch_brings_the_commit_to_the_code_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, again = tmp_path / "repository", tmp_path / "again"

    def git(*words: str, at: Path = repository) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *who, *words], cwd=at, check=True, capture_output=True, text=True).stdout

    (repository / "src").mkdir(parents=True)
    git("init", "-q")
    for name, text in {"src/a.py": "a = 1\n", "src/b.py": "b = 1\n", "notes.txt": "before\n"}.items():
        (repository / name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "ROOT", repository)
    commit = provenance.git_commit()
    assert commit == git("rev-parse", "HEAD").strip()
    assert provenance.uncommitted() == ""

    (repository / "notes.txt").write_text("after\n")
    assert provenance.git_commit() == commit, "notes are no code"
    (repository / "src/a.py").write_text("a = 2\n")
    (repository / "src/b.py").unlink()
    (repository / "src/new.py").write_text("new = 'ü'\n")
    (repository / "src/binary.bin").write_bytes(bytes(range(256)))
    assert provenance.git_commit() == f"{commit}+changes"
    patch = provenance.uncommitted()
    git("clone", "-q", str(repository), str(again), at=tmp_path)
    (tmp_path / "changes.patch").write_text(patch)
    git("apply", str(tmp_path / "changes.patch"), at=again)
    for name in ("src/a.py", "src/new.py", "src/binary.bin"):
        assert (again / name).read_bytes() == (repository / name).read_bytes()
    assert not (again / "src/b.py").exists()
    assert (again / "notes.txt").read_text() == "before\n"


def test_outside_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() is None
    assert provenance.uncommitted() == ""
