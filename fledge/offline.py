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


def hub_host() -> str | None:
    """The host that is asked for models; None where a proxy knows it, or HF_HUB_OFFLINE says whether it is asked."""
    proxied = any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES)
    if proxied or "HF_HUB_OFFLINE" in os.environ:
        return None
    return urlsplit(os.environ.get("HF_ENDPOINT") or HUB).hostname


@functools.cache
def stop_asking_an_unknown_hub() -> None:
    """Tell the hub's libraries to read their caches only, where its name cannot be resolved and no proxy could."""
    host = hub_host()
    if host is None or is_known(host):
        return
    say(f"{host} is not reachable from here: models and data sets are read from folders and from the hub's cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):  # which have read the variable
        if (module := sys.modules.get(name)) is not None:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


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
