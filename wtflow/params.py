"""How a setting is declared: once, typed and strict, beside the code that reads it."""

import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from wtflow.errors import WTFlowError


class Section(BaseModel):
    """A frozen group of settings. A key that is not declared, or a value of another type, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate plain values (as YAML or JSON gives them). `where` names their place in the error."""
        try:
            return cls.model_validate_json(json.dumps(values))
        except TypeError as error:  # a date, which YAML makes of 2026-11-24
            raise WTFlowError(f"settings of {where} are wrong: {error}. Put quotes around a text.") from None
        except ValidationError as error:
            lines = [
                f"  {'.'.join([where, *map(str, item['loc'])])}: {item['msg']}{_found(item['input'])}"
                for item in error.errors()
            ]
            known = ", ".join(cls.model_fields)
            raise WTFlowError(
                "\n".join([f"settings of {where} are wrong:", *lines, f"  known keys: {known}"])
            ) from None


def _found(value: object) -> str:
    """The value that is wrong; a whole section, whose keys do not go together, is not shown."""
    return "" if isinstance(value, Mapping) else f" (found {value!r})"


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `override` laid over it, group by group. Neither is changed."""
    result = dict(base)
    for key, value in override.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
