"""Rates and addresses as people write them."""

import pytest

from kvferry.errors import InputError
from kvferry.link import Rate, parse_address


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("10mbit", 10e6),
        ("500kbit", 500e3),
        ("1gbit", 1e9),
        ("10mbps", 10e6),
        ("1.5 Mbit/s", 1.5e6),
        (".5gbit", 5e8),
        ("800bit", 800.0),
    ],
)
def test_parse(text: str, bits: float) -> None:
    assert Rate.parse(text).bits_per_second == bits


@pytest.mark.parametrize("text", ["", "10", "fast", "10MB/s", "-1mbit", "0mbit", "nanmbit", "1e3mbit", "10 mbit now"])
def test_not_a_rate(text: str) -> None:
    with pytest.raises(InputError, match="rate"):
        Rate.parse(text)


@pytest.mark.parametrize("text", ["10mbit", "2.5gbit", "64kbit", "800bit"])
def test_text_round_trip(text: str) -> None:
    assert str(Rate.parse(text)) == text


def test_seconds() -> None:
    assert Rate.parse("8mbit").seconds(1_000_000) == 1.0


def test_addresses() -> None:
    assert parse_address("127.0.0.1:7421") == ("127.0.0.1", 7421)
    assert parse_address("[::1]:0") == ("::1", 0)
    assert parse_address("cloud.example:443") == ("cloud.example", 443)


@pytest.mark.parametrize("text", ["", "host", "host:", ":7421", "host:70000", "host:-1", "http://host:80", "host:x"])
def test_not_an_address(text: str) -> None:
    with pytest.raises(InputError, match="host:port"):
        parse_address(text)
