from typing import get_args

from wtflow.data.manifest import Layout
from wtflow.data.sources.layouts import LAYOUTS


def test_every_name_that_settings_allow_has_its_layout() -> None:
    assert set(LAYOUTS) == set(get_args(Layout))
