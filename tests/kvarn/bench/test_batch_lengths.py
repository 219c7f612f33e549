"""Lengths of sequences as benchmarks take them: batches, names and distributions."""

import random
from math import exp, log
from statistics import median, stdev

import pytest

from kvarn.bench.batch_lengths import (
    BATCHES,
    BatchShape,
    Lognormal,
    draw_lengths,
    parse_batches,
    parse_length,
    split_entries,
)
from kvarn.bench.bench_settings import BenchError


def test_batches_are_equal_listed_named_or_drawn():
    assert parse_batches("8x32768, 1x4096+2x128 ,2x7+3xlognormal(9,0)") == (
        BatchShape("8x32768", (32768,) * 8),
        BatchShape("1x4096+2x128", (4096, 128, 128)),
        BatchShape("2x7+3xlognormal(9,0)", (7, 7, 9, 9, 9)),
    )
    one_long, two_long = parse_batches("one-long,two-long")
    assert one_long == BatchShape("one-long", (131072,) + (2048,) * 63)
    assert two_long == BatchShape("two-long", (65536,) * 2 + (1024,) * 62)


def test_the_lognormal_batch_is_the_published_draw():
    rng = random.Random(0)
    drawn = sorted(min(120000, max(200, int(3000 * exp(1.2 * rng.gauss(0, 1))))) for _ in range(64))
    rng.shuffle(drawn)
    (batch,) = parse_batches("lognormal")
    assert batch.lengths == tuple(drawn)
    assert parse_batches(BATCHES["lognormal"])[0].lengths == batch.lengths


def test_every_batch_is_parsed_from_its_own_label():
    for batch in parse_batches(",".join([*BATCHES, "3x5+1xlognormal(100,0.5)"])):
        assert parse_batches(str(batch)) == (batch,)


def test_a_lognormal_has_its_median_and_sigma():
    drawn = draw_lengths(Lognormal(1000, 0.8), 4000, random.Random(1))
    assert median(drawn) == pytest.approx(1000, rel=0.1)
    assert stdev(map(log, drawn)) == pytest.approx(0.8, rel=0.1)
    wild = draw_lengths(Lognormal(300, 9.0), 400, random.Random(1))
    assert (min(wild), max(wild)) == (20, 12000)
    assert min(draw_lengths(Lognormal(2, 9.0), 400, random.Random(1))) == 1


def test_entries_are_split_outside_parentheses():
    assert split_entries("a(1,2), b,,c(3, 4)") == ("a(1,2)", "b", "c(3, 4)")
    assert split_entries("") == ()
    assert parse_length("lognormal(3, 4)") == Lognormal(3, 4.0)
    assert parse_length("lognormal(3;4)") is None
    assert parse_length(str(Lognormal(3000, 1.25))) == Lognormal(3000, 1.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "8by3",
            "case '8by3' is not understood: give REQUESTSxTOKENS.*or one of lognormal, one-long, two-long",
        ),
        ("lognormal(3000,1.2)", "not understood"),
        ("8x-1", "not understood"),
        ("8x32768+", "not understood"),
        ("8xlognormal(3000)", "not understood"),
        ("0x5", "case '0x5' has a number of 0"),
        ("5x0", "case '5x0' has a number of 0"),
        ("5xlognormal(0,1)", r"the median of lognormal\(0,1\) is 0"),
        ("5xlognormal(9,11)", r"the sigma of lognormal\(9,11\) is 11: give a number from 0 to 10"),
    ],
)
def test_what_is_no_batch_is_refused_in_one_sentence(text, message):
    with pytest.raises(BenchError, match=message):
        parse_batches(text)
