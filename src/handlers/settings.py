"""How the handlers of the box read their settings: the environment and `.env`, once, a wrong value in one line."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from src.common.exceptions import ConfigurationError


class HandlerSettings(BaseSettings):
    """A handler's own settings; each subclass names its `env_prefix`."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_file=".env", env_ignore_empty=True)


S = TypeVar("S", bound=HandlerSettings)


def read(model: type[S]) -> S:
    """The settings as the environment has them. Raises ConfigurationError: variable, value (secrets masked), rule."""
    try:
        return model()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    variable = f"{model.model_config.get('env_prefix', '')}{field}".upper()
    if first["type"] == "missing":
        raise ConfigurationError(f"{variable} is not set: {model.model_fields[field].description}")
    rule = first["msg"].removeprefix("Value error, ")
    if not field:
        raise ConfigurationError(rule)
    secret = "SecretStr" in str(model.model_fields[field].annotation)
    raise ConfigurationError(f"{variable}={'***' if secret else first['input']}: {rule[:1].lower()}{rule[1:]}")
