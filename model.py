"""A plain decoder LLM of the Llama family, from scratch. It knows nothing of audio.

(This branch holds only the reading of weight files.)
"""

import json
import math
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------
# Weight files

# torch's types by their names in .safetensors, and by those of their storages in .pt
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
            "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
            "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_tensors(path):
    """
    Read a weight file, or a Hugging Face folder of one or several, as a flat {name: tensor}.

    Safetensors and torch.save's files (zip or legacy, also what weights_only=True refuses) are
    told apart by their content; dicts inside dicts are joined by dots: "model.blocks.0.bias".
    Tensors are views of the memory-mapped file, read when used; no code in a file is ever run.
    Raises ValueError, one line, for a file that is missing, damaged or something else.
    """
    path, tensors = Path(path), {}
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            raise ValueError(f"{path}: no weights in this folder; wanted {' or '.join(WEIGHTS)}")
        path = found[0]
    try:
        files = [path]
        if path.suffix == ".json":  # the index of a model in several files
            names = json.loads(path.read_text())["weight_map"].values()
            files = [path.parent / name for name in sorted(set(names))]
        for path in files:
            file = MappedFile(path)
            magic = file.data[:9].numpy().tobytes()
            if magic[8:] == b"{":
                tensors.update(read_safetensors(file))
            elif magic[:4] == b"PK\3\4":
                tensors.update(read_zip(file))
            elif magic[:1] == b"\x80":
                tensors.update(read_legacy(file))
        if not tensors:
            raise ValueError("neither safetensors nor made by torch.save, or without a tensor")
        return tensors
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except Exception as error:  # whatever a damaged or hostile file may lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: no weights to be read ({reason}); fetch it again") from None


class MappedFile:
    """A file as a tensor of bytes that are read when they are used."""

    def __init__(self, path):
        self.path = path
        self.data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)

    def values(self, start, dtype, count):
        """`count` values of `dtype` from byte `start`: a view, or read now if not aligned."""
        size = count * dtype.itemsize
        if min(start, count) < 0 or start + size > len(self.data):
            raise ValueError(f"{len(self.data)} bytes, where {count} {dtype} should be at {start}")
        if size == 0:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize:
            return torch.from_numpy(np.fromfile(self.path, "u1", size, offset=start)).view(dtype)
        return self.data[start:start + size].view(dtype)


def read_safetensors(file):
    """u64 header length; the header, {name: {dtype, shape, data_offsets}} in JSON; the values."""
    first = 8 + int.from_bytes(file.data[:8].numpy().tobytes(), "little")
    if first > len(file.data):
        raise ValueError(f"its header promises {first} bytes, and it has {len(file.data)}")
    header = json.loads(file.data[8:first].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
        count = math.prod(shape)
        if start != reached or end - start != count * dtype.itemsize:  # no gaps, no overlaps
            raise ValueError(f"{name} claims bytes {start} to {end} for {shape} {dtype}")
        tensors[name], reached = file.values(first + start, dtype, count).reshape(shape), end
    return tensors


class Inert(dict):
    """Stands in for any object that a file asks for: holds its state, does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})

    def ignore(self, *args, **kwargs):
        return Inert()

    __call__ = append = extend = add = ignore
    __hash__ = object.__hash__


class Note(tuple):
    """What a pickle says of a tensor: its storage, offset, size and stride."""


class TensorUnpickler(pickle.Unpickler):
    """
    Knows torch's names for types of numbers and for putting a tensor together. Every other name
    in a file means Inert, so nothing that could act is within its reach, whatever the file says.
    """

    def __init__(self, stream):
        super().__init__(stream, encoding="latin1")
        self.dtypes = {}  # of each storage, by its key

    def find_class(self, module, name):
        if module.split(".")[0] == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *about: Note(about[:4])
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *about: tensor
        return Inert

    def persistent_load(self, storage):  # ("storage", dtype, key, device, count, ...)
        self.dtypes[storage[2]] = storage[1]
        return storage


def read_zip(file):
    """torch.save since 2020: a zip of ROOT/data.pkl and, for each storage, ROOT/data/KEY."""
    start = {}
    with zipfile.ZipFile(file.path) as archive:
        pickled, = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        tree = TensorUnpickler(archive.open(pickled)).load()
        folder = pickled.removesuffix(".pkl") + "/"
        for item in archive.infolist():
            if item.filename.startswith(folder):
                if item.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{item.filename} is compressed")
                lengths = struct.unpack_from("<HH", file.data.numpy(), item.header_offset + 26)
                start[item.filename.removeprefix(folder)] = item.header_offset + 30 + sum(lengths)
    return tensors_in(tree, file, start)


def read_legacy(file):
    """torch.save before: three pickles about the format, one of the tree, one of the keys of the
    storages; then the storages in that order, each after an int64 count."""
    with open(file.path, "rb") as stream:
        for _ in range(3):
            TensorUnpickler(stream).load()
        reader = TensorUnpickler(stream)
        tree, keys = reader.load(), TensorUnpickler(stream).load()
        at = stream.tell()
    start = {}
    for key in keys:
        start[key] = at + 8
        at += 8 + file.values(at, torch.int64, 1).item() * reader.dtypes[key].itemsize
    return tensors_in(tree, file, start)


def tensors_in(tree, file, start, prefix=""):
    """Flatten nested dicts, and make of each Note in them its tensor; `start` says where
    each storage's bytes begin."""
    tensors = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            tensors.update(tensors_in(node, file, start, f"{prefix}{name}."))
        elif isinstance(node, Note):
            (_, dtype, key, _, count, *_), offset, size, stride = node
            values = file.values(start[key], dtype, count)
            tensors[f"{prefix}{name}"] = values.as_strided(
                size, stride, values.storage_offset() + offset)
    return tensors
