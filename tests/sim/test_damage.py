"""Damaged traces: one bad row costs one row, whatever is wrong with it, and is named rightly."""

import gzip
import json
import random

import pytest

from pagedkv import TraceError
from pagedkv.sim.readers import read_trace
from tests.sim.test_readers import GOOD, moon

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def azure(second, inputs=10, outputs=5):
    return f"2023-11-16 18:17:{second:02},{inputs},{outputs}"


def burst(second, outputs=5):
    return f"{second},x,1.0,GPT-4,10,{outputs},15,API log"


def table(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def read(tmp_path, format, content, on_error="skip", suffix=".jsonl", **options):
    path = tmp_path / f"trace{suffix}"
    path.write_bytes(content)
    workload = read_trace(path, format, on_error=on_error, **options)
    return list(workload), dict(workload.skipped)


HUGE = int("9" * 400)
ONE_ROW = {
    "a number of 400 digits": ("mooncake", moon(0), moon(HUGE), "not a finite number"),
    "a length of 400 digits": ("mooncake", moon(0), moon(0, HUGE), "not a finite number"),
    "a number of 5,000 digits": ("mooncake", moon(0), '{"a": ' + "9" * 5000 + "}", "valid JSON"),
    "JSON too deep": ("mooncake", moon(0), "[" * 100_000, "not valid JSON"),
    "a time as text": ("mooncake", moon(0), moon("7"), "timestamp is not a finite number"),
    "a time that is true": ("mooncake", moon(0), moon(True), "timestamp is not a finite number"),
    "a length as text": ("mooncake", moon(0), moon(0, "7"), "input_length is not a finite"),
    "a length that is true": ("mooncake", moon(0), moon(0, True), "input_length is not a finite"),
    "think time as text": (
        "weka",
        GOOD["weka"][1],
        GOOD["weka"][1] | {"think_time": "7"},
        "think_time is not a finite",
    ),
    "no UTF-8": ("mooncake", moon(0), '{"a": "\udcff"}', "not UTF-8 text"),
    "no UTF-8 in a table": ("azure", azure(3), "\udcff,5,5", "not UTF-8 text"),
    "an open quote": ("azure", azure(3), '"2023-11-16 18:17:04,5,5', "not valid CSV"),
    "a quote opened late": ("azure", azure(3), 'x"y,"z,5', "not valid CSV"),
    "a long field": ("azure", azure(3), "x" * 200_000 + ",5,5", "not a date"),
    "a number for an object": ("weka", GOOD["weka"][1], {"requests": [7]}, "not an object"),
    "sub-agents no list": ("weka", GOOD["weka"][1], {"requests": 7}, "not a list"),
    "a time of null": ("weka", GOOD["weka"][1], GOOD["weka"][1] | {"t": None}, "t is not a finite"),
    "a time in words": ("weka", GOOD["weka"][1], GOOD["weka"][1] | {"t": "now"}, "t is not a fini"),
    "no length": ("weka", GOOD["weka"][1], {"requests": [{"t": 1, "out": 5}]}, "in is missing"),
    "an endless run": (
        "weka",
        GOOD["weka"][1],
        {"t": 1, "in": 100, "out": 5, "hash_rle": [[0, 10**13]]},
        "does not cover the prompt",
    ),
}
IDS = {
    "too few": [1],
    "too many": [1, 2, 3, 4],
    "fractions": [1.7, 2.2],
    "truths": [True, False],
    "texts": ["1", "2"],
    "none": None,
}
ONE_ROW |= {
    f"ids: {name}": (
        "weka",
        GOOD["weka"][1],
        {"t": 1, "in": 150, "out": 5, "hash_ids": ids},
        "hash_ids ",
    )
    for name, ids in IDS.items()
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_bad_row_costs_itself_and_is_named_by_its_line(tmp_path, name):
    format, good, bad, match = ONE_ROW[name]
    rows = [*([AZURE] if format == "azure" else []), good, bad, good]
    raw = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    content = "\n".join(raw).encode("utf-8", "surrogateescape")
    options = {"closed_loop": False} if format == "weka" else {}
    found, skipped = read(tmp_path, format, content, **options)
    assert len(found) == 2
    ((reason, times),) = skipped.items()
    assert (match in reason, times) == (True, 1)
    with pytest.raises(TraceError, match=match) as fault:
        read(tmp_path, format, content, "raise", **options)
    assert fault.value.where.endswith(f":{rows.index(bad) + 1}")


def test_a_bad_byte_is_named_by_its_own_line_and_costs_one_row(tmp_path):
    rows = [json.dumps(moon(i)).encode() for i in range(200)]
    rows[120] = b'{"timestamp": "\xff"}'
    with pytest.raises(TraceError, match="not UTF-8") as fault:
        read(tmp_path, "mooncake", b"\n".join(rows), "raise")
    assert fault.value.where.endswith(":121")
    assert len(read(tmp_path, "mooncake", b"\n".join(rows))[0]) == 199


@pytest.mark.parametrize("format", ["mooncake", "azure"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, format):
    content = b"\xef\xbb\xbf" + table(*GOOD[format])
    assert len(read(tmp_path, format, content, "raise")[0]) == 2


def test_an_open_quote_costs_its_row_and_not_those_behind_it(tmp_path):
    content = table(AZURE, azure(3), '"2023-11-16 18:17:04,5,6', *[azure(5)] * 9000)
    found, skipped = read(tmp_path, "azure", content)
    assert (len(found), sum(skipped.values())) == (9001, 1)


def test_quoted_cells_are_read_as_cells(tmp_path):
    content = table(AZURE, '"2023-11-16 18:17:04","5","6"\r', azure(5))
    assert [len(r.prompt) for r in read(tmp_path, "azure", content, "raise")[0]] == [5, 10]


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(TraceError, match="more than one column TIMESTAMP"):
        read(tmp_path, "azure", table(f"{AZURE},TIMESTAMP", azure(3) + ",x"))


# Time stamps

FAR = {
    "mooncake": [moon(0), moon(10**9), moon(50), moon(60)],
    "bailian": [moon(0), moon(10**9), moon(50), moon(60)],
    "azure": [AZURE, azure(3), "2033-01-01 00:00:00,5,6", azure(5), azure(6)],
    "burstgpt": [GOOD["burstgpt"][0], burst(0), burst(10**9), burst(50), burst(60)],
    "llmservingsim": [
        GOOD["llmservingsim"][0] | {"arrival_time_ns": t} for t in (0, 10**18, 50, 60)
    ],
}


@pytest.mark.parametrize("format", FAR)
def test_one_stamp_in_the_far_future_costs_one_row(tmp_path, format):
    options = {"block_size": 512} if format == "bailian" else {}
    found, skipped = read(tmp_path, format, table(*FAR[format]), **options)
    assert [r.arrival for r in found] == sorted(r.arrival for r in found)
    assert len(found) == 3
    assert found[-1].arrival < 100
    assert skipped == {"the time stamp is before the row before's": 1}


@pytest.mark.parametrize(
    ("stamps", "kept"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([5, 1, 2], [1, 2]),
        ([0, 9, 1, 2], [0, 1, 2]),
        ([3, 9, 1, 10], [3, 9, 10]),
        ([0, 1, 9], [0, 1, 9]),
        ([], []),
    ],
)
def test_of_two_stamps_out_of_order_the_one_out_of_line_goes(tmp_path, stamps, kept):
    content = table(*(moon(1000 * stamp) for stamp in stamps))
    assert [r.arrival for r in read(tmp_path, "mooncake", content)[0]] == kept


SKIPPED_FIRST = {
    "azure": [AZURE, "2033-01-01 00:00:00,0,6", azure(5), azure(6)],
    "burstgpt": [GOOD["burstgpt"][0], burst(900, outputs=0), burst(3), burst(4)],
    "bailian": [moon(900, chat_id=[1]), moon(3), moon(4)],
    "llmservingsim": [
        GOOD["llmservingsim"][0] | {"arrival_time_ns": 9e11, "input_toks": 4},
        *(GOOD["llmservingsim"][0] | {"arrival_time_ns": t * 1e9} for t in (3, 4)),
    ],
}


@pytest.mark.parametrize("format", SKIPPED_FIRST)
def test_the_clock_does_not_run_by_a_row_that_is_skipped(tmp_path, format):
    options = {"block_size": 512} if format == "bailian" else {}
    found, skipped = read(tmp_path, format, table(*SKIPPED_FIRST[format]), **options)
    start = 0 if format == "azure" else 3
    assert [r.arrival for r in found] == pytest.approx([start, start + 1])
    assert sum(skipped.values()) == 1


def test_a_table_begins_with_its_first_good_row(tmp_path):
    content = table(AZURE, "2033-01-01 00:00:00,5,6", azure(5), azure(6))
    assert [r.arrival for r in read(tmp_path, "azure", content)[0]] == [0, 1]


# Packed files and sessions


def test_every_flipped_bit_of_a_packed_file_is_a_typed_error_or_a_good_reading(tmp_path):
    chance = random.Random(2)
    rows = [moon(i, ids=(chance.getrandbits(40), chance.getrandbits(40))) for i in range(300)]
    packed = gzip.compress(table(*rows))
    refused = 0
    for _ in range(100):
        bits = bytearray(packed)
        bits[chance.randrange(12, len(bits) - 8)] ^= 1 << chance.randrange(8)
        for on_error in ("raise", "skip"):
            try:
                read(tmp_path, "mooncake", bytes(bits), on_error, suffix=".jsonl.gz")
            except TraceError:
                refused += 1
    assert refused > 150


def test_the_last_block_of_a_weka_prompt_may_have_no_id(tmp_path):
    turn = {"t": 0, "in": 150, "out": 5, "hash_rle": [[1, 2]]}
    ((first,), _) = read(tmp_path, "weka", table({"session_meta": "s"}, turn, turn | {"t": 1}))
    a, b = first.prompt.token_ids(), first.then.prompt.token_ids()
    assert len(a) == len(b) == 150
    assert (a[:128] == b[:128]).all()
    assert not (a[128:] == b[128:]).any()


def test_a_bad_turn_costs_a_session_one_turn_and_not_its_place(tmp_path):
    turn = {"t": 5.0, "in": 64, "out": 5, "hash_ids": [1]}
    session = {"id": "s", "requests": [turn | {"t": 0.0, "out": 0}, turn, turn | {"t": 9.0}]}
    plain = {"id": "r", "requests": [turn]}
    found, skipped = read(tmp_path, "weka", table(*[session, plain] * 40))
    assert [len(list(first.turns())) for first in found] == [2, 1] * 40
    assert skipped == {"out is less than 1": 40}
