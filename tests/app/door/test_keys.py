"""Keys: how they are written, what is kept of them, and when a changed file is taken."""

import json
import logging
import time
from pathlib import Path

import pytest

from app.door.keys import LOOK_S, Keyring, shown_key
from app.errors import ApiError
from config import keys
from config.keys import KeyLimits, parse_file, parse_flag
from config.problems import ConfigError
from config.settings import Settings, load
from tests.app.clock import Clock

KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "name", "key"),
    [
        (f"alice={KEY}", "alice", KEY),
        ("alice=a=b", "alice", "a=b"),
        ("c2VjcmV0c2VjcmV0==", None, "c2VjcmV0c2VjcmV0=="),
        ("1abc=def", None, "1abc=def"),
    ],
)
def test_a_flag_is_a_key_or_a_name_with_a_key(text: str, name: str | None, key: str):
    parsed = parse_flag(text)
    assert parsed.digest == keys.digest(key.encode())
    assert parsed.name == (name or f"key-{parsed.digest.hex()[:8]}")
    assert parse_flag(parsed.sealed()) == parsed


@pytest.mark.parametrize("text", ["a b", "", "k,ey", "sch\u00fcssel", "sha256:12", "x" * 513, "alice=a\x7fb"])
def test_what_cannot_be_a_key_is_refused_without_quoting_it(text: str):
    with pytest.raises(ValueError, match=r"key|sha256") as caught:
        parse_flag(text)
    assert not text or text not in str(caught.value)


def test_a_file_has_names_keys_limits_and_comments():
    found = parse_file(
        "# team\n\n"
        "alice: first   # until June\n"
        "alice: second concurrent=2 tokens_per_minute=0\n"
        f"bob: sha256:{keys.digest(b'third').hex()}\n"
        "fourth#not-a-comment requests_per_minute=7\n"
    )
    assert [each.digest for each in found] == [
        keys.digest(key) for key in (b"first", b"second", b"third", b"fourth#not-a-comment")
    ]
    assert [each.name for each in found[:3]] == ["alice", "alice", "bob"]
    assert found[1].limits == KeyLimits(concurrent=2, tokens_per_minute=0)
    assert found[3].limits == KeyLimits(requests_per_minute=7)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alice: key\nbob:\n\x00: x y z", "line 3"),
        ("alice: key limit=3", "line 1: behind the key come limits"),
        ("alice: key concurrent=-1", "line 1: concurrent is a number"),
        ("alice: key\nbob: key", "have the same key"),
        ("alice: a concurrent=1\nalice: b concurrent=2", "have different limits"),
    ],
)
def test_a_file_with_a_mistake_says_where_and_shows_no_key(text: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        parse_file(text)


def test_a_file_that_others_can_read_is_worth_a_warning_and_an_empty_one_an_error(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"alice: {KEY}\n")
    path.chmod(0o640)
    (notice,) = keys.check_file(path)
    assert "other users may read it (mode 640)" in notice
    path.chmod(0o600)
    assert keys.check_file(path) == []
    path.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="has no key"):
        keys.check_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        keys.check_file(tmp_path / "none")


def test_settings_keep_digests_only(monkeypatch: pytest.MonkeyPatch):
    settings = Settings(base_model="tiny", api_key=[f"alice={KEY}"])
    assert KEY not in repr(settings)
    assert settings.api_key == [f"alice=sha256:{keys.digest(KEY.encode()).hex()}"]
    monkeypatch.setenv("TAILRACE_API_KEY", "sch\u00fcssel-geheim")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "geheim" not in str(caught.value)


def test_variables_are_sealed_once_and_forgotten_by_those_without_a_door():
    environ = {"TAILRACE_API_KEY": f"alice={KEY}, {KEY}2"}
    assert keys.seal(environ)
    assert KEY not in environ["TAILRACE_API_KEY"]
    assert [parse_flag(each).digest for each in json.loads(environ["TAILRACE_API_KEY"])] == [
        keys.digest(KEY.encode()),
        keys.digest(f"{KEY}2".encode()),
    ]
    assert not keys.seal(environ)
    keys.forget(environ)
    assert environ == {}


def test_every_key_of_an_owner_opens_and_nothing_else():
    ring = Keyring([parse_flag(text).sealed() for text in ("alice=one", "alice=two", "bob=three")])
    assert [ring.owner(key) for key in (b"one", b"two", b"three")] == ["alice", "alice", "bob"]
    assert [ring.owner(key) for key in (b"", b"on", b"onee", b"ONE", b"\xff" * 10_000)] == [None] * 5


def test_limits_of_the_file_go_before_those_for_all(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("alice: one concurrent=0\nalice: two\nbob: three\n")
    ring = Keyring([], path, KeyLimits(4, 5, 6))
    assert ring.limits("alice") == KeyLimits(0, 5, 6)
    assert ring.limits("bob") == KeyLimits(4, 5, 6)


def test_a_changed_file_is_taken_within_two_looks_and_a_broken_one_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, clock = tmp_path / "keys", Clock(100.0)
    path.write_text("alice: one\n")
    ring = Keyring([], path, clock=clock)

    def looks(text: str | None) -> None:
        if text is None:
            path.unlink()
        else:
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").rename(path)
        for _ in range(3):
            clock.now += LOOK_S
            ring.owner(b"")

    looks("alice: two\nbob: one\n")
    assert (ring.owner(b"one"), ring.owner(b"two")) == ("bob", "alice")
    with caplog.at_level(logging.ERROR):
        looks("alice: three four\n")
        assert ring.owner(b"two") == "alice"
        looks(None)
        assert ring.owner(b"two") == "alice"
    assert len(caplog.records) == 2
    assert "three" not in caplog.text
    looks("")
    assert ring.owner(b"two") is None


def test_a_file_that_was_changed_long_ago_is_taken_by_the_very_next_request(tmp_path: Path):
    path, clock = tmp_path / "keys", Clock(100.0)
    path.write_text("alice: one\n")
    ring = Keyring([], path, clock=clock)
    path.write_text("alice: two-two\n")
    changed = path.stat().st_ctime
    deadline = time.monotonic() + 10
    while time.time() - changed <= LOOK_S:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    clock.now += 600
    assert (ring.owner(b"one"), ring.owner(b"two-two")) == (None, "alice")


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"HTTP_AUTHORIZATION": "Bearer abc"}, b"abc"),
        ({"HTTP_AUTHORIZATION": "bearer abc"}, b"abc"),
        ({"HTTP_X_API_KEY": "abc"}, b"abc"),
        ({"HTTP_AUTHORIZATION": "Bearer one", "HTTP_X_API_KEY": "two"}, b"one"),
        ({"HTTP_AUTHORIZATION": "Bearer one,Bearer one"}, b"one,Bearer one"),
        ({"HTTP_AUTHORIZATION": "Bearer \xfc"}, b"\xfc"),
    ],
)
def test_a_key_is_shown_in_a_header(environ: dict[str, str], key: bytes):
    assert shown_key(environ) == key


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "did not provide"),
        ({"HTTP_X_API_KEY": ""}, "did not provide"),
        ({"HTTP_AUTHORIZATION": ""}, "must be: Bearer"),
        ({"HTTP_AUTHORIZATION": "Bearer"}, "must be: Bearer"),
        ({"HTTP_AUTHORIZATION": "Basic YTpi"}, "must be: Bearer"),
        ({"QUERY_STRING": "a=1&API_KEY=abc"}, "not taken from the URL"),
    ],
)
def test_a_key_that_is_not_shown_as_it_should_is_a_401_that_says_how(environ: dict[str, str], words: str):
    with pytest.raises(ApiError, match=words) as caught:
        shown_key(environ)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
