"""huggingface_hub as it is installed, told that the hub is a server of ours and the cache a folder of a test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotp_plan.sources.transfer import persistence
from autotp_plan.sources.transfer.http_connections import close_kept
from tests.helpers.hub_server import HubServer, hub_server


@contextlib.contextmanager
def loopback_hub(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that huggingface_hub takes for the hub, in this process and in those that it starts."""
    from huggingface_hub import utils

    with hub_server() as server:
        point_to(server.url, cache, patch)
        patch.setattr(persistence, "FIRST_WAIT", 0.01)
        yield server
        utils.close_session()
        close_kept()


def point_to(url: str, cache: Path, patch: pytest.MonkeyPatch, offline: bool = False) -> None:
    """Let huggingface_hub ask `url`, keep what it downloads in `cache`, and be on or off line."""
    from huggingface_hub import constants

    variables = {
        "HF_ENDPOINT": url,
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    for name, value in variables.items():
        patch.setenv(name, value)
    for name in ("HF_TOKEN", *[name for name in os.environ if name.lower().endswith("_proxy")]):
        patch.delenv(name, raising=False)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "harnesses.json"), raising=False)
