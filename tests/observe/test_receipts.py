"""Receipts: the keys users rely on, the one-line header, the bounded book."""

import json

import msgspec
import pytest

from disaggd.observe.receipts import CachedTokens, Receipt, ReceiptBook


def receipt(request_id: str = "r", **fields: object) -> Receipt:
    return msgspec.structs.replace(Receipt(id=request_id, model="tiny", prompt_tokens=5), **fields)


def test_the_json_has_the_documented_keys() -> None:
    shown = json.loads(msgspec.json.encode(receipt()))
    assert shown.keys() >= {
        *("id", "model", "decision", "reason", "prefill_node", "decode_node", "prompt_tokens", "output_tokens"),
        *("cached_tokens", "kv_bytes", "retries", "spans_ms", "finish_reason"),
    }
    assert list(shown["cached_tokens"]) == ["decode", "prefill"]
    assert list(shown["spans_ms"]) == [
        "queue",
        "grant",
        "prefill_wait",
        "prefill",
        "transfer",
        "transfer_exposed",
        "first_token",
        "decode",
        "total",
    ]


@pytest.mark.parametrize(
    ("kv_bytes", "shown"), [(0, "0MB"), (12_600_000, "12.6MB"), (262_144, "0.26MB"), (999_999, "1MB"), (5 * 10**9, "5000.0MB")]
)
def test_a_remote_header_names_both_nodes_and_the_bytes(kv_bytes: int, shown: str) -> None:
    remote = receipt(
        decision="remote", prefill_node="p0", decode_node="d0", cached_tokens=CachedTokens(decode=7, prefill=3), kv_bytes=kv_bytes
    )
    assert remote.header() == f"remote p0->d0 cached=3 kv={shown}"
    assert msgspec.structs.replace(remote, is_pushing=True).header() == "remote p0->d0 cached=3 kv=?"


def test_a_local_header_names_the_decode_node() -> None:
    assert receipt(decision="local", decode_node="d0", cached_tokens=CachedTokens(decode=7)).header() == "local d0 cached=7"


def test_a_header_is_ascii_even_before_anything_is_decided() -> None:
    assert receipt().header() == "undecided ? cached=0"


def test_the_book_forgets_the_oldest() -> None:
    book = ReceiptBook(capacity=2)
    for request_id in ("a", "b", "a", "c"):
        book.write(receipt(request_id))
    assert [book.get(request_id) is None for request_id in ("a", "b", "c")] == [False, True, False]


def test_the_latest_receipt_of_an_id_wins() -> None:
    book = ReceiptBook()
    book.write(receipt(retries=0))
    book.write(receipt(retries=1))
    found = book.get("r")
    assert found is not None
    assert found.retries == 1
