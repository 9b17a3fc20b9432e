"""Weight files: safetensors, torch.save's .pt, sharded Hugging Face folders, and our checkpoints.

    python -c "from lib.weights import *; print(list(load_tensors('assets/base.pt'))[:3])"

No code in a file is ever run. Whatever is wrong with a file is a ValueError of one line.
"""
import json
import math
import mmap
import os
import re
import secrets
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# torch's types by their names in .safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
# first parts of the names of what training saves beside a model
TRAINING_STATE = (r"(\w*(optim|sched|scaler|rng|random)\w*|(\w*_)?ema(_\w+)?|callbacks|loops|args|"
                  r"hyper_parameters|cfg|config|criterion|(task|extra)_state|"
                  r"(\w+_)?(epoch|steps?|loss))(\.|$)")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def as_value_error(path, what, advice="fetch it again, or another"):
    """Whatever goes wrong with a missing, damaged or hostile file is a ValueError of one line."""
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path}: is a pipe or a device; give a file")  # it could block for ever
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise  # it says all already
        lines = (str(error) or type(error).__name__).splitlines()
        # load_state_dict's first line ends in a colon, and the names come after it
        reason = " ".join(" ".join(lines if lines[0].endswith(":") else lines[:1]).split())
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason
        if is_lfs_pointer(path):
            reason, advice = "but a git-lfs pointer to it", "run `git lfs pull` in its folder"
        raise ValueError(f"{path}: no {what} ({reason}); {advice}") from None


def is_lfs_pointer(path):
    """Whether git-lfs left a few lines in place of a large file."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def read_json(path):
    """The object in a JSON file. ValueError, one line, if there is none."""
    with as_value_error(path, "JSON object"):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"but a {type(content).__name__}")
        return content


def load_tensors(path):
    """Read a weight file, or a Hugging Face folder of one or several, as a flat {name: tensor}.

    Safetensors and torch.save's files are told apart by their content. Dicts inside dicts are
    joined by dots: "model.blocks.0.bias". Tensors are views of the memory-mapped file, read when
    they are used (only torch.save's format before 2020 is read at once).
    Raises ValueError, one line, for a file that is missing, damaged or something else.
    """
    tensors = {}
    for file in list_weight_files(Path(path)):
        with as_value_error(file, "weights to be read"):
            with open(file, "rb") as stream:
                start = stream.read(9)
            content = None
            if start[8:] == b"{":
                content = read_safetensors(file)
            elif start[:1] in (b"P", b"\x80"):  # a zip, or a pickle
                content = read_torch(file, zipped=start[:1] == b"P")
            if not content:
                raise ValueError("neither safetensors nor made by torch.save, or empty")
            tensors |= content
    return tensors


def list_weight_files(path):
    """The file itself; of a folder its weight file, or those that its index names."""
    if path.is_dir():
        present = [path / name for name in WEIGHT_FILES if (path / name).exists()]
        if not present:
            raise ValueError(f"{path}: no weights in this folder; put {WEIGHT_FILES[0]} there")
        path = present[0]
    if path.suffix != ".json":
        return [path]
    index = read_json(path)
    with as_value_error(path, "index of weights"):
        return [path.parent / name for name in sorted(set(index["weight_map"].values()))]


def read_safetensors(path):
    """u64 header length; the header, {name: {dtype, shape, data_offsets}} in JSON; the numbers."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"its header promises {length} bytes, which it does not have")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, previous_end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        count, dtype = math.prod(entry["shape"]), DTYPES[entry["dtype"]]
        whole = end - start == count * dtype.itemsize and 8 + length + end <= size
        if start != previous_end or not whole:  # no gaps, no overlaps
            raise ValueError(f"{name} claims bytes {start} to {end} for {count} {dtype}")
        flat = map_tensor(path, 8 + length + start, end - start, dtype)
        tensors[name] = flat.reshape(entry["shape"])
        previous_end = end
    return tensors


def map_tensor(path, start, size, dtype):
    """`size` bytes of a file as a flat tensor: a memory map of its own, so that its memory is free
    when the tensor is dropped; read at once if the numbers are not aligned."""
    if size == 0:
        return torch.empty(0, dtype=dtype)
    raw = np.memmap(path, "u1", "c", start, size)  # copy on write: the file stays as it is
    return torch.from_numpy(raw.copy() if start % dtype.itemsize else raw).view(dtype)


class AcceptsItems(type):
    """torch sets items of classes that equal dict: those of research code often inherit from it."""

    def __eq__(cls, other):
        return cls is other or other is dict

    __hash__ = type.__hash__


class StubObject(dict, metaclass=AcceptsItems):
    """Stands in for any object of a file that is not a tensor: it holds state, and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})

    __hash__ = object.__hash__


def read_torch(path, zipped):
    """The tensors of a torch.save file, by torch's loader that builds tensors and plain types only.

    Research files also hold options and training states. StubObject replaces each class that torch
    does not know, so that the tensors beside it can be read; torch lists such names for zips only.
    Names that could act, such as os.system, are refused by torch or are stubs too.
    """
    try:
        for item in zipfile.ZipFile(path).infolist() if zipped else ():
            if item.compress_type and "/data/" in item.filename:  # mapped, it would give nonsense
                raise ValueError(f"{item.filename} is compressed")
        unknown = get_unsafe_globals_in_checkpoint(path) if zipped else []
        with safe_globals([(StubObject, name) for name in unknown]), open(path, "rb") as file:
            # An old file may ask for more bytes than it has: read(n) of a map reserves no more.
            old = None if zipped else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            content = torch.load(old or path, "cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
        raise ValueError(f"torch refuses it: {reason.splitlines()[0]}; if you trust it, save its "
                         "tensors again with a current torch.save") from None
    return flatten_tensors(content)


def flatten_tensors(content):
    """The tensors in nested dicts, their names joined by dots. A dict that occurs twice is entered
    once: shared dicts nested 40 deep would otherwise take for ever."""
    tensors, entered, waiting = {}, set(), [("", content)]
    while waiting:
        prefix, node = waiting.pop()
        if torch.is_tensor(node):
            tensors[prefix] = node
        elif isinstance(node, dict) and id(node) not in entered:
            entered.add(id(node))
            waiting += [(f"{prefix}.{name}" if prefix else str(name), child)
                        for name, child in reversed(node.items())]
    return tensors


def strip_prefixes(tensors):
    """A model's tensors by its own names: without what DistributedDataParallel, torch.compile and
    training loops put before them, and without the training's own state. Empties `tensors`."""
    stripped = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        name = re.sub(r"\b(module|_orig_mod)\.", "", name)
        name = re.sub(r"^(model\.|(model_)?state_dict\.)+", "", name)
        if name in stripped:
            raise ValueError(f"{name} is there twice; keep one model in the file")
        if not re.match(TRAINING_STATE, name):
            stripped[name] = tensor
    return stripped


def holds_numbers(tensor):
    """Whether a tensor out of a file has numbers, and as many as its shape says."""
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    size = tensor.numel() * tensor.element_size()
    return not tensor.is_meta and 0 < size <= tensor.untyped_storage().nbytes()


def check_values(values, examples, times=math.inf):
    """ValueError unless each value has the type of the example of its name, None allows any, and a
    number is the example, or above 0, at most so many times its size, and at most 2^31."""
    for name, example in examples.items():
        value, kind = values[name], type(example)
        value = float(value) if kind is float and type(value) is int else value
        limit = min(times * (example or 1), 1 << 31) if kind in (int, float) else None
        fits = type(value) is kind and (limit is None or 0 < value <= limit or value == example)
        if example is not None and not fits:
            bounds = f" above 0 and up to {limit}" if limit else ""
            raise ValueError(f"{name} is {value!r}: expected {kind.__name__}{bounds}, "
                             f"like {example!r}")


@contextmanager
def build_for(tensors, device="meta"):
    """Modules built here will get these tensors from `load_weights`, so on device meta they take no
    memory. Sizes that ask for far more tensors than these end in a ValueError right then."""
    left = 100 + 2 * len(tensors)  # if it is not far, load_weights says what is missing

    def count(module, name, parameter):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"its sizes ask for far more than its {len(tensors)} tensors")

    handle = register_module_parameter_registration_hook(count)
    # normal_ on device meta would import torch's compiler, which takes a second
    no_initialisation = patch.object(torch.nn.init, "normal_", lambda tensor, *args, **kw: tensor)
    try:
        with torch.device(device), no_initialisation:
            yield
    finally:
        handle.remove()


def load_weights(module, tensors, source, dtype, device="cpu"):
    """Make these tensors the module's own, and empty the dict; an error begins with `source`.

    Each goes straight to its dtype and device; one that has both already stays a map of the file.
    ValueError, one line: what is missing, unknown or misshapen.
    """
    state = module.state_dict()
    problems = [f"{name} is missing" for name in state if name not in tensors]
    for name, t in tensors.items():
        own = state.get(name)
        if own is None:
            problems.append(f"{name} does not belong there")
        elif not torch.is_tensor(t) or t.is_nested:
            problems.append(f"{name} holds no numbers")
        elif (t.shape, t.is_floating_point()) != (own.shape, own.is_floating_point()):
            problems.append(f"{name} is {t.dtype} {tuple(t.shape)}, not {tuple(own.shape)}")
        elif not holds_numbers(t):
            problems.append(f"{name} claims more numbers than it holds")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source}: {', '.join(problems[:3])}{more}")
    for name in state:  # one by one, so that no more than one tensor is there twice
        t = tensors.pop(name)
        state[name] = t.to(device, dtype if t.is_floating_point() else None)
    module.load_state_dict(state, assign=True)


def bytes_to_tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # checkpoints hold tensors only


def tensor_to_bytes(tensor):
    return tensor.numpy().tobytes()


def save_atomically(path, content, write=torch.save):
    """write(content, file) under a temporary name, then rename: `path` is always whole, the old
    file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:  # a new file, through no link
            with suppress(OSError):
                lock(file)  # or remove_stale would take it for a dead process's
            write(content, file)
            file.flush()
            os.fsync(file.fileno())  # or the name could outlive the contents in a power cut
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's, on a full disk, says only "cut short"
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would take what room there is


def copy_atomically(source, path):
    """Copy the file `source` to `path`, which is always whole, as with save_atomically."""
    with open(source, "rb") as content:
        save_atomically(path, content, shutil.copyfileobj)


def check_output(path, inputs):
    """ValueError or OSError if a file cannot be written there, or is one of the inputs or in a
    folder that is one; "" stands for no input."""
    out = Path(path)
    if out.exists():
        places = [out, *out.resolve().parents]
        used = any(place.samefile(name) for name in inputs if name and Path(name).exists()
                   for place in places)
        if not out.is_file() or used:
            raise ValueError(f"--out {path}: is a folder, a device, or read here; name a new file")
    probe = temporary_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        open(probe, "xb").close()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def temporary_stem(path):
    """What a temporary file's name has of the path's: a name may have 255 bytes, and no more."""
    return path.name[:50]


def temporary_path(path):
    """A name beside the path that nobody has used."""
    return path.with_name(f".{temporary_stem(path)}.{secrets.token_hex(8)}.tmp")


def remove_stale(path):
    """Remove what killed processes left of saving `path`: temporary files that nobody writes."""
    for name in os.listdir(path.parent):
        if re.fullmatch(rf"\.{re.escape(temporary_stem(path))}\.[0-9a-f]{{16}}\.tmp", name):
            with suppress(OSError):
                with open(path.with_name(name), "rb") as file:
                    lock(file)
                os.unlink(path.with_name(name))


def lock(file):
    """OSError if another process has locked this file, or files cannot be locked here."""
    try:
        import fcntl
    except ImportError:  # Windows, where nobody can remove a file that is open
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def find_file(path):
    """The path itself or, if nothing is there, that of a file beside the code: assets/base.pt is
    found from any folder."""
    beside = Path(__file__).parents[1] / path
    return beside if not Path(path).exists() and beside.is_file() else path


def load_checkpoint(path, format):
    """A dict that save_atomically wrote, with this "format". ValueError says what is wrong."""
    path = find_file(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    with as_value_error(path, "checkpoint of this project, or cut off"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or saved.get("format") != format:
        raise ValueError(f"{path}: not a checkpoint of the kind {format!r}")
    return saved
