"""Each mail as a row of a database: `WORKER_HANDLER=src.handlers.sql:handle`, SQL_URL. SQLite and PostgreSQL.

Needs `requirements-handlers.txt`. A mail and its attachments are written in one transaction and upserted by `email_id`: a mail
that comes again, after a crash or from the dead letters, overwrites its own rows, so there is one row a mail whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    delete,
    func,
    inspect,
    make_url,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError
from sqlalchemy.schema import CreateTable

from src.common.exceptions import ConfigurationError, Permanent, Transient
from src.handlers.settings import HandlerSettings, read
from src.mail.record import Address, Email

Insert = postgresql.Insert | sqlite.Insert

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
INSERT: dict[str, Callable[[Table], Insert]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
CREATION_LOCK = 0x656D61696C  # any number; workers that start together make the tables one after the other

_json = JSON().with_variant(postgresql.JSONB(), "postgresql")
metadata = MetaData()

emails = Table(
    "email",
    metadata,
    Column("email_id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("mailbox", Text, nullable=False),
    Column("uid", BigInteger, nullable=False),
    Column("received_at", DateTime(timezone=True), comment="the server's word; UTC"),
    Column("sent_at", DateTime(timezone=True), comment="what the sender claims; UTC"),
    Column("message_id", Text, nullable=False),
    Column("in_reply_to", Text, nullable=False),
    Column("reference_ids", _json, nullable=False),
    Column("sender_name", Text, nullable=False),
    Column("sender_address", Text, nullable=False),
    Column("to_addresses", _json, nullable=False),
    Column("cc_addresses", _json, nullable=False),
    Column("reply_to_addresses", _json, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body_text", Text, nullable=False),
    Column("body_truncated", Boolean, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("labels", _json, nullable=False),
    Column("is_auto", Boolean, nullable=False),
    Column("is_bounce", Boolean, nullable=False),
    Column("is_list", Boolean, nullable=False),
    Column("raw_ref", Text, nullable=False),
    Column("defects", _json, nullable=False),
    Column("stored_at", DateTime(timezone=True), nullable=False, server_default=func.current_timestamp(), comment="first time"),
)

attachments = Table(
    "email_attachment",
    metadata,
    Column("email_id", Text, ForeignKey("email.email_id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False, comment="in the mail, from 0"),
    Column("name", Text, nullable=False),
    Column("content_type", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
)


class SqlSettings(HandlerSettings):
    model_config = SettingsConfigDict(env_prefix="SQL_")

    url: SecretStr = Field(description="sqlite:////path/to/file or postgresql://user:password@host/database")
    create_tables: bool = Field(False, description="Whether the worker makes the tables where they are missing.")
    timeout: float = Field(10, gt=0, le=600, description="Seconds to wait for a connection, a lock or a statement.")

    @field_validator("url")
    @classmethod
    def _known(cls, url: SecretStr) -> SecretStr:
        try:
            parsed = make_url(url.get_secret_value())
        except ArgumentError:
            raise ValueError("is no database address") from None
        if parsed.get_backend_name() not in DRIVERS:
            raise ValueError("must start with sqlite:// or postgresql://")
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ValueError("must name a file: sqlite:////path/to/file")
        return url


def handle(email: Email, context: object) -> None:
    """Raises Permanent for a value that the database cannot hold; what else goes wrong with the database is retried."""
    store(prepare(), email)


@cache
def prepare() -> Engine:
    """The database, once; its tables exist then. Raises ConfigurationError, and Transient when it does not answer."""
    settings = read(SqlSettings)
    engine = connect(settings)
    try:
        if settings.create_tables:
            create_tables(engine)
        missing = sorted(set(metadata.tables) - set(inspect(engine).get_table_names()))
    except DBAPIError as error:
        raise Transient(f"SQL_URL={engine.url!r}: {one_line(error)}") from error
    if missing:
        raise ConfigurationError(f"SQL_URL={engine.url!r}: no table {', '.join(missing)}; SQL_CREATE_TABLES=true makes it")
    return engine


def connect(settings: SqlSettings) -> Engine:
    """An engine that waits `timeout` seconds at most; nothing is connected yet."""
    url = make_url(settings.url.get_secret_value())
    backend = url.get_backend_name()
    return create_engine(
        url.set(drivername=DRIVERS[backend]),
        connect_args=waits(url, settings.timeout),
        pool_pre_ping=backend == "postgresql",
        hide_parameters=True,  # an error is logged and kept with the dead letter; the mail's text is not part of it
    )


def waits(url: URL, seconds: float) -> dict[str, Any]:
    """What the driver is told about waiting; what the address itself says wins."""
    if url.get_backend_name() == "sqlite":
        said: dict[str, Any] = {"timeout": seconds}
    else:
        said = {"connect_timeout": math.ceil(seconds), "options": f"-c statement_timeout={math.ceil(seconds * 1000)}"}
    return {name: value for name, value in said.items() if name not in url.query}


def create_tables(engine: Engine) -> None:
    """Make what is missing; safe when many processes do it at once."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CREATION_LOCK})
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))


def store(engine: Engine, email: Email) -> None:
    """One transaction: the mail's row, a row an attachment, none of an earlier time left. Raises Permanent, DBAPIError."""
    row, rows = row_of(email), attachment_rows(email)
    insert = INSERT[engine.dialect.name]
    try:
        with engine.begin() as connection:
            connection.execute(upsert(insert(emails), emails), row)  # first: its lock keeps two writers of one mail apart
            if rows:
                connection.execute(upsert(insert(attachments), attachments), rows)
            connection.execute(
                delete(attachments).where(attachments.c.email_id == email.email_id, attachments.c.position >= len(rows))
            )
    except (DataError, OverflowError) as error:
        raise Permanent(f"the database cannot hold this mail: {one_line(error)}") from error


def upsert(insert: Insert, table: Table) -> Insert:
    """INSERT … ON CONFLICT (key) DO UPDATE of everything but `stored_at`."""
    values = {
        column.name: insert.excluded[column.name]
        for column in table.c
        if not column.primary_key and column.server_default is None
    }
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=values)


def row_of(email: Email) -> dict[str, Any]:
    return {
        "email_id": email.email_id,
        "account": email.account,
        "mailbox": email.mailbox,
        "uid": email.uid,
        "received_at": moment(email.internal_date),
        "sent_at": moment(email.date),
        "message_id": email.message_id,
        "in_reply_to": email.in_reply_to,
        "reference_ids": list(email.references),
        "sender_name": email.sender.name,
        "sender_address": email.sender.address,
        "to_addresses": plain(email.to),
        "cc_addresses": plain(email.cc),
        "reply_to_addresses": plain(email.reply_to),
        "subject": email.subject,
        "body_text": email.text,
        "body_truncated": email.truncated,
        "size": email.size,
        "labels": list(email.labels),
        "is_auto": email.is_auto,
        "is_bounce": email.is_bounce,
        "is_list": email.is_list,
        "raw_ref": email.raw_ref,
        "defects": list(email.defects),
    }


def attachment_rows(email: Email) -> list[dict[str, Any]]:
    return [
        {
            "email_id": email.email_id,
            "position": position,
            "name": attachment.name,
            "content_type": attachment.content_type,
            "size": attachment.size,
            "sha256": attachment.sha256,
        }
        for position, attachment in enumerate(email.attachments)
    ]


def plain(addresses: tuple[Address, ...]) -> list[dict[str, str]]:
    return [{"name": address.name, "address": address.address} for address in addresses]


def moment(date: str) -> datetime | None:
    """A record's date, aware; None for "" and what is no date."""
    try:
        return datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def one_line(error: Exception) -> str:
    """What the driver says, without the statement and its values: they are the mail's text."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return " ".join(str(cause).split())
