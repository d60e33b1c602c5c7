"""Every setting is read, documented and checked; a wrong one is one line that a person can act on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic.fields import FieldInfo

from config.settings import SECTIONS, SettingsError, load_settings
from tests.support.daemons import ROOT, Daemon
from tests.support.servers import RedisServer

FIELDS = {(section, name): field for section, model in SECTIONS.items() for name, field in model.model_fields.items()}
ALIASES = {str(field.alias): field for field in FIELDS.values()}
EXAMPLE = ROOT / ".env.example"
ASSIGNMENT = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$")


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for alias in ALIASES:
        monkeypatch.delenv(alias, raising=False)


# every setting is read somewhere


SECTION_OF_CLASS = {model.__name__: section for section, model in SECTIONS.items()}


def attributes_read() -> set[tuple[str, str]]:
    """Each `<section>.<field>` of the program's code, be the section a name, an attribute or an argument of its class."""
    found = set()
    for path in (*ROOT.glob("src/**/*.py"), ROOT / "config/accounts.py", ROOT / "producer.py", ROOT / "worker.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        arguments = {
            node.arg: SECTION_OF_CLASS[node.annotation.id]
            for node in nodes
            if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in SECTION_OF_CLASS
        }
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if isinstance(owner, ast.Name):
                    found.add((arguments.get(owner.id, owner.id), node.attr))
                elif isinstance(owner, ast.Attribute):
                    found.add((owner.attr, node.attr))
    return found


def test_every_setting_is_read_by_the_program() -> None:
    """An option that nobody reads is a lie."""
    read = attributes_read()
    assert [f"{section}.{name}" for section, name in FIELDS if (section, name) not in read] == []
    assert ("work", "no_such_setting") not in read


def test_every_section_is_part_of_the_settings() -> None:
    """And no two settings share a variable."""
    settings = load_settings(env_file=None)
    assert set(SECTIONS) == set(vars(settings))
    assert len(ALIASES) == len(FIELDS)


def test_every_flag_of_the_commands_is_a_setting() -> None:
    """A flag overrides exactly one variable."""
    import producer
    import worker

    assert {*producer.FLAGS.values(), *worker.FLAGS.values()} <= set(ALIASES)


def test_every_setting_says_what_it_means() -> None:
    """Numbers with their unit, or as a count."""
    for alias, field in ALIASES.items():
        assert field.description, alias
        assert field.description.endswith("."), alias
    units = re.compile(
        r"[Ss]econd|[Mm]illisecond|[Bb]yte|[Dd]ay|Most|mail|results|letters|starts|attempts|work at once|Growth|[Pp]ort|calls|[Pp]art of"
    )
    numbers = [alias for alias, field in ALIASES.items() if {int, float} & {field.annotation, *get_args(field.annotation)}]
    assert len(numbers) > 20
    assert [alias for alias in numbers if not units.search(ALIASES[alias].description or "")] == []


# .env.example


def example_assignments() -> Iterator[tuple[str, str, str]]:
    """(variable, value, the comment above it)"""
    comment: list[str] = []
    for line in EXAMPLE.read_text().splitlines():
        if match := ASSIGNMENT.match(line):
            yield match[1], match[2], " ".join(comment)
            comment = []
        elif line.startswith("# "):
            comment.append(line[2:])
        else:
            comment = []


def test_the_example_documents_every_setting_once() -> None:
    """With its meaning above it, and nothing that does not exist."""
    found = list(example_assignments())
    assert sorted(name for name, _, _ in found) == sorted(ALIASES)
    for name, _, comment in found:
        assert (ALIASES[name].description or "-").rstrip(".") in comment, name


def test_the_example_is_valid_unedited_and_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(env_file=EXAMPLE) == load_settings(env_file=None)


def test_the_values_of_the_example_are_the_defaults(tmp_path: Path) -> None:
    """With every line in force: what it shows is what holds without it."""
    in_force = tmp_path / ".env"
    in_force.write_text("".join(f"{name}={value}\n" for name, value, _ in example_assignments()))
    assert load_settings(env_file=in_force) == load_settings(env_file=None)
    in_force.write_text(in_force.read_text().replace("DLQ_MAX=10000", "DLQ_MAX=10001"))
    assert load_settings(env_file=in_force) != load_settings(env_file=None)


# where a value comes from


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of the three: the strongest that is given."""
    file = tmp_path / ".env"
    file.write_text("WORKER_CONCURRENCY=2\nMAILBOXES=file\nLEASE_SECONDS=22\nUNKNOWN_THING=1\n")
    monkeypatch.setenv("WORKER_CONCURRENCY", "3")
    monkeypatch.setenv("MAILBOXES", "env")
    settings = load_settings({"WORKER_CONCURRENCY": "4", "LEASE_SECONDS": None}, env_file=file)
    assert (settings.work.concurrency, settings.mail.mailboxes, settings.work.lease) == (4, ("env",), 22)
    assert settings.work.max_attempts == 8


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files and CI systems pass them."""
    for name in ("REDIS_URL", "STREAM_NAME", "HTTP_PORT", "WORKER_HANDLER", "POLL_INTERVAL", "MAILBOXES"):
        monkeypatch.setenv(name, "")
    assert load_settings(env_file=None) == load_settings({}, env_file=None)
    assert load_settings(env_file=None).stream.name == "email_ingestion_stream"


def test_lists_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMAIL_USERNAME", " a@example.org , b@example.org,")
    monkeypatch.setenv("MAILBOXES", "INBOX,[Gmail]/All Mail")
    mail = load_settings(env_file=None).mail
    assert (mail.usernames, mail.mailboxes) == (("a@example.org", "b@example.org"), ("INBOX", "[Gmail]/All Mail"))
    assert load_settings({"MAILBOXES": ("One, Two", "Three")}, env_file=None).mail.mailboxes == ("One, Two", "Three")


def test_settings_cannot_be_changed() -> None:
    """Built once at the edge and handed down."""
    settings = load_settings(env_file=None)
    with pytest.raises(ValueError, match="frozen"):
        settings.work.lease = 1.0
    with pytest.raises(AttributeError):
        settings.work = settings.work  # type: ignore[misc]


@pytest.mark.parametrize("value", ["since:7d", "since:0d", "since:2026-01-31", "new", "all"])
def test_every_form_of_initial_sync(value: str) -> None:
    assert load_settings({"INITIAL_SYNC": value}, env_file=None).mail.initial_sync == value


def test_plain_text_is_allowed_on_this_machine() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert load_settings({"IMAP_HOST": host, "IMAP_SECURITY": "none"}, env_file=None).mail.security == "none"


# wrong values

WRONG = [
    ("REDIS_URL", "http://me:s3cr3t@127.0.0.1/0", "must start with redis://, rediss:// or unix://"),
    ("REDIS_MAX_CONNECTIONS", "3", "greater than or equal to 4"),
    ("REDIS_MAX_CONNECTIONS", "many", "valid integer"),
    ("REDIS_SOCKET_TIMEOUT", "0", "greater than 0"),
    ("REDIS_SOCKET_TIMEOUT", "-1", "greater than 0"),
    ("EMBEDDED_TCP", "maybe", "valid boolean"),
    ("STREAM_MAXLEN", "0", "greater than or equal to 1"),
    ("STREAM_MAXLEN", "1.5", "valid integer"),
    ("DLQ_MAX", "1e3", "valid integer"),
    ("RESULT_MAX_BYTES", "63", "greater than or equal to 64"),
    ("PROCESSED_DAYS", "never", "valid number"),
    ("RESULTS_DAYS", "36501", "less than or equal to 36500"),
    ("MAILBOXES", "IN\x07BOX", "printable"),
    ("MAILBOXES", ",", "must name at least one folder"),
    ("GMAIL_USERNAME", "a\nb", "must be printable"),
    ("IMAP_PORT", "65536", "less than or equal to 65535"),
    ("IMAP_PORT", "0", "greater than or equal to 1"),
    ("IMAP_SECURITY", "ssl", "'tls' or 'none'"),
    ("POLL_INTERVAL", "nan", "finite number"),
    ("POLL_INTERVAL", "inf", "finite number"),
    ("BACKOFF_CAP", "1e999", "finite number"),
    ("PRODUCER_BATCH_SIZE", "501", "less than or equal to 500"),
    ("INITIAL_SYNC", "yesterday", "must be since:<days>d, since:<YYYY-MM-DD>, new or all"),
    ("INITIAL_SYNC", "since:", "must be since:<days>d"),
    ("INITIAL_SYNC", "since:2026-02-30", "must be since:<days>d"),
    ("INITIAL_SYNC", "since:12345d", "must be since:<days>d"),
    ("INITIAL_SYNC", "2026-01-31", "must be since:<days>d"),
    ("DEDUP_SCOPE", "global", "'account' or 'mailbox'"),
    ("MAX_MESSAGE_BYTES", "35MB", "valid integer"),
    ("WORKER_HANDLER", "no_colon", "must look like package.module:function"),
    ("WORKER_HANDLER", "path/to:handle", "must look like package.module:function"),
    ("WORKER_BLOCK_MS", "8001", "less than or equal to 8000"),
    ("WORKER_CONCURRENCY", "0", "greater than or equal to 1"),
    ("BACKOFF_FACTOR", "0.5", "greater than or equal to 1"),
    ("BACKOFF_FACTOR", "inf", "finite number"),
    ("LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    ("LOG_FORMAT", "xml", "'auto', 'json' or 'text'"),
    ("HTTP_PORT", "-1", "greater than or equal to 0"),
    ("HTTP_PORT", "80 80", "valid integer"),
    ("METRICS_PORT", "80 80", "must be a port (0 to 65535) or off"),
    ("METRICS_PORT", "-1", "must be a port (0 to 65535) or off"),
    ("METRICS_PORT", "65536", "must be a port (0 to 65535) or off"),
    ("METRICS_PORT", "none", "must be a port (0 to 65535) or off"),
    ("LEASE_SECONDS", "1\n2", "valid number"),
    ("DATA_DIR", __file__, "is a file, not a folder"),
]


@pytest.mark.parametrize("source", ["environment", "file", "flag"])
@pytest.mark.parametrize(("name", "value", "rule"), WRONG, ids=[f"{name}={value!r}" for name, value, _ in WRONG])
def test_a_wrong_value_is_one_line(
    name: str, value: str, rule: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variable, value, rule, wherever it came from; a secret is masked."""
    file, flags = tmp_path / ".env", {}
    if source == "environment":
        monkeypatch.setenv(name, value)
    elif source == "flag":
        flags = {name: value}
    else:
        escaped = value.replace("\n", "\\n")
        file.write_text(f'{name}="{escaped}"\n')
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, env_file=file)
    line = str(caught.value)
    assert rule in line
    assert "\n" not in line
    if ALIASES[name].annotation is not None and "SecretStr" in str(ALIASES[name].annotation):
        assert line.startswith(f"{name}=***: ")
        assert "s3cr3t" not in line
    else:
        assert line.startswith(f"{name}={value if value.isprintable() else repr(value)}: ")


def test_a_token_is_never_sent_in_clear_text_to_another_machine() -> None:
    with pytest.raises(SettingsError, match="IMAP_SECURITY=none would send the token in clear text") as caught:
        load_settings({"IMAP_SECURITY": "none", "IMAP_HOST": "imap.gmail.com"}, env_file=None)
    assert "\n" not in str(caught.value)


def test_a_socket_timeout_below_the_block_time_is_refused() -> None:
    """Every quiet read would look like a dead server."""
    rule = r"^REDIS_SOCKET_TIMEOUT=2 s must be above WORKER_BLOCK_MS=2000 ms"
    with pytest.raises(SettingsError, match=rule):
        load_settings({"REDIS_SOCKET_TIMEOUT": "2"}, env_file=None)
    assert load_settings({"REDIS_SOCKET_TIMEOUT": "2.001"}, env_file=None).redis.socket_timeout == 2.001


def test_the_password_of_redis_is_not_shown_by_the_settings() -> None:
    """A repr may land in a log."""
    settings = load_settings({"REDIS_URL": "redis://me:s3cr3t@127.0.0.1:1/0"}, env_file=None)
    assert "s3cr3t" not in repr(settings)
    assert "s3cr3t" not in str(settings.redis)


def test_every_numeric_setting_has_a_lower_bound() -> None:
    """No negative wait, no batch of nothing."""

    def bounded(field: FieldInfo) -> bool:
        return bool(re.search(r"(Ge|Gt)\(", f"{field.metadata} {field.annotation}"))

    numbers = [alias for alias, field in ALIASES.items() if {int, float} & {field.annotation, *get_args(field.annotation)}]
    assert [alias for alias in numbers if not bounded(ALIASES[alias])] == []


# the commands


def ended(script: str, *args: str, code: int, tmp: Path, **env: str) -> list[str]:
    """The lines that a command which ends with `code` wrote."""
    with Daemon(script, *args, env=env, tmp=tmp) as daemon:
        assert daemon.exit_code(30) == code, daemon.output()
        return daemon.output().splitlines()


@pytest.mark.parametrize(
    ("script", "args"),
    [("worker.py", ("--concurrency", "none")), ("producer.py", ("--batch-size", "none"))],
)
def test_a_wrong_flag_is_exit_code_2_and_one_line(script: str, args: tuple[str, str], tmp_path: Path) -> None:
    """It names the variable behind the flag; nothing is started, nothing written."""
    [line] = ended(script, *args, code=2, tmp=tmp_path)
    variable = "WORKER_CONCURRENCY" if script == "worker.py" else "PRODUCER_BATCH_SIZE"
    assert line == f"{script}: {variable}=none: input should be a valid integer, unable to parse string as an integer"
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.0.log"]


def test_a_handler_that_cannot_be_imported_is_exit_code_2_and_one_line(tmp_path: Path, valkey: RedisServer) -> None:
    """With the reason; no consumer stays in the group."""
    env = {"REDIS_URL": valkey.url, "DATA_DIR": str(tmp_path)}
    lines = ended("worker.py", "--handler", "nowhere.at_all:handle", code=2, tmp=tmp_path, **env)
    problem = [line for line in lines if line.startswith("worker.py: ")]
    assert problem == [lines[-1]]
    assert lines[-1] == (
        "worker.py: WORKER_HANDLER=nowhere.at_all:handle: cannot import nowhere.at_all "
        "(ModuleNotFoundError: No module named 'nowhere')"
    )
    assert "Traceback" not in "\n".join(lines)
    assert valkey.client().dbsize() == 0


def test_no_token_is_exit_code_3_and_the_command_to_run(tmp_path: Path, valkey: RedisServer) -> None:
    """The last line can be pasted; nothing is written to Redis."""
    env = {"REDIS_URL": valkey.url, "DATA_DIR": str(tmp_path)}
    lines = ended("producer.py", "--username", "me@example.org", code=3, tmp=tmp_path, **env)
    assert lines[-1].startswith("producer.py: ")
    assert "python producer.py --auth-setup --username me@example.org" in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert valkey.client().dbsize() == 0


@pytest.mark.parametrize(("script", "args", "code"), [("producer.py", (), 3), ("worker.py", ("--drain",), 0)])
def test_a_misspelt_name_in_the_env_file_is_a_warning_at_start(
    script: str, args: tuple[str, ...], code: int, tmp_path: Path, valkey: RedisServer
) -> None:
    """With the name that is meant; what is like no setting is somebody else's and left alone."""
    (tmp_path / ".env").write_text("MAX_ATEMPTS=3\nEDITOR=vi\nMAX_ATTEMPTS=4\n")
    lines = ended(script, *args, code=code, tmp=tmp_path, REDIS_URL=valkey.url, DATA_DIR=str(tmp_path))
    told = [line for line in lines if "is no setting" in line]
    assert len(told) == 1
    assert "MAX_ATEMPTS in .env is no setting and does nothing: did you mean MAX_ATTEMPTS?" in told[0]


@pytest.mark.parametrize("script", ["producer.py", "worker.py"])
def test_help_answers_without_settings_and_servers(script: str, tmp_path: Path) -> None:
    lines = ended(script, "--help", code=0, tmp=tmp_path, LEASE_SECONDS="wrong")
    assert lines[0].startswith(f"usage: {script}")
