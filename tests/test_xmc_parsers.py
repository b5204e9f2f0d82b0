"""The parsers of rows: the native one, NumPy's and the row parser are one and the same."""

import math
import struct
import subprocess
import sys
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda import build_information
from mlloss_cuda.xmc.data import DataError, block_parser, text
from mlloss_cuda.xmc.data.block_parser import Counts, NativeParser, NumpyParser, RowArrays
from mlloss_cuda.xmc.data.row_parser import RowFormat, parse_row
from tests import fuzz_parser
from tests.conftest import skip_or_fail

NATIVE_OR_NONE = [HealthCheck.function_scoped_fixture]  # `native` does nothing but skip

FORMS = {
    "with labels": RowFormat(130, 30, has_header=False),
    "features alone": RowFormat(130, 0, has_header=False, has_labels=False),
}


@pytest.fixture(params=[NativeParser, NumpyParser])
def parser(request):
    if request.param is NativeParser:
        request.getfixturevalue("native")
    return request.param()


def as_block(lines):
    return np.frombuffer(bytearray(b"".join(line + b"\n" for line in lines)), np.uint8)


def parse(parser, lines, form):
    """The arrays that a block parser makes of lines, None if it refuses them."""
    block = as_block(lines)
    rows = RowArrays(parser.count(block), form)
    if not parser.parse(block, form, rows):
        return None
    return rows


@settings(suppress_health_check=NATIVE_OR_NONE, deadline=None, max_examples=1000)
@given(
    st.lists(st.text("0129,:. \t-e\rx", max_size=12), min_size=1, max_size=3),
    st.sampled_from(list(FORMS)),
)
def test_the_parsers_agree(native, lines, form):
    """A block is taken exactly if the row parser takes every line, and equally."""
    lines, form = [line.encode() for line in lines], FORMS[form]
    explained = [parse_row(line, form) for line in lines]
    blocks = [parse(parser, lines, form) for parser in (NativeParser(), NumpyParser())]
    if any(isinstance(row, str) for row in explained):
        assert blocks == [None, None]
        return
    labels, ids, values = zip(*explained, strict=True)
    unique = [sorted(set(row)) for row in labels]
    for rows in blocks:
        num_rows, num_labels, num_features = rows.filled.tolist()
        assert num_rows == len(lines)
        assert rows.label_ids[:num_labels].tolist() == list(chain(*unique))
        assert rows.label_offsets.tolist() == np.cumsum([0, *map(len, unique)]).tolist()
        assert rows.feature_ids[:num_features].tolist() == list(chain(*ids))
        wanted = np.array(list(chain(*values)), np.float64).astype(np.float32)
        assert rows.feature_values[:num_features].tobytes() == wanted.tobytes()
        assert rows.feature_offsets.tolist() == np.cumsum([0, *map(len, ids)]).tolist()


@settings(suppress_health_check=NATIVE_OR_NONE, deadline=None, max_examples=300)
@given(st.binary(max_size=400).map(lambda content: content + b"\n"))
def test_counts(native, content):
    block = np.frombuffer(bytearray(content), np.uint8)
    wanted = Counts(
        content.count(b"\n"),
        content.count(b","),
        content.count(b":"),
        sum(not line.startswith((b" ", b"\t")) for line in content[:-1].split(b"\n")),
        len(content),
    )
    assert NativeParser().count(block) == wanted
    assert NumpyParser().count(block) == wanted


def test_counts_of_much_text(native):
    """Sums of bytes do not overflow."""
    block = np.frombuffer(bytearray(b",,,,::\n" * 100_000), np.uint8)
    counts = NativeParser().count(block)
    assert counts == Counts(100_000, 400_000, 200_000, 100_000, 700_000)
    assert counts == NumpyParser().count(block)


# ---- Values --------------------------------------------------------------------------------------

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
FORMATS = ("%.6f", "%.9g", "%.15g", "%.16g", "%.17g", "%.20g", "%.60g", "%.3e")


def value_of(parser, number):
    """The float32 number that a parser makes of a text, None if it refuses it."""
    rows = parse(parser, [b" 0:" + number], RowFormat(1, 1))
    return None if rows is None else rows.feature_values[0]


def bits(value):
    return None if value is None else struct.pack("<f", value)


def rounded(number):
    """The bits that are wanted: of the text in float64, of that in float32; None for infinity."""
    with np.errstate(over="ignore"):
        value = np.float64(number.decode()).astype(np.float32)
    return bits(value) if np.isfinite(value) else None


@settings(suppress_health_check=NATIVE_OR_NONE, deadline=None, max_examples=1000)
@given(st.one_of(FLOAT32, st.floats(-3e38, 3e38)), st.sampled_from(FORMATS))
def test_values_are_rounded_through_float64(native, value, written):
    number = (written % value).encode()
    for parser in (NativeParser(), NumpyParser()):
        assert bits(value_of(parser, number)) == rounded(number)


@settings(suppress_health_check=NATIVE_OR_NONE, deadline=None, max_examples=500)
@given(FLOAT32, st.integers(-2, 2), st.integers(17, 150))
def test_values_between_two_numbers(native, value, steps, digits):
    """Halfway between two neighbours in float32, and a few steps of float64 from there."""
    _, exponent = math.frexp(value)
    middle = value + math.copysign(2.0 ** (max(exponent, -125) - 25), value)
    for _ in range(abs(steps)):
        middle = math.nextafter(middle, math.copysign(math.inf, steps))
    exact = Fraction(middle)
    scaled = exact * 10**digits
    number = f"{scaled.numerator // scaled.denominator}e-{digits}".encode()
    for parser in (NativeParser(), NumpyParser()):
        assert bits(value_of(parser, number)) == rounded(number)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("1", 1),
        ("+1.", 1),
        ("-.5", -0.5),
        ("-0", -0.0),
        ("-0e99999999999999999999", -0.0),
        ("1e-99999999999999999999", 0),
        ("1e-46", 0),
        ("1e-45", 2.0**-149),
        ("16777217", 16777216),
        ("16777219", 16777220),
        ("9007199254740993", 2.0**53),
        ("3.4028235e38", 2.0**128 - 2.0**104),
        ("3.402823567797336e38", 2.0**128 - 2.0**104),
        ("0" * 400 + "1" + "0" * 400 + "e-400", 1),
        ("0." + "0" * 300 + "1e301", 1),
        ("0.000000000000000000000000000000012345678e30", 0.012345678),
        # Halfway between 1 and the next number, and the least more than that: float64 cannot tell
        # them apart, and the one step through it rounds to even.
        ("1.000000059604644775390625", 1),
        ("1.000000059604644775390625000000000001", 1),
        ("1.0000000596046449", 1 + 2.0**-23),
    ],
)
def test_odd_values(parser, number, value):
    assert bits(value_of(parser, number.encode())) == bits(value)


NO_VALUES = (
    ". + -. e1 1e 1e+ 1e1.5 --1 1- 1+1 1.. 0x1 nan inf 1e39 -1e39 1e999 1e99999999999999999999 "
    "340282356779733661637539395458142568448 340282356779733661637539395458142568447"
)


@pytest.mark.parametrize("number", ["", *NO_VALUES.split()])
def test_what_is_no_value(parser, number):
    assert value_of(parser, number.encode()) is None


@pytest.mark.parametrize(
    ("id_", "fits"),
    [
        ("129", True),
        ("000000000000000000000000000000129", True),
        ("130", False),
        ("4294967296", False),
        ("18446744073709551616", False),  # 2^64
        ("18446744073709551617", False),
        ("340282366920938463463374607431768211456", False),  # 2^128
        ("", False),
        ("+1", False),
        ("1.0", False),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_ids(parser, form, id_, fits):
    line = f" {id_}:1" if form == "with labels" else f"{id_}:1"
    rows = parse(parser, [line.encode()], FORMS[form])
    assert (rows is not None) == fits
    if form == "with labels":
        rows = parse(parser, [id_.replace("129", "29").encode() + b","[len(id_) :]], FORMS[form])
        assert (rows is not None) == fits


# ---- Bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["rows", "labels", "features"])
def test_arrays_that_are_too_small(parser, missing):
    """As where a file grows between the two times that it is read: nothing is written beyond."""
    block = as_block([b"1,2 3:1 4:1", b"5 6:1"])
    counts = parser.count(block)
    if missing == "rows":
        counts.line_ends -= 1
    elif missing == "labels":
        counts.commas -= 1
    else:
        counts.colons -= 1
    form = FORMS["with labels"]
    rows = RowArrays(counts, form)
    assert not parser.parse(block, form, rows)
    assert rows.filled[0] <= 1


def test_malformed_text_gets_no_more_memory_than_well_formed_text(parser):
    block = np.frombuffer(bytearray(b":" * 999 + b"\n"), np.uint8)
    assert len(RowArrays(parser.count(block), FORMS["with labels"]).feature_ids) <= 250


def test_operators_check_their_arguments(native):
    parse_rows = torch.ops.mlloss_cuda.parse_rows
    count_rows = torch.ops.mlloss_cuda.count_rows
    block = torch.tensor(list(b"1 2:3\n"), dtype=torch.uint8)
    ids, offsets = torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    good = (ids, offsets, ids.clone(), torch.zeros(3), offsets.clone(), ids.clone())
    assert parse_rows(block, True, 9, 9, *good)
    assert good[-1].tolist() == [1, 1, 1]
    for bad_text in (block[:0], block[:-1], block.long(), block[None], block[::2]):
        with pytest.raises(RuntimeError, match="text"):
            parse_rows(bad_text, True, 9, 9, *good)
        with pytest.raises(RuntimeError, match="text"):
            count_rows(bad_text, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="too short"):
        count_rows(block, torch.zeros(3, dtype=torch.int64))
    for index, bad in (
        (0, ids.int()),  # label_ids
        (1, offsets[:0]),  # label_offsets
        (2, ids[::2]),  # feature_ids
        (3, torch.zeros(2)),  # feature_values, fewer than feature_ids
        (3, torch.zeros(3, dtype=torch.float64)),
        (4, offsets[:1]),  # feature_offsets, fewer than label_offsets
        (5, ids[:2]),  # filled
        (5, torch.tensor([-1, 0, 0])),
        (5, torch.tensor([0, 0, 4])),
        (5, torch.tensor([2, 0, 0])),
    ):
        arguments = [array.clone() for array in good[:5]] + [torch.zeros(3, dtype=torch.int64)]
        arguments[index] = bad
        with pytest.raises(RuntimeError, match=r"arrays|filled"):
            parse_rows(block, True, 9, 9, *arguments)


def test_schemas(native):
    """What they write to is what the schema says."""
    block = torch.tensor(list(b"1 2:3\n4 5:6\n"), dtype=torch.uint8)
    check = ("test_schema",)
    torch.library.opcheck(
        torch.ops.mlloss_cuda.count_rows,
        (block, torch.zeros(4, dtype=torch.int64)),
        test_utils=check,
    )
    ids, offsets = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    arrays = (ids, offsets, ids.clone(), torch.zeros(2), offsets.clone(), offsets.clone())
    torch.library.opcheck(
        torch.ops.mlloss_cuda.parse_rows, (block, True, 9, 9, *arrays), test_utils=check
    )


def test_the_native_parser_serves_where_there_is_one(monkeypatch):
    parser = block_parser.block_parser()
    is_there = build_information.fallback_reason() is None
    assert type(parser) is (NativeParser if is_there else NumpyParser)
    monkeypatch.setattr(block_parser, "load_native", lambda: False)
    assert type(block_parser.block_parser()) is NumpyParser


# ---- Many files ----------------------------------------------------------------------------------


def test_random_files(native):
    """tests/fuzz_parser.py does the same for any time."""
    assert fuzz_parser.run(3, seed=2026, native=NativeParser()) > 50


@pytest.mark.slow
def test_random_files_under_sanitizers():
    reason = fuzz_parser.sanitizers_unavailable_reason()
    if reason is not None:
        skip_or_fail(reason)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_parser", "--sanitize", "--minutes", "0.05"],
        cwd=fuzz_parser.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SanitizedParser" in done.stdout
    assert "no disagreement" in done.stdout


PEAK = """
import pathlib, re, sys
from mlloss_cuda.xmc.data import read_dataset
def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", status.read_text())[1])
status = pathlib.Path("/proc/self/status")
read_dataset(sys.argv[1])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
data = read_dataset(sys.argv[2])
arrays = [v for v in vars(data).values() if hasattr(v, "nbytes")]
print((resident("VmHWM") - before) / sum(array.nbytes for array in arrays))
"""


def test_memory_is_that_of_the_arrays(native, tmp_path):
    """And of a block: 1 MiB beside 28 MB here."""
    entries = " ".join(f"{10 * i}:0.{i:06}" for i in range(1, 200))
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("1 1:1\n")
    large.write_text("".join(f"{row % 97},{row % 101 + 100} {entries}\n" for row in range(12_000)))
    code = [sys.executable, "-c", PEAK, str(small), str(large)]
    done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=fuzz_parser.ROOT)
    assert 0.9 < float(done.stdout) < 1.5


def test_rows_that_are_too_many_take_no_memory(parser, tmp_path):
    """As in a small gzip file of very many short rows."""
    sizes = []
    path = tmp_path / "data.txt"
    path.write_text("2 5 3\n" + " \n" * 10_000)

    class Watched(RowArrays):
        def __init__(self, counts, form):
            super().__init__(counts, form)
            sizes.append(len(self.label_offsets))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "RowArrays", Watched)
        with pytest.raises(DataError, match="expected 2 rows as the header says, found 10000"):
            text.read_text(path, parser=parser)
    assert sizes == [4]
