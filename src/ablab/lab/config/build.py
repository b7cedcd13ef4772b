"""Build objects from nodes of the config: the only module that instantiates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from ablab.errors import ConfigError


def build(node: DictConfig, **given: Any) -> Any:
    """Call the `_target_` of a node with the node's keys and additional arguments of the program.

    A node with `_partial_: true` returns a partial function, to be called with the remaining arguments later.

    Raises:
        ConfigError: the call refused a value; the message begins with the config path of the value.
    """
    place = node._get_full_key("")
    for name in given.keys() & node.keys():
        raise ConfigError(f"{place}.{name}: the program itself gives it, from the rest of the config; leave it out")
    with add_config_path(place):
        # partial: live objects in `given` must not pass through OmegaConf, which would copy them
        call = instantiate(node, _partial_=True, _convert_="all")
        return call if node.get("_partial_") else call(**given)


@contextmanager
def add_config_path(place: str) -> Iterator[None]:
    """Turn errors about a value into a `ConfigError` that names its path in the config.

    The path is put before a message of the form `name=value`: `data.batch_size=0: …`.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, LookupError, MisconfigurationException, InstantiationException) as error:
        message = str(error.__cause__ or error) if isinstance(error, InstantiationException) else str(error)
        if isinstance(error, InstantiationException) and (inside := re.search(r"full_key: (\S+)", str(error))):
            place = inside[1]  # a node below, data.shift of data
        separator = "." if re.match(r"[\w.]+=", message) else ": "
        raise ConfigError(f"{place}{separator}{message}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"{place}: it needs a package that is not installed ({error}); choose another") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ConfigError(f"{place}: it takes more memory than there is; choose smaller sizes") from error
