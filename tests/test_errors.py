"""Messages: one line, no control characters, no credentials."""

from __future__ import annotations

from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import InputError, reason, redact
from attribution.runtime import machine, progress

URL = "https://ann:s3cret@mlflow.example:5000/api"
SAFE = "https://***@mlflow.example:5000/api"


@pytest.mark.parametrize(
    "text, expected",
    [
        (URL, SAFE),
        (f"first {URL}, then '{URL}'.", f"first {SAFE}, then '{SAFE}'."),
        (f"MLFLOW_TRACKING_URI={URL}", f"MLFLOW_TRACKING_URI={SAFE}"),
        ("postgresql+psycopg2://ann:p@ss@db/x", "postgresql+psycopg2://***@db/x"),
        ("postgresql://ann:pa/ss@db/x", "postgresql://***@db/x"),
        ("http://ann:p%40ss@db/x", "http://***@db/x"),
        ("http://:s3cret@db", "http://***@db"),
        ("http://s3cret@db", "http://***@db"),
        (f"?next={quote(URL, safe='')}", f"?next={quote(SAFE, safe='*')}"),
        (quote(quote(URL, safe=""), safe=""), quote(quote(SAFE, safe="*"), safe="*")),
        ("https://bucket/a?X-Amz-Signature=s3cret&x=1", "https://bucket/a?X-Amz-Signature=***&x=1"),
        ("postgresql://db/x?user=ann&password=s3cret", "postgresql://db/x?user=ann&password=***"),
    ],
)
def test_credentials_are_replaced(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/ann@work/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/0/runs/a@b",
        "file:///tmp/a:b@c",
        "write to ann@mail.example",
        quote("http://db:5000/x@y", safe=""),
    ],
)
def test_text_without_credentials_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(min_size=1), st.text(min_size=1), st.booleans())
def test_a_quoted_password_never_shows(user: str, password: str, encoded: bool) -> None:
    url = f"http://{quote_plus(user)}:{quote_plus('<' + password + '>')}@host/path"
    shown = redact(f"before {quote(url, safe='') if encoded else url} after")
    expected = "http://***@host/path"
    assert shown == f"before {quote(expected, safe='*') if encoded else expected} after"


def test_no_message_shows_credentials(monkeypatch, capsys) -> None:
    assert str(InputError(f"uri={URL}: bad\nline")) == f"uri={SAFE}: bad line"
    assert reason(OSError(f"no answer from {URL}")) == f"no answer from {SAFE}"
    progress.say(f"run at {URL}")
    assert capsys.readouterr().err == f"run at {SAFE}\n"
    monkeypatch.setattr("sys.argv", ["finetune", f"--model={URL}"])
    assert machine.environment()["command"] == ["finetune", f"--model={SAFE}"]


def test_an_input_error_is_one_printable_line() -> None:
    assert str(InputError("a\nb\x1b[31m")) == "a b\\x1b[31m"
