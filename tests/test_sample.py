"""Asking: one question, many questions, a list; its scores; what an answer attended to."""
import json
import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_lists import BAD_SOUNDS, item, sounds, write_wav  # noqa: F401 - sounds is a fixture

import sample
from data.pretrain import load_base
from encoders import load_audio
from integrate import AudioLLM, IntegrationConfig, pool, prefill
from lib.attention import (attention_by_source, attention_on_grid, attention_weights,
                           word_groups)
from model import KVCache
from sample import read_prompts, score_choices

ROOT = Path(__file__).parents[1]


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


def test_an_answer_does_not_wait_for_torchs_compiler(checkpoint, tmp_path):
    """Importing it would take as long as the whole answer."""
    write_wav(tmp_path / "a.wav", 1.0)
    program = ("import sys, sample; sample.main(sample.Options(audio='a.wav', prompt='What?', "
               f"ckpt={str(checkpoint)!r}, device='cpu')); print('torch._dynamo' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.stdout.splitlines()[-1] == "False", result.stderr


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
    calls = []
    hear = AudioLLM.hear
    monkeypatch.setattr(AudioLLM, "hear", lambda self, f: calls.append(f) or hear(self, f))
    questions = ["What is it?", "Who is speaking?", "Is it loud?"]
    options = ["--audio", "a.wav", "--max-new-tokens", 4]
    stdout, _ = ask(call, checkpoint, *options, stdin="\n".join(questions) + "\n")  # then EOF
    assert len(calls) == 1
    alone = [ask(call, checkpoint, *options, "--prompt", q)[0] for q in questions]
    assert stdout == "".join("> " + answer for answer in alone) + "> "
    empty_line = ask(call, checkpoint, *options, stdin=f"{questions[0]}\n \n{questions[1]}\n")[0]
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
    assert code == 0 and str(Path("out/pal/model.pt")) in stderr
    os.utime(tmp_path / "out" / "lal" / "model.pt", (1e9, 1e9))
    stderr = call(sample, "--audio", "a.wav", "--prompt", "x", "--max-new-tokens", 1)[2]
    assert str(Path("out/lal/model.pt")) in stderr


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
    assert code == 0 and f"{Path('assets/lal.pt')}: mode lal" in stderr


def test_what_is_cropped_or_padded_is_said(call, checkpoint, tmp_path):
    options = ["--prompt", "x", "--max-new-tokens", 3]
    write_wav("long.wav", 9.5)
    write_wav("short.wav", 0.02)
    write_wav("right.wav", 4.0)
    stdout, stderr = ask(call, checkpoint, "--audio", "long.wav", *options)
    lines = [line for line in stderr.splitlines() if "cropped" in line and "9.5 s" in line]
    assert [line.split()[0] for line in lines] == ["whisper", "sslam", "clap"]
    assert "silence" not in stderr
    stderr = ask(call, checkpoint, "--audio", "short.wav", *options)[1]
    lines = [line for line in stderr.splitlines() if "is added" in line and "0.02 s" in line]
    assert [line.split()[0] for line in lines] == ["whisper", "sslam", "clap"]
    assert ["silence" in line for line in lines] == [True, True, False] and "cropped" not in stderr
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


def random_features(model, *seconds):
    """Of clips of such lengths, and nothing that an encoder would ever say."""
    g = torch.Generator().manual_seed(0)
    return [{kind: pool(torch.randn(e.steps(s) * e.grid[1], e.width, generator=g).double(),
                        model.pool_sizes[kind])
             for kind, e in model.encoders.items()} for s in seconds]


@pytest.mark.parametrize("batch", [2, 100])
def test_the_likeliest_choice_is_that_of_each_choice_alone(checkpoint, batch):
    model = AudioLLM.load(checkpoint).double()
    for p in model.llm.parameters():  # who is sure of nothing chooses the shortest, whatever sounds
        p.data *= 3
    features = random_features(model, 1, 4)
    rng, words = np.random.default_rng(0), "a dog an alarm bird no yes siren ba so man".split()
    many = [" ".join(rng.choice(words, 1 + n % 4)) for n in range(40)]  # short and long ones
    choices = [many, (), many, many[9:]]
    questions = ["what is it", "or", "what is it", "who speaks in the clip"]
    clip_index, tokenizer = [1, 0, 0, 1], model.tokenizer
    want = []
    for row, question, own in zip(clip_index, questions, choices):
        loss, heard = [], model.hear([features[row]])
        for choice in own:
            prompt, reply = tokenizer.chat(question)[1], tokenizer.reply(choice)
            ids = torch.tensor([prompt + reply])
            with torch.no_grad():
                cache = heard.fork([0], ids.shape[1])
                logits = model.llm(ids, cache=cache)[0, len(prompt) - 1:-1]
            p = logits.log_softmax(dim=-1).gather(1, ids[0, len(prompt):, None])
            loss.append(p.sum().item())
        want.append(loss)
    assert np.argmax(want[0]) != np.argmax(want[2])  # or it would not matter which clip is asked
    cache = model.hear(features)
    prompts = [tokenizer.chat(question)[1] for question in questions]
    asked = read_prompts(model, cache, prompts, clip_index)
    got = score_choices(model, asked, prompts, choices, batch)
    assert [len(own) for own in got] == [40, 0, 40, 31]
    assert all(np.allclose(*pair, atol=1e-3) for pair in zip(got, want))


def test_questions_without_choices_get_the_labels_of_their_data_set():
    items = [{"task": task, "domain": domain, "output": output, "choices": choices}
             for task, domain, output, choices in (
                 ("classification", "a", "dog, wet", []), ("classification", "a", "cat", []),
                 ("tagging", "b", "rain, wind", []), ("tagging", "b", "rain", []),
                 ("classification", "b", "owl", ["owl", "elk"]), ("reasoning", "b", "two", []))]
    sample.add_label_choices(items)
    assert [item["choices"] for item in items] == [
        ["cat", "dog, wet"], ["cat", "dog, wet"], ["rain", "wind"], ["rain", "wind"],
        ["owl", "elk"], []]


def test_a_list_is_answered_written_and_scored(call, checkpoint, sounds, refuses):
    raw = [item(task="classification"),
           item("more/ä b.wav", output="a cat", task="classification"),
           item(output="Two.", task="reasoning", choices=["One.", "Two."]),
           item(output="It barks.", task="captioning"), item(output="so ne", task="transcription")]
    (sounds / "q.json").write_text(json.dumps(raw))
    options = ["--data", "q.json", "--out", "new/p.json", "--max-new-tokens", 3, "--batch", 2]
    stdout, _ = ask(call, checkpoint, *options, "--controls")
    rows = json.loads((sounds / "new" / "p.json").read_text(encoding="utf-8"))
    assert [(t["prompt"], t["ref"], t["audio_id"], t["mode"], t["task"]) for t in rows] == [
        ("What is it?", r["output"], r["audio_id"], "pal", r["task"]) for r in raw]
    model = AudioLLM.load(checkpoint)
    for t in rows:
        wave = partial(load_audio, sounds / t["audio_id"])
        cache = model.hear(model.features([wave]))
        assert [t["pred"]] == model.ask(cache, [t["prompt"]], max_new_tokens=3)
    for words in ("silence", "wrong clip", "CIDEr-D", "word error rate", "macro", "by likelihood"):
        assert words in stdout
    written = (sounds / "new" / "p.json").read_bytes()
    (sounds / "more" / "ä b.wav").write_bytes(b"no sound")
    refuses(["b.wav"], sample, "--ckpt", checkpoint, *options)
    assert (sounds / "new" / "p.json").read_bytes() == written and len([*sounds.glob("new/*")]) == 1


def test_a_list_goes_on_without_clips_that_cannot_be_heard(call, checkpoint, sounds, refuses):
    """Whether their headers show it or only their samples."""
    names = ["a.wav", *BAD_SOUNDS, "more/ä b.wav", "a.wav"]
    for name in BAD_SOUNDS:
        BAD_SOUNDS[name][0](sounds / name)
    raw = [item(name, task="classification") for name in names]
    (sounds / "q.jsonl").write_text("\n".join(map(json.dumps, raw)))
    options = ["--data", "q.jsonl", "--out", "p.json", "--max-new-tokens", 2, "--controls"]
    stderr = ask(call, checkpoint, *options, "--skip-bad")[1]
    assert all(f"{name}: " in stderr for name in BAD_SOUNDS)
    rows = json.loads((sounds / "p.json").read_text(encoding="utf-8"))
    assert [row["audio_id"] for row in rows] == ["a.wav", "more/ä b.wav", "a.wav"]
    assert refuses(["items cannot be used"], sample, "--ckpt", checkpoint, *options)


@pytest.mark.parametrize("name", ["q.json", "a.wav", "model.pt", "link.json", "a folder"])
def test_the_answers_overwrite_nothing_that_is_read(name, refuses, checkpoint, sounds):
    (sounds / "q.json").write_text(json.dumps([item()]))
    (sounds / "model.pt").write_bytes(checkpoint.read_bytes())
    (sounds / "a folder").mkdir()
    try:
        (sounds / "link.json").symlink_to("q.json")
    except OSError:  # not everybody may make one on Windows
        os.link(sounds / "q.json", sounds / "link.json")
    before = {path: path.read_bytes() for path in sounds.iterdir() if path.is_file()}
    refuses([f"--out {name}"], sample, "--ckpt", "model.pt", "--data", "q.json", "--out", name,
            "--max-new-tokens", 1)
    assert {path: path.read_bytes() for path in sounds.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_the_answers_overwrite_no_file_of_a_folder_that_is_read(kind, refuses, sounds, monkeypatch):
    folder = sounds / "weights"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (sounds / "q.json").write_text(json.dumps([item()]))
    part = SimpleNamespace(checkpoint_path=str(folder))
    whole = SimpleNamespace(checkpoint_path=None)
    model = SimpleNamespace(seconds=4.0, llm=part if kind == "llm" else whole,
                            encoders={"whisper": part if kind == "whisper" else whole})
    options = sample.Options(data="q.json", ckpt="model.pt", out="weights/tokenizer.json")
    with pytest.raises(ValueError, match="read here; name a new file"):
        sample.score_list(model, options)


@pytest.mark.skipif(sys.platform == "win32", reason="other rules for names")
def test_where_nothing_can_be_written_is_said_before_anything_is_asked(
        refuses, checkpoint, sounds, monkeypatch):
    (sounds / "q.json").write_text(json.dumps([item()]))
    monkeypatch.setattr(sample, "answer_all", None)
    for out in ("q.json/answers.json", "x" * 300 + ".json"):
        refuses([f"{out}: "], sample, "--ckpt", checkpoint, "--data", "q.json", "--out", out)
    assert not [path for path in sounds.iterdir() if path.suffix == ".tmp"]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such devices here")
def test_devices_are_refused(refuses, checkpoint, sounds):
    (sounds / "q.json").write_text(json.dumps([item()]))
    options = ["--ckpt", checkpoint, "--max-new-tokens", 1]
    refuses(["/dev/zero"], sample, *options, "--audio", "/dev/zero", "--prompt", "x")
    refuses(["/dev/zero"], sample, *options, "--data", "/dev/zero")
    refuses(["/dev/zero"], sample, "--ckpt", "/dev/zero", "--audio", "a.wav", "--prompt", "x")
    refuses(["--out /dev/zero"], sample, *options, "--data", "q.json", "--out", "/dev/zero")


def test_a_closed_stdin_asks_nothing(call, checkpoint, sounds, monkeypatch):
    def closed(prompt):
        raise RuntimeError("input(): lost sys.stdin")  # what Python's own does

    monkeypatch.setattr(sample, "input", closed, raising=False)
    assert ask(call, checkpoint, "--audio", "a.wav")[0] == ""


def test_absurd_prompts_and_temperatures_are_one_line(refuses, checkpoint, sounds, call):
    options = ["--audio", "a.wav", "--ckpt", checkpoint, "--max-new-tokens", 2]
    refuses(["4,000"], sample, *options, "--prompt", "x" * 100_000)
    refuses(["4,000"], sample, *options, stdin="what?\n" + "x" * 100_000)
    for temperature in ("1e-40", "9e-7"):
        refuses(["--temperature"], sample, *options, "--prompt", "x", "--temperature", temperature)
    cold, greedy = (ask(call, checkpoint, *options[:2], "--prompt", "x", "--max-new-tokens", 5,
                        "--temperature", temperature)[0] for temperature in (1e-6, 0))
    assert cold == greedy


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


# ------------------------------------------------------------------------------ attention

@pytest.fixture(params=["plits", "lal", "pal"])
def hearer(base, request):
    """A model in float64 that has learnt next to nothing, and its features of a clip."""
    torch.manual_seed(0)
    model = load_base(base, request.param, IntegrationConfig()).double().eval()
    return model, *random_features(model, 1.3)


@torch.no_grad()
def test_the_weights_are_those_that_the_model_used(hearer):
    """They sum to one over what a query sees, and times v they are what the layer made of them."""
    model, features = hearer
    c = model.llm.config
    assert c.num_key_value_heads < c.num_attention_heads  # so that sharing of keys is tested
    outputs = []
    for block in model.llm.model.layers:
        block.self_attn.register_forward_hook(
            lambda module, inputs, output: outputs.append((module, output)))
    cache = KVCache(c.num_hidden_layers)
    segments = model.segments([features])
    read = [lambda: prefill(model.llm, segments, cache, model.write),
            lambda: model.llm(torch.tensor([[5, 6, 7]]), cache=cache),
            lambda: model.llm(torch.tensor([[8]]), cache=cache)]
    for step in read:
        outputs.clear()
        layers = attention_weights(model.llm, step)
        assert len(layers) == len(outputs) and len(layers) % c.num_hidden_layers == 0 < len(layers)
        for i, ((weights, positions), (module, out)) in enumerate(zip(layers, outputs)):
            layer, S = i % c.num_hidden_layers, weights.shape[-1]  # of a group after the other
            v = cache.values[layer][:, :S]
            v = v.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=2)
            y = torch.einsum("bhts,bshd->bthd", weights, v)
            assert (module.o_proj(y.flatten(2)) - out).abs().max() < 1e-12
            queries = positions[0, -weights.shape[2]:, None]
            visible = positions <= queries  # (T, S)
            assert ((weights > 0) == visible).all() and visible.any(1).all()
            assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert S == sum(segment.tokens.shape[1] for segment in segments) + 4


def test_a_word_is_said_by_the_position_that_chose_it(hearer):
    """The attention reported for an answer is what the model used as it made it, token by token."""
    model, features = hearer
    question, layers = "What is it?", model.llm.config.num_hidden_layers
    answer, cache, prompt = [], model.hear([features]), model.tokenizer.chat(question)[1]
    steps = attention_weights(model.llm, lambda: answer.extend(
        model.llm.generate(prompt, 5, cache=cache)))
    sources = attention_by_source(model, features, question, answer)
    sizes = [segment.tokens.shape[1] for segment in model.segments([features])]
    assert [weights.shape[-1] for weights in sources.values()][:-1] == sizes
    assert list(sources) == ["start", "whisper", "lfst", "text"]
    reported = torch.cat(list(sources.values()), dim=-1)  # (layers, tokens, n)
    assert (reported.sum(-1) - 1).abs().max() < 1e-12
    for i, (weights, positions) in enumerate(steps):
        row = weights[0, :, -1].mean(0)[positions[0].argsort()]
        assert (reported[i % layers, i // layers, :len(row)] - row).abs().max() < 1e-12
        assert reported[i % layers, i // layers, len(row):].eq(0).all()


@pytest.mark.parametrize("seconds", [4.0, 1.3, 0.01])
def test_a_tokens_weight_lands_where_the_token_was_made(base, seconds):
    """attention_on_grid shares a pooled token's weight among just those cells that it averages."""
    model = load_base(base, "lal", IntegrationConfig("mlp"))
    for kind, encoder in model.encoders.items():
        steps, bands = encoder.steps(seconds), encoder.grid[1]
        n = steps * bands
        # token i alone holds a one at i: the pooled ones show where each of theirs came from
        pooled = pool(torch.eye(n), model.pool_sizes[kind])
        weights = torch.arange(1.0, len(pooled) + 1)
        grid, step = attention_on_grid(model, kind, torch.diag(weights), seconds)
        assert abs(step * encoder.grid[0] - encoder.seconds) < 1e-9
        assert grid.shape == (len(pooled), steps, bands)
        assert torch.equal(grid.flatten(1) > 0, pooled > 0)
        assert torch.allclose(grid.sum((1, 2)), weights)


@pytest.mark.parametrize("seconds", [4.0, 1.3])
def test_a_weight_on_lfst_lands_at_its_place_in_the_layout(checkpoint, seconds):
    model = AudioLLM.load(checkpoint)
    features, = model.features([lambda rate: torch.randn(int(seconds * rate))])
    tokens = dict(zip(model.connectors, model.segments([features])[1:]))["lfst"].tokens
    (steps, bands), n = model.connectors["lfst"].grid, tokens.shape[1]
    grid, step = attention_on_grid(model, "lfst", torch.eye(n), seconds)
    assert grid.shape == (n, n // (bands + 1), bands) and step * steps == 4.0
    for token, place in enumerate(grid):
        t, band = divmod(token, bands + 1)
        assert place.sum() == (band < bands)  # a newline is nowhere
        assert band == bands or place[t, band] == 1


@pytest.mark.parametrize("text", ["a siren", "An alarm, then a bell.", "日本語 🎵🎵 ok", " \n a"])
def test_words_are_made_of_all_the_tokens(checkpoint, text):
    tokenizer = AudioLLM.load(checkpoint).tokenizer
    ids = tokenizer.encode(" " + text)
    words = word_groups(tokenizer, ids)
    assert [i for _, index in words for i in index] == list(range(len(ids)))
    assert [word for word, _ in words if word] == text.split()
    with pytest.raises(ValueError, match="empty"):
        word_groups(tokenizer, [])


def test_a_file_for_what_a_checkpoint_holds_itself_is_refused(refuses, checkpoint, sounds):
    refuses(["names no file of whisper", "leave out"], sample, "--ckpt", checkpoint, "--audio",
            "a.wav", "--prompt", "x", "--encoders", "whisper=none.pt")


def test_headings_and_short_names_stand_apart(call, checkpoint, sounds):
    (sounds / "q.json").write_text(json.dumps([item(dataset="a")]))
    text = ask(call, checkpoint, "--data", "q.json", "--max-new-tokens", 2)[0]
    assert text.splitlines()[0].split()[:3] == ["dataset", "task", "questions"]
