# SPDX-License-Identifier: Apache-2.0
"""Keys are read from files, and compared whole."""

import pytest

from ospec_jax.config import ConfigError
from ospec_jax.serving import keys as module
from ospec_jax.serving.keys import Caller, Keys
from ospec_jax.serving.settings import HttpConfig


def read(folder, clients=None, admin=None):
    """Keys of two files."""
    files = {}
    for name, text in (("api_key_file", clients), ("admin_key_file", admin)):
        if text is not None:
            files[name] = folder / name
            files[name].write_text(text)

    return Keys.read(HttpConfig(**files))


def test_without_files_there_are_no_keys(tmp_path):
    keys = read(tmp_path)
    assert keys.num_clients == 0
    assert not keys.has_admin
    assert keys.identify("Bearer ").bearer == "nobody"
    assert keys.identify("").bearer == "nobody"


def test_keys_have_names_or_get_some(tmp_path):
    keys = read(tmp_path, "# ours\n\nada secret-01\n  secret-02 \n", "secret-03")
    assert keys.num_clients == 2
    assert keys.has_admin
    assert keys.identify("Bearer secret-01") == Caller("client", "ada")
    assert keys.identify("bearer secret-02") == Caller("client", "key-2")
    assert keys.identify("Bearer secret-03") == Caller("admin")


@pytest.mark.parametrize(
    "header",
    [
        "secret-01",
        "Basic secret-01",
        "Bearer secret-0",
        "Bearer secret-011",
        "Bearer ada",
    ],
)
def test_what_is_no_key(tmp_path, header):
    assert read(tmp_path, "ada secret-01").identify(header).bearer == "nobody"


def test_every_key_is_compared_whichever_fits(tmp_path, monkeypatch):
    keys = read(tmp_path, "secret-01\nsecret-02\nsecret-03")
    compared = []
    compare = module.secrets.compare_digest

    def watch(left, right):
        compared.append(len(left))
        return compare(left, right)

    monkeypatch.setattr(module.secrets, "compare_digest", watch)
    keys.identify("Bearer secret-01")
    keys.identify("Bearer x")
    assert compared == [32] * 6


@pytest.mark.parametrize(
    ("clients", "admin", "said"),
    [
        ("", None, "no keys"),
        ("short", None, "line 1 has a key of 5"),
        ("a b secret-01", None, "3 words"),
        ("a/b secret-01", None, "line 1"),
        ("a secret-01\na secret-02", None, "line 2 repeats"),
        ("a secret-01\nb secret-01", None, "line 2 repeats"),
        (None, "secret-01\nsecret-02", "has 2 keys"),
        ("secret-01", "secret-01", "also a client's"),
    ],
)
def test_malformed_files_are_refused(tmp_path, clients, admin, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, clients, admin)
    assert "secret" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Keys.read(HttpConfig(api_key_file=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "given",
    [
        {"port": 70_000},
        {"default_temperature": 3.0},
        {"max_choices": 0},
        {"keep_alive": 0.0},
        {"stream_interval": -1.0},
        {"port": "8000"},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        HttpConfig(**given)


def test_of_several_keys_those_share_that_say_so(tmp_path):
    keys = read(tmp_path, "ada secret-01 share\nbob secret-02\nsecret-03", "secret-04")
    is_sharing = lambda key: keys.identify(f"Bearer {key}").is_sharing
    assert is_sharing("secret-01")
    assert keys.identify("Bearer secret-01").name == "ada"
    for key in ("secret-02", "secret-03", "secret-04", "unknown"):
        assert not is_sharing(key)


def test_who_is_alone_shares_with_nobody_else_and_so_shares(tmp_path):
    assert read(tmp_path).identify("").is_sharing
    assert read(tmp_path, "secret-01").identify("Bearer secret-01").is_sharing
