"""What all settings share: the strict section and the number types; imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
