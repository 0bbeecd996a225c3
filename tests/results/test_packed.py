"""Packed records are the records, to the last bit."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.compare.records import recorded
from ubmoe.config import UserError, load_config
from ubmoe.results import packed
from ubmoe.results.records import pack, stored

HEAD = {"main": 0.1 + 0.2, "after": 1e-17, "without_first": {"after": 100.0}}
CONFIG = {
    "model": {"name": "small", "adapter": None},
    "seed": 0,
    "bi": {"layers": {"from": 11}, "stages": [{"train": ["ffn"], "steps": 1}, {"train": []}]},
}


def record(*changes, heads=((HEAD, HEAD), (HEAD, HEAD))):
    config = copy.deepcopy(CONFIG)
    for key, value in changes:
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[int(name) if isinstance(node, list) else name]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    layers = [{"after": 2.0, "heads": [*own]} for own in heads]
    return {"config": config, "seconds": 1.0, "dependence": {"layers": layers, "by_text": [0.1]}}


RECORDS = {
    "a.dependence.seed0": record(),
    "b.dependence.seed0": record(("bi.stages", [])),
    "c.dependence.seed0": record(("bi.layers", "all"), ("seed", 0.0)),
    "d.dependence.seed1": record(("seed", True), ("model.adapter", ...), ("extra", {"a": {}})),
    "e.dependence.seed1": record(("bi", {}), heads=((HEAD,), (HEAD, HEAD))),
    "f.dependence.seed1": record(("bi.stages", [{"train": ["a\u2028b"]}]), heads=()),
    "g.dependence.seed1": record(heads=(({"main": 1},), ({"main": None},))),
    **{f"{name}.scan.seed2": record(heads=()) for name in "ij"},
    "h.sts.seed1": {"config": {"model": {"name": "other"}, "seed": 1}, "sts": {"tasks": {}}},
}


def text(value):
    return json.dumps(value, sort_keys=True)


def test_packed_records_are_the_records_to_the_last_bit(tmp_path):
    packed.write(tmp_path, RECORDS)
    actual = packed.read(tmp_path)
    assert {name: text(item) for name, item in actual.items()} == {
        name: text(record) for name, record in RECORDS.items()
    }
    first, *lines = map(json.loads, (tmp_path / "records.jsonl").read_text().split("\n")[:-1])
    assert first["shared"]["config"]["bi.stages.0.train"] == ["ffn"]
    said = {line["name"][0]: line["config"] for line in lines}
    assert said["a"] == {} and said["b"] == {"bi.stages": []}
    assert said["d"] == {"seed": True, "extra.a": {}, "unset": ["model.adapter"]}
    assert [line["name"][0] for line in lines if "heads" in line] == [*"abcd"]
    arrays = np.load(tmp_path / "heads.npz")
    assert arrays["a.dependence.seed0"].shape == (2, 2, 3)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", min_size=1), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text("abc", min_size=1), JSON, min_size=1), min_size=1))
def test_any_configurations_are_packed_without_loss(tmp_path_factory, configs):
    folder = tmp_path_factory.mktemp("packed")
    records = {f"x{place}.sts.seed0": {"config": item} for place, item in enumerate(configs)}
    packed.write(folder, records)
    assert text(packed.read(folder)) == text(records)


def test_what_cannot_be_packed_is_refused_before_anything_is_written(tmp_path):
    dotted = {"a.sts.seed0": {"config": {"a.b": 1}, "sts": {}}}
    with pytest.raises(UserError, match="a.sts.seed0 cannot be packed without loss"):
        packed.write(tmp_path, dotted)
    assert not [*tmp_path.iterdir()]


def made(folder):
    return load_config(None, [f"results.directory={folder}"])


def test_files_are_packed_into_their_folder_and_newer_ones_win(tmp_path, monkeypatch):
    monkeypatch.setattr("ubmoe.results.records.as_text", lambda *_: "")  # they lack most parts
    config = made(tmp_path)
    for name in ("a.dependence.seed0", "h.sts.seed1"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RECORDS[name]))
    assert pack(config) == str(tmp_path / "records.jsonl")
    assert {item.name for item in tmp_path.iterdir()} == {"records.jsonl", "heads.npz"}
    newer = copy.deepcopy(RECORDS["a.dependence.seed0"])
    newer["config"]["seed"] = 7
    (tmp_path / "a.dependence.seed0.json").write_text(json.dumps(newer))
    (tmp_path / "benchmark.rows.json").write_text("{}")
    both = recorded(config)
    assert both.by_name["a.dependence.seed0"].config["seed"] == 7  # the file, not the packed one
    assert both.by_name["h.sts.seed1"].data == RECORDS["h.sts.seed1"]
    assert stored(tmp_path, "a.dependence.seed0") == newer
    assert stored(tmp_path, "h.sts.seed1") == RECORDS["h.sts.seed1"]
    assert stored(tmp_path, "i.sts.seed1") is None
    pack(config)
    assert stored(tmp_path, "a.dependence.seed0") == newer
    assert stored(tmp_path, "h.sts.seed1") == RECORDS["h.sts.seed1"]
    with pytest.raises(UserError, match="holds no record"):
        pack(config)


@pytest.mark.parametrize(
    "line", ["", "null", "[]", "{", '{"name": []}', '{"name": "a", "config": 1}']
)
def test_a_line_that_is_no_record_is_named(line, tmp_path):
    packed.write(tmp_path, {"h.sts.seed1": RECORDS["h.sts.seed1"]})
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + line + "\n" + "{}\n")
    with pytest.raises(UserError, match="records.jsonl, line 3: no packed records"):
        recorded(made(tmp_path))


@pytest.mark.parametrize("broken", [None, b"", b"no archive"])
def test_heads_that_are_gone_or_broken_are_one_line(broken, tmp_path):
    packed.write(tmp_path, {"a.dependence.seed0": RECORDS["a.dependence.seed0"]})
    if broken is None:
        (tmp_path / "heads.npz").unlink()
    else:
        (tmp_path / "heads.npz").write_bytes(broken)
    with pytest.raises(UserError, match="records.jsonl, line [12]: no packed records"):
        recorded(made(tmp_path))


def test_heads_beside_no_records_are_somebody_elses(tmp_path):
    (tmp_path / "heads.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"heads.npz is beside no records.jsonl, .*; move it"):
        packed.write(tmp_path, {"h.sts.seed1": RECORDS["h.sts.seed1"]})
    assert [item.name for item in tmp_path.iterdir()] == ["heads.npz"]
    assert (tmp_path / "heads.npz").read_bytes() == b"mine"
