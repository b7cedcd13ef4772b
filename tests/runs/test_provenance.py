"""The record of code, environment and machine."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest

from ablab.errors import ConfigError
from ablab.lab.run import provenance
from ablab.lab.run.folder import read_config


def test_a_config_that_cannot_be_read_is_named(run: Any) -> None:
    done = run()
    (done.folder / "config.yaml").write_text("data: *nothing\n")
    with pytest.raises(ConfigError, match=r"its config\.yaml cannot be read .*; bring it back"):
        read_config(done.folder)


def test_the_environment_names_every_package_and_the_threads() -> None:
    found = json.loads(json.dumps(provenance.environment()))
    assert found["packages"]["torch"] == metadata.version("torch")
    assert {"lightning", "numpy", "pytest"} <= found["packages"].keys()
    assert found["threads"]["torch"] >= 1
    assert found["python"].startswith("3.")
    assert found["processor"]
