from pathlib import Path

import pytest

from pipelines.lines import LINE_STAGES, read_params
from wtflow.errors import WTFlowError

EMPTY = "{" + ", ".join(f"{stage}: {{}}" for stage in LINE_STAGES) + "}"


def params(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    found = read_params(params(tmp_path, f"lines: {{a: {EMPTY}}}\ntrain: {{learning_rate: 2e-3}}\n"))
    assert found["train"]["learning_rate"] == 0.002


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"lines: {{a: {EMPTY}}}\nevaluat: {{}}\n", "unknown section evaluat. Known: fetch, lines, prepare"),
        (f"lines:\n  a: {EMPTY}\n  a: {EMPTY}\n", 'duplicate key "a"'),
        (f"lines: {{17: {EMPTY}}}\n", r"Put it in quotes: '17'"),
        (f"lines: {{Tile B: {EMPTY}}}\n", "lines.Tile B: a line's name is 1 to 50 lower-case letters"),
        ("lines: {a: {train: {}}}\n", "lines.a: needs exactly the sections prepare, extract"),
        (f"lines: {{true: {EMPTY}}}\n", "lines.True: a line's name is 1 to 50 lower-case letters"),
        (f"lines: {{a: {EMPTY.replace('train: {}', 'train: 5')}}}\n", "lines.a.train holds 5, not settings"),
        (f"lines: {{a: {EMPTY}}}\ntrain: [epochs]\n", "train holds ['epochs'], not settings"),
        (f"lines: {{a: {EMPTY}}}\nfetch: 5\n", "fetch holds 5, not settings"),
        ('prepare: {group_pattern: "(part\\d+)_"}\n', "A backslash belongs in single quotes: '(part\\d+)_'"),
        ("lines: {}\n", "needs a section `lines`"),
        ("lines: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = params(tmp_path, text)
    with pytest.raises(WTFlowError) as raised:
        read_params(path)
    assert str(raised.value).startswith(str(path))
    assert said in str(raised.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes("lines: {}  # Maße\n".encode("latin-1"))
    with pytest.raises(WTFlowError, match=r"params\.yaml: not UTF-8 .* at byte 15\)\. Save it as UTF-8"):
        read_params(path)
