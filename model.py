"""A plain decoder LLM of the Llama family, from scratch. It knows nothing of audio.

Embeddings in, positions, a cache: that is all that integrate.py needs to let it hear. One rule says
what sees what: a query sees every key whose position is not after its own. Try:

    python -c "from model import *; llm = LLM(LLMConfig()); print(llm.generate([1, 2, 3], 5))"

LLM.from_pretrained(folder) reads Llama 2, Llama 3.2, Qwen2.5 and SmolLM2, load_tokenizer(folder)
their tokenizers.

Letters in shapes: B batch, T new tokens, S all tokens so far, D width, H heads, K key-value heads,
d head width, V vocabulary.
"""
import functools
import io
import json
import math
import pickle
import re
import struct
import unicodedata
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FAR = 1 << 30  # the position of padding: after every query, so no query sees it


@dataclass(frozen=True)
class LLMConfig:
    """Sizes of the decoder, named as in Hugging Face's config.json; by default our miniature."""
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    rope_scaling: dict = None  # of Llama 3: the four numbers that `rotary` reads

    def __post_init__(self):
        H, K = self.num_attention_heads, self.num_key_value_heads
        assert H % K == 0, f"{H} heads cannot share {K} key-value heads evenly"
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim}: rotary positions turn pairs"


# ----------------------------------------------------------------------------------- weight files

# torch's types by their names in .safetensors, and by those of their storages in .pt
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
            "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
            "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def reading(path, what):
    """Whatever a file leads to that is missing, damaged or hostile is a ValueError of one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason
        raise ValueError(f"{path}: no {what} ({reason}); fetch it again, or another") from None


def load_tensors(path):
    """
    Read a weight file, or a Hugging Face folder of one or several, as a flat {name: tensor}.

    Safetensors and torch.save's files (zip or legacy, also what weights_only=True refuses) are
    told apart by their content; dicts inside dicts are joined by dots: "model.blocks.0.bias".
    Tensors are views of the memory-mapped file, read when used; no code in a file is ever run.
    Raises ValueError, one line, for a file that is missing, damaged or something else.
    """
    path, tensors, readers = Path(path), {}, {b"P": read_zip, b"\x80": read_legacy}
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).exists()]
        if not found:
            raise ValueError(f"{path}: no weights in this folder; wanted {' or '.join(WEIGHTS)}")
        path = found[0]
    files = [path]
    if path.suffix == ".json":  # the index of a model in several files
        index = read_json(path)
        with reading(path, "index of weights"):
            files = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    for path in files:
        with reading(path, "weights to be read"):
            with open(path, "rb") as file:
                magic = file.read(9)
            read = read_safetensors if magic[8:] == b"{" else readers.get(magic[:1])
            found = read(path) if read else {}
            if not found:
                raise ValueError("neither safetensors nor made by torch.save, or empty")
            tensors |= found
    return tensors


def values(path, start, dtype, count):
    """
    `count` values of `dtype` from byte `start` of a file: a map of their own, so that the memory
    of one tensor is free when it is dropped; or read now if not aligned.
    """
    size, length = count * dtype.itemsize, path.stat().st_size
    if min(start, count) < 0 or start + size > length:
        raise ValueError(f"{length} bytes, where {count} {dtype} should be at {start}")
    if size == 0:
        return torch.empty(0, dtype=dtype)
    part = np.memmap(path, "u1", "c", start, size)  # copy on write: the file stays whole
    return torch.from_numpy(part.copy() if start % dtype.itemsize else part).view(dtype)


def read_safetensors(path):
    """u64 header length; the header, {name: {dtype, shape, data_offsets}} in JSON; the values."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header promises {length} bytes, which it does not have")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
        count = math.prod(shape)
        if start != reached or end - start != count * dtype.itemsize:  # no gaps, no overlaps
            raise ValueError(f"{name} claims bytes {start} to {end} for {shape} {dtype}")
        tensors[name], reached = values(path, 8 + length + start, dtype, count).reshape(shape), end
    return tensors


class Inert(dict):
    """Stands in for any object that a file asks for: holds its state, does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})

    def ignore(self, *args, **kwargs):
        return Inert()

    __call__ = append = extend = add = ignore
    __hash__ = object.__hash__


class TensorUnpickler(pickle.Unpickler):
    """
    Knows torch's names for types of numbers and for putting a tensor together. Every other name
    in a file means Inert, so nothing that could act is within its reach, whatever the file says.
    start: where in the file at `path` the bytes of each storage begin, by its key.
    """

    def __init__(self, stream, path=None, start=None):
        super().__init__(stream, encoding="latin1")
        self.path, self.start, self.dtypes = path, start, {}

    def find_class(self, module, name):
        if module.split(".")[0] == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, start, size, stride, *_: storage.as_strided(size, stride, start)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        return Inert

    def persistent_load(self, storage):
        _, dtype, key, _, count, *_ = storage
        self.dtypes[key] = dtype
        return values(self.path, self.start[key], dtype, count)


def read_zip(path):
    """torch.save since 2020: a zip of ROOT/data.pkl and, for each storage, ROOT/data/KEY."""
    start = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        pickled, = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix(".pkl") + "/"
        for item in archive.infolist():
            if item.filename.startswith(folder):
                if item.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{item.filename} is compressed")
                file.seek(item.header_offset + 26)
                lengths = struct.unpack("<HH", file.read(4))  # of two fields before the values
                start[item.filename.removeprefix(folder)] = file.tell() + sum(lengths)
        return tensors_in(TensorUnpickler(archive.open(pickled), path, start).load())


def read_legacy(path):
    """torch.save before: three pickles about the format, one of the tree, one of the keys of the
    storages; then the storages in that order, each after an int64 count."""
    with open(path, "rb") as stream:
        for _ in range(3):
            TensorUnpickler(stream).load()
        tree = stream.tell()
        first = TensorUnpickler(stream, path, defaultdict(int))  # only to learn of the storages
        first.load()
        keys = TensorUnpickler(stream).load()
        start, at = {}, stream.tell()
        for key in keys:
            start[key] = at + 8
            at += 8 + values(path, at, torch.int64, 1).item() * first.dtypes[key].itemsize
        stream.seek(tree)
        return tensors_in(TensorUnpickler(stream, path, start).load())


def tensors_in(tree, prefix=""):
    """The tensors in nested dicts, their names joined by dots."""
    tensors = {}
    for name, node in tree.items():
        if isinstance(node, dict):
            tensors |= tensors_in(node, f"{prefix}{name}.")
        elif torch.is_tensor(node):
            tensors[f"{prefix}{name}"] = node
    return tensors


def read_json(path):
    """The object in a JSON file. ValueError, one line, if there is none."""
    with reading(path, "JSON object"):
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"but a {type(found).__name__}")
        return found


# The settings that change results, and what can be computed here: anything else is refused.
KNOWN = {"architectures": ("LlamaForCausalLM", "Qwen2ForCausalLM"), "hidden_act": ("silu",),
         "rope_type": ("default", "llama3"), "attention_bias": (False,), "mlp_bias": (False,),
         "partial_rotary_factor": (1,), "use_sliding_window": (False,), "quantization_config": ()}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder):
    """The LLMConfig of a Hugging Face folder. ValueError for all that we would compute wrongly."""
    path = Path(folder) / "config.json"
    c = read_json(path)
    with reading(path, "model that can be computed here"):
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # the newer name, the older
        kind = rope.get("rope_type", rope.get("type", "default"))
        given = c | rope | {"rope_type": kind, "architectures": c["architectures"][0]}
        for setting, known in KNOWN.items():
            if given.get(setting) not in (*known, None):
                raise ValueError(f"{setting} is {given[setting]!r}, and can only be "
                                 f"{' or '.join(map(repr, known or (None,)))} here")
        sizes = {size: c[size] for size in ("vocab_size", "hidden_size", "intermediate_size",
                                            "num_hidden_layers", "num_attention_heads")}
        H = c["num_attention_heads"]
        sizes["num_key_value_heads"] = c.get("num_key_value_heads") or H
        sizes["head_dim"] = c.get("head_dim") or c["hidden_size"] // H
        for size, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{size} is {value!r}")
        return LLMConfig(
            **sizes, qkv_bias=given["architectures"] == "Qwen2ForCausalLM",
            rms_norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            rope_scaling={key: float(rope[key]) for key in LLAMA3} if kind == "llama3" else None,
            tie_word_embeddings=bool(c.get("tie_word_embeddings")))


def fill(module, tensors, source, dtype, device="cpu"):
    """Make these tensors the module's own, and empty the dict; a complaint begins with `source`.

    Each goes straight to its dtype and device; one that is there already stays a map of the file.
    ValueError, one line: what is missing, unknown or misshapen.
    """
    wanted = module.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, t in tensors.items():
        want = wanted.get(name)
        if want is None:
            wrong.append(f"{name} does not belong there")
        elif (t.shape, t.is_floating_point()) != (want.shape, want.is_floating_point()):
            wrong.append(f"{name} is {t.dtype} {tuple(t.shape)}, not {tuple(want.shape)}")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source}: {', '.join(wrong[:3])}{more}")
    for name in wanted:  # one by one: no more than one tensor is there twice; counters stay whole
        t = tensors.pop(name)
        wanted[name] = t.to(device, dtype if t.is_floating_point() else None)
    module.load_state_dict(wanted, assign=True)


# ---------------------------------------------------------------------------- positions and cache

def place(start, count, lengths=None):
    """Positions (1 or B, count) of `count` tokens from `start` on, and the start of what follows.

    start: an int, or (B, 1) when the rows differ. Rows with fewer than `count` tokens say so in
    `lengths` (B,); what is left over is padding, at FAR.
    """
    steps = torch.arange(count, device=None if isinstance(start, int) else start.device)[None]
    if lengths is None:
        return start + steps, start + count
    steps, lengths = steps.to(lengths.device), lengths[:, None]
    return (start + steps).masked_fill(steps >= lengths, FAR), start + lengths


def end(positions):
    """The start (rows, 1) of what follows tokens at these positions (rows, n), padding left out."""
    positions = positions.masked_fill(positions == FAR, -1)
    return F.pad(positions, (1, 0), value=-1).amax(dim=1, keepdim=True) + 1  # no tokens end at 0


class KVCache:
    """What each layer has read: keys and values (B, S, K, d), and their positions (1 or B, S).

    Without `room` new keys are concatenated; with `room`, as after `fork`, every layer has that
    many slots at once, written in place. Gradients flow through either. Layers may hold
    different tokens: those that hold the same share one tensor of positions, and so one mask.
    """

    def __init__(self, layers, room=0):
        self.keys, self.values, self.positions = [None] * layers, [None] * layers, [None] * layers
        self.next = 0  # where the next token goes: an int, or (B, 1) when the rows differ
        self.plain = True  # every key lies before `next`: nothing is padding
        self.room = room

    def extend(self, positions, layers=None):
        """Say that these layers (None: all) will now append tokens at `positions` (1 or B, T)."""
        longer = {}
        for i in range(len(self.positions)) if layers is None else layers:
            old = self.positions[i]
            if id(old) not in longer:
                longer[id(old)] = positions if old is None else join_rows(old, positions)
            self.positions[i] = longer[id(old)]

    def append(self, layer, k, v):
        """Add one layer's new keys and values (B, T, K, d), after `extend`; returns all it has."""
        S, T = self.positions[layer].shape[1], k.shape[1]
        for store, new in ((self.keys, k), (self.values, v)):
            if not self.room:
                store[layer] = new if store[layer] is None else join_rows(store[layer], new)
                continue
            if store[layer] is None:
                store[layer] = new.new_empty(new.shape[0], self.room, *new.shape[2:])
            slots = store[layer].shape[1]
            assert S <= slots, f"{S} tokens do not fit into a cache of {slots} slots"
            store[layer][:, S - T:S] = new
        return self.keys[layer][:, :S], self.values[layer][:, :S]

    def fork(self, rows, room):
        """A copy with `room` more slots, whose row i continues row rows[i] of this one.

        The original stays as it was: hear once, ask many.
        """
        rows = torch.as_tensor(list(rows))

        def choose(x):
            if not torch.is_tensor(x) or x.shape[0] == 1:
                return x
            return x.index_select(0, rows.to(x.device))  # its gradient is quicker than x[rows]'s

        new = KVCache(len(self.keys), room)
        new.next, new.plain = choose(self.next), self.plain
        shared = {id(p): choose(p) for p in self.positions}
        for i, positions in enumerate(self.positions):
            new.positions[i] = shared[id(positions)]
            S = 0 if positions is None else positions.shape[1]
            for old, store in ((self.keys[i], new.keys), (self.values[i], new.values)):
                if S:
                    store[i] = old.new_empty(len(rows), S + room, *old.shape[2:])
                    store[i][:, :S] = choose(old)[:, :S]
        return new


def join_rows(a, b):
    """Concatenate along dimension 1; a batch of one stands for every row."""
    B = max(a.shape[0], b.shape[0])
    return torch.cat([a.expand(B, *a.shape[1:]), b.expand(B, *b.shape[1:])], dim=1)


def visibility(queries, keys, dtype):
    """The one rule: 0 where the key's position is not after the query's, else -inf.

    queries (1 or B, T), keys (1 or B, S) are positions -> (1 or B, 1, T, S), to be added to scores.
    """
    hidden = keys[:, None, None, :] > queries[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


def rotary(positions, config, dtype):
    """cos and sin (1 or B, T, 1, d) of the angles position * theta^(-2i/d), i < d/2, twice.

    The first half of sin is negative, ready for `rotate`. Llama 3 slows down by `factor` the pairs
    that turned fewer than low_freq_factor times in the context it was first trained on, leaves
    alone those that turned more than high_freq_factor times, and blends in between.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    i = torch.arange(0, config.head_dim, 2, dtype=exact, device=positions.device)
    speed = config.rope_theta ** (-i / config.head_dim)
    if config.rope_scaling:
        factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3)
        keep = ((context * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speed = speed * (keep + (1 - keep) / factor)
    angles = (positions[..., None].to(exact) * speed)[:, :, None]  # (1 or B, T, 1, d/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, rope):
    """Turn each pair (x[i], x[i + d/2]) of x (B, T, heads, d) by its position's angle."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


# ------------------------------------------------------------------------------------- the decoder

def linear(x, weight, bias=None):
    """W x + b of every row of x. A row alone, when generating, is the vector of torch.mv:
    F.linear takes a kernel made for many rows, in bfloat16 half as slow again."""
    if x.numel() != weight.shape[1]:
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def heads(self, x):
        B, T, width = x.shape
        return x.view(B, T, width // self.head_dim, self.head_dim)  # (B, T, heads, d)

    def forward(self, x, rope, mask, cache, layer):
        q = rotate(self.heads(self.q_proj(x)), rope)
        k = rotate(self.heads(self.k_proj(x)), rope)
        v = self.heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), (B, K, S, d)
        # softmax(q k^T / sqrt(d) + mask) v; told "causal", the kernel needs no mask and skips half
        B, T = x.shape[:2]
        if T > 1:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                               enable_gqa=True).transpose(1, 2)
        else:  # the heads that share a key-value head are its rows: it is read once, not for each
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim),
                                               k, v, mask)  # (B, K, H / K, d)
        return self.o_proj(y.reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything between the embedded tokens and the logits."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, positions=None, cache=None):
        """x (B, T, D) -> (B, T, D). See LLM.forward for positions and cache."""
        own = range(len(self.layers))  # a cache may have more layers, for others to use
        first = cache is None or all(cache.positions[i] is None for i in own)
        in_order = positions is None
        if in_order:
            positions, after = place(0 if cache is None else cache.next, x.shape[1])
        else:
            after = end(positions)
        positions = positions.to(x.device)
        if cache is not None:
            cache.extend(positions, own)
            cache.plain = cache.plain and in_order
            cache.next = after
        # plain causal, or one more token after everything else, which sees all: without a mask
        unmasked = in_order and (first or cache.plain and x.shape[1] == 1)
        masks = {}  # one for every distinct set of keys: a single one, unless layers were left out
        rope = rotary(positions, self.config, x.dtype)
        for i, block in enumerate(self.layers):
            keys = positions if cache is None else cache.positions[i]
            if not unmasked and id(keys) not in masks:
                masks[id(keys)] = visibility(positions, keys, x.dtype)
            x = block(x, rope, masks.get(id(keys)), cache, i)
        return self.norm(x)


class LLM(nn.Module):
    """A decoder LLM: `llm(ids)` gives logits, `llm.generate(ids, n)` gives new ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module):
        # std 1/sqrt(D), which is GPT-2's 0.02 at its sizes; what writes into the residual stream
        # starts smaller by sqrt(2 * layers), so that the stream keeps its size
        std = self.config.hidden_size ** -0.5
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for out in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(out.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A Llama or Qwen2 from a Hugging Face folder, in eval mode: config.json and weights.
        ValueError, one line, for whatever does not fit. See `fill` for what is copied."""
        with torch.device("meta"):
            llm = cls(read_config(folder))
        # Old Llamas store their rotary speeds, and some tied models their embedding twice.
        unused = r".*rotary_emb\.inv_freq" + "|lm_head.weight" * llm.config.tie_word_embeddings
        fill(llm, {name: tensor for name, tensor in load_tensors(folder).items()
                   if not re.fullmatch(unused, name)}, folder, dtype, device)
        return llm.eval()

    def embed(self, ids):
        return self.model.embed_tokens(ids)  # (B, T) -> (B, T, D)

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., D)."""
        tied = self.config.tie_word_embeddings
        return linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def forward(self, ids=None, embeds=None, positions=None, cache=None):
        """Logits (B, T, V) of ids (B, T) or of their embeddings (B, T, D), one of the two.

        positions (1 or B, T): None means in order, after what the cache holds. FAR marks padding.
        cache: a KVCache; these tokens see what it holds, and are added to it.
        """
        assert (ids is None) != (embeds is None), "give ids or embeds, one of the two"
        embeds = self.embed(ids) if embeds is None else embeds
        return self.head(self.model(embeds, positions, cache))

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=0.0, top_p=1.0, cache=None, rows=None,
                 eos_id=None, seed=None, on_token=None):
        """Continue one prompt (a list of ids) or a batch of them (a list of lists, or (B, T)).

        temperature 0 takes the likeliest token; above 0 it samples, from the likeliest tokens that
        together have probability top_p. Ends after max_new_tokens, or at eos_id, which is left out.
        cache: what was heard or read before; it is left as it was. Prompt i continues its row
        rows[i]; without rows it has one row for all of them, or one each.
        on_token: called with the list of the step's ids, one a row (None: that row has ended).
        Returns the new ids: a list, or for a batch a list of lists.
        """
        single = not torch.is_tensor(ids) and (len(ids) == 0 or isinstance(ids[0], int))
        prompts = [ids] if single else ids.tolist() if torch.is_tensor(ids) else ids
        if not prompts or not all(prompts):
            raise ValueError("nothing to continue: every prompt needs at least one token")
        device = self.model.embed_tokens.weight.device
        B, lengths = len(prompts), torch.tensor([len(p) for p in prompts], device=device)
        T = max(len(p) for p in prompts)
        batch = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
        cache = cache or KVCache(self.config.num_hidden_layers)
        cache = cache.fork(range(B) if rows is None else rows, T + max_new_tokens)
        ragged = min(len(p) for p in prompts) < T
        positions = place(cache.next, T, lengths)[0] if ragged else None
        dice = None if seed is None else torch.Generator(device).manual_seed(seed)
        hidden = self.model(self.embed(batch), positions, cache)
        hidden = hidden[torch.arange(B, device=device), lengths - 1]  # (B, D): each prompt's last
        answers, ended = [[] for _ in prompts], [False] * B
        for step in range(max_new_tokens):
            token = pick(self.head(hidden), temperature, top_p, dice)  # (B,)
            new = token.tolist()
            ended = [e or t == eos_id for e, t in zip(ended, new)]
            for answer, t, e in zip(answers, new, ended):
                if not e:
                    answer.append(t)
            if on_token:
                on_token([None if e else t for t, e in zip(new, ended)])
            if all(ended) or step == max_new_tokens - 1:
                break
            hidden = self.model(self.embed(token[:, None]), None, cache)[:, 0]
        return answers[0] if single else answers


def pick(logits, temperature, top_p, dice=None):
    """The next token (B,) from logits (B, V): the likeliest, or drawn (nucleus sampling, top-p)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # the likeliest token always stays
    return order.gather(1, torch.multinomial(p, 1, generator=dice))[:, 0]


# -------------------------------------------------------------------------------------- tokenizers

class SentencePieceTokenizer:
    """Text to ids and back, exactly: unknown characters become bytes, white space is kept."""

    def __init__(self, proto):
        from sentencepiece import SentencePieceProcessor
        self.proto = proto  # the bytes of a .model file
        self.pieces = SentencePieceProcessor(model_proto=proto)
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.vocab_size = len(self.pieces)
        # whose vocabulary has no bracket has never read Llama 2's [INST]: that is our miniature
        self.plain = self.pieces.is_unknown(self.pieces.piece_to_id("["))

    def encode(self, text):
        return self.pieces.encode(text)

    def decode(self, ids):
        return self.pieces.decode(list(ids))

    def chat(self, question, system="", later=False):
        """See BPETokenizer.chat; this is the format of Llama 2, and of our miniature."""
        before, question = [self.eos_id] * later + [self.bos_id], question.strip()
        if self.plain:
            return before[:1], self.encode(f"{system} {question}".strip() + "\n")
        system = f"<<SYS>>\n{system.strip()}\n<</SYS>>\n\n" if system else ""
        return before, self.encode(f"[INST] {system}{question} [/INST]")

    def reply(self, answer):
        """See BPETokenizer.reply."""
        return self.encode(" " * self.plain + answer.strip()) + [self.eos_id]


# How text is cut before BPE by GPT-2 (and SmolLM2, with each digit alone), Llama 3 and Qwen2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA.replace("{1,3}", "")

# GPT-2's visible letter for every byte: itself, or one from U+0100 on; and the way back.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in SEEN}
LETTERS |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SEEN)}
BYTES = {ord(letter): b for b, letter in LETTERS.items()}

# A chat of Llama 3, and of Qwen2.5 and SmolLM2: how it starts, how each turn opens and closes.
CHATS = [("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
         ("", "<|im_start|>{}\n", "<|im_end|>\n")]


@functools.cache
def members(kind):
    """The inside of a `re` set: letters (L), numbers (N) or Unicode's white space (s)."""
    def inside(c):
        if kind == "s":
            return chr(c).isspace() and not 28 <= c <= 31  # those are white space to Python only
        return unicodedata.category(chr(c))[0] == kind

    inside = [inside(c) for c in range(0x40000)]  # there are none in the planes above
    edges = [c for c in range(len(inside)) if inside[c] != inside[c - 1]]
    return "".join(f"\\U{a:08x}-\\U{b - 1:08x}" for a, b in zip(edges[::2], edges[1::2]))


@functools.cache
def cutter(pattern):
    r"""A compiled `re` from a pattern with \p{L}, \p{N} and Unicode's \s, unknown to Python's."""
    parts = re.split(r"(\[.*?\])", pattern.replace(r"\S", r"[^\s]"))  # every second one is a set
    parts[::2] = [re.sub(r"\\p\{.\}|\\s", r"[\g<0>]", part) for part in parts[::2]]
    return re.compile(re.sub(r"\\p\{(.)\}|\\s", lambda m: members(m[1] or "s"), "".join(parts)))


def cuts(step):
    """The patterns by which a tokenizer.json's pre-tokenizer cuts text, one after another."""
    kind = step["type"]
    if kind == "Sequence" and step["pretokenizers"][-1]["type"] == "ByteLevel":
        return [pattern for part in step["pretokenizers"] for pattern in cuts(part)]
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}|[^\p{N}]+"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        if step["pattern"].get("Regex") in (LLAMA, QWEN):
            return [step["pattern"]["Regex"]]
    raise ValueError(f"its pre-tokenizer has {json.dumps(step)}, which is not known here")


class BPETokenizer:
    """Byte-level BPE: text is cut into pieces, a piece is its UTF-8 bytes, written as letters, and
    neighbours are merged in the order in which the merges were learnt.

    spec: what a tokenizer.json holds, and under bos_id and eos_id what config.json says of them.
    """

    def __init__(self, spec):
        self.spec, model, added = spec, spec["model"], spec.get("added_tokens") or []
        if model["type"] != "BPE" or (spec.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
            raise ValueError("only BPE is known here, with the normalizer NFC or none")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise ValueError(f"its {key} {model[key]!r} is not known here")
        self.normalize = bool(spec.get("normalizer"))
        self.cutters = [cutter(pattern) for pattern in cuts(spec["pre_tokenizer"])]
        self.ignore_merges = model.get("ignore_merges", False)
        self.added = {token["content"]: token["id"] for token in added}
        special = {token["content"] for token in added if token["special"]}
        self.vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        lost = {a + b for a, b in self.ranks} - self.vocab.keys()
        if lost:
            raise ValueError(f"its vocabulary lacks {len(lost)} tokens, {min(lost)!r} for one")
        longest_first = sorted(self.added, key=len, reverse=True)
        self.finder = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.texts = {i: token for token, i in self.vocab.items()}
        self.texts |= {i: letters(text) for text, i in self.added.items() if text not in special}
        self.bos_id, self.eos_id = spec.get("bos_id"), spec.get("eos_id")
        self.vocab_size = 1 + max([*self.added.values(), *self.vocab.values()])
        self.merge = functools.lru_cache(1 << 16)(self.merge)

    @property
    def proto(self):
        return json.dumps(self.spec).encode()  # for read_tokenizer

    def encode(self, text, special=False):
        """Ids of a text. What is spelt like a special token becomes one only if `special`."""
        ids = []
        for part in self.finder.split(text) if special else [text]:
            if special and part in self.added:
                ids.append(self.added[part])
                continue
            pieces = [unicodedata.normalize("NFC", part) if self.normalize else part]
            for cut in self.cutters:
                pieces = [piece for whole in pieces for piece in cut.findall(whole)]
            for piece in pieces:
                ids += self.merge(letters(piece))
        return ids

    def merge(self, piece):
        """Ids of a piece written in letters: merge the pair learnt first, while any is known."""
        if self.ignore_merges and piece in self.vocab:
            return [self.vocab[piece]]
        last = len(self.ranks)
        parts = [letter for letter in piece if letter in self.vocab]  # SmolLM2 lacks a few bytes
        while len(parts) > 1:
            a, b = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, last))
            if (a, b) not in self.ranks:
                break
            spaced = "".join(f" {part} " for part in parts)  # no letter is a space
            parts = spaced.replace(f" {a}  {b} ", f" {a}{b} ").split()
        return [self.vocab[part] for part in parts]

    def decode(self, ids):
        """The text of ids, without special tokens; what is not UTF-8 becomes U+FFFD."""
        text = "".join(self.texts.get(i, "") for i in ids)
        return text.translate(BYTES).encode("latin-1").decode("utf-8", "replace")

    def chat(self, question, system="", later=False):
        """Ids of a chat that asks a question, in two parts: all that comes before the question
        (and the audio that it is about); the question, and what makes the model answer.
        later: the first part closes the answer that it follows, instead of starting a chat."""
        for start, opening, closing in CHATS:
            if opening.split("{}")[0] in self.added:
                break
        else:
            raise ValueError("this tokenizer has the special tokens of no chat known here")
        ours = functools.partial(self.encode, special=True)  # never for what others wrote
        before = ours(closing if later else start)
        if system:
            before += ours(opening.format("system")) + self.encode(system.strip()) + ours(closing)
        return (before + ours(opening.format("user")),
                self.encode(question.strip()) + ours(closing + opening.format("assistant")))

    def reply(self, answer):
        """Ids of an answer, as it follows the second part of a chat, and of its end."""
        return self.encode(answer.strip()) + [self.eos_id]


def letters(text):
    return text.encode().decode("latin-1").translate(LETTERS)


def train_tokenizer(texts, vocab_size):
    """A SentencePiece tokenizer (BPE, byte fallback) learnt from an iterable of strings."""
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return SentencePieceTokenizer(out.getvalue())


def read_tokenizer(proto):
    """The tokenizer whose `proto` this is: the bytes of a SentencePiece .model, or of JSON."""
    if proto[:1] == b"{":
        return BPETokenizer(json.loads(proto))
    return SentencePieceTokenizer(proto)


def load_tokenizer(path):
    """The tokenizer in a .model file, a tokenizer.json, or a folder with one of them.

    If there is a config.json beside it, its bos_id and eos_id are what that says. ValueError, one
    line, if it cannot be used, or not with that config's vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json")]
        path = found[0] if found[0].exists() else found[1]
    beside = path.with_name("config.json")
    config = read_json(beside) if beside.exists() else {}
    spec = read_json(path) if path.suffix == ".json" else None
    with reading(path, "usable tokenizer"):
        for key in ("bos", "eos") if spec else ():
            ids = config.get(f"{key}_token_id")
            spec[f"{key}_id"] = ids[-1] if isinstance(ids, list) else ids  # the last ends a turn
        tokenizer = BPETokenizer(spec) if spec else SentencePieceTokenizer(path.read_bytes())
    if tokenizer.vocab_size > config.get("vocab_size", tokenizer.vocab_size):
        raise ValueError(f"{path}: {tokenizer.vocab_size} tokens, and {beside} says "
                         f"{config['vocab_size']}: they do not belong together")
    return tokenizer
