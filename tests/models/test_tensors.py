"""Files written block by block are the library's own, byte for byte; blocks are the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ubmoe.models import tensors
from ubmoe.models.tensors import Stream, write_file, write_model


def some(seed=0):
    """Tensors of all dtypes, names out of order, odd sizes, one empty, one not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    actual = {
        "b.weight": torch.randn(7, 3, generator=generator),
        "a.weight": torch.randn(5, generator=generator).bfloat16(),
        "größe": torch.randn(2, 3, 5, generator=generator).half(),
        "z": torch.randn(1, generator=generator).double(),
        "a.bias": torch.randn(3, generator=generator).half(),
        "empty": torch.zeros(0, 4),
        "B": torch.randn(11, 1, generator=generator).bfloat16(),
    }
    return actual | {"turned": torch.randn(4, 6, generator=generator).T}


@pytest.mark.parametrize("block", [1, 4, 1 << 24])
@pytest.mark.parametrize("read", [False, True])
def test_a_file_is_the_librarys_byte_for_byte(tmp_path, monkeypatch, block, read):
    monkeypatch.setattr(tensors, "BLOCK", block)
    values = some()
    whole = {name: value.contiguous() for name, value in values.items()}
    save_file(whole, tmp_path / "library", metadata={"format": "pt"})
    streams = {name: Stream.from_tensor(value) for name, value in values.items()}
    write_file(Stream.from_file(tmp_path / "library") if read else streams, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    for count in range(1, len(values)):  # headers of many lengths
        part = dict(list(whole.items())[:count])
        save_file(part, tmp_path / "library", metadata={"format": "pt"})
        write_file({name: streams[name] for name in part}, tmp_path / "ours")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize("block", [1, 4, 10, 1 << 24])
def test_blocks_are_rows_of_the_tensor_in_their_order(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensors, "BLOCK", block)
    values = some()
    save_file({k: v.contiguous() for k, v in values.items()}, tmp_path / "file")
    for name, stream in Stream.from_file(tmp_path / "file").items():
        for item in (stream, Stream.from_tensor(values[name])):
            assert torch.equal(item.whole(), values[name]) and item.dtype == values[name].dtype
            assert torch.equal(item.to(torch.float16).whole(), values[name].half())
            rows = [len(part) for part in item.blocks()]
            width = values[name][:1].numel()
            assert sum(rows) == len(values[name])
            assert all(count == 1 or count * width <= block for count in rows)
        lengths = [
            [len(part) for part in item.blocks()]
            for item in (stream, Stream.from_tensor(values[name]))
        ]
        assert lengths[0] == lengths[1]


def test_what_is_no_number_of_floating_point_is_left_out(tmp_path):
    values = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int8), "c": torch.tensor(1.0)}
    save_file(values, tmp_path / "file")
    assert set(Stream.from_file(tmp_path / "file")) == {"a"}


def test_shards_are_small_enough_and_hold_every_tensor_once(tmp_path):
    values = {f"{n}": torch.full((100,), float(n)) for n in range(10)}
    streams = {name: Stream.from_tensor(value) for name, value in values.items()}
    groups = {"x": {name: streams[name] for name in "0123456"}}
    groups["y"] = {name: streams[name] for name in "789"}
    write_model(groups, tmp_path, "1KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4000} and list(index["weight_map"]) == list(values)
    actual = {}
    for group, count in (("x", 4), ("y", 2)):
        for number in range(1, count + 1):
            file = tmp_path / f"model-{group}-0000{number}-of-0000{count}.safetensors"
            part = load_file(file)
            assert sum(value.nbytes for value in part.values()) <= 1000
            assert part.keys() <= groups[group].keys() and not actual.keys() & part.keys()
            assert {index["weight_map"][name] for name in part} == {file.name}
            actual |= part
    assert len(list(tmp_path.iterdir())) == 7
    assert actual.keys() == values.keys()
    assert all(torch.equal(actual[name], value) for name, value in values.items())


def test_one_file_needs_no_index(tmp_path):
    streams = {f"{n}": Stream.from_tensor(torch.ones(100)) for n in range(10)}
    write_model({"": streams}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    write_model({"": streams}, tmp_path, "1KB")
    assert (tmp_path / "model-00005-of-00005.safetensors").is_file()
    assert (tmp_path / "model.safetensors.index.json").is_file()
