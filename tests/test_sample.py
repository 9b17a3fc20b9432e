"""Asking: options and their errors, lists of questions, one question, many questions."""
import json
import os
import struct
import subprocess
import sys
import wave
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from encoders import load_audio
from integrate import Arm, AudioLLM, pool, run
from model import KVCache
from sample import Questions, attention, listen, on_grid, words

ROOT = Path(__file__).parents[1]


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
    items = list(Questions(sounds / "q.json"))
    assert items == list(Questions(sounds / "q.jsonl"))
    assert items == list(Questions(sounds / "more" / "q.json", sounds))
    assert items[0] == {"clip": sounds / "a.wav", "audio_id": "a.wav", "output": "a dog",
                        "instruction": "What is it?", "task": "question", "domain": "q",
                        "choices": []}
    assert (items[1]["task"], items[1]["domain"]) == ("t", "d")
    assert items[2]["output"] == raw[2]["output"].strip()


def test_an_input_is_added_to_the_instruction(sounds):
    raw = [item(input="It barks."), item(input=""), item(input=None)]
    (sounds / "q.json").write_text(json.dumps(raw))
    asked = [i["instruction"] for i in list(Questions(sounds / "q.json"))]
    assert asked == ["What is it? It barks.", "What is it?", "What is it?"]


def test_audio_is_relative_to_the_list_or_to_the_root_given(sounds, monkeypatch):
    monkeypatch.chdir("/")
    (sounds / "more" / "q.json").write_text(json.dumps([item("ä b.wav")]))
    (sounds / "q.json").write_text(json.dumps([item("ä b.wav")]))
    there = sounds / "more" / "ä b.wav"
    assert Questions(sounds / "more" / "q.json")[0]["clip"] == there
    assert Questions(sounds / "q.json", sounds / "more")[0]["clip"] == there
    with pytest.raises(ValueError, match="item 0"):
        list(Questions(sounds / "q.json"))


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
        Questions(path)
    assert all(word in str(error.value) for word in [*words, str(path)])
    assert "\n" not in str(error.value)


def test_a_list_that_is_no_text_file_or_not_there(sounds):
    (sounds / "b.json").write_bytes(b"\xff\xfe\xfa")
    bad = {sounds / "b.json": "text", sounds: "directory", sounds / "no.json": "no.json"}
    for path, word in bad.items():
        with pytest.raises((ValueError, OSError), match=word):
            Questions(path)


# ------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("program", [sample, train])
def test_help_shows_every_option_and_its_default(program, call):
    code, text, _ = call(program, "--help")
    words = " ".join(text.split())
    assert code == 0
    for f in fields(program.Options):
        flag = "--" + f.name.replace("_", "-")
        assert flag in words and "_" not in flag
        assert f.metadata["help"] in words
        if f.default is not None and f.type is not bool:
            assert f"(default: {f.default})" in words.split(f.metadata["help"], 1)[1]


def test_options_reach_the_program(call):
    got = []

    stub = SimpleNamespace(__name__="x", __doc__="", Options=sample.Options, main=got.append)
    assert call(stub, "--audio", "x.wav", "--top-p", "0.5", "--max-new-tokens", "7")[0] == 0
    assert got == [sample.Options(audio="x.wav", top_p=0.5, max_new_tokens=7)]


@pytest.mark.parametrize("options, words", [
    ("--audio a.wav --promp what", ["unrecognized", "--promp"]),
    ("--audio a.wav --nonsense", ["unrecognized", "--nonsense"]),
    ("--audio a.wav --prompt=", ["--prompt is empty"]),
    ("--audio a.wav --ckpt=", ["--ckpt is empty"]),
    ("--audio a.wav --temperature hot", ["--temperature", "hot"]),
    ("--audio a.wav --temperature -1", ["--temperature -1", "0 to"]),
    ("--audio a.wav --temperature nan", ["--temperature nan"]),
    ("--audio a.wav --temperature inf", ["--temperature inf"]),
    ("--audio a.wav --top-p 0", ["--top-p 0"]),
    ("--audio a.wav --top-p 1.1", ["--top-p 1.1", "to 1"]),
    ("--audio a.wav --max-new-tokens 0", ["--max-new-tokens 0", "1 to"]),
    ("--audio a.wav --max-new-tokens 99999999999", ["--max-new-tokens"]),
    ("--audio a.wav --seed -1", ["--seed -1", "0 or more"]),
    (f"--audio a.wav --seed {2 ** 64}", ["--seed"])])
def test_options_that_mean_nothing_are_refused(options, words, refuses):
    assert len(refuses([*words, "--help"], sample, *options.split())) == 1


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:999", "cpux"])
def test_an_unknown_device_is_refused(device, refuses, checkpoint):
    write_wav("a.wav", 0.2)
    refuses([f"--device {device}"], sample, "--audio", "a.wav", "--ckpt", checkpoint,
            "--device", device)


def test_a_mistake_in_the_code_is_no_users_mistake(call, monkeypatch):
    def broken(o):
        raise KeyError("oh")

    monkeypatch.setattr(sample, "main", broken)
    with pytest.raises(KeyError):
        call(sample, "--audio", "a.wav")


# -------------------------------------------------------------------------------------- asking

def ask(call, checkpoint, *options, **kwargs):
    options = ["--ckpt", checkpoint, "--device", "cpu", *options]
    code, stdout, stderr = call(sample, *options, **kwargs)
    assert code == 0
    return stdout, stderr


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_a_bad_sound_is_one_line(name, refuses, checkpoint, tmp_path):
    make, word = BAD_SOUNDS[name]
    make(tmp_path / "bad.wav")
    options = ["--audio", "bad.wav", "--prompt", "x", "--ckpt", checkpoint]
    line, = refuses(["bad.wav"], sample, *options)
    assert word.lower() in line.lower() and "--help" not in line


def test_a_bad_checkpoint_is_one_line(refuses, checkpoint, base, tmp_path, call):
    write_wav("a.wav", 0.2)
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "short.pt").write_bytes(whole[:-1])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for path in ("cut.pt", "short.pt", "empty.pt", "other.pt", "a.wav", "none.pt", ".", base):
        lines = refuses([str(path)], sample, "--audio", "a.wav", "--prompt", "x", "--ckpt", path)
        assert len(lines) == 1


def test_as_a_program_of_its_own(checkpoint, tmp_path):
    """What `call` imitates, for real: exit code, one line, no traceback."""
    result = subprocess.run([sys.executable, ROOT / "sample.py", "--audio", "none.wav"],
                            cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    line, = result.stderr.splitlines()
    assert line.startswith("sample.py: none.wav")


def test_one_question_gives_one_answer_that_the_seed_decides(call, checkpoint):
    write_wav("a.wav", 1.0)
    options = ["--audio", "a.wav", "--prompt", "What is it?", "--max-new-tokens", 9]
    greedy = ask(call, checkpoint, *options)[0]
    model = AudioLLM.load(checkpoint)
    cache = model.hear(model.features([lambda rate: load_audio("a.wav", rate)]))
    assert greedy == model.ask(cache, ["What is it?"], max_new_tokens=9)[0] + "\n"
    assert ask(call, checkpoint, *options, "--seed", 1)[0] == greedy
    warm = [*options, "--temperature", 2]
    drawn = ask(call, checkpoint, *warm)[0]
    assert drawn == ask(call, checkpoint, *warm)[0] != ask(call, checkpoint, *warm, "--seed", 1)[0]
    assert drawn != greedy == ask(call, checkpoint, *warm, "--top-p", 0.001)[0]


def test_many_questions_hear_the_sound_once(call, checkpoint, monkeypatch):
    write_wav("a.wav", 1.0)
    heard = []
    hear = AudioLLM.hear
    monkeypatch.setattr(AudioLLM, "hear", lambda self, f: heard.append(f) or hear(self, f))
    asked = ["What is it?", "Who is speaking?", "Is it loud?"]
    options = ["--audio", "a.wav", "--max-new-tokens", 4]
    stdout, _ = ask(call, checkpoint, *options, stdin="\n".join(asked) + "\n")  # then EOF
    assert len(heard) == 1
    alone = [ask(call, checkpoint, *options, "--prompt", q)[0] for q in asked]
    assert stdout == "".join("> " + answer for answer in alone) + "> "
    empty_line = ask(call, checkpoint, *options, stdin=f"{asked[0]}\n \n{asked[1]}\n")[0]
    assert empty_line == "> " + alone[0] + "> "
    assert ask(call, checkpoint, *options, stdin="")[0] == "> "


def test_without_a_checkpoint_the_newest_is_asked(call, checkpoint, tmp_path):
    write_wav("a.wav", 0.2)
    for age, mode in ((300, "plits"), (100, "pal"), (200, "lal")):
        path = tmp_path / "out" / mode / "model.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(checkpoint.read_bytes())
        os.utime(path, (1e9 - age, 1e9 - age))
    code, _, stderr = call(sample, "--audio", "a.wav", "--prompt", "x", "--max-new-tokens", 1)
    assert code == 0 and "out/pal/model.pt" in stderr
    os.utime(tmp_path / "out" / "lal" / "model.pt", (1e9, 1e9))
    stderr = call(sample, "--audio", "a.wav", "--prompt", "x", "--max-new-tokens", 1)[2]
    assert "out/lal/model.pt" in stderr


def test_a_checkpoint_of_half_numbers_is_asked_like_any_other(checkpoint, tmp_path):
    model = AudioLLM.load(checkpoint).half()
    model.save(tmp_path / "half.pt")
    assert os.path.getsize(tmp_path / "half.pt") < 0.6 * os.path.getsize(checkpoint)
    again = AudioLLM.load(tmp_path / "half.pt")
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert two.dtype == torch.float32 and torch.equal(one.float(), two)
    features = again.features([lambda rate: torch.randn(rate)])
    assert isinstance(again.ask(again.hear(features), ["x"], max_new_tokens=2)[0], str)


def test_without_any_checkpoint_the_one_that_comes_with_the_code_answers(call, tmp_path):
    write_wav("a.wav", 0.5)
    code, _, stderr = call(sample, "--audio", "a.wav", "--prompt", "What is it?")
    assert code == 0 and "assets/lal.pt: mode lal" in stderr


def test_what_is_cropped_or_padded_is_said(call, checkpoint, tmp_path):
    options = ["--prompt", "x", "--max-new-tokens", 3]
    write_wav("long.wav", 9.5)
    write_wav("short.wav", 0.02)
    write_wav("right.wav", 4.0)
    stdout, stderr = ask(call, checkpoint, "--audio", "long.wav", *options)
    said = [line for line in stderr.splitlines() if "cropped" in line and "9.5 s" in line]
    assert [line.split()[0] for line in said] == ["whisper", "sslam", "clap"]
    assert "silence" not in stderr
    stderr = ask(call, checkpoint, "--audio", "short.wav", *options)[1]
    said = [line for line in stderr.splitlines() if "is added" in line and "0.02 s" in line]
    assert [line.split()[0] for line in said] == ["whisper", "sslam", "clap"]
    assert ["silence" in line for line in said] == [True, True, False] and "cropped" not in stderr
    stderr = ask(call, checkpoint, "--audio", "right.wav", *options)[1]
    assert "cropped" not in stderr and "is added" not in stderr
    # what is cropped is not heard
    data = (tmp_path / "long.wav").read_bytes()[:44 + 2 * 4 * 16000 + 2000]
    (tmp_path / "first.wav").write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:40]
                                         + struct.pack("<I", len(data) - 44) + data[44:])
    assert ask(call, checkpoint, "--audio", "first.wav", *options)[0] == stdout


def test_any_path_and_any_question(call, checkpoint, tmp_path):
    (tmp_path / "dïr 日本").mkdir()
    path = write_wav(tmp_path / "dïr 日本" / "ünï 🎵.wav", 0.3, 44100, 2)
    for prompt in ("日本語 🎵?", "x" * 2000, "\udcff", "a\nb\0c"):
        ask(call, checkpoint, "--audio", path, "--prompt", prompt, "--max-new-tokens", 2)


# -------------------------------------------------------------------------------------- scores

def test_captions_and_transcripts_are_scored_as_the_reference_packages_do():
    golden = np.load(ROOT / "tests" / "golden" / "scores.npz")
    clips = json.loads(str(golden["clips"]))
    pairs = [(i, said.split(), ref.split()) for i, (said, refs) in enumerate(clips) for ref in refs]
    index, said, written = zip(*pairs)
    scores = dict(zip(index, sample.cider_d(said, written, index)))
    assert np.abs(np.array([scores[i] for i in range(len(clips))]) - golden["cider"]).max() < 1e-9
    items = [{"clip": i, "output": ref} for i, (_, refs) in enumerate(clips) for ref in refs]
    found = [(said, None) for said, refs in clips for _ in refs]
    value, = sample.measures("captioning", items, found).values()
    assert abs(sample.score(*value) - golden["cider"].mean()) < 1e-9
    first = [{"clip": i, "output": refs[0]} for i, (_, refs) in enumerate(clips)]
    value, = sample.measures("transcription", first, [(said, None) for said, _ in clips]).values()
    assert abs(sample.score(*value) - golden["all_wer"]) < 1e-12
    for item, (said, _), want in zip(first, clips, golden["wer"]):
        value, = sample.measures("transcription", [item], [(said, None)]).values()
        assert abs(sample.score(*value) - want) < 1e-12


def test_words_are_lower_case_and_without_punctuation():
    assert sample.plain('"Don\'t!" - SAID a hi-hat...') == ["don't", "said", "a", "hi-hat"]


def test_labels_count_alike_in_the_macro_average_however_rare():
    labels = ["a dog", "a cat"]
    items = [{"clip": i, "output": o, "choices": labels} for i, o in enumerate(
        ["a dog", "a dog", "a dog", "a cat"])]
    found = [("a dog", "a dog"), ("big dog.", "a dog"), ("a cat", "a dog"), ("owl", "a dog")]
    got = {name: sample.score(*parts)
           for name, parts in sample.measures("classification", items, found).items()}
    assert got == {"exact match": 1 / 4, "choice by words": 2 / 4, "choice by likelihood": 3 / 4,
                   "choice by words, macro": (2 / 3 + 0) / 2, "choice by likelihood, macro": 1 / 2}
    items[3]["choices"] = []  # a question without choices does not count where there are some
    got = sample.measures("reasoning", items, found)
    assert sample.score(*got["choice by words"]) == 2 / 3 and len(got) == 3


def test_the_interval_is_that_of_independent_clips_not_of_their_questions():
    right = np.random.default_rng(0).random(400) < 0.5
    ones, same = np.ones(1600), np.zeros(1600, int)
    mean, low, high = sample.bootstrap(np.arange(400).repeat(4), right.repeat(4), ones, same)
    assert mean == right.mean() and low < mean < high
    assert abs((high - low) / (2 * 1.96 * (mean * (1 - mean) / 400) ** 0.5) - 1) < 0.1


def random_features(model, *seconds):
    """Of clips of such lengths, and nothing that an encoder would ever say."""
    g = torch.Generator().manual_seed(0)
    return [{kind: pool(torch.randn(e.steps(s) * e.grid[1], e.width, generator=g).double(),
                        model.windows[kind])
             for kind, e in model.encoders.items()} for s in seconds]


@pytest.mark.parametrize("batch", [2, 100])
def test_the_likeliest_choice_is_that_of_each_choice_alone(checkpoint, batch):
    model = AudioLLM.load(checkpoint).double()
    for p in model.llm.parameters():  # who is sure of nothing chooses the shortest, whatever sounds
        p.data *= 3
    features = random_features(model, 0.3, 2.5)
    dice, words = np.random.default_rng(0), "a dog an alarm bird no yes siren ba so man".split()
    many = [" ".join(dice.choice(words, 1 + n % 4)) for n in range(40)]  # short and long ones
    choices = [many, (), many, many[9:]]
    asked = ["what is it", "or", "what is it", "who speaks in the clip"]
    rows, token = [1, 0, 0, 1], model.tokenizer
    want = []
    for row, question, some in zip(rows, asked, choices):
        loss = []
        for choice in some:
            prompt, reply = token.chat(question)[1], token.reply(choice)
            ids = torch.tensor([prompt + reply])
            with torch.no_grad():
                logits = model.llm(ids, cache=model.hear([features[row]]))[0, len(prompt) - 1:-1]
            p = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt):, None])
            loss.append(-p.sum().item())
        want.append(some[int(np.argmin(loss))] if some else None)
    assert want[0] != want[2]  # or it would not matter which clip is asked
    cache = model.hear(features)
    assert sample.likeliest(model, cache, asked, choices, rows, batch) == want


def test_a_list_is_answered_written_and_scored(call, checkpoint, sounds, refuses):
    raw = [item(task="classification"),
           item("more/ä b.wav", output="a cat", task="classification"),
           item(output="Two.", task="reasoning", choices=["One.", "Two."]),
           item(output="It barks.", task="captioning"), item(output="so ne", task="transcription")]
    (sounds / "q.json").write_text(json.dumps(raw))
    options = ["--data", "q.json", "--out", "new/p.json", "--max-new-tokens", 3, "--batch", 2]
    stdout, _ = ask(call, checkpoint, *options, "--controls")
    told = json.loads((sounds / "new" / "p.json").read_text(encoding="utf-8"))
    assert [(t["prompt"], t["ref"], t["audio_id"], t["mode"], t["task"]) for t in told] == [
        ("What is it?", r["output"], r["audio_id"], "pal", r["task"]) for r in raw]
    model = AudioLLM.load(checkpoint)
    for t in told:
        wave = partial(load_audio, sounds / t["audio_id"])
        cache = model.hear(model.features([wave]))
        assert [t["pred"]] == model.ask(cache, [t["prompt"]], max_new_tokens=3)
    for words in ("deaf", "wrong clip", "CIDEr-D", "word error rate", "macro", "by likelihood"):
        assert words in stdout
    left = (sounds / "new" / "p.json").read_bytes()
    (sounds / "more" / "ä b.wav").write_bytes(b"no sound")
    refuses(["b.wav"], sample, "--ckpt", checkpoint, *options)
    assert (sounds / "new" / "p.json").read_bytes() == left and len([*sounds.glob("new/*")]) == 1


@pytest.mark.parametrize("options, words", [
    ("--out p.json", ["--data"]), ("--controls", ["--data"]), ("--data q.json --llm x", ["--llm"]),
    ("--data q.json --prompt x", ["--prompt"]), ("--data q.json --out q.json", ["--out"]),
    ("--data none.json", ["none.json"])])
def test_options_of_lists_that_make_no_sense_are_refused(options, words, refuses, checkpoint,
                                                         sounds):
    (sounds / "q.json").write_text(json.dumps([item()]))
    before = [] if "--llm" in options else ["--ckpt", checkpoint]
    refuses(words, sample, *before, *options.split())
    assert json.loads((sounds / "q.json").read_text()) == [item()]


# ----------------------------------------------------------------------------- what it listened to

@pytest.fixture(params=["plits", "lal", "pal"])
def hearer(base, request):
    """A model in float64 that has learnt next to nothing, and what it is to hear of a clip."""
    torch.manual_seed(0)
    model = train.load_base(base, request.param, train.WINDOWS).double().eval()
    return model, *random_features(model, 1.3)


@torch.no_grad()
def test_the_weights_are_those_that_the_model_used(hearer):
    """They sum to one over what a query sees, and times v they are what the layer made of them."""
    model, features = hearer
    c = model.llm.config
    assert c.num_key_value_heads < c.num_attention_heads  # so that sharing of keys is tested
    made = []
    for block in model.llm.model.layers:
        block.self_attn.register_forward_hook(lambda module, given, out: made.append((module, out)))
    cache = KVCache(c.num_hidden_layers)
    segments = model.segments([features])
    read = [lambda: run(model.llm, segments, cache),
            lambda: model.llm(torch.tensor([[5, 6, 7]]), cache=cache),
            lambda: model.llm(torch.tensor([[8]]), cache=cache)]
    S = 0
    for step in read:
        made.clear()
        seen = attention(model.llm, step)
        assert len(seen) == len(made) == c.num_hidden_layers
        S = seen[0][0].shape[-1]
        for layer, ((weights, positions), (module, out)) in enumerate(zip(seen, made)):
            v = cache.values[layer][:, :S]
            v = v.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=2)
            y = torch.einsum("bhts,bshd->bthd", weights, v)
            assert (module.o_proj(y.flatten(2)) - out).abs().max() < 1e-12
            queries = positions[0, -weights.shape[2]:, None]
            sees = positions <= queries  # (T, S)
            assert ((weights > 0) == sees).all() and sees.any(1).all()
            assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert S == sum(tokens.shape[1] for _, tokens, _ in segments) + 4


def test_a_word_is_said_by_the_position_that_chose_it(hearer):
    """What listen() tells of an answer is what the model saw as it made it, token by token."""
    model, features = hearer
    question, layers = "What is it?", model.llm.config.num_hidden_layers
    made, cache, prompt = [], model.hear([features]), model.tokenizer.chat(question)[1]
    seen = attention(model.llm, lambda: made.extend(model.llm.generate(prompt, 5, cache=cache)))
    parts = listen(model, features, question, made)
    sizes = [tokens.shape[1] for _, tokens, _ in model.segments([features])]
    assert [part.shape[-1] for part in parts.values()][:-1] == sizes
    assert list(parts) == ["start", "whisper", "lfst", "text"]
    told = torch.cat(list(parts.values()), dim=-1)  # (layers, tokens, n)
    assert (told.sum(-1) - 1).abs().max() < 1e-12
    for i, (weights, positions) in enumerate(seen):
        row = weights[0, :, -1].mean(0)[positions[0].argsort()]
        assert (told[i % layers, i // layers, :len(row)] - row).abs().max() < 1e-12
        assert told[i % layers, i // layers, len(row):].eq(0).all()


@pytest.mark.parametrize("seconds", [4.0, 1.3, 0.01])
def test_a_tokens_weight_lands_where_the_token_was_made(base, seconds):
    """on_grid shares a pooled token's weight among just those places whose tokens it averages."""
    model = train.load_base(base, "lal", train.WINDOWS, arm=Arm(connector="mlp"))
    for kind, encoder in model.encoders.items():
        steps, bands = encoder.steps(seconds), encoder.grid[1]
        n = steps * bands
        # token i alone holds a one at i: the pooled ones show where each of theirs came from
        pooled = pool(torch.eye(n), model.windows[kind])
        weights = torch.arange(1.0, len(pooled) + 1)
        grid, step = on_grid(model, kind, torch.diag(weights), seconds)
        assert abs(step * encoder.grid[0] - encoder.seconds) < 1e-9
        assert grid.shape == (len(pooled), steps, bands)
        assert torch.equal(grid.flatten(1) > 0, pooled > 0)
        assert torch.allclose(grid.sum((1, 2)), weights)


@pytest.mark.parametrize("seconds", [4.0, 1.3])
def test_a_weight_on_lfst_lands_at_its_place_in_the_layout(checkpoint, seconds):
    model = AudioLLM.load(checkpoint)
    features, = model.features([lambda rate: torch.randn(int(seconds * rate))])
    tokens = dict(zip(model.connectors, model.segments([features])[1:]))["lfst"][1]
    (steps, bands), n = model.connectors["lfst"].shape, tokens.shape[1]
    grid, step = on_grid(model, "lfst", torch.eye(n), seconds)
    assert grid.shape == (n, n // (bands + 1), bands) and step * steps == 4.0
    for token, place in enumerate(grid):
        t, band = divmod(token, bands + 1)
        assert place.sum() == (band < bands)  # a newline is nowhere
        assert band == bands or place[t, band] == 1


@pytest.mark.parametrize("text", ["a siren", "An alarm, then a bell.", "日本語 🎵🎵 ok", " \n a"])
def test_words_are_made_of_all_the_tokens(checkpoint, text):
    tokenizer = AudioLLM.load(checkpoint).tokenizer
    ids = tokenizer.encode(" " + text)
    found = words(tokenizer, ids)
    assert [i for _, which in found for i in which] == list(range(len(ids)))
    assert [word for word, _ in found if word] == text.split()
    with pytest.raises(ValueError, match="empty"):
        words(tokenizer, [])


@pytest.mark.parametrize("options", [
    ["--audio", "a.wav", "--listen", "a.png"], ["--masks", "a.png"], ["--curves", "out"]])
def test_a_picture_without_matplotlib_says_what_to_install(options, refuses, monkeypatch,
                                                           tmp_path):
    write_wav(tmp_path / "a.wav", 0.2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "stage": "1", "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(refuses(["pip install matplotlib"], sample, *options)) == 1


def test_pictures_that_cannot_be_drawn_are_one_line(refuses, tmp_path):
    refuses(["--listen", "--audio"], sample, "--listen", "a.png", "--prompt", "x")
    refuses(["out/none/metrics.jsonl"], sample, "--curves", "out/none")


def test_pictures_are_drawn(call, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")

    def is_picture(path):
        return (tmp_path / path).read_bytes()[:4] == b"\x89PNG"

    for name, seconds in (("a", 0.01), ("b", 5.0)):
        write_wav(f"{name}.wav", seconds)
        ask(call, checkpoint, "--audio", f"{name}.wav", "--prompt", "Is $^ it \udcff?",
            "--max-new-tokens", 3, "--listen", f"new/{name}.png")
        assert is_picture(f"new/{name}.png")
    assert call(sample, "--masks", "masks.png")[0] == 0 and is_picture("masks.png")
    lines = [{"step": 1, "stage": "1", "loss": 2.0}, {"step": 2, "stage": "2", "loss": 1.0},
             {"step": 2, "stage": "2", "validation": 0.5},
             {"scores": {"all all": {"questions": 3, "model": 0.5, "deaf": 0.1}}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call(sample, "--curves", ".")[0] == 0 and is_picture("curves.png")
