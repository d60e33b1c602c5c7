"""Every setting of both daemons: one frozen object, built once at the edge and handed down.

A setting comes from (strongest first) a command-line flag, the environment, the file `.env`, its default. Names are flat
(`REDIS_URL`), sections are nested (`settings.redis.url`). `.env.example` and the README's table are made from this file by
`scripts/settings_doc.py`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Days = Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)]
SINCE_DAYS = re.compile(r"since:(\d{1,4})d")
HANDLER = re.compile(r"(?:[\w.]+|.+\.py):\w+")
ARCHIVE = re.compile(r"off|file:(?!//(?!/)).+|(?!file:)[a-z][a-z0-9+.:-]*://.+")


class SettingsError(ValueError):
    """One line for the user: variable, rule, value (secrets masked)."""


class Section(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=False, env_ignore_empty=True)


class RedisSettings(Section):
    url: SecretStr | None = Field(
        None,
        alias="REDIS_URL",
        description="redis://, rediss:// or unix:// address. Unset: the server on 127.0.0.1:6379 if one answers at the first run, "
        "else an embedded Valkey kept under DATA_DIR.",
    )
    max_connections: int = Field(
        20,
        alias="REDIS_MAX_CONNECTIONS",
        ge=4,
        le=1000,
        description="Most connections of one process; with more mailboxes or handlers than that, calls wait for their turn.",
    )
    socket_timeout: Positive = Field(
        10,
        alias="REDIS_SOCKET_TIMEOUT",
        description="Seconds without an answer after which a call counts as lost (above the block time).",
    )
    embedded_tcp: bool = Field(
        True,
        alias="EMBEDDED_TCP",
        description="Whether the embedded server also listens on 127.0.0.1:6379 (no password: any local user can read it).",
    )

    memory_high: float = Field(
        0.85, alias="MEMORY_HIGH", gt=0, le=1, description="Part of Redis' maxmemory in use at which the producer pauses intake."
    )
    memory_low: float = Field(
        0.75, alias="MEMORY_LOW", gt=0, le=1, description="Part of it below which intake goes on; no limit, no pause."
    )
    allow_eviction: bool = Field(
        False,
        alias="ALLOW_EVICTION",
        description="Start although Redis' maxmemory-policy would throw unfinished mail away when it is full.",
    )

    @field_validator("url")
    @classmethod
    def _scheme(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return url

    @model_validator(mode="after")
    def _low_below_high(self) -> RedisSettings:
        if self.memory_low > self.memory_high:
            raise ValueError(f"MEMORY_LOW={self.memory_low:g} must not be above MEMORY_HIGH={self.memory_high:g}")
        return self


class StreamSettings(Section):
    name: str = Field(
        "email_ingestion_stream",
        alias="STREAM_NAME",
        min_length=1,
        description="Key of the stream; all other keys follow from it but `producer_state:*`: one stream to a Redis database.",
    )
    group: str = Field("email_workers", alias="CONSUMER_GROUP", min_length=1, description="The one consumer group of the stream.")
    maxlen: int = Field(
        100_000,
        alias="STREAM_MAXLEN",
        ge=1,
        description="Unfinished mails at which intake waits; nothing is ever trimmed. Backfill uses a tenth.",
    )
    dlq_max: int = Field(10_000, alias="DLQ_MAX", ge=1, description="Dead letters at which workers stop reading and say so.")
    dlq_days: Days = Field(
        90, alias="DLQ_DAYS", description="Days after which a dead letter is given up (discarded): its mail will not come back."
    )
    results_max: int = Field(100_000, alias="RESULTS_MAX", ge=1, description="About how many results are kept.")
    results_days: Days = Field(7, alias="RESULTS_DAYS", description="Days a result is kept.")
    result_max_bytes: int = Field(
        65_536, alias="RESULT_MAX_BYTES", ge=64, description="Largest result of a handler, in bytes of JSON."
    )
    processed_days: Days = Field(400, alias="PROCESSED_DAYS", description="Days the ids of finished mail are kept.")


class MailSettings(Section):
    usernames: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        alias="GMAIL_USERNAME",
        description="Accounts, separated by commas. Unset: the account of the token file, or all of ACCOUNTS_FILE.",
    )
    accounts_file: Path | None = Field(
        None,
        alias="ACCOUNTS_FILE",
        description="TOML file of several accounts, each with folders, a way to log in and overrides of this section "
        "(docs/OAUTH2_SETUP.md, section 4). GMAIL_USERNAME then chooses among them.",
    )
    mailboxes: Annotated[tuple[str, ...], NoDecode] = Field(
        ("INBOX",),
        alias="MAILBOXES",
        description=r"Folders, separated by commas: names, or special uses (\All, \Sent, \Junk, …), whose names are localised.",
    )
    auth_method: Literal["oauth2", "service_account", "password"] = Field(
        "oauth2",
        alias="AUTH_METHOD",
        description="How to log in: a person's consent, a Workspace service account, or a password (app passwords, other servers).",
    )
    token_dir: Path = Field(
        Path("tokens"),
        alias="TOKEN_DIR",
        description="Folder of the token files: <account>.json, or gmail_token.json for a single account.",
    )
    token_file: Path | None = Field(
        None, alias="TOKEN_FILE", description="Token file of a single account; it wins over TOKEN_DIR."
    )
    service_account_file: Path | None = Field(
        None,
        alias="SERVICE_ACCOUNT_FILE",
        description="JSON key of a service account with domain-wide delegation, for AUTH_METHOD=service_account; one for all accounts.",
    )
    password: SecretStr | None = Field(
        None, alias="IMAP_PASSWORD", description="Password of a single account, for AUTH_METHOD=password."
    )
    password_file: Path | None = Field(
        None, alias="IMAP_PASSWORD_FILE", description="File with that password, mode 0600; it wins over IMAP_PASSWORD."
    )
    host: str = Field("imap.gmail.com", alias="IMAP_HOST", description="IMAP server.")
    port: int = Field(993, alias="IMAP_PORT", ge=1, le=65535, description="Its port.")
    security: Literal["tls", "none"] = Field(
        "tls", alias="IMAP_SECURITY", description="`none` is allowed on this machine only (sandbox, tests)."
    )
    ca_file: Path | None = Field(None, alias="IMAP_CA_FILE", description="Certificate authority of a server of your own (PEM).")
    timeout: Positive = Field(60, alias="IMAP_TIMEOUT", description="Seconds a single socket operation may take.")
    poll_interval: Positive = Field(
        60, alias="POLL_INTERVAL", description="Seconds between two polls; IDLE is only a hint in between."
    )
    batch_size: int = Field(100, alias="PRODUCER_BATCH_SIZE", ge=1, le=500, description="Most mails in one publish.")
    initial_sync: str = Field(
        "since:7d", alias="INITIAL_SYNC", description="First read of a mailbox: since:7d, since:2026-01-31, new or all."
    )
    max_message_bytes: int = Field(
        35_000_000,
        alias="MAX_MESSAGE_BYTES",
        ge=65_536,
        description="Above this a mail is read as a stub: header and first 64 KiB.",
    )
    dedup_scope: Literal["account", "mailbox"] = Field(
        "account", alias="DEDUP_SCOPE", description="`mailbox`: the same mail in a second watched folder is a new mail."
    )
    lease: Positive = Field(
        30, alias="PRODUCER_LEASE", description="Seconds after which a standby producer takes a silent one's mailbox over."
    )
    relist_interval: Positive = Field(
        600,
        alias="RELIST_INTERVAL",
        description="Seconds between two looks for mail that became visible late; each sixth goes back two days.",
    )
    daily_bytes: int = Field(
        2_000_000_000,
        alias="DAILY_BYTES",
        ge=1_000_000,
        description="Bytes a day and account at which old mail waits for tomorrow.",
    )
    overquota_wait: Positive = Field(3600, alias="OVERQUOTA_WAIT", description="Seconds of rest after the server's [OVERQUOTA].")
    throttled_wait: Positive = Field(900, alias="THROTTLED_WAIT", description="Seconds of rest after the server's [THROTTLED].")
    connections_wait: Positive = Field(
        300, alias="CONNECTIONS_WAIT", description="Seconds of rest after `Too many simultaneous connections`."
    )
    incomplete_wait: Positive = Field(
        15,
        alias="INCOMPLETE_WAIT",
        description="Seconds between two tries for a mail whose data the server does not give; three, then a stub.",
    )

    @field_validator("accounts_file", "token_file", "service_account_file", "password_file", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        return value or None

    @field_validator("usernames", "mailboxes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("usernames", "mailboxes")
    @classmethod
    def _printable(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any(not name.isprintable() for name in names):
            raise ValueError("must be printable")
        return names

    @field_validator("mailboxes")
    @classmethod
    def _one_at_least(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("must name at least one folder")
        return names

    @field_validator("initial_sync")
    @classmethod
    def _sync(cls, value: str) -> str:
        if value not in ("new", "all") and not SINCE_DAYS.fullmatch(value):
            try:
                date.fromisoformat(value.removeprefix("since:") if value.startswith("since:") else "")
            except ValueError:
                raise ValueError("must be since:<days>d, since:<YYYY-MM-DD>, new or all") from None
        return value

    @model_validator(mode="after")
    def _plain_text_stays_here(self) -> MailSettings:
        if self.security == "none" and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError("IMAP_SECURITY=none would send the token in clear text; it is allowed for 127.0.0.1 only")
        return self


class AuthSettings(Section):
    """What `--auth-setup` needs; a producer that has its token files needs none of it."""

    client_id: str | None = Field(
        None, alias="GMAIL_CLIENT_ID", description="Client id of a Google Cloud client of type Desktop app, for --auth-setup."
    )
    client_secret: SecretStr | None = Field(None, alias="GMAIL_CLIENT_SECRET", description="Its secret.")
    client_secrets_file: Path | None = Field(
        None,
        alias="GMAIL_CLIENT_SECRETS_FILE",
        description="The same two as the JSON file that Google's console lets one download; it wins over them.",
    )
    port: int = Field(
        0,
        alias="GMAIL_AUTH_PORT",
        ge=0,
        le=65535,
        description="Port of 127.0.0.1 at which --auth-setup waits for the browser. 0: any free one.",
    )


class WorkSettings(Section):
    handler: str | None = Field(
        None,
        alias="WORKER_HANDLER",
        description="package.module:function or path/to/file.py:function. Unset: the built-in one (log a line, done).",
    )
    handlers_file: Path | None = Field(
        None,
        alias="HANDLERS_FILE",
        description="TOML file of several handlers with simple rules, the first match wins (docs/handlers.md); what none matches goes "
        "to WORKER_HANDLER.",
    )
    isolation: Literal["thread", "process"] = Field(
        "thread",
        alias="WORKER_ISOLATION",
        description="Where handlers run: threads of the worker, or processes of their own, which can be killed.",
    )
    handler_timeout: Positive = Field(
        1800,
        alias="HANDLER_TIMEOUT",
        description="Seconds a handler may take; then the attempt has failed. A process is killed, a thread cannot be stopped.",
    )
    handler_memory_mb: int | None = Field(
        None,
        alias="HANDLER_MEMORY_MB",
        ge=256,
        description="Megabytes of address space of a process that runs handlers: more is a MemoryError in the handler. Unset: no limit.",
    )
    label: str | None = Field(
        None, alias="CONSUMER_NAME", description="Label of this worker; the name in Redis is <label>-<pid>-<nonce>."
    )
    batch_size: int = Field(100, alias="WORKER_BATCH_SIZE", ge=1, le=500, description="Most mails in one read.")
    block_ms: int = Field(2000, alias="WORKER_BLOCK_MS", ge=1, le=8000, description="Milliseconds a read waits for mail.")
    concurrency: int = Field(
        8, alias="WORKER_CONCURRENCY", ge=1, le=2000, description="Handlers at work at once: threads, processes, or async tasks."
    )
    lease: Positive = Field(
        60, alias="LEASE_SECONDS", description="Seconds without renewal after which another worker takes a mail over."
    )
    recovery_tick: Positive = Field(1, alias="RECOVERY_TICK", description="Seconds between two looks for abandoned and due mail.")
    poison_starts: int = Field(
        3,
        alias="POISON_STARTS",
        ge=1,
        description="How often a mail, started alone, may end its own process before it is buried.",
    )
    max_attempts: int = Field(8, alias="MAX_ATTEMPTS", ge=1, description="Failed attempts before a mail is buried.")
    backoff_base: Positive = Field(
        1, alias="BACKOFF_BASE", description="Seconds: the delay after attempt n is base x factor^(n-1), less the jitter."
    )
    backoff_factor: float = Field(2, alias="BACKOFF_FACTOR", ge=1, allow_inf_nan=False, description="Growth of the delay.")
    backoff_cap: Positive = Field(3600, alias="BACKOFF_CAP", description="Longest delay in seconds.")
    backoff_jitter: float = Field(
        1,
        alias="BACKOFF_JITTER",
        ge=0,
        le=1,
        description="The random part of the delay: 1 anything from 0 up to it, 0 exactly it.",
    )

    @field_validator("handler")
    @classmethod
    def _form(cls, value: str | None) -> str | None:
        if value and not HANDLER.fullmatch(value):
            raise ValueError("must look like package.module:function or path/to/file.py:function")
        return value


class BreakerSettings(Section):
    failures: int = Field(
        5,
        alias="BREAKER_FAILURES",
        ge=1,
        description="Failed calls within BREAKER_WINDOW, of an IMAP server, the token endpoint or what a handler names, "
        "after which it is left alone for a while.",
    )
    rate: float = Field(
        0.5, alias="BREAKER_RATE", gt=0, le=1, description="Part of the calls within BREAKER_WINDOW that must have failed too."
    )
    window: Positive = Field(60, alias="BREAKER_WINDOW", description="Seconds back that calls are counted.")
    open_seconds: Positive = Field(
        30,
        alias="BREAKER_OPEN_SECONDS",
        description="Longest wait in seconds before one call tries again; doubled each time that one fails too.",
    )
    open_cap: Positive = Field(300, alias="BREAKER_OPEN_CAP", description="Seconds at which that doubling ends.")


class RunSettings(Section):
    data_dir: Path = Field(
        Path("data"), alias="DATA_DIR", description="What the daemons keep on disk: markers, raw mail, the embedded server."
    )
    raw_archive: SecretStr | None = Field(
        None,
        alias="RAW_ARCHIVE",
        description="Where raw mail is kept for handlers: file:<folder>, a URL of fsspec (s3://bucket/folder, with its package "
        "installed), or off. A place of this stream alone, which producer and workers share. Unset: file:data/raw (under DATA_DIR).",
    )
    raw_retention: Days = Field(
        7, alias="RAW_RETENTION", description="Days (the unit) raw mail is kept after its mail is done, and up to one day more."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", alias="LOG_LEVEL", description="Least level that is logged."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", alias="LOG_FORMAT", description="auto: text on a terminal, else JSON."
    )
    stats_interval: Positive = Field(60, alias="STATS_INTERVAL", description="Seconds between two lines of counts in the log.")
    shutdown_timeout: Positive = Field(30, alias="SHUTDOWN_TIMEOUT", description="Seconds handlers get to finish after SIGTERM.")
    hang_timeout: Positive = Field(
        1800,
        alias="HANG_TIMEOUT",
        description="Seconds that a loop of a daemon may stand still after /health has said 503; then the process shows where its "
        "threads stand and ends with 1.",
    )
    http_host: str = Field("127.0.0.1", alias="HTTP_HOST", description="Address the health endpoint listens on.")
    http_port: int | None = Field(
        None,
        alias="HTTP_PORT",
        ge=0,
        le=65535,
        description="Its port. Unset: 8080 (producer), 8081 (worker) or the next free one; 0: any free one.",
    )

    metrics_port: Annotated[int, Ge(0), Le(65535)] | Literal["off"] | None = Field(
        None,
        alias="METRICS_PORT",
        description="A second port that answers /metrics alone; the daemon's own port answers it too. Unset: 9090 (producer), none "
        "(worker); off: none; 0: any free one. One that is taken is a warning: set it for one daemon of a machine only.",
    )

    http_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        alias="HTTP_ALLOWED_HOSTS",
        description="Names under which the endpoint answers, beside 127.0.0.1, localhost, [::1] and HTTP_HOST; `*`: any. "
        "A page of the web cannot read it under a name of its own.",
    )

    status_page_bodies: bool = Field(
        False,
        alias="STATUS_PAGE_BODIES",
        description="Whether the status page shows the text of dead mail too, to whoever can reach it.",
    )

    @field_validator("data_dir")
    @classmethod
    def _folder(cls, path: Path) -> Path:
        if os.path.isfile(path):  # noqa: PTH113  # False, no error, where it may not be looked at
            raise ValueError("is a file, not a folder")
        return path

    @field_validator("http_allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _port_or_off(cls, value: object) -> object:
        if value in (None, "off"):
            return value
        if not str(value).isdigit() or int(str(value)) > 65535:
            raise ValueError("must be a port (0 to 65535) or off")
        return int(str(value))

    @field_validator("raw_archive")
    @classmethod
    def _archive(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not ARCHIVE.fullmatch(url.get_secret_value()):
            raise ValueError("must be off, file:<folder>, or the URL of a folder (s3://bucket/folder)")
        return url


@dataclass(frozen=True)
class Settings:
    redis: RedisSettings
    stream: StreamSettings
    mail: MailSettings
    auth: AuthSettings
    work: WorkSettings
    breakers: BreakerSettings
    run: RunSettings


SECTIONS: Mapping[str, type[Section]] = {
    "redis": RedisSettings,
    "stream": StreamSettings,
    "mail": MailSettings,
    "auth": AuthSettings,
    "work": WorkSettings,
    "breakers": BreakerSettings,
    "run": RunSettings,
}


def load_settings(flags: Mapping[str, Any] | None = None, env_file: Path | None = Path(".env")) -> Settings:
    """Build the settings. `flags`: variable name → value given on the command line; None means not given.

    Raises SettingsError: one line that names the variable, the rule and the value.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    built: dict[str, Any] = {}
    for section, model in SECTIONS.items():
        own = {field.alias: given[field.alias] for field in model.model_fields.values() if field.alias in given}
        try:
            built[section] = model(_env_file=env_file, **own)  # type: ignore[call-arg]  # an argument of every BaseSettings
        except ValidationError as error:
            raise SettingsError("=".join(first_fault(model, error))) from None
    settings = Settings(**built)
    if settings.redis.socket_timeout * 1000 <= settings.work.block_ms:
        raise SettingsError(
            f"REDIS_SOCKET_TIMEOUT={settings.redis.socket_timeout:g} s must be above WORKER_BLOCK_MS={settings.work.block_ms}"
            " ms, or every quiet read looks like a dead server"
        )
    return settings


def env_names(text: str) -> list[str]:
    """The variables that a .env file sets."""
    return re.findall(r"^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)[ \t]*=", text, re.MULTILINE)


def known_names() -> list[str]:
    """All variables that are settings."""
    return [str(field.alias) for section in SECTIONS.values() for field in section.model_fields.values()]


def misspelt(names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """Of `names`, what is no setting but much like one → the one that is meant."""
    near = {name: difflib.get_close_matches(name, known, 1, cutoff=0.85) for name in sorted(set(names) - set(known))}
    return {name: found[0] for name, found in near.items() if found}


def misspelt_in(env_file: Path) -> dict[str, str]:
    """`misspelt` of a .env file; {} where there is none."""
    try:
        return misspelt(env_names(env_file.read_text()), known_names())
    except FileNotFoundError:
        return {}


def first_fault(model: type[Section], error: ValidationError) -> tuple[str, str] | tuple[str]:
    """(variable, "value: rule"), secrets masked; (rule,) where it is about several variables."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    rule = first["msg"].removeprefix("Value error, ")
    if not name:
        return (rule,)
    field = next((field for field in model.model_fields.values() if field.alias == name), None)
    secret = field is not None and "SecretStr" in str(field.annotation)
    value = "***" if secret else str(first["input"])
    return name, f"{value if value.isprintable() else repr(value)}: {rule[:1].lower()}{rule[1:]}"
