"""Tests against real engines run only when asked for (`make test-engines`, or `-m vllm`): each starts a server."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "vllm" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="needs a vLLM server: run `make test-engines`"))
