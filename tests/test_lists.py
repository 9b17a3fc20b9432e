"""Lists of questions: what is read, what is refused, and what an item costs."""
import json
import pickle
import struct
import tempfile
import tracemalloc
import wave

import numpy as np
import pytest
from torch.utils.data import DataLoader

from data import lists
from data.lists import QuestionList, wrong_clips


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
    "no_audio": (json.dumps([item(), item("b/none.wav")]), ["item 1", "b/none.wav"])}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_says_where_and_what(name, sounds):
    text, words = BAD_LISTS[name]
    path = sounds / f"{name}.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        QuestionList(path)
    assert all(word in str(error.value) for word in [*words, str(path)])
    assert "\n" not in str(error.value)


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
    (sounds / "long.jsonl").write_text(line * 20000)
    tracemalloc.start()
    items = QuestionList(sounds / "long.jsonl")
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(items) == 20000 and used < 20 * 20000 + 50000  # the file has 300 bytes an item


def test_the_wrong_clip_is_another_one_of_the_same_domain_if_there_is_one():
    domains = {0: "sound", 1: "speech", 2: "sound", 3: "sound", 4: "speech", 5: "music"}
    other = wrong_clips(domains)
    assert all(other[clip] != clip for clip in domains)
    assert all(domains[other[clip]] == domains[clip] for clip in range(5))
    assert wrong_clips({0: "sound"}) == {}
