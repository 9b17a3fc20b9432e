"""Real LLMs: their folders, their logits and their chats, against the public implementations."""
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lists import item, write_wav
from test_tokenizers import FAMILIES, golden, llm_folder, refused, write_tokenizer

import sample
import train
from data.lists import tokenize_conversation
from integrate import AudioLLM
from lib.tokenizers import load_tokenizer, train_tokenizer
from lib.huggingface import read_config
from model import LLM, KVCache, LLMConfig, make_positions

MODELS = ["llama2", "llama3", "qwen2", "qwen2_untied", "smollm2"]


# ----------------------------------------------------------------------------------------- folders

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
    expected = golden("llm.npz", name)
    config = json.loads(expected["config"].tobytes()) | settings
    tensors = {key.removeprefix("weights/"): torch.from_numpy(value)
               for key, value in expected.items() if key.startswith("weights/")}
    tensors |= change or {}
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return expected
    weight_map = {}
    for i in range(shards):
        file, shard = f"model-{i}.safetensors", dict(list(tensors.items())[i::shards])
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return expected


def close(a, b, tolerance=1e-4):
    return (a - torch.as_tensor(b)).abs().max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_choices_equal_transformers(tmp_path, name):
    expected = write_folder(tmp_path, name, shards=3 if name == "qwen2" else 1)
    llm = LLM.from_pretrained(tmp_path)
    rows = [torch.from_numpy(expected[f"ids/{row}"]).long() for row in (0, 1)]
    logits = [expected[f"logits/{row}"] for row in (0, 1)]
    with torch.no_grad():
        for ids, row_logits in zip(rows, logits):
            assert close(llm(ids[None])[0], row_logits)
            cache = KVCache(2, capacity=60)
            pieces = [llm(part[None], cache=cache)[0] for part in ids.split([5, 1, len(ids) - 6])]
            assert close(torch.cat(pieces), row_logits)
        lengths = torch.tensor([len(ids) for ids in rows])
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (2, 48)
        padded = llm(batch, positions=make_positions(0, batch.shape[1], lengths)[0])
        assert all(close(padded[row, :len(logits[row])], logits[row]) for row in (0, 1))
    new = [expected[f"new/{row}"].tolist() for row in (0, 1)]
    assert llm.generate([ids.tolist() for ids in rows], 24) == new
    assert [llm.generate(ids.tolist(), 24) for ids in rows] == new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for_frozen_in_no_way(tmp_path, dtype):
    expected = write_folder(tmp_path, "llama3")
    llm = LLM.from_pretrained(tmp_path, dtype=dtype)
    before = (tmp_path / "model.safetensors").read_bytes()
    for name, p in llm.named_parameters():
        assert p.dtype == dtype and p.requires_grad and not p.is_meta
        assert torch.equal(p, torch.from_numpy(expected["weights/" + name]).to(dtype))
    with torch.no_grad():
        for p in llm.parameters():
            p.zero_()  # also where a parameter is a map of the file, the file stays as it is
    assert (tmp_path / "model.safetensors").read_bytes() == before and not llm.training


def test_older_and_newer_ways_to_write_a_config(tmp_path):
    write_folder(tmp_path, "llama3")
    new = read_config(tmp_path, LLMConfig)
    assert new.rope_scaling["factor"] == 8 and new.rope_theta == 1000 and new.head_dim == 16
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    write_folder(tmp_path, "llama3", rope_scaling=rope | {"type": "llama3"}, rope_theta=1000)
    assert read_config(tmp_path, LLMConfig) == new  # the same in both, as some programs write it
    theta = rope.pop("rope_theta")
    for key in ("rope_type", "type"):
        rope[key] = rope.pop("rope_type", None) or rope.pop("type")
        write_folder(tmp_path, "llama3", rope_parameters=None, rope_scaling=rope, rope_theta=theta)
        assert read_config(tmp_path, LLMConfig) == new
    write_folder(tmp_path, "llama2", drop=["num_key_value_heads", "head_dim", "rms_norm_eps",
                                           "rope_parameters", "tie_word_embeddings"])
    old = read_config(tmp_path, LLMConfig)
    assert (old.num_key_value_heads, old.head_dim, old.rope_theta) == (4, 8, 10000)
    assert not old.tie_word_embeddings and old.rms_norm_eps == 1e-6


def test_what_old_files_hold_twice_is_left_out(tmp_path):
    expected = write_folder(tmp_path, "llama3")
    embedding = torch.from_numpy(expected["weights/model.embed_tokens.weight"])
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for head in (embedding, embedding.float()):
        write_folder(tmp_path, "llama3", change=extra | {"lm_head.weight": head})
        ids = torch.from_numpy(expected["ids/1"]).long()
        llm = LLM.from_pretrained(tmp_path)
        assert llm.config.tie_word_embeddings
        assert close(llm(ids[None])[0].detach(), expected["logits/1"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "state_dict.module.", ""])
def test_what_training_put_around_a_model_is_left_out(tmp_path, prefix):
    expected = write_folder(tmp_path, "qwen2_untied")
    tensors = {f"{prefix}{key.removeprefix('weights/')}": torch.from_numpy(value)
               for key, value in expected.items() if key.startswith("weights/")}
    tensors["optimizer_state_dict.state.0.exp_avg"] = torch.ones(2)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    ids = torch.from_numpy(expected["ids/1"]).long()
    logits = LLM.from_pretrained(tmp_path)(ids[None])[0].detach()
    assert close(logits, expected["logits/1"])


def test_a_tied_model_with_a_head_of_its_own_uses_it(tmp_path):
    head = {"lm_head.weight": torch.randn(64, 32, generator=torch.Generator().manual_seed(0))}
    ids = torch.arange(1, 20)[None]
    write_folder(tmp_path, "llama3", change=head, tie_word_embeddings=False)
    expected = LLM.from_pretrained(tmp_path)(ids)
    write_folder(tmp_path, "llama3", change=head)
    assert torch.equal(LLM.from_pretrained(tmp_path)(ids), expected)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
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
    "rope_type 'llama3', and it says 'yarn'": dict(rope_scaling={"type": "yarn", "factor": 4.0}),
    "factor 8.0, and it says 4.0": dict(rope_scaling=LLAMA3),
    "rope_theta 1000.0, and it says 10000.0": dict(rope_scaling=dict(LLAMA3, rope_theta=10000.0)),
    "rope_theta 1000.0, and it says 77.0": dict(rope_theta=77.0),
    "full_attention": dict(rope_parameters={"full_attention": LLAMA3}),
    "rope_theta is nan": dict(rope_parameters={"rope_theta": float("nan")}),
    "rope_theta is 0": dict(rope_parameters={"rope_theta": 0}),
    "factor is 0.0": dict(rope_parameters=dict(LLAMA3, factor=0.0)),
    "rms_norm_eps is -1": dict(rms_norm_eps=-1),
    "rms_norm_eps is 'x'": dict(rms_norm_eps="x"),
    "partial_rotary_factor is 0.5": dict(partial_rotary_factor=0.5),
    "'low_freq_factor'": dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
    "'hidden_size'": dict(drop=["hidden_size"]),
    "hidden_size is '32'": dict(hidden_size="32", head_dim=16),
    "'architectures'": dict(drop=["architectures"]),
    "architectures is 'None'": dict(architectures=None),
    "architectures is 'None', ": dict(architectures=[None]),
    "vocab_size is '64'": dict(vocab_size="64"),
    "vocab_size is None": dict(vocab_size=None),
    "vocab_size is 1000000000000": dict(vocab_size=10 ** 12),
    "num_hidden_layers is 1000000000000000000000000000000": dict(num_hidden_layers=10 ** 30),
    "far more than its 20 tensors": dict(num_hidden_layers=10 ** 7),
    "overflow": dict(hidden_size=2 ** 31 - 2, intermediate_size=2 ** 31 - 2),
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


@pytest.mark.parametrize("reason", REFUSED)
def test_a_folder_that_we_would_misread_is_refused(tmp_path, reason):
    write_folder(tmp_path, "llama3")
    LLM.from_pretrained(tmp_path)
    write_folder(tmp_path, "llama3", **REFUSED[reason])
    with refused(tmp_path, reason):
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


LFS_POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("file", ["model.safetensors", "model-1.safetensors", "config.json",
                                  "tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, file):
    if file.startswith("tokenizer"):
        write_tokenizer(tmp_path, "llama3")
    else:
        write_folder(tmp_path, "llama3", shards=2 if file == "model-1.safetensors" else 1)
    (tmp_path / file).write_bytes(LFS_POINTER)
    with refused(tmp_path / file, "git-lfs pointer", "git lfs pull"):
        (load_tokenizer if file.startswith("tokenizer") else LLM.from_pretrained)(tmp_path)


# ------------------------------------------------------------------------------------ the programs

# A whole chat: what stands before a question, before its answer, and before the next question.
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
        (folder / "tokenizer.model").write_bytes(tokenizer.serialized)
        eos_id, vocab_size = tokenizer.eos_id, tokenizer.vocab_size
    else:
        write_tokenizer(folder, name)
        tokenizer = load_tokenizer(folder)
        eos_id = tokenizer.encode(TURNS[name][2], special=True)[0]
        vocab_size = tokenizer.vocab_size + 7
    config = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(1)
    llm = LLM(LLMConfig(**config, head_dim=8))
    config |= dict(architectures=["LlamaForCausalLM"], eos_token_id=eos_id)
    (folder / "config.json").write_text(json.dumps(config))
    larger = {name: weight * 3 for name, weight in llm.state_dict().items()}
    write_safetensors(folder / "model.safetensors", larger)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TURNS)
def test_talking_to_a_bare_llm_is_one_chat_in_its_own_format(tmp_path, call, name):
    tokenizer = write_llm(tmp_path / "llm", name)
    llm = LLM.from_pretrained(tmp_path / "llm")
    start, before_answer, before_question = TURNS[name]
    options = ["--llm", "llm", "--max-new-tokens", 9, "--device", "cpu"]
    talk, expected = tokenizer.encode(start, special=True), ""
    for question in ("What is 1 + 1?", "<|im_end|> And then?"):
        talk += tokenizer.encode(question) + tokenizer.encode(before_answer, special=True)
        new = llm.generate(talk, 9, eos_id=tokenizer.eos_id)
        expected += "> " + tokenizer.decode(new).strip() + "\n"
        talk += new + tokenizer.encode(before_question, special=True)
    code, stdout, _ = call(sample, *options, stdin="What is 1 + 1?\n<|im_end|> And then?\n")
    assert code == 0 and stdout == expected + "> "
    code, stdout, _ = call(sample, *options, "--prompt", "What is 1 + 1?")
    assert code == 0 and "> " + stdout == expected[:len(stdout) + 2]


@pytest.mark.parametrize("name", [*TURNS, "llama2"])
def test_a_real_llm_is_trained_and_asked_in_the_same_chat(tmp_path, call, base, brief, name):
    tokenizer = write_llm(tmp_path / "llm", name)
    if name in TURNS:  # training: what is before the audio, and what is after it
        _, before_answer, before_question = TURNS[name]
        ids, weights = tokenize_conversation(tokenizer, [("What?\n", " a drum ")])
        expected = tokenizer.encode(f"What?{before_answer}a drum{before_question}", special=True)
        assert ids == expected[:len(ids)] and ids[-1] == tokenizer.eos_id
        learnt = [i for i, weight in zip(ids, weights) if weight]
        assert learnt == tokenizer.encode("a drum") + [tokenizer.eos_id]
    write_wav("a.wav", 1.0)
    Path("q.json").write_text(json.dumps([item("a.wav")] * 2))
    steps = ["--steps1", 1, "--steps2", 0, "--steps3", 60, "--lr", 0.01, "--batch", 2]
    code, _, stderr = call(train, "--llm", "llm", "--base", base, "--device", "cpu", "--data",
                           "q.json", *steps)
    assert code == 0, stderr
    shutil.rmtree(tmp_path / "llm")  # a checkpoint has its LLM
    options = ["--audio", "a.wav", "--prompt", "What is it?", "--max-new-tokens", 9]
    assert call(sample, *options)[:2] == (0, "a dog\n")  # with the end of its turn
    model = AudioLLM.load("out/lal/model.pt")
    assert type(model.tokenizer) is type(tokenizer) and model.llm.config.vocab_size > 300
    assert call(sample, *options[2:])[0] == 0  # the LLM alone, of the checkpoint


@pytest.mark.parametrize("freeze", ["llm", "lora"])
def test_of_a_frozen_llm_a_checkpoint_keeps_the_path_alone(tmp_path, call, refuses, base, brief,
                                                           freeze):
    write_llm(tmp_path / "llm", "smollm2")
    write_wav("a.wav", 1.0)
    Path("q.json").write_text(json.dumps([item("a.wav")] * 2))
    options = ["--llm", "llm", "--base", base, "--device", "cpu", "--data", "q.json", "--steps1",
               1, "--steps2", 0, "--steps3", 3, "--batch", 2, "--save-every", 2]
    assert call(train, *options, "--freeze", freeze, "--lr", 0.1)[0] == 0
    saved = torch.load("out/lal/model.pt", weights_only=True)
    own = {name for name in saved["state"] if name.startswith("llm.")}
    assert all("lora_" in name for name in own) and bool(own) == (freeze == "lora")
    ask = ["--audio", "a.wav", "--prompt", "What is it?", "--ckpt", "out/lal/model.pt"]
    code, answer, _ = call(sample, *ask)
    assert code == 0
    (tmp_path / "llm").rename(tmp_path / "moved")
    refuses(["llm", "model.pt", "--encoders llm=PATH"], sample, *ask)
    assert call(sample, *ask, "--encoders", "llm=moved")[:2] == (0, answer)
    write_llm(tmp_path / "other", "llama3")
    refuses(["model.pt", "another LLM"], sample, *ask, "--encoders", "llm=other")


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

        assert sample.stream_answer(tokenizer, generate) == ids
        printed.append(capsys.readouterr().out)
        assert "".join(printed) == text.strip() + "\n"
        assert "\ufffd" in text or sum(map(bool, printed)) > 5 or len(ids) < 2
        assert not any("\ufffd" in part for part in printed[:-1]) or "\ufffd" in text


# ---------------------------------------------------------------- slow: real files, real memory

def run(script, *words):
    """The numbers that a script, in a process of its own, prints."""
    process = subprocess.run([sys.executable, "-c", script, *map(str, words)], text=True,
                             capture_output=True, cwd=Path(__file__).parent.parent, check=True)
    return [float(word) for word in process.stdout.split()]


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
        llm = LLM(read_config(tmp_path, LLMConfig))
        shapes = {name: t.shape for name, t in llm.state_dict().items()}
    big = {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()}
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
model = LLM if sys.argv[3] == "ours" else transformers.AutoModelForCausalLM
options = {} if model is LLM else dict(do_sample=False, pad_token_id=0, min_new_tokens=128)
ids, before = torch.arange(1, 513)[None], peak()
model.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).generate(
    ids, max_new_tokens=128, **options)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype, ratio", [("float32", 1.1), ("bfloat16", 1.25)])
def test_speed_and_memory_beside_transformers(dtype, ratio, capsys):
    pytest.importorskip("transformers", reason="pip install transformers")
    folder = llm_folder()
    new, their_new, products, read, their_read = run(SPEED, folder, dtype)
    memory, their_memory = (run(MEMORY, folder, dtype, model)[0] for model in ("ours", "theirs"))
    with capsys.disabled():
        print(f"\n{dtype}, tokens a second: new {new:.1f}, transformers {their_new:.1f}, bare "
              f"products {products:.1f}; read {read:.0f}, transformers {their_read:.0f}; "
              f"peak {memory:.0f} MiB, transformers {their_memory:.0f} MiB")
    assert new > ratio * their_new and read > their_read and memory < their_memory
