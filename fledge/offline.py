"""Machines without the model hub: found out once, instead of by half a minute of retries for every file."""

import functools
import os
import socket
import sys
import threading
from urllib.parse import urlsplit

from fledge.console import say

HUB = "https://huggingface.co"
PROXIES = ("https_proxy", "http_proxy", "all_proxy")
PATIENCE_S = 3.0  # for an answer about the hub's name; no answer in time says nothing


@functools.cache
def stop_asking_an_unknown_hub() -> None:
    """Tell the hub's library to read its cache only, where the hub's name cannot be resolved and no proxy could."""
    proxied = any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES)
    host = urlsplit(os.environ.get("HF_ENDPOINT") or HUB).hostname
    if proxied or host is None or "HF_HUB_OFFLINE" in os.environ or is_known(host):
        return
    say(f"{host} is not reachable from here: models and data sets are read from folders and from the hub's cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def is_known(host: str) -> bool:
    """Whether a host's name can be resolved; True, too, where nobody answers in time."""
    failed = threading.Event()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            failed.set()

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not failed.is_set()
