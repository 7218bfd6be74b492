import pytest
from huggingface_hub import HfApi, constants

from undersong.hub.local_hub import LocalHub


@pytest.fixture
def online(monkeypatch):
    """The suite runs with HF_HUB_OFFLINE=1; with this, huggingface_hub in this process may talk to a LocalHub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online):
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)
