import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.feature_cache import feature_cache
from tests.tiny_line import LINE
from wtflow.cli import app
from wtflow.features.cache import FeatureCache


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and error of `wtflow cache`, in this process."""
    done = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def place(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in, with data/ and without a cache."""
    (tmp_path / "data").symlink_to(tiny_features / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("WTFLOW_FEATURES", "WTFLOW_WORK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_a_cache_it_says_where_it_looked(place: Path) -> None:
    for command in ("ls", "verify", "gc"):
        status, _, err = run(command)
        assert (status, "error: .wtflow/features: no such folder" in err) == (1, True)


@pytest.mark.parametrize("variable", ["WTFLOW_FEATURES", "WTFLOW_WORK"])
def test_the_stage_and_the_command_line_mean_the_same_folder(
    variable: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "elsewhere")
    assert run("fill")[0] == 0
    assert list(feature_cache().folder.glob("*/*.safetensors"))
    monkeypatch.delenv(variable)
    assert not feature_cache().folder.exists()


def test_fill_ls_verify(place: Path) -> None:
    status, out, err = run("fill")
    assert (status, out, err) == (0, ".wtflow/features: 60 images taken over from data/features\n", "")
    status, out, err = run("ls", "--json")
    assert (status, err) == (0, "")
    (one,) = json.loads(out)
    parts = len(list(place.glob("data/features/*/*/part-*")))
    assert (one["images"], one["shards"], one["levels"], one["image_size"]) == (60, parts, [2, 3], [64, 64])
    status, out, _ = run("ls")
    assert status == 0
    assert one["digest"][:12] in out
    assert run("verify") == (0, ".wtflow/features: 60 images, all files whole\n", "")
    assert run("fill", "nowhere") == (1, "", "error: nowhere: no <line>/<output>/index.json. Type: dvc pull\n")


def test_verify_names_the_damaged_file_and_the_remedy(place: Path) -> None:
    run("fill")
    damaged = max(Path(".wtflow/features").glob("*/*.safetensors"))
    data = damaged.read_bytes()
    damaged.unlink()  # the features keep theirs
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    status, out, err = run("verify")
    assert status == 1
    assert out == f"{damaged.absolute().relative_to(place)}: not the bytes that were written\n"
    assert "1 damaged files. Type: wtflow cache verify --remove" in err
    status, out, _ = run("verify", "--remove")
    assert (status, "1 damaged files removed" in out, damaged.exists()) == (0, True, False)
    assert run("verify")[0] == 0


def test_gc_keeps_what_manifests_use(place: Path, tmp_path: Path) -> None:
    run("fill")
    cache = FeatureCache(Path(".wtflow/features"))
    (shelf,) = cache.shelves()
    assert "0 images in 0 shards removed" in run("gc")[1]
    first, image_ids = next(shelf.contents())
    unused = shelf.add(shelf.reader()(list(shelf.find(image_ids[:1]).values())), ["f" * 64], "")
    status, out, _ = run("gc", "--dry-run")
    assert (status, shelf.file(unused).exists()) == (0, True)
    assert f"{unused}.safetensors: 1 images\n" in out
    assert "1 images in 1 shards would be removed" in out
    status, out, _ = run("gc")
    assert (status, shelf.file(unused).exists(), shelf.file(first).exists()) == (0, False, True)
    assert run("verify")[1] == ".wtflow/features: 60 images, all files whole\n"
    assert "no <line>/manifest.parquet" in run("gc", "--prepared", "nowhere")[2]


def test_gc_is_refused_while_a_run_holds_the_cache(place: Path) -> None:
    run("fill")
    with feature_cache().held():
        status, _, err = run("gc")
        assert (status, "a run uses it" in err) == (1, True)
        assert run("gc", "--dry-run")[0] == 0


def test_a_backbone_can_be_dropped(place: Path) -> None:
    run("fill")
    digest = json.loads((place / "data/features" / LINE / "fit/index.json").read_text())["backbone_digest"]
    assert "would be removed" in run("gc", "--drop", digest[:8], "--dry-run")[1]
    assert json.loads(run("ls", "--json")[1])[0]["images"] == 60
    assert run("gc", "--drop", "")[::2] == (
        1,
        "error: --drop: no digest given. Name a backbone by the first digits that `wtflow cache ls` shows.\n",
    )
    assert json.loads(run("ls", "--json")[1])[0]["images"] == 60
    assert run("gc", "--drop", digest[:8])[0] == 0
    assert json.loads(run("ls", "--json")[1]) == []
