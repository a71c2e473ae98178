"""What the tasks of a Ray get of this process's environment."""

import json
import os
from pathlib import Path

import pytest

from pipelines.adapters.ray_runtime import cluster, passed

SECRETS = {
    "AWS_ACCESS_KEY_ID": "an-id",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_SESSION_TOKEN": "a-token",
    "MLFLOW_TRACKING_PASSWORD": "a-password",
    "MLFLOW_TRACKING_TOKEN": "another-token",
}
SETTINGS = {
    "AWS_ENDPOINT_URL": "http://s3",
    "AWS_REGION": "r",
    "MLFLOW_TRACKING_URI": "http://m",
    "WTFLOW_THREADS": "1",
}


def test_settings_are_handed_to_tasks_and_secrets_are_not() -> None:
    assert passed({**SECRETS, **SETTINGS, "HOME": "/root", "RAY_AUTH_TOKEN": "t"}) == SETTINGS


@pytest.mark.slow
def test_a_ray_of_this_process_has_its_secrets_and_does_not_show_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, **SETTINGS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    with cluster(1):
        import ray

        names = [*SECRETS, *SETTINGS]
        seen = ray.get(ray.remote(lambda: {name: os.environ.get(name) for name in names}).remote())
        shown = str(ray.get_runtime_context().runtime_env)
    assert seen == {**SECRETS, **SETTINGS}
    assert "http://s3" in shown
    assert not [value for value in SECRETS.values() if value in shown]


@pytest.mark.slow
def test_a_submitted_job_may_have_settings_in_its_runtime_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WTFLOW_THREADS": "1", "OTHER": "kept"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    # as `ray job submit` hands a job its runtime environment
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": given}, "metadata": {}}))
    monkeypatch.delenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    with cluster(1):
        import ray

        seen = dict(ray.get_runtime_context().runtime_env["env_vars"])
    assert seen["PYTHONPATH"] == str(tmp_path)
    assert {name: seen[name] for name in given} == given
