"""Where features that were computed once are kept: beside the unfinished work, or where WTFLOW_FEATURES says."""

from pathlib import Path

from pydantic_settings import SettingsConfigDict

from pipelines.environment import RunSettings, Settings
from wtflow.features.cache import FeatureCache


class CacheSettings(Settings):
    """`WTFLOW_<NAME>` in the environment; see infra/env.example."""

    model_config = SettingsConfigDict(env_prefix="WTFLOW_")

    features: str = ""
    """Folder of the feature cache, which lines, checkouts and machines may share; empty: `work`/features."""


def feature_cache() -> FeatureCache:
    """The cache that the environment names, by its absolute path."""
    named = CacheSettings().features
    return FeatureCache((RunSettings().work / "features").absolute() if not named else Path(named).absolute())
