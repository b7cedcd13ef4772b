"""Secrets are hidden in every copy, and nothing is altered that a run is rebuilt from."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.browse.collect import collect
from ablab.lab.evaluate import scoring_config
from ablab.lab.run.folder import read_config
from ablab.lab.run.redaction import first_line, redact, redact_loggers, redact_overrides
from ablab.lab.run.resume import resume_config

Start = Callable[..., SimpleNamespace]
Stop = Callable[..., Path | None]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "MY_TOKEN": "hunter2-hunter2",
    "AWS_SECRET": "s3cr3t/s3cr3t",
}


def files_with(folder: Path, *texts: str) -> list[Path]:
    """The files below a folder that hold one of some texts, as it is or as JSON writes it."""
    wanted = [form.encode() for text in texts for form in (text, json.dumps(text)[1:-1])]
    return [path for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in wanted)]


# The function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("x=abcdefgh on", "x=*** on"),
        ("the key 'abcdefgh', and (abcdefgh).", "the key '***', and (***)."),
        ("abcdefgh", "***"),
        ("{notes:abcdefgh,tags:[abcdefgh,b]}", "{notes:***,tags:[***,b]}"),
        ("abcdefgh\nabcdefgh", "***\n***"),
        ("it's a \"b\" 'c' phrase", "***"),
        ("[it\\'s a \"b\" \\'c\\' phrase]", "[***]"),
        # a part of a path or of a word is there by accident
        ("/home/abcdefgh/in.txt", "/home/abcdefgh/in.txt"),
        ("abcdefgh/in.txt ./abcdefgh abcdefgh.py", "abcdefgh/in.txt ./abcdefgh abcdefgh.py"),
        ("abcdefghi xabcdefgh abcdefgh-2 2_abcdefgh", "abcdefghi xabcdefgh abcdefgh-2 2_abcdefgh"),
        # of a variable that is not named like a secret, too short, or the path of a file
        ("harmless", "harmless"),
        ("on", "on"),
        (f"--credentials {__file__}", f"--credentials {__file__}"),
        ("data.tokens=characters num_tokens=200000 characters_per_token: 1.000000",) * 2,
        # what is assigned
        ("train.py +wandb.api_key=0123456789 seed=0", "train.py +wandb.api_key=*** seed=0"),
        ("{'password': 'hunter22', 'n': 3}", "{'password': '***', 'n': 3}"),
        ("my notes on passwords: a=b", "my notes on passwords: a=b"),
        # addresses
        ("git+https://ghp_0123456789@host/a.git", "git+https://***@host/a.git"),
        ("http://me:p@ss@host:80/x", "http://***@host:80/x"),
        ("http://host/x?user=me&access_token=abc", "http://host/x?user=me&access_token=***"),
        ("s3://b/x?X-Amz-Signature=0a&sig=1b", "s3://b/x?X-Amz-Signature=***&sig=***"),
        ("http://host/x@y?author=me http://z", "http://host/x@y?author=me http://z"),
    ],
)
def test_a_text_loses_its_secrets_and_nothing_else(text: str, clean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    monkeypatch.setenv("A_PASSPHRASE", "it's a \"b\" 'c' phrase")
    monkeypatch.setenv("SHORT_KEY", "on")
    monkeypatch.setenv("KEYBOARD", "harmless")
    monkeypatch.setenv("GOOGLE_CREDENTIALS", __file__)
    assert redact(text) == clean
    assert redact(clean) == clean, "a second time changes nothing"


def test_of_an_error_its_first_line_is_given_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    assert first_line(OSError("no answer to abcdefgh from http://abcdefgh@host/\nmore")) == (
        "no answer to *** from http://***@host/"
    )
    assert first_line(OSError()) == "OSError"


def test_a_setting_that_is_named_like_a_secret_is_hidden() -> None:
    config = {
        "logger": {"comet": {"api_key": "abcdef123456", "workspace": "lab", "passwords": ["a", "b"], "secret": 1234}},
        "data": {"token": "hf_abcdef", "num_tokens": 3, "tokens": "characters", "root": "https://me:pw1@host/data"},
        "model": {"cls_token": "max", "pad_token": "x", "use_secret": True, "password": None},
        "ablation": {"tune": {"key": "optimizer.lr"}},
        "flat.api_key": "abc",
        "flat.passwords.0": "abc",
    }
    assert redact(config) == {
        "logger": {"comet": {"api_key": "***", "workspace": "lab", "passwords": ["***", "***"], "secret": "***"}},
        "data": {"token": "***", "num_tokens": 3, "tokens": "characters", "root": "https://***@host/data"},
        "model": {"cls_token": "max", "pad_token": "x", "use_secret": True, "password": None},
        "ablation": {"tune": {"key": "optimizer.lr"}},
        "flat.api_key": "***",
        "flat.passwords.0": "***",
    }
    words = ["train.py", "data.token=hf_abcdef", "+logger.comet.api_key=a b", "data.tokens=x", "--api-key=a"]
    assert redact(words) == ["train.py", "data.token=***", "+logger.comet.api_key=***", words[3], "--api-key=***"]


def test_only_loggers_lose_secrets_in_what_a_run_is_rebuilt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    config = {
        "model": {"hidden_key": "abcdefgh", "cls_token": "max", "api_key": "a"},
        "data": {"root": "https://me:pw1@host/data", "token": "hf_abcdef"},
        "logger": {"wandb": {"notes": "so abcdefgh is", "tags": ["abcdefgh", "b"], "entity": None}},
    }
    clean, hidden = redact_loggers(config)
    assert clean == {**config, "logger": {"wandb": {"notes": "so *** is", "tags": ["***", "b"], "entity": None}}}
    assert hidden == ["logger.wandb.notes", "logger.wandb.tags.0"]
    assert redact_loggers({"logger": {}, "seed": 0}) == ({"logger": {}, "seed": 0}, [])

    words = ["model.api_key=a", "name=abcdefgh", "logger=wandb", "logger.wandb.notes='it\\'s  abcdefgh'"]
    words += ["logger.wandb.tags=[abcdefgh,'b c']", "+logger.comet={_target_:x.Y,api_key:abc}", "~logger.csv"]
    assert redact_overrides(words) == [
        *words[:3],
        "logger.wandb.notes='it\\'s  ***'",
        "logger.wandb.tags=[***,'b c']",
        "+logger.comet=***",
        words[6],
    ]


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_secret_is_anywhere_in_a_runs_folder(command: Callable[..., Any], tmp_path: Path) -> None:
    words = ["trainer=smoke", "logger=wandb", "logger.wandb.mode=offline", f"name={SECRETS['MY_TOKEN']}"]
    words += [f"logger.wandb.notes='{SECRETS['AWS_SECRET']} http://me:pa55@host/'"]
    done = command(*words, UNRELATED="a-value-of-the-environment", **SECRETS)
    assert done.returncode == 0, done.stderr
    values = [value for name, value in SECRETS.items() if name != "MY_TOKEN"]  # the folder's name has it, as was asked
    assert files_with(tmp_path / "runs", *values, "a-value-of-the-environment", "pa55") == []


def test_a_secret_of_a_logger_is_in_no_file_and_its_key_in_the_record(
    run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "pa'ss wörd\"x, a passphrase that is longer than a line of YAML takes, and \\ has signs in it " + "x" * 60
    monkeypatch.setenv("DEPLOY_PASSWORD", odd)
    monkeypatch.setenv("CI_REGISTRY_PASSWORD", "lightning")
    done = run(
        "logger=wandb",
        "logger.wandb.notes='${oc.env:DEPLOY_PASSWORD}'",
        "logger.wandb.group='${oc.env:DEPLOY_PASSWORD}'",
    )
    cfg = read_config(done.folder)
    assert (cfg.logger.wandb.notes, cfg.logger.wandb.group) == ("***", "***")
    assert cfg.trainer._target_ == "ablab.lab.trainer.Trainer", "it can be built again"
    assert files_with(done.folder, odd[:20]) == []
    record = json.loads((done.folder / "run.json").read_text())
    assert record["hidden"] == ["logger.wandb.group", "logger.wandb.notes"]


def test_a_run_is_rebuilt_from_the_values_that_it_had(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "postgres" / "in.txt"
    text.parent.mkdir()
    text.write_text("to be or not to be, that is the question. " * 200)
    for name, value in {
        "PGPASSWORD": "postgres",
        "API_TOKEN": "32-true",
        "PATH_KEY": str(text),
        "TASK_SECRET": "ablab.tasks.language_modeling.LanguageModeling",
        "TOKEN_KIND": "characters",
    }.items():
        monkeypatch.setenv(name, value)
    done = run("model=rnn", "data=text", f"data.path={text}", "data.context_length=8", "+cell={cls_token:a,api_key:b}")
    before: Any = OmegaConf.to_container(done.cfg, resolve=True)
    after: Any = OmegaConf.to_container(read_config(done.folder))
    assert after == {**before, "trust": False}, "a folder may be somebody else's"
    assert resume_config(OmegaConf.create({"resume": str(done.folder)})).data.path == str(text)
    assert scoring_config(done.folder).trainer.precision == "32-true"
    assert "hidden" not in json.loads((done.folder / "run.json").read_text())


def test_a_logger_is_never_resumed_with_a_hidden_secret(
    stop: Stop, config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    words = ["logger=wandb", "logger.wandb.mode=offline", "logger.wandb.notes=abcdefgh", "trainer.max_steps=2"]
    folder = stop("training_step", 1, *words, "trainer.limit_train_batches=2")
    assert folder is not None
    with pytest.raises(ConfigError, match=r"hidden in config\.yaml.*; give it again, logger\.wandb\.notes=…, or"):
        resume_config(OmegaConf.create({"resume": str(folder)}))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "finished"}))
    assert resume_config(OmegaConf.create({"resume": str(folder)})).resume == str(folder), "nothing is logged any more"


def test_an_error_and_a_command_are_recorded_without_secrets(
    run: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ablab.tasks.task import Task

    def fail(*arguments: Any) -> None:
        raise OSError("no answer from http://me:pa55@host with abcdefgh")

    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    words = ["logger.wandb.notes='abcdefgh http://me:pa55@host'", "data.path=abcdefgh/x"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(Task, "training_step", fail)
    with pytest.raises(OSError, match="no answer"):
        run()
    [folder] = (tmp_path / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["error"] == "OSError: no answer from http://***@host with ***"
    assert shlex.split(record["command"])[1:] == [
        "train.py",
        "logger.wandb.notes='*** http://***@host'",
        "data.path=abcdefgh/x",
    ]


def test_the_page_of_runs_has_no_secrets(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("+cell={api_key:abcdefgh,x:y}")
    record = json.loads((done.folder / "run.json").read_text())
    record |= {"overrides": ["data.token=hf_abc", "seed=0"], "error": "refused: abcdefgh", "status": "failed"}
    (done.folder / "run.json").write_text(json.dumps(record))
    with (done.folder / "config.yaml").open("a") as file:
        file.write("password: pa55word\nplace: https://me:pa66@host/\n")
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    page = json.dumps(collect(done.folder.parent))
    for secret in ("abcdefgh", "pa55word", "pa66", "hf_abc"):
        assert secret not in page
    assert "refused: ***" in page


def test_no_file_of_an_ablation_has_a_secret(command: Callable[..., Any], tmp_path: Path) -> None:
    secrets = "hunter2CCCC33", "LLLL0000", "MMMM1212"
    notes = f"'{secrets[0]} https://me:{secrets[1]}@host/?token={secrets[2]}'"
    words = ["-m", "logger=wandb", "logger.wandb.mode=offline", "trainer=smoke", "norm=batchnorm,none", "seed=0"]
    done = command(*words, f"logger.wandb.notes={notes}", "name=abl", DB_PASSWORD=secrets[0])
    assert done.returncode == 0, done.stderr
    page = command(str(tmp_path / "runs"), "--no-open", script="scripts/browse.py", DB_PASSWORD=secrets[0])
    assert page.returncode == 0, page.stderr
    assert len([path for path in (tmp_path / "runs").rglob("*") if path.is_file()]) > 20
    assert files_with(tmp_path / "runs", *secrets) == []
    content = json.loads((tmp_path / "runs/abl/ablation.json").read_text())
    assert "logger.wandb.notes=" in content["command"]
    assert content["ablation"]["factors"] == {"norm": {"batchnorm": ["norm=batchnorm"], "none": ["norm=none"]}}
