"""The arithmetic that says how a rank-1 layer runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_ens.layers.plan import (
    DEFAULTS,
    Call,
    Constants,
    constants_file,
    constants_of,
    in_turn,
    plan,
    save_constants,
)

CPU = DEFAULTS["cpu"]
SIZES = st.integers(1, 10**7)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIFELONG_ENS_CACHE", str(tmp_path))
    constants_of.cache_clear()
    yield tmp_path
    constants_of.cache_clear()


@given(
    rows=st.integers(1, 4096),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    learning=st.booleans(),
    frozen=st.booleans(),
    more=st.integers(2, 100),
)
def test_whatever_merges_goes_on_merging_with_more_rows(rows, sizes, learning, frozen, more):
    call = Call(rows, 1, *sizes, learning=learning, frozen=frozen and learning)
    larger = Call(rows * more, 1, *sizes, learning=learning, frozen=frozen and learning)
    if plan(call, CPU).mode == "merge":
        assert plan(larger, CPU).mode == "merge"


def test_the_break_even_is_where_weight_and_activations_are_of_one_size():
    # without launches: one and a half passes over the weight against one over the activations
    free = Constants(0.0, 1e10)
    sizes = {"input_size": 500, "output_size": 500, "weight_size": 100_000}
    assert plan(Call(149, 1, **sizes), free).mode == "scale"
    assert plan(Call(151, 1, **sizes), free).mode == "merge"


def test_several_members_merge_only_where_the_layer_has_a_batched_product():
    sizes = {"input_size": 10_000, "output_size": 10_000, "weight_size": 100}
    assert plan(Call(256, 4, **sizes), CPU).mode == "scale"
    assert plan(Call(256, 4, **sizes, batched=True), CPU).mode == "batched"


def test_members_take_turns_where_activations_are_large_and_not_where_weights_are():
    large_images = (Call(1, 1, 16_384, 16_384, 2_304),) * 20
    wide_layers = (Call(1, 1, 4_608, 512, 2_359_296),) * 20
    assert in_turn(large_images, 64, 4, True, CPU)
    assert not in_turn(large_images, 64, 1, True, CPU)
    assert not in_turn(wide_layers, 16, 4, True, CPU)
    assert not in_turn(large_images, 64, 4, True, Constants(1e-3, 1e12)), "a pass of its own costs launches"


def test_the_explanation_names_every_way_and_marks_the_fastest():
    found = plan(Call(64, 1, 1000, 1000, 500, learning=True), CPU)
    lines = found.explain().splitlines()
    assert "128" not in lines[0]
    assert "activations 512,000 bytes, dense weights 2,000 bytes" in lines[0]
    assert lines[1].startswith("* merge")
    assert lines[2].startswith("  scale")
    assert f"{found.seconds['merge'] * 1e6:.1f} us" in lines[1]


def test_measured_constants_are_kept_and_used(cache):
    assert constants_of("cpu") == CPU
    path = save_constants("cpu", Constants(1e-6, 5e9))
    assert path == constants_file("cpu")
    assert cache in path.parents
    assert constants_of("cpu") == Constants(1e-6, 5e9)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"launch_seconds": "x", "bytes_per_second": 1})])
def test_a_damaged_file_of_constants_is_named_and_not_used(cache, text, caplog):
    path = constants_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert constants_of("cpu") == CPU
    assert str(path) in caplog.text
    assert "bench calibrate" in caplog.text
