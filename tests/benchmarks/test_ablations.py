import pytest

from benchmarks import ablations
from benchmarks.ablations import VARIANTS, Trial
from benchmarks.product_lines import PROJECT, ProductLine
from wtflow.errors import WTFlowError

LINE = ProductLine("solar-mono", PROJECT, PROJECT / "data/raw/solar-mono")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_settings_that_train_takes_and_differs_from_the_default(variant: str) -> None:
    trial = Trial(variant, LINE, 1)
    assert trial.params.seed == 1
    assert (trial.params == Trial("default", LINE, 1).params) == (variant == "default")


def test_what_only_asks_a_field_otherwise_shares_its_training() -> None:
    trials = [Trial(variant, LINE, 0) for variant in ("default", "start 0", "width 32", "top 3 %")]
    groups = [[trial.variant for trial in group] for group in ablations._by_training(trials)]
    assert sorted(groups) == [["default", "start 0", "top 3 %"], ["width 32"]]


def test_a_setting_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "VARIANTS", {"odd": {"batches": {"rareness": 2.0}}})
    with pytest.raises(WTFlowError, match=r"rareness"):
        _ = Trial("odd", LINE, 0).params
