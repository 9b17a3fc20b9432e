"""Damaged and hostile files: each is read, or refused by a ValueError of one line that names it.

Mutations are drawn from a seed: 300 of each kind of file in the quick suite, thousands by

    python -m pytest -m fuzz
"""
import json
import random
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_lists import write_wav
from test_tokenizers import golden

from data.lists import QuestionList
from encoders import Whisper, WhisperConfig, load_encoder
from integrate import AudioLLM
from lib.audio import check_audio, load_audio
from lib.tokenizers import load_tokenizer, train_tokenizer
from lib.huggingface import read_config
from model import LLM, LLMConfig

TINY = LLMConfig(40, 16, 16, 1, 2, 1, 8)
SECONDS = 5          # that one input may take
MEMORY = 1 << 30     # bytes that reading it may add
VALUES = (None, True, -1, 0, 1, 3, 10 ** 9, 10 ** 30, 0.5, 1e308, float("nan"), "", "x", "\ud800",
          "../x", [], {}, [[]], {"a": 1}, [0] * 9)
TENSORS = (torch.zeros(0), torch.zeros(()), torch.zeros(1).expand(10 ** 8), torch.ones(2, 2, 2),
           torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.complex64),
           torch.zeros(2, 2).to_sparse(), torch.tensor([float("nan")]))


def mutate_bytes(data, rng):
    """A copy with one to four random edits: bits, numbers, cuts, insertions and repetitions."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 64))
        piece = rng.choice((rng.randbytes(n), b"\0" * n, b"\xff" * n, b"\x7f" * n, data[i:i + n]))
        start, end = rng.choice(((i, i + n), (i, i), (i, i + n), (i, len(data))))
        data[start:end] = piece if end < len(data) or rng.random() < 0.5 else b""
        data = data or bytearray(b"\0")
    return bytes(data)


def copied(node):
    """Nested dicts and lists anew; what they hold is never changed, and stays the same."""
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return list(map(copied, node)) if isinstance(node, list) else node


def mutate_object(content, rng, values):
    """A copy of nested dicts and lists in which one to three values are replaced, lost or added."""
    content = copied(content)
    for _ in range(rng.randint(1, 3)):
        places, waiting = [], [content]
        while waiting:
            node = waiting.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        node, key = rng.choice(places)
        change = rng.random()
        if change < 0.2:
            del node[key]
        elif change < 0.3 and isinstance(node, dict):
            node[rng.choice(("x", "", "a.b", "__class__"))] = node[key]
        else:
            node[key] = copied(rng.choice(values))
        if not content:
            break
    return content


@contextmanager
def limited():
    """Too slow or too much memory is an exception, where the system can limit them."""
    if sys.platform != "linux":
        yield
        return
    import resource
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_DATA)

    def stop(*_):
        raise TimeoutError(f"over {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, old[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, old)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def fuzz(request, tmp_path):
    """fuzz(name, make, read): read files `name` that `make(path, rng)` writes, many times.
    Returns the share of them that could be read."""
    total = 5000 if "fuzz" in request.config.getoption("-m") else 300

    def run(name, make, read):
        path, count = tmp_path / name, 0
        for seed in range(total):
            make(path, random.Random(seed))
            try:
                with limited(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(path)
                count += 1
            except ValueError as error:
                assert path.stem in str(error) and "\n" not in str(error), (seed, str(error))
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        return count / total

    return run


def of_bytes(data):
    return lambda path, rng: path.write_bytes(mutate_bytes(data, rng))


def of_json(content):
    return lambda path, rng: path.write_text(json.dumps(mutate_object(content, rng, VALUES)))


def of_checkpoint(content):
    return lambda path, rng: torch.save(mutate_object(content, rng, VALUES + TENSORS), path)


def tiny_encoder():
    return Whisper(WhisperConfig(mels=8, width=64, layers=1, seconds=0.2)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a dog barks", "a siren, then a bell"] * 9, 280)


@pytest.mark.fuzz
def test_wavs(fuzz, tmp_path):
    write_wav(tmp_path / "good.wav", 0.01)

    def read(path):
        assert check_audio(path) > 0
        assert load_audio(path, 16000, seconds=1).isfinite().all()

    assert 0 < fuzz("bad.wav", of_bytes((tmp_path / "good.wav").read_bytes()), read) < 1


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl"])
def test_lists(fuzz, tmp_path, name):
    write_wav(tmp_path / "a.wav", 0.01)
    items = [{"audio_id": "a.wav", "instruction": "What?", "output": o, "choices": ["a", "b"],
              "task": "classification", "dataset": "x", "input": ""} for o in "ab"]
    text = json.dumps(items) if name == "bad.json" else "\n".join(map(json.dumps, items))
    for make in (of_bytes(text.encode()), of_json(items)):
        fuzz(name, make, lambda path: [*QuestionList(path), *QuestionList(path, skip_bad=True)])


@pytest.mark.fuzz
def test_configs_of_llms(fuzz, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
              "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": True,
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 99}}
    for make in (of_json(config), of_bytes(json.dumps(config).encode())):
        fuzz("config.json", make, lambda path: read_config(path.parent, LLMConfig))
    # a config that says something else than the weights
    llm = LLM(TINY)
    torch.save(llm.state_dict(), tmp_path / "pytorch_model.bin")

    def read(path):
        assert LLM.from_pretrained(path.parent)(torch.tensor([[1, 2]])).shape[:2] == (1, 2)

    assert 0 < fuzz("config.json", of_json(config | {"rope_scaling": None}), read)


@pytest.mark.fuzz
def test_tokenizers(fuzz, tokenizer):
    def read(path):
        own = load_tokenizer(path)
        own.decode(own.encode("a dog, \u4f60\u597d"))

    text = golden("tokenizers.npz", "smollm2")["json"].tobytes()
    for name, make in (("tokenizer.json", of_json(json.loads(text))),
                       ("tokenizer.json", of_bytes(text)),
                       ("tokenizer.model", of_bytes(tokenizer.serialized))):
        fuzz(name, make, read)


@pytest.mark.fuzz
def test_checkpoints_of_encoders(fuzz, tmp_path):
    encoder = tiny_encoder()
    state = {"model_state_dict": {f"encoder.{k}": t for k, t in encoder.state_dict().items()},
             "dims": {"n_mels": 8}}
    torch.save(state, tmp_path / "good.pt")

    def read(path):
        wave = torch.zeros(1, 1600)
        other = load_encoder("whisper", path)
        assert other(other.front_end(wave)).shape == encoder(encoder.front_end(wave)).shape

    assert fuzz("bad.pt", of_checkpoint(state), read)
    fuzz("bad.pt", of_bytes((tmp_path / "good.pt").read_bytes()),
         lambda path: load_encoder("whisper", path))


@pytest.mark.fuzz
def test_checkpoints_of_this_project(fuzz, tmp_path, tokenizer):
    llm = LLM(LLMConfig(tokenizer.vocab_size, 16, 16, 1, 2, 1, 8))
    model = AudioLLM(llm, tokenizer, {"whisper": tiny_encoder()}, "plits")
    model.save(tmp_path / "good.pt")
    saved = torch.load(tmp_path / "good.pt", weights_only=True)

    def read(path):
        other = AudioLLM.load(path)
        cache = other.hear(other.features([lambda rate: torch.zeros(rate // 10)]))
        other.ask(cache, ["What is it?"], max_new_tokens=2)

    assert fuzz("bad.pt", of_checkpoint(saved), read)
    fuzz("bad.pt", of_bytes((tmp_path / "good.pt").read_bytes()), AudioLLM.load)
