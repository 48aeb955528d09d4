"""What every section of a config is: frozen, and closed to what it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    from vfmlab.registry import Registry


class Section(BaseModel):
    """Base of every config section: frozen, and closed to unknown fields.

    dropped: fields of earlier versions, at the one value that they ever had. They stay in the JSON, and so in
    ids; a config that sets another value is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    dropped: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, given in value.items():
            parts = given if isinstance(given, list | tuple) else [given]
            if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
                raise _problem(name, "the number is too large", "an integer beyond 64 bits")
            if name in cls.dropped and given != cls.dropped[name]:
                raise _problem(name, f"the field is no longer there, it is always {cls.dropped[name]!r}; "
                                     "leave it out", given)
        return {name: given for name, given in value.items() if name not in cls.dropped}

    @model_serializer(mode="wrap")
    def _with_dropped(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return handler(self) | self.dropped


def _problem(field: str, message: str, value: Any) -> ValidationError:
    line = {"type": "value_error", "loc": (field,), "input": value, "ctx": {"error": ValueError(message)}}
    return ValidationError.from_exception_data("Section", [line])


def by_name(registry: Registry, key: str) -> BeforeValidator:
    """Validate a section with the `Config` of the registered part that its field `key` names."""

    def choose(value: Any) -> Any:
        if isinstance(value, str):
            value = {key: value}
        if not isinstance(value, dict):
            return value
        if key not in value:
            raise ValueError(f"needs the field '{key}' (choose from: {', '.join(registry.names())})")
        return registry.get(value[key]).Config.model_validate(value)

    return BeforeValidator(choose)


def under(key: str, error: ValidationError) -> ValidationError:
    """`error` with `key` put before the place of each of its complaints, so that a message names the whole
    path.
    """
    lines = [{k: v for k, v in line.items() if k in ("type", "input", "ctx")} | {"loc": (key, *line["loc"])}
             for line in error.errors(include_url=False)]
    return ValidationError.from_exception_data(error.title, lines)


class Part(Section):
    """A part of a run that is given from a notebook's cell; see `vfmlab/nn/parts.py`."""

    source: str = Field(..., pattern="^[0-9a-f]{8}$", description="hash of its source")
    weight: float = Field(1.0, gt=0, description="of a loss")
