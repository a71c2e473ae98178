import json
from pathlib import Path

import pytest

from pipelines.code_digests import main
from wtflow.artefact import sha256_file

DVC = "stages: {code-train: {deps: [pipelines/train.py, wtflow/flow]}}\n"


def test_the_digests_change_with_a_file_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(DVC)
    for name in ("pipelines/train.py", "wtflow/flow/path.py"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(name)
    main("train")
    written = Path("data/code/train.json").read_bytes()
    assert json.loads(written) == {
        name: sha256_file(Path(name)) for name in ("pipelines/train.py", "wtflow/flow/path.py")
    }
    main("train")
    assert Path("data/code/train.json").read_bytes() == written
    Path("wtflow/flow/path.py").write_text("changed")
    main("train")
    assert Path("data/code/train.json").read_bytes() != written
