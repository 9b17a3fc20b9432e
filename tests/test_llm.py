"""Real LLMs: their folders, their logits, their tokenizers, against the public implementations."""
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from integrate import AudioLLM
from model import (LLM, BPETokenizer, KVCache, LLMConfig, load_tokenizer, place, read_config,
                   read_tokenizer, train_tokenizer)
from test_sample import item, write_wav

GOLDEN = Path(__file__).parent / "golden"
SYSTEM = "You don't guess: you listen."
TALK = "What's 1234567 + {x} in a cafe?\nAnswer me."
MODELS = ["llama2", "llama3", "qwen2", "qwen2_untied", "smollm2"]
FAMILIES = ["smollm2", "llama3", "qwen2"]


def golden(file, name):
    with np.load(GOLDEN / file, allow_pickle=False) as data:
        return {key.removeprefix(name + "/"): data[key] for key in data.files
                if key.startswith(name + "/")}


# ---------------------------------------------------------------------------------- folders

def write_safetensors(path, tensors):
    header, data = {}, b""
    names = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_folder(folder, name, shards=1, change=None, drop=(), **settings):
    """A Hugging Face folder with a golden model in it; returns its golden values too."""
    found = golden("llm.npz", name)
    config = json.loads(found["config"].tobytes()) | settings
    tensors = {key.removeprefix("weights/"): torch.from_numpy(value)
               for key, value in found.items() if key.startswith("weights/")}
    tensors |= change or {}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items()
                                                    if k not in drop}))
    files = {f"model-{i}.safetensors": dict(list(tensors.items())[i::shards])
             for i in range(shards)} if shards > 1 else {"model.safetensors": tensors}
    for file, part in files.items():
        write_safetensors(folder / file, part)
    if shards > 1:
        where = {key: file for file, part in files.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return found


def close(a, b, tolerance=1e-4):
    return (a - torch.as_tensor(b)).abs().max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_choices_equal_transformers(tmp_path, name):
    found = write_folder(tmp_path, name, shards=3 if name == "qwen2" else 1)
    llm = LLM.from_pretrained(tmp_path)
    rows = [torch.from_numpy(found[f"ids/{row}"]).long() for row in (0, 1)]
    want = [found[f"logits/{row}"] for row in (0, 1)]
    with torch.no_grad():
        for ids, logits in zip(rows, want):
            assert close(llm(ids[None])[0], logits)
            cache = KVCache(2, room=60)
            pieces = [llm(part[None], cache=cache)[0] for part in ids.split([5, 1, len(ids) - 6])]
            assert close(torch.cat(pieces), logits)
        lengths = torch.tensor([len(ids) for ids in rows])
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (2, 48)
        padded = llm(batch, positions=place(0, batch.shape[1], lengths)[0])
        assert all(close(padded[row, :len(want[row])], want[row]) for row in (0, 1))
    new = [found[f"new/{row}"].tolist() for row in (0, 1)]
    assert llm.generate([ids.tolist() for ids in rows], 24) == new
    assert [llm.generate(ids.tolist(), 24) for ids in rows] == new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for_frozen_in_no_way(tmp_path, dtype):
    found = write_folder(tmp_path, "llama3")
    llm = LLM.from_pretrained(tmp_path, dtype=dtype)
    before = (tmp_path / "model.safetensors").read_bytes()
    for name, p in llm.named_parameters():
        assert p.dtype == dtype and p.requires_grad and not p.is_meta
        assert torch.equal(p, torch.from_numpy(found["weights/" + name]).to(dtype))
    with torch.no_grad():
        for p in llm.parameters():
            p.zero_()  # also where a parameter is a map of the file, the file stays as it is
    assert (tmp_path / "model.safetensors").read_bytes() == before and not llm.training


def test_older_and_newer_ways_to_write_a_config(tmp_path):
    write_folder(tmp_path, "llama3")
    new = read_config(tmp_path)
    assert new.rope_scaling["factor"] == 8 and new.rope_theta == 1000 and new.head_dim == 16
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        rope[key] = rope.pop("rope_type", None) or rope.pop("type")
        write_folder(tmp_path, "llama3", rope_parameters=None, rope_scaling=rope, rope_theta=theta)
        assert read_config(tmp_path) == new
    write_folder(tmp_path, "llama2", drop=["num_key_value_heads", "head_dim", "rms_norm_eps",
                                           "rope_parameters", "tie_word_embeddings"])
    old = read_config(tmp_path)
    assert (old.num_key_value_heads, old.head_dim, old.rope_theta) == (4, 8, 10000)
    assert not old.tie_word_embeddings and old.rms_norm_eps == 1e-6


def test_what_old_files_hold_twice_is_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    found = write_folder(tmp_path, "llama3", change=extra | {"lm_head.weight": torch.ones(64, 32)})
    ids = torch.from_numpy(found["ids/1"]).long()
    assert close(LLM.from_pretrained(tmp_path)(ids[None])[0].detach(), found["logits/1"])


REFUSED = {
    "MistralForCausalLM": dict(architectures=["MistralForCausalLM"]),
    "'LlamaForCausalLM' or 'Qwen2ForCausalLM'": dict(architectures=["GPT2LMHeadModel"]),
    "hidden_act is 'gelu'": dict(hidden_act="gelu"),
    "attention_bias is True": dict(attention_bias=True),
    "mlp_bias is True": dict(mlp_bias=True),
    "use_sliding_window is True": dict(use_sliding_window=True),
    "quantization_config": dict(quantization_config={"bits": 4}),
    "rope_type is 'yarn'": dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
    "rope_type is 'linear'": dict(rope_scaling={"type": "linear"}, rope_parameters=None),
    "partial_rotary_factor is 0.5": dict(partial_rotary_factor=0.5),
    "'low_freq_factor'": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
    "'hidden_size'": dict(drop=["hidden_size"]),
    "hidden_size is '32'": dict(hidden_size="32", head_dim=16),
    "'architectures'": dict(drop=["architectures"]),
    "config.json": dict(rope_parameters=["llama3"]),
    "config.json: ": dict(num_attention_heads=0),
    "num_hidden_layers is -2": dict(num_hidden_layers=-2),
    "4 heads cannot share 3": dict(num_key_value_heads=3),
    "model.embed_tokens.weight is torch.float16 (64, 32)": dict(vocab_size=65),
    "model.layers.2.input_layernorm.weight": dict(num_hidden_layers=3),
    "lm_head.weight is missing": dict(tie_word_embeddings=False),
    "a.b does not belong": dict(change={"a.b": torch.ones(2)}),
    "model.norm.weight is torch.int8": dict(change={"model.norm.weight": torch.ones(32).char()}),
}


def refused(*words):
    """A context in which one ValueError of one line, with these words, has to come."""
    class Refused:
        def __enter__(self):
            self.raises = pytest.raises(ValueError)
            self.info = self.raises.__enter__()

        def __exit__(self, *about):
            caught = self.raises.__exit__(*about)
            assert "\n" not in str(self.info.value)
            assert all(str(word) in str(self.info.value) for word in words), self.info.value
            return caught
    return Refused()


@pytest.mark.parametrize("why", REFUSED)
def test_a_folder_that_we_would_misread_is_refused(tmp_path, why):
    write_folder(tmp_path, "llama3")
    LLM.from_pretrained(tmp_path)
    write_folder(tmp_path, "llama3", **REFUSED[why])
    with refused(tmp_path, why):
        LLM.from_pretrained(tmp_path)


def test_a_folder_with_something_missing_or_damaged_is_refused(tmp_path):
    write_folder(tmp_path, "qwen2", shards=2)
    for file in ("model-1.safetensors", "model.safetensors.index.json", "config.json"):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[:len(whole) // 2])
        with refused(tmp_path, file):
            LLM.from_pretrained(tmp_path)
        (tmp_path / file).unlink()
        with refused(tmp_path):
            LLM.from_pretrained(tmp_path)
        (tmp_path / file).write_bytes(whole)
    for text in ("[1, 2]", "\xff", "{" * 10 ** 5):
        (tmp_path / "config.json").write_text(text, "latin-1")
        with refused("config.json"):
            LLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------- tokenizers

def strings(n, seed=0):
    """Strings of assigned code points, of all the kinds that upset tokenizers."""
    rng = random.Random(seed)
    every = [chr(c) for c in range(0x110000)
             if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]

    def kind(*categories):
        return [c for c in every if unicodedata.category(c) in categories]

    latin, digits = [c for c in every if ord(c) < 0x250], kind("Nd", "Nl", "No")
    right_to_left = [c for c in every if unicodedata.bidirectional(c) in ("R", "AL", "AN")]
    emoji = [c for c in every if 0x1F300 <= ord(c) < 0x1FB00] + ["\u200d", "\ufe0f"] * 50
    pools = [every, latin, [chr(c) for c in range(32, 127)], kind("Mn", "Mc", "Me") + latin,
             kind("Cc", "Cf") + latin, [c for c in every if c.isspace()] * 20 + latin,
             digits + latin, emoji, right_to_left, right_to_left + digits,
             [chr(c) for c in range(0x4E00, 0x9FFF)] + latin]
    words = ("the a don't I'm we'LL they'RE IT'S 'S it'\u017f '\u017f def return (x) => {y} == "
             "!= ++ [0] _name; // # @ https://x.y/z?a=1&b=2 3.14159 1234567 007 \u00bd \u216b "
             "\u0661\u0662\u0663\u0664 cafe\u0301 na\u00efve \uff21\uff22 \ufb01 \u212a \u212b "
             "\u1100\u1161 \u0915\u093f\u0924\u093e\u092c listening zzz <|im_end|> </s>")
    words = words.split(" ")
    gaps = [" ", "  ", "\t", "\n", "\r\n", "\n\n", " \n ", " " * 7, "\u00a0", "\u3000", "\x1c",
            "\x1f", "\x85", "\u2028", "\x0b", ""]
    out = ["", *words, *(gap * k for gap in gaps for k in (1, 2, 50))]
    while len(out) < n:
        how = rng.randrange(4)
        if how == 0:  # words and what is between them
            out.append("".join(rng.choice(words) + rng.choice(gaps)
                               for _ in range(rng.randrange(1, 14))))
        elif how == 1:  # random bytes
            text = rng.randbytes(rng.randrange(1, 40)).decode("utf-8", "replace")
            out.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
        else:  # one kind of character, or all kinds mixed
            pool = rng.choice(pools)
            text = "".join(rng.choice(pool if how == 2 else rng.choice(pools))
                           for _ in range(rng.randrange(1, 40)))
            out.append(rng.choice(gaps) + text + rng.choice(gaps) * 3 + rng.choice(words))
    return out[:n]


def split(flat, lengths):
    return np.split(flat, np.cumsum(lengths.astype(int))[:-1])


def write_tokenizer(folder, name, change=lambda spec: None, **config):
    """A folder with a golden tokenizer in it, and a config.json if there are settings for it."""
    found = golden("tokenizers.npz", name)
    spec = json.loads(found["json"].tobytes())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_those_of_the_package_tokenizers(tmp_path, name):
    found = write_tokenizer(tmp_path, name)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    data = np.load(GOLDEN / "tokenizers.npz", allow_pickle=False)
    texts = [raw.tobytes().decode() for raw in split(data["strings"], data["lengths"])]
    special = {tokenizer.added[token] for token in ("<|im_end|>",) if token in tokenizer.added}
    for text, want in zip(texts, split(found["ids"], found["lengths"])):
        assert tokenizer.encode(text, special=True) == want.tolist(), ascii(text)
        plain = tokenizer.encode(text)
        assert plain == want.tolist() or special & set(want.tolist()) and not special & set(plain)
        kept = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        assert tokenizer.decode(plain) == kept
    assert len(texts) == 400


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_is_what_the_template_writes(tmp_path, name):
    found = write_tokenizer(tmp_path, name)
    tokenizer = load_tokenizer(tmp_path)
    before, after = tokenizer.chat(f"\n {TALK} ", SYSTEM)
    assert before + after == found["chat"].tolist()
    assert tokenizer.chat(TALK)[1] == after and len(tokenizer.chat(TALK)[0]) < len(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_never_becomes_a_special_token_unasked(tmp_path, name):
    write_tokenizer(tmp_path, name)
    tokenizer = load_tokenizer(tmp_path)
    everything = "".join(tokenizer.added) + "x".join(tokenizer.added)
    special = set(tokenizer.added.values())
    assert not special & set(tokenizer.encode(everything))
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    asked = tokenizer.encode(everything, special=True)
    assert [i for i in asked if i in special] == [*tokenizer.added.values()] * 2
    plain, hostile = tokenizer.chat("x", "x"), tokenizer.chat(everything, everything)
    count = lambda parts: sum(i in special for part in parts for i in part)  # noqa: E731
    assert count(plain) == count(hostile)
    left = "".join("<tool_call>" * (token == "<tool_call>") for token in tokenizer.added)
    assert tokenizer.decode([*special]) == left  # which is an added one, but not a special one


def test_a_special_token_in_the_vocabulary_is_not_found_there(tmp_path):
    def change(spec):
        spec["model"]["vocab"]["<|eot_id|>"] = tokenizer.added["<|eot_id|>"]
    write_tokenizer(tmp_path, "llama3")
    tokenizer = load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, "llama3", change)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.merge("<|eot_id|>")) > 1


def test_the_ends_come_from_the_config_and_survive_a_checkpoint(tmp_path):
    write_tokenizer(tmp_path, "llama3", bos_token_id=1020, eos_token_id=[1021, 1024],
                    vocab_size=1025)
    tokenizer = load_tokenizer(tmp_path)
    again = read_tokenizer(tokenizer.proto)
    for t in (tokenizer, again):
        assert (t.bos_id, t.eos_id, t.vocab_size) == (1020, 1024, 1025)
        assert t.encode("a siren") == tokenizer.encode("a siren")
    learnt = train_tokenizer([f"a siren and {n} drums." for n in range(100)], 320)
    assert read_tokenizer(learnt.proto).encode("a siren") == learnt.encode("a siren")
    (tmp_path / "tokenizer.model").write_bytes(learnt.proto)
    (tmp_path / "config.json").unlink()
    assert load_tokenizer(tmp_path).proto == learnt.proto


def test_llama_2_chats_in_plain_text():
    tokenizer = train_tokenizer([f"[INST] <<SYS>> a siren and {n} drums. [/INST]"
                                 for n in range(100)], 320)
    before, after = tokenizer.chat(" a siren? ", "a drum.")
    assert before == [tokenizer.bos_id]
    assert tokenizer.decode(after) == "[INST] <<SYS>>\na drum.\n<</SYS>>\n\na siren? [/INST]"
    assert tokenizer.decode(tokenizer.chat("</s>")[1]) == "[INST] </s> [/INST]"


def test_older_files_write_merges_as_strings(tmp_path):
    def change(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    write_tokenizer(tmp_path, "qwen2")
    want = load_tokenizer(tmp_path).encode("the listening of 12 drums")
    write_tokenizer(tmp_path, "qwen2", change)
    assert load_tokenizer(tmp_path).encode("the listening of 12 drums") == want


def test_long_pieces_take_no_long_time(tmp_path):
    write_tokenizer(tmp_path, "smollm2")
    tokenizer = load_tokenizer(tmp_path)
    text = " " * 20000 + "acgt" * 5000 + "!" * 20000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def put(*path):
    *path, key, value = path

    def change(spec):
        for name in path:
            spec = spec[name]
        spec[key] = value
    return change


CUT = ("pre_tokenizer", "pretokenizers", 0)
UNKNOWN = {
    "p{Lu}": put(*CUT, "pattern", "Regex", r"\p{Lu}+"),
    "Removed": put(*CUT, "behavior", "Removed"),
    "Metaspace": put("pre_tokenizer", {"type": "Metaspace"}),
    "no 'pre_tokenizer'": lambda spec: spec.pop("pre_tokenizer"),
    "prefix_space": put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True),
    "normalizer": put("normalizer", {"type": "Lowercase"}),
    "only BPE": put("model", "type", "Unigram"),
    "byte_fallback True": put("model", "byte_fallback", True),
    "dropout 0.1": put("model", "dropout", 0.1),
    "lacks 1 token": lambda spec: spec["model"]["merges"].append(["\u0120the", "zq"]),
    "unpack": lambda spec: spec["model"]["merges"].append(["a", "b", "c"]),
    "no 'model'": lambda spec: spec.pop("model"),
    "no usable": put("model", "vocab", [1, 2]),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_an_unknown_tokenizer_is_refused(tmp_path, why):
    write_tokenizer(tmp_path, "llama3")
    load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, "llama3", UNKNOWN[why])
    with refused("tokenizer.json", why):
        load_tokenizer(tmp_path)


def test_other_files_that_are_no_tokenizer(tmp_path):
    with refused("tokenizer.json"):
        load_tokenizer(tmp_path)
    for text in ("{", "[]", "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, "latin-1")
        with refused("tokenizer.json"):
            load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, "llama3", vocab_size=1000)
    with refused("tokenizer.json", "1025 tokens", "1000"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, "llama3", vocab_size=2000)  # Qwen's are padded like that
    load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_says_so(tmp_path):
    write_tokenizer(tmp_path, "llama3", lambda spec: spec["added_tokens"].clear())
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.encode("a", special=True)
    with refused("no chat"):
        tokenizer.chat("Who is there?")


# ------------------------------------------------------------------------------- the programs

# What a whole chat looks like: everything before a question, before its answer, before the next.
TURNS = {"smollm2": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
                     "<|im_end|>\n<|im_start|>user\n"),
         "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
                    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n")}


def write_llm(folder, name):
    """A whole Hugging Face folder of a small LLM with random weights, and its tokenizer."""
    folder.mkdir(exist_ok=True)
    if name == "llama2":
        tokenizer = train_tokenizer([f"[INST] a siren and {n} drums. [/INST]" for n in range(99)],
                                    320)
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        eos, size = tokenizer.eos_id, tokenizer.vocab_size
    else:
        write_tokenizer(folder, name)
        tokenizer = load_tokenizer(folder)
        eos, size = tokenizer.encode(TURNS[name][2], special=True)[0], tokenizer.vocab_size + 7
    config = dict(vocab_size=size, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(1)
    llm = LLM(LLMConfig(**config, head_dim=8))
    config |= dict(architectures=["LlamaForCausalLM"], eos_token_id=eos)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {k: v * 3 for k, v in
                                                     llm.state_dict().items()})
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TURNS)
def test_talking_to_a_bare_llm_is_one_chat_in_its_own_format(tmp_path, call, name):
    tokenizer = write_llm(tmp_path / "llm", name)
    llm = LLM.from_pretrained(tmp_path / "llm")
    start, answers, asks = TURNS[name]
    options = ["--llm", "llm", "--max-new-tokens", 9, "--device", "cpu"]
    talk, stdout = tokenizer.encode(start, special=True), ""
    for question in ("What is 1 + 1?", "<|im_end|> And then?"):
        talk += tokenizer.encode(question) + tokenizer.encode(answers, special=True)
        new = llm.generate(talk, 9, eos_id=tokenizer.eos_id)
        stdout += "> " + tokenizer.decode(new).strip() + "\n"
        talk += new + tokenizer.encode(asks, special=True)
    code, got, _ = call(sample, *options, stdin="What is 1 + 1?\n<|im_end|> And then?\n")
    assert code == 0 and got == stdout + "> "
    code, got, _ = call(sample, *options, "--prompt", "What is 1 + 1?")
    assert code == 0 and "> " + got == stdout[:len(got) + 2]


@pytest.mark.parametrize("name", [*TURNS, "llama2"])
def test_a_real_llm_is_trained_and_asked_in_the_same_chat(tmp_path, call, base, brief, name):
    tokenizer = write_llm(tmp_path / "llm", name)
    if name in TURNS:  # training: what is before the audio, and what is after it
        _, answers, asks = TURNS[name]
        ids, weights = train.conversation(tokenizer, [("What?\n", " a drum ")])
        want = tokenizer.encode(f"What?{answers}a drum{asks}", special=True)
        assert ids == want[:len(ids)] and ids[-1] == tokenizer.eos_id
        graded = [i for i, weight in zip(ids, weights) if weight]
        assert graded == tokenizer.encode("a drum") + [tokenizer.eos_id]
    write_wav("a.wav", 1.0)
    Path("q.json").write_text(json.dumps([item("a.wav")] * 2))
    steps = ["--steps1", 1, "--steps2", 0, "--steps3", 60, "--lr", 0.01, "--batch", 2]
    code, _, stderr = call(train, "--llm", "llm", "--base", base, "--device", "cpu", "--data",
                           "q.json", *steps)
    assert code == 0, stderr
    shutil.rmtree(tmp_path / "llm")  # a checkpoint has its LLM
    asked = ["--audio", "a.wav", "--prompt", "What is it?", "--max-new-tokens", 9]
    assert call(sample, *asked)[:2] == (0, "a dog\n")  # with the end of its turn
    model = AudioLLM.load("out/lal/model.pt")
    assert type(model.tokenizer) is type(tokenizer) and model.llm.config.vocab_size > 300
    assert call(sample, *asked[2:])[0] == 0  # the LLM alone, of the checkpoint


@pytest.mark.parametrize("program", [sample, train])
def test_a_bad_folder_is_one_line(tmp_path, refuses, base, program):
    options = ["--base", base] if program is train else []
    refuses(["none", "config.json"], program, "--llm", "none", *options)
    write_llm(tmp_path / "llm", "llama3")
    (tmp_path / "llm" / "tokenizer.json").unlink()
    refuses(["llm", "tokenizer.json"], program, "--llm", "llm", *options)
    if program is sample:
        for more in ("--audio", "--ckpt"):
            refuses(["--llm", more], sample, "--llm", "llm", more, "x")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_streams_in_whole_characters(tmp_path, name, capsys):
    write_tokenizer(tmp_path, name)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("\n na\u00efve \U0001f3a7 \u732b\u5a18 \u0915\u093f! \n",
                 "\ufffd a \ufffd", "", " "):
        printed, ids = [], tokenizer.encode(text)

        def generate(on_token):
            for i in ids:
                on_token([i])
                printed.append(capsys.readouterr().out)
            on_token([None])
            return ids

        assert sample.say(tokenizer, generate) == ids
        printed.append(capsys.readouterr().out)
        assert "".join(printed) == text.strip() + "\n"
        assert "\ufffd" in text or sum(map(bool, printed)) > 5 or len(ids) < 2
        assert not any("\ufffd" in part for part in printed[:-1]) or "\ufffd" in text


# ------------------------------------------------------------- slow: real files, real memory

def llm_folder():
    return os.environ.get("LLM_FOLDER") or pytest.skip("set LLM_FOLDER to a real LLM's folder")


def run(script, *words):
    """What a script, in a process of its own, prints: numbers."""
    told = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True,
                          text=True, cwd=Path(__file__).parent.parent, check=True).stdout
    return [float(word) for word in told.split()]


@pytest.mark.slow
def test_ids_of_a_real_tokenizer_equal_those_of_the_package():
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    folder = llm_folder()
    ours = load_tokenizer(folder)
    theirs = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    theirs.encode_special_tokens = True
    lost = {chr(c) for c in range(128) if not ours.encode(chr(c))}  # SmolLM2 has not every byte
    for text in strings(12000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert ours.normalize or lost & set(text) or ours.decode(ids) == text


LOAD = """
import resource, sys, torch
from model import LLM
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
llm = LLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
total = sum(p.sum().item() for p in llm.parameters())
size = sum(p.numel() * p.element_size() for p in llm.parameters())
print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_peaks_at_1_2_times_the_size_of_the_weights(tmp_path, dtype):
    sizes = dict(hidden_size=1024, intermediate_size=4096, vocab_size=8192, num_hidden_layers=8,
                 num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    write_folder(tmp_path, "llama3", **sizes)
    with torch.device("meta"):
        wanted = LLM(read_config(tmp_path)).state_dict()
    big = {name: torch.full(t.shape, 0.5, dtype=torch.float16) for name, t in wanted.items()}
    write_folder(tmp_path, "llama3", change=big, **sizes)
    assert run(LOAD, tmp_path, dtype)[0] < 1.2


# Ours, transformers', and the products of a token's vector with every matrix, in turns: tokens a
# second, the best of five, when they write 128 new ones, and when the first two read 512.
SPEED = """
import sys, time, torch, transformers
from model import LLM, linear
ours = LLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
theirs = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2]).eval()
ids = torch.randint(1000, (1, 512), generator=torch.Generator().manual_seed(0))
pairs = [(torch.ones(1, 1, w.shape[1], dtype=w.dtype), w) for w in ours.parameters() if w.dim() > 1]

def their_generate(ids, new):
    theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    max_new_tokens=new, min_new_tokens=new)

@torch.inference_mode()
def products(ids, new):
    for _ in range(new):
        for x, w in pairs:
            linear(x, w)

for generates, prompt, new in (((ours.generate, their_generate, products), ids[:, :16], 128),
                               ((ours.generate, their_generate), ids, 1)):
    seconds = [[] for _ in generates]
    for _ in range(5):
        for generate, times in zip(generates, seconds):
            start = time.perf_counter()
            generate(prompt, new)
            times.append(time.perf_counter() - start)
    print(*((128 if new > 1 else 512) / min(times) for times in seconds))
"""

# Memory that loading, reading 512 tokens and writing 128 takes beyond that of the imports.
MEMORY = """
import resource, sys, torch, transformers
from model import LLM
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
kind = LLM if sys.argv[3] == "ours" else transformers.AutoModelForCausalLM
words = {} if kind is LLM else dict(do_sample=False, pad_token_id=0, min_new_tokens=128)
ids, before = torch.arange(1, 513)[None], peak()
kind.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).generate(
    ids, max_new_tokens=128, **words)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype, times", [("float32", 1.1), ("bfloat16", 1.25)])
def test_speed_and_memory_beside_transformers(dtype, times, capsys):
    pytest.importorskip("transformers", reason="pip install transformers")
    folder = llm_folder()
    new, their_new, products, read, their_read = run(SPEED, folder, dtype)
    memory, their_memory = (run(MEMORY, folder, dtype, whose)[0] for whose in ("ours", "theirs"))
    with capsys.disabled():
        print(f"\n{dtype}, tokens a second: new {new:.1f}, transformers {their_new:.1f}, bare "
              f"products {products:.1f}; read {read:.0f}, transformers {their_read:.0f}; "
              f"peak {memory:.0f} MiB, transformers {their_memory:.0f} MiB")
    assert new > times * their_new and read > their_read and memory < their_memory
