"""Lists of questions: what is read, what is refused, and what an item costs."""
import json
import os
import pickle
import struct
import tempfile
import tracemalloc
import unicodedata
import wave
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from torch.utils.data import DataLoader

from data import lists
from data.lists import QuestionList, drop_unreadable, wrong_clips


def write_wav(path, seconds, rate=16000, channels=1, seed=0):
    samples = np.random.default_rng(seed).integers(-9000, 9000, (int(seconds * rate), channels))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def not_numbers(path):
    data = np.full(900, np.nan, "<f4").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16,
                         3, 1, 16000, 64000, 4, 32, b"data", len(data))
    path.write_bytes(header + data)


# Sound files that cannot be heard, and what the refusal has to say. Used for training too.
BAD_SOUNDS = {
    "cut": (lambda path: path.write_bytes(write_wav(path, 1).read_bytes()[:999]), "truncated"),
    "missing": (lambda path: None, "no such"),
    "folder": (lambda path: path.mkdir(), ""),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "header": (lambda path: path.write_bytes(write_wav(path, 1).read_bytes()[:20]), ""),
    "text": (lambda path: path.write_text("no sound at all\n"), "not a "),
    "no_samples": (lambda path: write_wav(path, 0), "no samples"),
    "nan": (not_numbers, "NaN")}


def item(audio="a.wav", **fields):
    return {"audio_id": audio, "instruction": "What is it?", "output": "a dog"} | fields


# --------------------------------------------------------------------------- lists of questions

@pytest.fixture
def sounds(tmp_path):
    write_wav(tmp_path / "a.wav", 0.5)
    (tmp_path / "more").mkdir()
    write_wav(tmp_path / "more" / "ä b.wav", 0.3)
    return tmp_path


def test_a_json_list_and_json_lines_are_the_same(sounds):
    raw = [item(), item("more/ä b.wav", instruction="Who?", task="t", dataset="d"),
           item(output="two\nlines, \u2028 and \x85")]
    (sounds / "q.json").write_text(json.dumps(raw, indent=2))
    lines = [json.dumps(r, ensure_ascii=False) for r in raw]
    (sounds / "q.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (sounds / "more" / "q.json").write_text("\ufeff" + json.dumps(raw), encoding="utf-8")
    items = list(QuestionList(sounds / "q.json"))
    assert items == list(QuestionList(sounds / "q.jsonl"))
    assert items == list(QuestionList(sounds / "more" / "q.json", sounds))
    assert items[0] == {"clip": sounds / "a.wav", "audio_id": "a.wav", "output": "a dog",
                        "instruction": "What is it?", "task": "question", "domain": "q",
                        "choices": []}
    assert (items[1]["task"], items[1]["domain"]) == ("t", "d")
    assert items[2]["output"] == raw[2]["output"].strip()


def test_an_input_is_added_to_the_instruction(sounds):
    raw = [item(input="It barks."), item(input=""), item(input=None)]
    (sounds / "q.json").write_text(json.dumps(raw))
    instructions = [i["instruction"] for i in list(QuestionList(sounds / "q.json"))]
    assert instructions == ["What is it? It barks.", "What is it?", "What is it?"]


def test_audio_is_relative_to_the_list_or_to_the_root_given(sounds, monkeypatch):
    monkeypatch.chdir("/")
    (sounds / "more" / "q.json").write_text(json.dumps([item("ä b.wav")]))
    (sounds / "q.json").write_text(json.dumps([item("ä b.wav")]))
    audio = sounds / "more" / "ä b.wav"
    assert QuestionList(sounds / "more" / "q.json")[0]["clip"] == audio
    assert QuestionList(sounds / "q.json", sounds / "more")[0]["clip"] == audio
    with pytest.raises(ValueError, match="item 0"):
        list(QuestionList(sounds / "q.json"))


# Lists that cannot be used, and the words that a refusal must have. Used for training too.
BAD_LISTS = {
    "empty": ("", ["empty"]),
    "no_items": ("[]", ["empty"]),
    "json": ('[{"audio_id": "a.wav",\n "instruction": "?"\n "output": "!"}]', ["line 3"]),
    "jsonl": (f"{json.dumps(item())}\n\n{json.dumps(item())[:-9]}\n", ["line 3"]),
    "number": (json.dumps([item(), 7]), ["item 1", "int"]),
    "text": (json.dumps(["a.wav"]), ["item 0", "str"]),
    "no_field": (json.dumps([item(), {"audio_id": "a.wav", "output": "x"}]),
                 ["item 1", "instruction"]),
    "blank": (json.dumps([item(), item(output=" ")]), ["item 1", "output"]),
    "wrong_type": (json.dumps([item(), item(instruction=["What?"])]), ["item 1", "instruction"]),
    "task": (json.dumps([item(), item(task=3)]), ["item 1", "task"]),
    "dataset": (json.dumps([item(dataset=["d"])]), ["item 0", "dataset"]),
    "input": (json.dumps([item(input={"a": 1})]), ["item 0", "input"]),
    "half": (json.dumps([item(instruction="\ud83d?")]), ["item 0", "instruction"]),
    "choices": (json.dumps([item(choices=["a cat", "an owl"])]), ["item 0", "choices"]),
    "no_list": (json.dumps([item(), item(choices="a dog or a cat")]), ["item 1", "choices"]),
    "half_choice": (json.dumps([item(choices=["a dog", "\ud83d"])]), ["item 0", "choices"]),
    "number_choice": (json.dumps([item(choices=["a dog", 3])]), ["item 0", "choices"]),
    "blank_choice": (json.dumps([item(choices=["a dog", " "])]), ["item 0", "choices"]),
    "long": (json.dumps([item(), item(output="a dog " * 24_000)]), ["item 1", "144,000"]),
    "deep": ("[" * 100_000 + "]" * 100_000, ["deep"]),
    "deep_line": (f'{json.dumps(item())}\n{{"x": {"[" * 100_000}', ["line 2", "deep"]),
    "digits": (f"[{json.dumps(item())}, {'9' * 9000}]", ["JSON"]),
    "no_audio": (json.dumps([item(), item("b/none.wav")]), ["item 1", "b/none.wav"]),
    "long_name": (json.dumps([item("n" * 300)]), ["item 0", "too long"]),
    "longer_name": (json.dumps([item("n" * 5000)]), ["item 0", "audio_id", "5,000"]),
    "zero_name": (json.dumps([item("a\0.wav")]), ["item 0"]),
    "half_name": (json.dumps([item("\udcff.wav")]), ["item 0", "audio_id"])}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_says_where_and_what(name, sounds):
    text, words = BAD_LISTS[name]
    path = sounds / f"{name}.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        QuestionList(path)
    assert all(word in str(error.value) for word in [*words, str(path)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 999


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_lists_of_windows_shell_are_read(encoding, sounds):
    raw = [item("more/ä b.wav", output="चिड़िया 🎵"), item()]
    mark = "" if encoding == "utf-16" else "\ufeff"  # utf-16 writes one itself
    lines = "\r\n".join(map(json.dumps, raw)) + "\r\n"
    for name, text in (("q.json", json.dumps(raw, indent=1, ensure_ascii=False)),
                       ("q.jsonl", lines)):
        (sounds / name).write_bytes((mark + text).encode(encoding))
        questions = list(QuestionList(sounds / name))
        assert [q["audio_id"] for q in questions] == ["more/ä b.wav", "a.wav"]
        assert questions[0]["output"] == unicodedata.normalize("NFC", "चिड़िया 🎵")
    (sounds / "q.jsonl").write_bytes((mark + lines + "oh").encode(encoding))
    with pytest.raises(ValueError, match="line 3: not JSON"):
        QuestionList(sounds / "q.jsonl")


def test_texts_of_two_normal_forms_are_the_same(sounds):
    """é as one character, or as e and an accent, as macOS and some keyboards write it."""
    raw = [item(output="cafe\u0301", choices=["caf\u00e9", "the\u0301"])]
    (sounds / "q.json").write_text(json.dumps(raw))
    question, = QuestionList(sounds / "q.json")
    assert question["output"] == "caf\u00e9" and question["choices"] == ["caf\u00e9", "th\u00e9"]


def in_another_process(function, argument):
    with ProcessPoolExecutor(1) as process:
        return process.submit(function, argument).result()


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_a_list_that_is_rewritten_while_it_is_used_is_noticed(name, sounds):
    raw = [item(), item(output="a cat")]
    text = json.dumps(raw) if name == "q.json" else "\n".join(map(json.dumps, raw))
    path = sounds / name
    path.write_text(text)
    questions = QuestionList(path)
    expected, times = list(questions), path.stat()
    path.write_text(text.replace("a cat", "a rat"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if name == "q.json":  # a copy is read
        assert list(questions) == expected == in_another_process(list, questions)
        return
    assert questions[0] == expected[0]  # the same as before
    for read in (lambda: questions[1], lambda: list(questions),
                 lambda: pickle.loads(pickle.dumps(questions))[1],
                 lambda: in_another_process(list, questions)):
        with pytest.raises(ValueError, match="q.jsonl: has been changed"):
            read()
    path.write_text(text[:40])
    with pytest.raises(ValueError, match="q.jsonl: has been changed"):
        list(questions)


def test_more_tasks_than_sixteen_bits_count(sounds):
    lines = [json.dumps(item(task=f"task {n}")) for n in range(65_540)]
    (sounds / "q.jsonl").write_text("\n".join(lines))
    questions = QuestionList(sounds / "q.jsonl")
    assert len(questions.tasks) == 65_540 and questions.task_numbers[-1] == 65_539
    assert questions[65_539]["task"] == "task 65539"


@pytest.mark.parametrize("name", [name for name in BAD_SOUNDS if name != "nan"])
def test_a_clip_whose_header_is_bad_is_found_with_the_list(name, sounds, capsys):
    make, word = BAD_SOUNDS[name]
    make(sounds / "bad.wav")
    (sounds / "q.jsonl").write_text("\n".join(map(json.dumps, [item(), item("bad.wav")])))
    with pytest.raises(ValueError, match=r"q.jsonl: line 2: .*bad.wav") as error:
        QuestionList(sounds / "q.jsonl")
    assert word.lower() in str(error.value).lower() and "\n" not in str(error.value)
    questions = QuestionList(sounds / "q.jsonl", skip_bad=True)
    assert [q["audio_id"] for q in questions] == ["a.wav"]
    assert "line 2" in capsys.readouterr().err
    if name != "folder":
        write_wav(sounds / "bad.wav", 0.1)
        mended = QuestionList(sounds / "q.jsonl")  # which is no change of the list
        assert len(mended) == 2 and mended.fingerprint == questions.fingerprint


def test_clips_that_only_reading_shows_to_be_bad_are_left_out(sounds, capsys):
    not_numbers(sounds / "bad.wav")
    raw = [item(), item("bad.wav"), item("more/ä b.wav"), item("bad.wav", output="x")]
    (sounds / "q.jsonl").write_text("\n".join(map(json.dumps, raw)))
    questions = QuestionList(sounds / "q.jsonl")
    items = drop_unreadable(questions, questions.clips(seconds=0.2))
    assert [q["audio_id"] for q in items] == ["a.wav", "more/ä b.wav"]
    line, = capsys.readouterr().err.splitlines()
    assert "bad.wav" in line and "NaN" in line and "1 of 3" in line
    bad = sounds / "bad.wav"
    with pytest.raises(ValueError, match="none of the clips"):
        drop_unreadable(questions, {bad: questions.clips()[bad]})


def test_a_list_out_of_a_pipe_or_device_is_refused(sounds):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(sounds / "pipe")
    for path in (sounds / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="has to be a file"):
            QuestionList(path)


def test_a_list_that_is_no_text_file_or_not_there(sounds):
    (sounds / "b.json").write_bytes(b"\xff\xfe\xfa")
    bad = {sounds / "b.json": "text", sounds: "directory", sounds / "no.json": "no.json"}
    for path, word in bad.items():
        with pytest.raises((ValueError, OSError), match=word):
            QuestionList(path)


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
def test_items_are_the_same_in_data_workers_and_in_a_copy(name, sounds):
    raw = [item(output=f"a dog {n}") for n in range(20)]
    (sounds / "q.json").write_text(json.dumps(raw))
    (sounds / "q.jsonl").write_text("\n".join(map(json.dumps, raw)))
    questions = QuestionList(sounds / name)
    expected = list(questions)
    assert list(pickle.loads(pickle.dumps(questions))) == expected
    loader = DataLoader(questions, batch_size=None, num_workers=2, collate_fn=lambda x: x)
    assert list(loader) == expected == list(questions) == [questions[i] for i in range(20)]


def test_a_json_list_is_parsed_once_and_its_copy_is_removed(sounds, monkeypatch):
    (sounds / "new").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(sounds / "new"))
    (sounds / "q.json").write_text(json.dumps([item()]))
    questions = QuestionList(sounds / "q.json")
    monkeypatch.setattr(lists, "as_json_lines", None)  # from here on nobody reads the whole list
    copy = pickle.loads(pickle.dumps(questions))
    assert copy[0] == questions[0]
    del copy  # as when a spawned data worker ends
    lists.remove_file(questions.jsonl, process=-1)  # and as when a forked one does
    assert len([*sounds.glob("new/*")]) == 1 and questions[0]["output"] == "a dog"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="item 0"):
        QuestionList(sounds / "q.json", audio_root=sounds / "more")
    del questions
    assert [*sounds.glob("new/*")] == []


def test_bad_items_are_counted_the_first_named_and_left_out_on_request(sounds, capsys):
    bad = [item(f"none{n}.wav") for n in range(12)]
    raw = bad[:4] + [item(output="x"), item(output="y")] + bad[4:]
    (sounds / "bad.jsonl").write_text("\n".join(map(json.dumps, raw)))
    with pytest.raises(ValueError, match="bad.jsonl: 12 items cannot be used, the first 10"):
        QuestionList(sounds / "bad.jsonl")
    named = [line for line in capsys.readouterr().err.splitlines() if "none" in line]
    assert len(named) == 10 and "line 1:" in named[0] and "line 7" in named[4]
    good = QuestionList(sounds / "bad.jsonl", skip_bad=True)
    assert [question["output"] for question in good] == ["x", "y"]
    assert "12 items cannot be used, the first 10 are above; 2 stay" in capsys.readouterr().err


def test_the_fingerprint_changes_with_the_list(sounds):
    prints = set()
    for raw in ([item()], [item(), item()], [item(output="a cat")]):
        (sounds / "q.jsonl").write_text("\n".join(map(json.dumps, raw)))
        prints.add(QuestionList(sounds / "q.jsonl").fingerprint)
    assert len(prints) == 3


def test_an_item_of_jsonl_costs_a_few_bytes_of_memory(sounds):
    line = json.dumps(item("a.wav", instruction="What is it? " * 20)) + "\n"
    (sounds / "long.jsonl").write_text(line * 8000)
    tracemalloc.start()
    items = QuestionList(sounds / "long.jsonl")
    own = tracemalloc.Filter(True, "*lists.py")  # not what is imported or interned meanwhile
    traces = tracemalloc.take_snapshot().filter_traces([own]).statistics("filename")
    used = sum(trace.size for trace in traces)
    tracemalloc.stop()
    assert len(items) == 8000  # of 300 bytes each in the file
    assert 24 * 8000 <= used < 24 * 8000 + 30000


def test_the_wrong_clip_is_another_one_of_the_same_domain_if_there_is_one():
    domains = {0: "sound", 1: "speech", 2: "sound", 3: "sound", 4: "speech", 5: "music"}
    other = wrong_clips(domains)
    assert all(other[clip] != clip for clip in domains)
    assert all(domains[other[clip]] == domains[clip] for clip in range(5))
    assert wrong_clips({0: "sound"}) == {}
    # a list in order of word and speaker: the wrong clip is of the same speaker no more than by
    # chance, wherever one looks for it
    speakers = {f"{word} {speaker} {i}": speaker
                for word in range(10) for speaker in "abcde" for i in range(5)}
    other = wrong_clips(dict.fromkeys(speakers, "fsdd"))
    assert sorted(other.values()) == sorted(speakers)
    alike = sum(speakers[clip] == speakers[other[clip]] for clip in speakers)
    assert 25 <= alike <= 75  # of 250, where chance is a fifth
