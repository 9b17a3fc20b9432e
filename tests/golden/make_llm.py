"""Golden values for test_llm.py and test_tokenizers.py, from transformers and tokenizers.

    pip install transformers tokenizers && python tests/golden/make_llm.py

llm.npz         for each of MODELS: config.json as transformers writes it, random weights in
                float16, and what LlamaForCausalLM or Qwen2ForCausalLM in float32 makes of them:
                the logits of two rows of unequal length, and how both go on (greedily, padded)
tokenizers.npz  small byte-level BPE tokenizers, built like those of SmolLM2, Llama 3 and Qwen2.5,
                strings to encode, and the ids that the package tokenizers gives
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
from test_tokenizers import SYSTEM, TALK, strings  # noqa: E402

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
LLAMA3 = dict(rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {
    "llama2": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6)),
    "qwen2_untied": ("Qwen2", dict(tie_word_embeddings=False, num_key_value_heads=1)),
    "smollm2": ("Llama", dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=24,
                              tie_word_embeddings=True, rope_theta=100000.0)),
}


def model(name):
    kind, sizes = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, kind + "Config")(**(SMALL | sizes), pad_token_id=0)
    llm = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in llm.parameters():
            p.copy_((torch.randn(p.shape) * 0.3 + (p.dim() == 1)).half())
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        llm.save_pretrained(folder)
        out["config"] = np.frombuffer((Path(folder) / "config.json").read_bytes(), np.uint8)
    for key, tensor in llm.state_dict().items():
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            out["weights/" + key] = tensor.half().numpy()
    lengths = [48, 17]
    ids = torch.randint(1, 64, (2, 48))
    mask = torch.stack([torch.arange(48) >= 48 - n for n in lengths]).long()  # padded on the left
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = llm(ids, attention_mask=mask, position_ids=positions).logits
        new = llm.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False,
                           eos_token_id=None)[:, 48:]
    for row, n in enumerate(lengths):
        out[f"ids/{row}"] = ids[row, 48 - n:].numpy().astype(np.uint8)
        out[f"logits/{row}"] = logits[row, 48 - n:].numpy()
        out[f"new/{row}"] = new[row].numpy().astype(np.uint8)
    return {f"{name}/{key}": value for key, value in out.items()}


# The three families: special tokens, the pattern that cuts, a chat as their templates write it.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHATML = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in
                 (("system", SYSTEM), ("user", TALK))) + "<|im_start|>assistant\n"
FAMILIES = {
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, CHATML),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>"], WORDS,
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM +
               "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n" + TALK +
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], WORDS.replace("{1,3}", ""), CHATML),
}


def tokenizer(name, texts):
    special, words, chat = FAMILIES[name]
    t = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if words:
        t.pre_tokenizer = pre.Sequence([
            pre.Split(Regex(words), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        t.pre_tokenizer = pre.Sequence([
            pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    t.normalizer = normalizers.NFC() if name == "qwen2" else None
    t.decoder = decoders.ByteLevel()
    # a corpus of many kinds of text: the strings of another seed
    corpus = strings(3000, seed=1) + [Path(__file__).read_text()] * 2
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    spec = json.loads(t.to_str())
    if name == "llama3":  # pieces that no merges lead to: ignore_merges finds them all the same
        pieces = [piece for text in texts for piece, _ in t.pre_tokenizer.pre_tokenize_str(text)
                  if piece not in spec["model"]["vocab"] and 2 < len(piece) < 9]
        for piece in sorted(set(pieces))[::20][:20]:
            spec["model"]["vocab"][piece] = len(spec["model"]["vocab"])
    t = Tokenizer.from_str(json.dumps(spec))
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if name == "qwen2":
        t.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    ids = [t.encode(s, add_special_tokens=False).ids for s in texts]
    written = Tokenizer.from_str(t.to_str()).encode(chat, add_special_tokens=False).ids
    out = {"json": np.frombuffer(json.dumps(json.loads(t.to_str()), ensure_ascii=False,
                                            separators=(",", ":")).encode(), np.uint8),
           "ids": np.array(sum(ids, []), np.uint16),
           "lengths": np.array([len(i) for i in ids], np.uint16),
           "chat": np.array(written, np.uint16)}
    return {f"{name}/{key}": value for key, value in out.items()}


if __name__ == "__main__":
    golden = {}
    for name in MODELS:
        golden |= model(name)
    np.savez_compressed(HERE / "llm.npz", **golden)
    texts = strings(400)
    raw = [s.encode() for s in texts]
    golden = {"strings": np.frombuffer(b"".join(raw), np.uint8),
              "lengths": np.array([len(s) for s in raw], np.uint16)}
    for name in FAMILIES:
        golden |= tokenizer(name, texts)
    np.savez_compressed(HERE / "tokenizers.npz", **golden)
