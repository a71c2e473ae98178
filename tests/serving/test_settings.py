import pytest

from serving.settings import ServeSettings
from wtflow.errors import WTFlowError


def test_only_this_machine_by_default() -> None:
    settings = ServeSettings.from_environment()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WTFLOW_SERVE_PORT", "8123")
    monkeypatch.setenv("WTFLOW_SERVE_MAX_BATCH_SIZE", "3")
    settings = ServeSettings.from_environment()
    assert (settings.port, settings.max_batch_size) == (8123, 3)


def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WTFLOW_SERVE_PORT", "")
    assert ServeSettings.from_environment().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "70000"), ("PORT", "web"), ("MAX_BATCH_SIZE", "0"), ("REPLICAS", "-1"), ("BATCH_WAIT_MS", "-5")],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"WTFLOW_SERVE_{name}", value)
    with pytest.raises(WTFlowError, match=f"WTFLOW_SERVE_{name}: .*{value}"):
        ServeSettings.from_environment()


def test_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WTFLOW_SERVE_PROT", "8123")
    with pytest.raises(WTFlowError, match=r"WTFLOW_SERVE_PROT.*WTFLOW_SERVE_PORT"):
        ServeSettings.from_environment()
