import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_line import scores, write_trained
from wtflow import bundle as module
from wtflow.artefact import read_json, sha256_file, write_json
from wtflow.bundle import FILES, load_bundle, write_bundle
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_a_bundle_written_again_scores_the_same(tiny_bundle: Path, tiny_test: FeatureShards, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    detector = bundle.detector()
    weights = detector.backbone.network.state_dict()
    digest = write_bundle(
        tmp_path / "again", bundle.config, weights, detector.scorer, bundle.calibration, bundle.provenance
    )
    again = load_bundle(tmp_path / "again")
    assert digest == again.digest == bundle.digest
    assert (again.config, again.provenance) == (bundle.config, bundle.provenance)
    levels = tiny_test.batch(range(len(tiny_test)))
    before, after = detector.verdicts_of_features(levels), again.detector().verdicts_of_features(levels)
    np.testing.assert_allclose(scores(after), scores(before), rtol=0, atol=1e-7)
    assert [verdict.p_value for verdict in after] == [verdict.p_value for verdict in before]


def test_the_same_training_gives_the_same_digest(tiny_bundle: Path, tiny_fit: FeatureShards, tmp_path: Path) -> None:
    assert write_trained(tiny_fit, tmp_path / "twice") == load_bundle(tiny_bundle).digest


def test_the_networks_do_not_learn_any_more(tiny_bundle: Path) -> None:
    detector = load_bundle(tiny_bundle).detector()
    for network in (detector.backbone.network, detector.scorer):
        assert not any(module.training for module in network.modules())
        assert not any(value.requires_grad for value in network.parameters())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_changed_byte_is_refused(copy: Path, name: str, share: float) -> None:
    flip(copy / name, int(share * ((copy / name).stat().st_size - 1)))
    with pytest.raises(DigestError, match=name.replace(".", r"\.")):
        load_bundle(copy)


def test_any_changed_byte_of_the_header_is_refused(copy: Path) -> None:
    """Except in the white space between its values, where it says the same."""
    path = copy / "bundle.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        if whole[place : place + 1].isspace():
            continue
        flip(path, place)
        with pytest.raises(WTFlowError, match="bundle"):
            load_bundle(copy)
        path.write_bytes(whole)
    load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DigestError, match=f"lacks {re.escape(name)}"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["extra.py", "config.json.bak", ".hidden"])
def test_an_added_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).touch()
    with pytest.raises(DigestError, match=rf"{re.escape(name)} does not belong into a bundle\. Remove it"):
        load_bundle(copy)


def test_a_file_changed_together_with_its_digest_is_refused(copy: Path) -> None:
    """Whoever mends the header too has another digest, and the old one no longer fits."""
    header = read_json(copy / "bundle.json")
    header["files"]["config.json"] = "0" * 64
    write_json(copy / "bundle.json", header)
    with pytest.raises(DigestError, match=r"config\.json"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["backbone.safetensors", "scorer.safetensors"])
def test_weights_that_are_replaced_before_they_are_read_are_refused(copy: Path, name: str) -> None:
    bundle = load_bundle(copy)
    flip(copy / name, -1)
    with pytest.raises(DigestError, match=rf"{re.escape(name)}: the bundle was replaced .* Type the command again"):
        bundle.detector()
    shutil.rmtree(copy)
    with pytest.raises(DigestError, match="the bundle was replaced"):
        bundle.detector()


def test_a_bundle_that_is_replaced_while_it_is_checked_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(path: Path) -> str:
        digest = sha256_file(path)
        if path.name == "calibration.json":
            flip(path, -2)
        return digest

    monkeypatch.setattr(module, "sha256_file", hashed)
    with pytest.raises(DigestError, match=r"calibration\.json: the bundle was replaced"):
        load_bundle(copy)


def test_no_header_and_an_unknown_format_say_what_to_do(copy: Path) -> None:
    header = json.loads((copy / "bundle.json").read_text())
    write_json(copy / "bundle.json", header | {"format": 99})
    with pytest.raises(WTFlowError, match=r"format 99.*Train the line again"):
        load_bundle(copy)
    (copy / "bundle.json").unlink()
    with pytest.raises(WTFlowError, match=r"bundle\.json: not there"):
        load_bundle(copy)
    write_json(copy / "bundle.json", header)
    with pytest.raises(WTFlowError, match=rf"Bundles below it: {re.escape(str(copy))}$"):
        load_bundle(copy.parent)


@pytest.mark.parametrize("header", [[], None, {"files": []}])
def test_a_header_of_another_shape_is_refused(copy: Path, header: object) -> None:
    whole = read_json(copy / "bundle.json")
    write_json(copy / "bundle.json", whole | header if isinstance(header, dict) else header)
    with pytest.raises(DigestError, match=r"bundle\.json: .* Fetch the bundle again"):
        load_bundle(copy)


def test_a_bundle_shows_itself_in_a_line(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert bundle.digest in repr(bundle)
    assert len(repr(bundle)) < 400
