"""Weight files: what is read, and how little a damaged or hostile one can do."""
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from collections import Counter, defaultdict
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders import load_encoder
from lib.weights import (load_checkpoint, load_tensors, load_weights, read_json,
                         save_atomically)

LEGACY = dict(_use_new_zipfile_serialization=False)


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def write_safetensors(path, state):
    header, at = {}, 0
    for name, t in state.items():
        kind = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[t.dtype]
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text +
                     b"".join(t.contiguous().numpy().tobytes() for t in state.values()))
    return path


def pickled(path, tree, **settings):
    torch.save(tree, path, **settings)
    return path


class Payload:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_is_ever_run(tmp_path, protocol, legacy):
    flag, path = tmp_path / "ran", tmp_path / "evil.pt"
    settings = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    tree = {"model": {"w": torch.arange(3.0), "x": Payload(flag)}, Payload(flag): 1,
            "z": [Payload(flag)]}
    pickled(path, tree, **settings)
    for load in (load_tensors, partial(load_encoder, "whisper")):
        with pytest.raises(ValueError) as error:
            load(path)
        one_line(error, "evil.pt", "save its tensors again")
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists()  # the payload was a live one


class Call:
    """Unpickling it calls a function with an argument that would leave a file behind."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec, subprocess.run, Path.touch, runpy.run_path])
def test_a_function_that_torch_does_not_know_is_not_called(function, tmp_path):
    flag, script = tmp_path / "ran", tmp_path / "script.py"
    code = f"open({str(flag)!r}, 'w')"
    script.write_text(code)
    argument = {eval: code, exec: code, subprocess.run: ["touch", str(flag)], Path.touch: flag,
                runpy.run_path: str(script)}[function]
    path = pickled(tmp_path / "a.pt", {"w": torch.ones(2), "x": Call(function, argument)})
    try:
        assert load_tensors(path)["w"].tolist() == [1, 1]
    except ValueError as error:  # torch refuses the modules that it knows to be dangerous
        assert "a.pt" in str(error) and "save its tensors again" in str(error)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists()


class OmegaConf:
    """An object of the research code, as found in its checkpoints: nested, with a state."""

    def __init__(self):
        self.content = {"lr": np.float64(1e-3), "names": {"a", "b"}, "parent": Path("x")}


class AttributeDict(dict):
    """A dict whose items are attributes too, as Lightning's and many an options file's."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


FOREIGN = {"namespace": Namespace(lr=0.1, layers=[1, 2]), "config": OmegaConf(),
           "scalar": np.float64(3), "array": np.arange(3), "time": datetime(2026, 1, 1),
           "groups": defaultdict(list, {"a": [1]}), "counts": Counter("aab"), "path": Path("x"),
           "options": AttributeDict(a=1, b=AttributeDict(c=2))}


@pytest.mark.parametrize("name", FOREIGN)
def test_tensors_beside_foreign_objects_are_read(name, tmp_path):
    content = {"cfg": FOREIGN[name], "model": {"w": torch.arange(3.0)}}
    path = pickled(tmp_path / "a.pt", content)
    assert load_tensors(path)["model.w"].tolist() == [0, 1, 2]
    try:
        old_format = load_tensors(pickled(tmp_path / "old.pt", content, **LEGACY))
        assert old_format["model.w"].tolist() == [0, 1, 2]
    except ValueError as error:  # torch lists no foreign names of this format
        assert "old.pt" in str(error) and "save its tensors again" in str(error)


def test_the_old_format_of_torch_opens_if_it_holds_tensors_alone(tmp_path):
    path = pickled(tmp_path / "a.pt", {"a": {"b": torch.arange(3.0)}}, **LEGACY)
    assert load_tensors(path)["a.b"].tolist() == [0, 1, 2]


def test_dicts_that_are_shared_and_deeply_nested_are_entered_once(tmp_path):
    content = {"w": torch.ones(2)}
    for _ in range(40):
        content = {"a": content, "b": content}
    tensors = load_tensors(pickled(tmp_path / "a.pt", content))
    assert list(tensors) == [".".join("a" * 40) + ".w"]


GREEDY = {  # files that ask for more memory than there is
    "a pickle's unknown length": b"\x80\x02\x8e" + b"\xff" * 6,
    "a pickle's frame": b"\x80\x04\x95" + b"\xff" * 6,
    "a text": b"\x80\x02X" + b"\xff\xff\xff\x7f" + b"ab",
    "a header": b"\xff" * 7 + b"\x7f{",
    "a shorter header": b"\xff\xff\xff\xff\x01\0\0\0{",
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("greed", GREEDY)
def test_a_few_bytes_do_not_take_gigabytes(greed, tmp_path):
    import resource
    (tmp_path / "a.pt").write_bytes(GREEDY[greed])
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.split("VmData:")[1].split()[0])
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 10 ** 9, limits[1]))
    try:
        with pytest.raises(ValueError) as error:
            load_tensors(tmp_path / "a.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    one_line(error, "a.pt")
    assert "Memory" not in str(error.value)


def test_a_payload_where_torch_looks_first(tmp_path):
    flag = tmp_path / "ran"
    code = pickle.dumps(Payload(flag), 2)
    (tmp_path / "a.pt").write_bytes(code)  # in place of a legacy file's magic number
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("a/data.pkl", code)
    for name in "a.pt", "b.pt":
        with pytest.raises(ValueError) as error:
            load_tensors(tmp_path / name)
        one_line(error, name)
    assert not flag.exists()
    pickle.loads(code)
    assert flag.exists()


def header(entries, data=bytes(64)):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FINE = {"a": entry(0, 16, [4]), "b": entry(16, 32, [2, 2])}
BAD_WEIGHTS = {
    "100 torch.float32": header({"a": entry(0, 400, [100])}),             # beyond the end
    "b claims": header({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}),  # overlapping
    "c claims": header(FINE | {"c": entry(40, 48, [2])}),                 # a gap
    "a claims": header({"a": entry(0, 16, [5])}),
    "(": header({"a": entry(0, 24, [-2, -3])}),
    "header promises": struct.pack("<Q", 2 ** 62) + b"{" + bytes(20),
    "F99": header({"a": entry(0, 16, [4], "F99")}),
    "data_offsets": header({"a": {"dtype": "F32"}}),
    "column": header(b'{"a": '),
    "neither": b"Dear reader, these are no weights.",
    "no weights": b"",
    "no weights to": b"PK\3\4" + bytes(100),
    "; fetch": b"\x80\x02." + bytes(100),
}


@pytest.mark.parametrize("why", BAD_WEIGHTS)
def test_a_damaged_weight_file_is_refused_in_one_line(tmp_path, why):
    (tmp_path / "a.safetensors").write_bytes(header(FINE))
    assert load_tensors(tmp_path / "a.safetensors")["b"].shape == (2, 2)
    (tmp_path / "bad.safetensors").write_bytes(BAD_WEIGHTS[why])
    with pytest.raises(ValueError) as error:
        load_tensors(tmp_path / "bad.safetensors")
    one_line(error, "bad.safetensors", why)


@pytest.mark.parametrize("write", [pickled, partial(pickled, **LEGACY), write_safetensors])
def test_a_file_cut_anywhere_is_refused(tmp_path, write):
    raw = write(tmp_path / "a.pt", {"a": torch.randn(50), "b": torch.ones(9)}).read_bytes()
    for size in range(0, len(raw) - 1, 97):
        (tmp_path / "b.pt").write_bytes(raw[:size])
        with pytest.raises(ValueError) as error:
            load_tensors(tmp_path / "b.pt")
        one_line(error, "b.pt")


@pytest.mark.parametrize("content", [
    {"a": torch.zeros(1000)},
    {"a": torch.zeros(100), "b": torch.randn(100), "c": torch.randn(10)}],  # fit, if not unpacked
    ids=["one", "three"])
def test_a_zip_that_was_packed_again(tmp_path, content):
    pickled(tmp_path / "a.pt", content)
    for pack in zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED:
        with zipfile.ZipFile(tmp_path / "a.pt") as old, \
                zipfile.ZipFile(tmp_path / "b.pt", "w", pack) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        if pack == zipfile.ZIP_STORED:
            tensors = load_tensors(tmp_path / "b.pt")
            assert all(torch.equal(tensors[name], content[name]) for name in content)
    with pytest.raises(ValueError) as error:
        load_tensors(tmp_path / "b.pt")
    one_line(error, "b.pt", "data/0 is compressed")


def test_a_storage_that_reaches_beyond_the_file(tmp_path):
    path = pickled(tmp_path / "a.pt", {"a": torch.zeros(1000)}, **LEGACY)
    raw = path.read_bytes().replace(struct.pack("<cH", b"M", 1000), struct.pack("<cH", b"M", 9999))
    path.write_bytes(raw)
    with pytest.raises(ValueError) as error:
        load_tensors(path)
    one_line(error, "a.pt", "save its tensors again")


def test_weights_are_views_of_the_file_until_they_are_used(tmp_path):
    state = {"a": torch.arange(4.0), "b": torch.arange(6.0).view(2, 3).T}
    for path in (write_safetensors(tmp_path / "x.safetensors", state),
                 pickled(tmp_path / "x.pt", state)):
        tensors = load_tensors(path)
        raw = path.read_bytes()
        with open(path, "r+b") as file:  # what changes before it is read is read as changed
            file.write(raw.replace(struct.pack("<f", 5), struct.pack("<f", 9)))
        assert tensors["b"].max() == 9 and load_tensors(path)["b"].max() == 9
        path.write_bytes(raw)
        tensors = load_tensors(path)
        assert all(torch.equal(tensors[name], state[name]) for name in state)
        tensors["a"][0] = 7  # a private copy of that page: the file stays as it is
        assert load_tensors(path)["a"][0] == 0


def test_a_file_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.pt"
    save_atomically(path, {"format": "x", "a": torch.ones(2)})

    def break_off(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomically(path, None, break_off)
    assert load_checkpoint(path, "x")["a"].tolist() == [1, 1] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not a checkpoint of the kind 'y'"):
        load_checkpoint(path, "y")


def test_a_temporary_file_is_new_and_no_one_elses(tmp_path):
    """What a user has under a name of ours or that we once used stays, and no link is followed."""
    path, own = tmp_path / "a.pt", tmp_path / "own"
    own.write_text("precious")
    (tmp_path / "a.pt.tmp").write_text("mine")
    (tmp_path / "a.tmp").symlink_to(own)
    (tmp_path / ".a.pt.tmp").symlink_to(own)
    (tmp_path / f".a.pt.{'0' * 16}.tmp").symlink_to(own)  # even if it has a name of ours
    (tmp_path / f".b.pt.{'0' * 16}.tmp").write_text("another file's")
    names = []

    def write(content, file):
        names.extend(os.listdir(tmp_path))
        file.write(content)

    before = set(os.listdir(tmp_path)) - {f".a.pt.{'0' * 16}.tmp"}
    save_atomically(path, b"new", write)
    save_atomically(path, b"newer", write)
    assert path.read_bytes() == b"newer" and own.read_text() == "precious"
    assert (tmp_path / "a.pt.tmp").read_text() == "mine"
    temporary = [name for name in names if name not in before | {"a.pt"}]
    assert len(set(temporary)) == 2  # a new name each time
    assert set(os.listdir(tmp_path)) == before | {"a.pt"}


def test_the_next_saving_removes_what_killed_processes_left_and_nothing_that_is_written(tmp_path):
    path, began, go_on = tmp_path / "a.pt", threading.Event(), threading.Event()
    (tmp_path / f".a.pt.{'0' * 16}.tmp").write_bytes(b"half")  # as one that was killed leaves it

    def write_slowly(content, file):
        began.set()
        go_on.wait(60)
        file.write(content)

    writer = threading.Thread(target=save_atomically, args=(path, b"slow", write_slowly))
    writer.start()
    began.wait(60)
    save_atomically(path, b"fast", lambda content, file: file.write(content))
    assert path.read_bytes() == b"fast" and len(os.listdir(tmp_path)) == 2  # one is being written
    go_on.set()
    writer.join()
    assert path.read_bytes() == b"slow" and os.listdir(tmp_path) == ["a.pt"]


def refuse_allocation(*args):
    raise AssertionError("a tensor was moved or converted before the shapes were compared")


def test_shapes_are_compared_before_anything_is_allocated(monkeypatch):
    tensors = {"weight": torch.zeros(1).expand(10 ** 6, 10 ** 6), "bias": torch.zeros(2)}
    monkeypatch.setattr(torch.Tensor, "to", refuse_allocation)
    with pytest.raises(ValueError) as error:
        load_weights(torch.nn.Linear(2, 2), tensors, "a.pt: no layer", torch.float64)
    one_line(error, "a.pt: no layer", "weight is torch.float32 (1000000, 1000000), not (2, 2)")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes of that kind here")
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    for name in ("config.json", "model.safetensors", "x.pt"):
        os.mkfifo(tmp_path / name)
        for read in (read_json, load_tensors):
            with pytest.raises(ValueError, match="is a pipe or a device"):
                read(tmp_path / name)


def test_a_name_of_as_many_bytes_as_the_system_takes_can_be_saved(tmp_path):
    path = tmp_path / ("ü" * 120 + ".json")  # 245 bytes
    save_atomically(path, b"{}", lambda content, file: file.write(content))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
