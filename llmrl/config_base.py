"""What every section of a configuration has in common: frozen models that refuse unknown keys, and types of values."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import is_pydantic_dataclass

Device: TypeAlias = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Positive: TypeAlias = Annotated[float, Field(gt=0.0)]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def section_fields(annotation: Any) -> dict[str, Any]:
    """Keys and their types, if a type is a section of a configuration; otherwise nothing."""
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        if is_pydantic_dataclass(annotation):
            return {name: field.annotation for name, field in annotation.__pydantic_fields__.items()}
    return {}


class Settings(BaseModel):
    """Base of every section: frozen, no unknown keys, finite numbers; a section left empty keeps its defaults."""

    model_config = ConfigDict(**STRICT, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        sections = {name for name, field in cls.model_fields.items() if section_fields(field.annotation)}
        return {key: item for key, item in value.items() if item is not None or key not in sections}
