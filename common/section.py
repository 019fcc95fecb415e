"""Rules for every table of a run's TOML file, whichever keys it has."""

from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MOST = 2**31 - 1
"""The upper bound of a whole number whose key has none of its own: the largest that the libraries can hold."""


class Section(BaseModel):
    """A table of the TOML file: unknown keys are errors, numbers are finite, values never change after validation.

    Booleans are not numbers, texts are not empty, and whole numbers are bounded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings", allow_inf_nan=False)

    may_be_blank: ClassVar[tuple[str, ...]] = ()
    """The keys whose texts may be of spaces and line breaks alone."""

    @model_validator(mode="before")
    @classmethod
    def _values_are_of_their_kind(cls, table: Any) -> Any:
        """Refuse values that pydantic would accept: booleans for 0 and 1, and empty texts."""
        given = table if isinstance(table, dict) else {}
        problems = [
            f"{key} {problem}"
            for key, field in cls.model_fields.items()
            if key in given
            and (problem := _other_kind(given[key], field, may_be_blank=key in cls.may_be_blank)) is not None
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return table

    @field_validator("*", mode="after")
    @classmethod
    def _is_bounded(cls, value: Any, info: ValidationInfo) -> Any:
        bounds = cls.model_fields[str(info.field_name)].metadata
        has_bound = any(hasattr(bound, "le") or hasattr(bound, "lt") for bound in bounds)
        if isinstance(value, int) and value > MOST and not has_bound:
            raise PydanticCustomError("too_large", f"should be less than or equal to {MOST}")
        return value

    def refuse_unused(self, *keys: str, because: str) -> None:
        """Raise ValueError if one of these keys, which have no effect here, has another value than its default."""
        defaults = {key: type(self).model_fields[key].default for key in keys}
        if changed := [key for key, default in defaults.items() if getattr(self, key) != default]:
            found = ", ".join(f"{key} = {getattr(self, key)!r}" for key in changed)
            raise ValueError(f"{found} would have no effect: {because}")


def _other_kind(value: Any, field: FieldInfo, *, may_be_blank: bool) -> str | None:
    """The error for a boolean in place of a number, or for an empty text that is not a default."""
    kinds = _kinds(field.annotation)
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, bool) and bool not in kinds and not kinds.isdisjoint({int, float}):
            return f"should be a number, found {value!r}"
        is_empty = isinstance(part, str) and not (part if may_be_blank else part.strip())
        if is_empty and str in kinds and part != field.default:
            return f"should not be empty, found {value!r}" + ("" if field.is_required() else "; leave it out")
    return None


def _kinds(annotation: Any) -> set[type]:
    """The types that a value may have or contain; a list of possible texts states its own error."""
    if get_origin(annotation) is Literal:
        return {type(choice) for choice in get_args(annotation)} - {str}
    if inner := get_args(annotation):
        return set().union(*map(_kinds, inner))
    return {annotation} if isinstance(annotation, type) else set()
