from pathlib import Path

from pipelines.provenance import stage_sources

DVC = "stages: {code-train: {deps: [pipelines/train.py, pipelines/page.html.j2, wtflow/flow]}}\n"


def test_a_folder_stands_for_the_source_files_in_it(tmp_path: Path) -> None:
    """Else a change of one of them would not be seen."""
    (tmp_path / "dvc.yaml").write_text(DVC)
    for name in ("wtflow/flow/path.py", "wtflow/flow/loss.py", "wtflow/flow/notes.txt", "wtflow/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = ["pipelines/train.py", "pipelines/page.html.j2", "wtflow/flow/loss.py", "wtflow/flow/path.py"]
    assert stage_sources("train", tmp_path) == wanted
