from benchmarks.small_lines import claims, subset
from wtflow.data.shards import FeatureShards


def test_a_subset_keeps_everything_but_some_training_images(tiny_fit: FeatureShards) -> None:
    every = len(tiny_fit.rows(split="train"))
    small = subset(tiny_fit, 5, draw=0)
    assert len(small.rows(split="train")) == 5
    assert (every > 5, len(small)) == (True, 5 + len(tiny_fit.rows(split="calibrate")))
    ids = small.index["image_id"].to_pylist()
    assert ids != subset(tiny_fit, 5, draw=1).index["image_id"].to_pylist()
    assert subset(tiny_fit, None, draw=0) is tiny_fit
    row = small.rows(split="train")[0]
    whole = tiny_fit.index["image_id"].to_pylist().index(ids[row])
    assert all((small.batch([row])[level] == tiny_fit.batch([whole])[level]).all() for level in tiny_fit.levels)


def test_the_claim_of_a_size_is_about_its_worst_line() -> None:
    rows = [
        {"line": "a", "size": 20, "wtflow": 0.9, "neighbours": 0.85},
        {"line": "b", "size": 20, "wtflow": 0.8, "neighbours": 0.82},
        {"line": "a", "size": "all", "wtflow": 0.95, "neighbours": 0.955},
    ]
    assert [(claim.value, claim.holds) for claim in claims(rows)] == [(-0.02, False), (-0.005, True)]
