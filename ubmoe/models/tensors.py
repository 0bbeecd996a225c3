"""Tensors on disk, read and written in blocks of rows: no file, and no large tensor, is ever held.

The format is safetensors': eight bytes that give the header's length, the header as JSON, then the
numbers. Its library writes only what is held whole.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

BLOCK = 1 << 21  # numbers of a tensor that are held at once: 8 MiB in float32
LENGTH = 8  # bytes that give the header's length
SHARD = "5GB"
# transformers 4 refuses any other format than pt, and says it; 5 and all else do not look.
GUARDED = "pt, whose is_causal transformers 5.2 or newer reads"
# How the format calls them, in the order in which it writes them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stream:
    """A tensor that is read when it is wanted, in blocks along its first dimension.

    Two of one shape have the same blocks, whatever their dtypes.
    """

    shape: torch.Size
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "Stream":
        """Cast block by block."""
        return Stream(self.shape, dtype, lambda: (block.to(dtype) for block in self.blocks()))

    def whole(self) -> Tensor:
        """The whole tensor, in memory."""
        filled, start = torch.empty(self.shape, dtype=self.dtype), 0
        for block in self.blocks():
            filled[start : start + len(block)] = block
            start += len(block)
        return filled

    @classmethod
    def from_tensor(cls, value: Tensor) -> "Stream":
        """The stream of a tensor in memory, on its device."""
        value = value.detach()
        return cls(value.shape, value.dtype, lambda: (value[rows] for rows in _rows(value.shape)))

    @classmethod
    def from_file(cls, path: Path) -> "dict[str, Stream]":
        """The floating-point tensors of a safetensors file, by name.

        Raises SafetensorError or OSError for any other file.
        """
        with safe_open(path, "pt"):  # the library checks all that the header says
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        streams = {}
        for name, entry in header.items():
            shape, dtype = torch.Size(entry["shape"]), DTYPES.get(entry["dtype"])
            if shape and dtype is not None:
                start = LENGTH + length + entry["data_offsets"][0]
                streams[name] = cls(shape, dtype, partial(_read, path, start, shape, dtype))
        return streams


def _read(path: Path, start: int, shape: torch.Size, dtype: torch.dtype) -> Iterator[Tensor]:
    """Plain reading: a mapped file would count as memory, and the library's slices are slow."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for rows in _rows(shape):
            block = torch.empty(rows.stop - rows.start, *shape[1:], dtype=dtype)
            _fill(file, block.flatten().view(torch.uint8).numpy().data)
            yield block


def _fill(file: FileIO, place: memoryview) -> None:
    """A read may give less than was asked for. Raises OSError at the file's end."""
    while place:
        if not (count := file.readinto(place)):
            raise OSError(f"{file} ends in the middle of a tensor")
        place = place[count:]


def _rows(shape: torch.Size) -> Iterator[slice]:
    """The blocks of a shape of one dimension and more."""
    step = max(1, BLOCK // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def write_file(tensors: dict[str, Stream], path: Path) -> None:
    """A safetensors file, byte for byte as its library writes it from tensors in memory."""
    kinds = list(NAMES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        places = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": NAMES[tensor.dtype], **places}
    with path.open("wb") as file:
        file.write(_with_length(header))
        for name in order:
            for block in tensors[name].blocks():
                flat = block.cpu().contiguous().flatten()
                file.write(flat.view(torch.uint8).numpy().data)


def guard(folder: Path) -> None:
    """Let transformers 4 refuse a folder's weights, where it would read them causally in silence.

    A header grows by it, so each file is copied once.
    """
    for path in folder.glob("*.safetensors"):
        copy = path.with_suffix(".guarded")
        with path.open("rb") as old, copy.open("wb") as new:
            header = json.loads(old.read(int.from_bytes(old.read(LENGTH), "little")))
            header["__metadata__"] = (header.get("__metadata__") or {}) | {"format": GUARDED}
            new.write(_with_length(header))
            shutil.copyfileobj(old, new, BLOCK)
        copy.replace(path)


def _with_length(header: dict[str, object]) -> bytes:
    """A file's beginning: the numbers behind it begin at a multiple of eight."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH, "little") + text


def write_model(groups: dict[str, dict[str, Stream]], folder: Path, shard: str = SHARD) -> None:
    """Each group in files of its own, `model-<group>...` or `model...`, of at most that size.

    With an index over all of them, unless all are in one file that is called model.safetensors.
    """
    places: dict[str, str] = {}
    for group, tensors in groups.items():
        shapes = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in tensors.items()
        }
        pattern = f"model-{group}{{suffix}}.safetensors" if group else "model{suffix}.safetensors"
        split = split_torch_state_dict_into_shards(
            shapes, filename_pattern=pattern, max_shard_size=shard
        )
        for file, names in split.filename_to_tensors.items():
            write_file({name: tensors[name] for name in names}, folder / file)
        places |= split.tensor_to_filename
    if set(places.values()) != {"model.safetensors"}:
        size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
