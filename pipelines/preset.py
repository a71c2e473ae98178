"""Lay a preset over a product line: `python -m pipelines.preset LINE NAME` writes it into params.yaml.

A preset, presets/<name>.yaml, is a line's overrides of `extract` and `train`. Keys that no preset sets stay as the line
has them, those that one sets are the preset's; `default` takes them away. Comments stay, but for those beside a setting
that goes, and nothing is written that a stage would refuse.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from pipelines.command import call, parser
from pipelines.lines import PARAMS_FILE, known_line, read_params, read_yaml
from wtflow.artefact import replacing
from wtflow.errors import WTFlowError
from wtflow.features.extract import ExtractParams
from wtflow.params import Section, merged
from wtflow.training import TrainParams

FOLDER = Path("presets")
DEFAULT = "default"
STAGES: dict[str, type[Section]] = {"extract": ExtractParams, "train": TrainParams}

Key = tuple[str, ...]


def main(line: str, name: str) -> None:
    """Write the preset, then say what changed and what to type next."""
    before = read_params()
    known_line(before, line)
    presets = read_presets()
    if name not in presets:
        raise WTFlowError(f"{FOLDER}: no preset {name!r}. Known: {', '.join(presets)}.")
    wanted = with_preset(before["lines"][line], presets, name)
    check(before, line, wanted)
    changes = list(changed(before["lines"][line], wanted))
    if not changes:
        say(f"{line} has preset {name} already: nothing to change.")
        return
    write(line, wanted)
    say(f"lines.{line} of {PARAMS_FILE}:", *(f"  {change}" for change in changes))
    back = "" if name == DEFAULT else f"    (to go back: python -m pipelines.preset {line} {DEFAULT})"
    say(f"Next: dvc repro register@{line}{back}")


def say(*lines: str) -> None:
    """Print as it is."""
    Console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def read_presets(folder: Path = FOLDER) -> dict[str, Mapping[str, Any]]:
    """Overrides by preset, `default` first, which has none."""
    return {DEFAULT: {}} | {path.stem: read_preset(path) for path in sorted(folder.glob("*.yaml"))}


def read_preset(path: Path) -> Mapping[str, Any]:
    """The overrides of one preset."""
    values = read_yaml(path)
    if not isinstance(values, Mapping) or set(values) - set(STAGES):
        raise WTFlowError(f"{path}: holds a mapping of {' and '.join(STAGES)}, nothing else. Move other keys out.")
    for stage, section in values.items():
        if not isinstance(section, Mapping):
            raise WTFlowError(f"{path}: {stage} holds {section!r}, not settings. Write them below it, indented.")
    return values


def with_preset(sections: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A line's sections with the preset in place of any other one."""
    owned = {key for preset in presets.values() for key in leaves(preset)}
    own = {stage: without(sections[stage] or {}, owned, (stage,)) for stage in STAGES}
    return {**sections, **merged(own, presets[name])}


def without(values: Mapping[str, Any], owned: set[Key], place: Key) -> dict[str, Any]:
    """`values` but for the keys in `owned`, and for groups that hold nothing else."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        here = (*place, key)
        if isinstance(value, Mapping):
            if inside := without(value, owned, here):
                kept[key] = inside
        elif here not in owned:
            kept[key] = value
    return kept


def leaves(values: Mapping[str, Any], place: Key = ()) -> Iterator[Key]:
    """Places of the values that are no groups."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key)


def check(params: Mapping[str, Any], line: str, sections: Mapping[str, Any]) -> None:
    """Raise what the stages would raise for these sections of the line."""
    for stage, section in STAGES.items():
        values = merged(params.get(stage) or {}, sections[stage])
        section.parse(values, where=f"{PARAMS_FILE}: {stage} (with lines.{line}.{stage})")
    kept = merged(params.get("extract") or {}, sections["extract"])["backbone"]["levels"]
    used = merged(params.get("train") or {}, sections["train"])["fusion"]["levels"]
    if set(used) - set(kept):
        raise WTFlowError(
            f"{PARAMS_FILE}: train.fusion.levels {used} of {line} are not all in extract.backbone.levels {kept}. "
            "Add the missing ones there."
        )


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line of text for each override that comes, goes or changes."""
    old, new = ({key: json.dumps(at(tree, key)) for key in leaves(tree)} for tree in (before, after))
    for key in sorted(old.keys() | new.keys()):
        name = ".".join(key)
        if key not in old:
            yield f"+ {name}: {new[key]}"
        elif key not in new:
            yield f"- {name}: {old[key]}"
        elif old[key] != new[key]:
            yield f"  {name}: {old[key]} -> {new[key]}"


def write(line: str, sections: Mapping[str, Any], path: Path = PARAMS_FILE) -> None:
    """Set the line's `extract` and `train`; the rest of the file stays as it is, to the letter where YAML allows.

    Raises `WTFlowError`, and writes nothing, if anything else would change with it.
    """
    before = read_params(path)
    own = {**before["lines"][line], **{stage: sections[stage] for stage in STAGES}}
    editor = YAML()
    editor.width, editor.preserve_quotes = 4096, True
    editor.representer.add_representer(type(None), _null)
    params = editor.load(path.read_text(encoding="utf-8"))
    target = params["lines"][line]
    for stage in STAGES:
        _lay(target, stage, sections[stage])
    if any(sections[stage] for stage in STAGES):
        target.fa.set_block_style()
    elif not any(target.values()):
        target.fa.set_flow_style()
    text = io.StringIO()
    editor.dump(params, text)
    with replacing(path) as draft:
        draft.write_text(text.getvalue(), encoding="utf-8")
        if read_params(draft) != {**before, "lines": {**before["lines"], line: own}}:
            raise WTFlowError(
                f"{path}: lines.{line} shares settings with another place (& and *, or <<), which would change with "
                "it. Write them out, then type the same command."
            )


def _lay(parent: CommentedMap, key: str, value: Any) -> None:
    """Let `key` hold `value`; what is the same already stays untouched, with its comments."""
    node = parent.get(key)
    if not (isinstance(node, CommentedMap) and node and isinstance(value, Mapping) and value):
        parent[key] = _commented({key: value})[key]
        return
    for gone in [name for name in node if name not in value]:
        del node[gone]
    for name, one in value.items():
        if name not in node or node[name] != one:
            _lay(node, name, one)
    if any(isinstance(one, Mapping) for one in value.values()):
        node.fa.set_block_style()


def _commented(values: Mapping[str, Any]) -> CommentedMap:
    """Groups in block style, those without groups on one line, where the parser that DVC uses wants a colon quoted."""
    result = CommentedMap()
    for key, one in values.items():
        is_quoted = isinstance(one, str) and ":" in one
        result[key] = (
            _commented(one) if isinstance(one, Mapping) else DoubleQuotedScalarString(one) if is_quoted else one
        )
    nested = any(isinstance(value, Mapping) for value in values.values())
    (result.fa.set_block_style if nested else result.fa.set_flow_style)()
    return result


def _null(dumper: Any, _: None) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:null", "null")


def at(values: Mapping[str, Any], key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


if __name__ == "__main__":
    options = parser("pipelines.preset", __doc__, "example: python -m pipelines.preset solar-mono edge")
    options.add_argument("line", metavar="LINE", help="a product line: a key of `lines` in params.yaml")
    options.add_argument("name", metavar="NAME", help=f"a file of {FOLDER}/ without its suffix, or {DEFAULT}")
    arguments = options.parse_args()
    call(lambda: main(arguments.line, arguments.name))
