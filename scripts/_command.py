"""How the commands of this folder begin and end: settings, log, errors in words, exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _path  # noqa: F401  # before the project's own modules
from config.settings import Settings, SettingsError, load_settings
from src.common import logging_config
from src.common.exceptions import ConfigurationError, IngestionError
from src.common.shutdown import Shutdown


def say(line: str) -> None:
    """On stderr, after the command's name."""
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def run_command(
    act: Callable[[Settings, Shutdown], int], *, log_level: str = "ERROR", flags: Mapping[str, Any] | None = None
) -> int:
    """The exit code of `act`; 2 for a setting or argument that cannot be used, 1 for anything else that is in the way.

    `flags`: settings that the command line gives. Who acts for long calls `shutdown.on_signals()`; until then Ctrl-C ends it here.
    """
    try:
        settings = load_settings(flags)
        logging_config.configure(settings.run.log_format, log_level)
        return act(settings, Shutdown())
    except (SettingsError, IngestionError) as error:
        say(str(error))
        return 2 if isinstance(error, (SettingsError, ConfigurationError)) else 1
    except KeyboardInterrupt:
        say("stopped before anything was changed")
        return 1
