"""The numbers: what PLITS, LAL and PAL cost, derived, checked, measured and seen; what arms learn.
How to read the result: one table for training, one for inference, a row for each mode and number
of audio tokens Na. "Predicted" is this file's own arithmetic (matrix products only: 2 m k n
operations for (m, k) times (k, n)), "measured" is this machine's clock and memory, "paper" is what
the paper says of its own setting, which it does not describe in full. Speed-ups are against PLITS
of the same row; one below the ratio of FLOPs has lost time on work that is no matrix product.
Utilisation is the share of this machine's own matrix product rate. "Kept" is what forward stores
for backward, "peak", of a GPU, is everything. The accounting table has, for each way to count
memory, the Na from which on LAL saves the paper's 64.1%, and is 247.5% faster; where the two are
equal, both headlines hold at one setting. The last line of stdout is all of it, as JSON.

    python bench.py                                     # a small LLM, a minute or two on a CPU
    python bench.py --llm llama-3.2-1b                  # shapes only, random weights: for a GPU
    python bench.py --measure nothing                   # the arithmetic alone
    python bench.py --measure turns --na 512 --nt 64 --batch 8 --peer
    python bench.py --quality                           # train and score every arm, an hour

The paper: arXiv 2506.10423v2, figure 1 and section 3.
"""
import bisect
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from encoders import make_encoder
from integrate import hear, pal, pool
from model import LLM, LLMConfig
from sample import command_line, option, pick_device

LLMS = {
    "small": LLMConfig(8192, 512, 2048, 8, 8, 2, 64),
    "llama-3.2-1b": LLMConfig(128256, 2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": LLMConfig(128256, 3072, 8192, 28, 24, 8, 128),
    "qwen2.5-1.5b": LLMConfig(151936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True),
}
ENCODERS = {"whisper": "small", "sslam": "base", "clap": "tiny"}  # public sizes, for --encoders
PAPER = {"memory": 0.641, "speed": 2.475}  # of LAL against PLITS: less, and more
SAYS = {"speed": "up to 3.475", "train": "up to 64.1", "infer": "up to 83"}  # of LAL


# ------------------------------------------------------------------------------------- the math

@dataclass(frozen=True)
class Batch:
    """What a mode makes of B rows with Na audio tokens and Nt text tokens each.

    Of the audio, `prefix` tokens run through the LLM and `side` tokens are only written into the
    cache, of those layers that are in `layers`. PLITS is all prefix, LAL all side, PAL both.
    """
    B: int
    prefix: int
    side: int
    text: int
    layers: tuple

    def kinds(self, c, first=0):
        """(audio tokens written, how many layers) of layers that have them, and of those without,
        from layer `first` on."""
        having = sum(i >= first for i in self.layers)
        return (self.side, having), (0, c.num_hidden_layers - first - having)


SHARES = {"plits": 1.0, "lal": 0.0, "pal": 0.5}  # of the audio tokens run, and are not just written


def batch(c, mode, B, Na, Nt, share=None, layers=None):
    """The Batch that a mode makes; share: of PAL's audio, how much runs (None: as in SHARES)."""
    share = share if mode == "pal" and share is not None else SHARES[mode]
    prefix = round(share * Na)
    layers = range(c.num_hidden_layers) if layers is None else layers
    return Batch(B, prefix, Na - prefix, Nt, tuple(layers))


def widths(c):
    """Width of the residual stream, of all queries, of all keys."""
    return c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def layer_flops(c, run, written, pairs):
    """FLOPs of one layer and row: `run` tokens pass through it, `written` leave only k and v.

    pairs: how many (query, key) there are, in each head. (m, k) times (k, n) takes 2 m k n.
    """
    D, Hd, Kd = widths(c)
    return {
        "q, o": run * 2 * D * 2 * Hd,                      # W_Q x, W_O y
        "k, v": (run + written) * 2 * D * 2 * Kd,          # W_K x, W_V x
        "attention": pairs * 2 * 2 * Hd,                   # q k^T, softmax(...) v
        "feed-forward": run * 2 * D * 3 * c.intermediate_size,  # gate, up, down
    }


def pairs(b, written, causal):
    """Query-key pairs of one row and head: all that are computed, or (causal) all that are seen.

    A query sees the keys that are not after it: of its own kind half, of what came before it all.
    """
    prefix, text = b.prefix, b.text
    if not causal:
        return (prefix + text) * (prefix + written + text)
    return prefix * (prefix + 1) // 2 + text * (prefix + written) + text * (text + 1) // 2


def forward_flops(c, b, causal=False):
    """FLOPs of one forward pass with logits at every text token, part by part."""
    parts = {"logits": b.text * 2 * c.hidden_size * c.vocab_size}
    for written, layers in b.kinds(c):
        one = layer_flops(c, b.prefix + b.text, written, pairs(b, written, causal))
        parts.update({name: parts.get(name, 0) + layers * n for name, n in one.items()})
    return {name: b.B * n for name, n in parts.items()}


def backward_flops(c, b, frozen=False, causal=False):
    """FLOPs of the backward pass: a product A B with gradient G needs G B^T for A and A^T G for B.

    So it takes twice the forward pass where weights and inputs both need a gradient. With the LLM
    frozen only the audio tokens do: no weight gradients, attention still twice. And where audio is
    only written, text before the first such layer has no gradient to take, in that layer's W_Q,
    W_K, W_V neither, and its queries need none.
    """
    D, Hd, Kd = widths(c)
    first = min(b.layers, default=c.num_hidden_layers) if frozen and not b.prefix else 0
    if frozen and first == c.num_hidden_layers:
        return 0
    total = (1 if frozen else 2) * b.text * 2 * D * c.vocab_size
    for written, layers in b.kinds(c, first):
        parts = layer_flops(c, b.prefix + b.text, written, pairs(b, written, causal))
        attention = parts.pop("attention")
        total += layers * (2 * attention + (1 if frozen else 2) * sum(parts.values()))
    if frozen and not b.prefix:
        total -= b.text * 2 * D * (Hd + 2 * Kd) + pairs(b, b.side, causal) * 2 * Hd
    return b.B * total


def train_flops(c, b, frozen=False, causal=False):
    return sum(forward_flops(c, b, causal).values()) + backward_flops(c, b, frozen, causal)


def hear_flops(c, b, causal=False):
    """FLOPs of writing the audio into the cache: all that LAL ever does with it."""
    seen = pairs(Batch(b.B, b.prefix, 0, 0, ()), 0, causal)  # the prefix sees nothing of the side
    return b.B * sum(layers * sum(layer_flops(c, b.prefix, written, seen).values())
                     for written, layers in b.kinds(c))


def ask_flops(c, b, new, causal=False):
    """FLOPs of a question of `text` tokens about what was heard, and of `new` tokens of answer.

    The first new token falls out of the question's own pass; each other one is one more pass.
    """
    T, total = b.text, new * 2 * c.hidden_size * c.vocab_size  # logits of one token at a time
    for written, layers in b.kinds(c):
        heard = b.prefix + written
        seen = T * heard + (T * (T + 1) // 2 if causal else T * T)
        seen += sum(heard + T + g for g in range(1, new))
        total += layers * sum(layer_flops(c, T + new - 1, 0, seen).values())
    return b.B * total


def answer_flops(c, b, new, causal=False):
    return hear_flops(c, b, causal) + ask_flops(c, b, new, causal)


def parameters(c):
    """How many numbers the LLM's weights are."""
    D, Hd, Kd = widths(c)
    layer = 2 * D * (Hd + Kd) + 3 * D * c.intermediate_size + 2 * D
    layer += c.qkv_bias * (Hd + 2 * Kd)
    return c.num_hidden_layers * layer + D + c.vocab_size * D * (1 if c.tie_word_embeddings else 2)


def cache_bytes(c, b, size, new=0):
    """Bytes of keys and values, `size` each: the same in every mode, every token leaves them."""
    tokens = sum(layers * (b.prefix + written + b.text + new) for written, layers in b.kinds(c))
    return 2 * size * b.B * tokens * c.num_key_value_heads * c.head_dim


def kept_bytes(c, b, size, fused=True):
    """Bytes that forward keeps for backward, without the logits: what each product and each bend
    will want to see again. Attention that never stores its T x S scores is taken for granted.

    fused: RMSNorm is one kernel (cuda); else it keeps x / rms besides (cpu).
    """
    (D, Hd, Kd), H, L = widths(c), c.num_attention_heads, c.num_hidden_layers
    run = b.prefix + b.text
    norm = D * (1 if fused else 2)               # x, and x / rms for the gain's gradient
    layer = (2 * (norm + D)                      # both norms and their outputs
             + 2 * Hd                            # q, and softmax(...) v
             + 4 * c.intermediate_size)          # gate, silu(gate), up; their product
    row = run * (L * layer + norm) + b.text * D  # the last norm, the logits' input
    row += sum(layers * (run + written) * 2 * Kd for written, layers in b.kinds(c))  # k, v
    once = 2 * (run + b.side) * c.head_dim       # cos and sin of the positions
    if b.side:
        row += b.side * 2 * D                    # the audio and, once for all layers, its norm
        once += len(b.layers) * 2 * D * Kd       # W_K, W_V with the gain folded in
        once += run * (run + b.side)             # the mask
        if len(b.layers) < L:
            once += run * run                    # and that of the layers that have no audio
    row32 = run * (L * (H + 2) + 1) + b.side     # float32: one a row of scores, one a norm
    return size * (b.B * row + once) + 4 * b.B * row32


def memory(c, b, size, fused=True):
    """Bytes of a training step, counted in five ways, each on top of the one before it."""
    P = parameters(c)
    logits = b.B * b.text * c.vocab_size * (size + 4)  # as they come, and their softmax in float32
    counts = {"activations kept": kept_bytes(c, b, size, fused), "+ logits, softmax": logits,
              "+ weights": size * P, "+ gradients": size * P, "+ Adam's state": 8 * P}
    return dict(zip(counts, accumulate(counts.values())))


def limits(c, Nt):
    """PLITS / LAL as Na grows. What is kept and what is cached tend to a constant. FLOPs do not:
    LAL's grow with Na, PLITS' with Na^2; so one more token costs first so many times as much, and
    in the end the whole ratio is so many times Na."""
    far = 10 ** 12

    def costs(f, Na, *more):
        return [f(c, batch(c, mode, 1, Na, Nt), *more) for mode in ("plits", "lal")]

    first = [one - none for one, none in zip(costs(train_flops, 1), costs(train_flops, 0))]
    flops, kept, cache = (p / l for p, l in (
        costs(train_flops, far), costs(kept_bytes, far, 2), costs(cache_bytes, far, 2)))
    return {"FLOPs, the first token": first[0] / first[1], "FLOPs, over Na": flops / far,
            "kept": kept, "cache": cache}


# ----------------------------------------------------------------- what the paper may have counted

MOST = 1 << 16  # audio tokens, where the search ends


def headline(c, B, Nt, size, count):
    """The Na from which on LAL saves the paper's share of memory, counted so, and of time; MOST
    if it never does. Time by causal FLOPs."""
    def both(f, Na):
        return [f(c, batch(c, mode, B, Na, Nt)) for mode in ("plits", "lal")]

    def saving(Na):
        plits, lal = both(lambda c, b: memory(c, b, size)[count], Na)
        return 1 - lal / plits

    def speed(Na):
        plits, lal = both(partial(train_flops, causal=True), Na)
        return plits / lal - 1

    return [bisect.bisect_left(range(MOST), PAPER[name], lo=1, key=f)
            for name, f in (("memory", saving), ("speed", speed))]


def both(c, B, size, count):
    """(Na, Nt) where both headlines hold at once: with less text, memory asks for more audio than
    time does, with more text for less. None if there is no such text of up to 4096 tokens."""
    def enough(Nt):
        saved, sped = headline(c, B, Nt, size, count)
        return saved <= sped

    Nt = bisect.bisect_left(range(4097), True, lo=1, key=enough)
    return (headline(c, B, Nt, size, count)[1], Nt) if Nt <= 4096 else None


# ------------------------------------------------------------------------------- the measurement

def saved_bytes(make, ours):
    """Bytes that autograd keeps of the forward pass `make`; tensors in `ours` are there anyway."""
    own = {t.untyped_storage().data_ptr() for t in ours}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # once each; held, so that no address comes again
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = make()  # noqa: F841 - alive until all is counted
    return sum(storage.nbytes() for storage in saved.values())


def inputs(llm, b):
    """Random text ids (B, Nt), and audio (B, n, D) to run and to write, None where n is 0."""
    weight = llm.model.embed_tokens.weight
    ids = torch.randint(llm.config.vocab_size, (b.B, b.text), device=weight.device)
    audio = [weight.new_empty(b.B, n, weight.shape[1]).normal_().requires_grad_() if n else None
             for n in (b.prefix, b.side)]  # a connector trains behind it: it needs a gradient
    return ids, *audio


def loss_of(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def loss(llm, b, ids, prefix, side):
    return loss_of(pal(llm, ids, prefix, side, layers=b.layers), ids)


def train_step(llm, *batch):
    llm.zero_grad(set_to_none=True)
    loss(llm, *batch).backward()


@torch.no_grad()
def listen(llm, b, prefix, side):
    """Write the audio into a new cache."""
    cache = None if prefix is None else hear(llm, prefix, "plits")
    return cache if side is None else hear(llm, side, "lal", cache, b.layers)


def timed(functions, device, rounds):
    """Run the functions {name: f} in turn: {name: seconds of each of so many runs}, all that f set
    going on the device included. A round before them is to warm up."""
    took = {name: [] for name in functions}
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    for _ in range(1 + rounds):
        for name, f in functions.items():
            wait()
            began = time.perf_counter()
            f()
            wait()
            took[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in took.items()}


def product_rate(device, dtype):
    """FLOPs a second of a large matrix product: the most that anything here could reach."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(timed({"product": lambda: a @ a}, device, 5)["product"])


class AttentionKernels(TorchDispatchMode):
    """Which attention kernels ran inside: flash, efficient, cudnn; else math, the slow one."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "_scaled_dot_product_" in (name := operation._schema.name):
            self.names.add(name.partition("product_")[2].partition("_attention")[0])
        return operation(*args, **(kwargs or {}))


def measure_training(llm, b, o, device):
    batch = inputs(llm, b)
    kept = saved_bytes(lambda: loss(llm, b, *batch), [*llm.parameters(), batch[0]])
    with AttentionKernels() as kernels:
        loss(llm, b, *batch)
    times = timed({"step": partial(train_step, llm, b, *batch)}, device, o.rounds)
    return {"kept": kept, "kernels": sorted(kernels.names), "seconds": times}


def measure_inference(llm, b, o, device):
    """Hear, and answer; also reading the question alone. A second question is one more answer."""
    ids, *audio = inputs(llm, b)
    cache = listen(llm, b, *audio)
    times = timed({"hear": lambda: listen(llm, b, *audio),
                   "answer": lambda: llm.generate(ids, o.new_tokens, cache=cache),
                   "read": lambda: llm.generate(ids, 1, cache=cache)}, device, o.rounds)
    return {"read": times.pop("read"), "seconds": times}


def measure_encoders(o):
    """Seconds a clip of each encoder, at a public size: the same in every mode."""
    device, dtype, took = torch.device(o.device), getattr(torch, o.dtype), {}
    for kind, size in ENCODERS.items():
        encoder = make_encoder(kind, size).eval().requires_grad_(False).to(device)
        wave = torch.randn(2, int(encoder.seconds * encoder.rate), device=device)
        with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
            runs = timed({kind: lambda: encoder(encoder.front_end(wave))}, device, o.rounds)
        took[kind] = statistics.median(runs[kind]) / len(wave)
    return took


def make_llm(o, dtype):
    """A new LLM of these shapes, its random weights made where and as they are needed."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(o.device):
        llm = LLM(LLMS[o.llm])
    torch.set_default_dtype(torch.float32)
    if o.compile:
        llm.model.forward = torch.compile(llm.model.forward)
    return llm


@cache
def prepared(o, kind):
    """What a process needs for all its rows: its share of the memory, an LLM, the product rate."""
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if device.type == "cuda":
        share = o.memory * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    else:  # more than there is would stop the machine; this way it is an error of torch's
        resource.setrlimit(resource.RLIMIT_DATA, (int(o.memory * 1e9),) * 2)
    if kind == "infer" and dtype == torch.bfloat16:
        dtype = torch.float16  # the paper's
    return make_llm(o, dtype).requires_grad_(kind == "train"), product_rate(device, dtype)


def work(o, kind, mode, Na, Nt):
    """A row of the sweep, in the process of its mode."""
    device, row = torch.device(o.device), {"mode": mode, "Na": Na, "Nt": Nt}
    llm, rate = prepared(o, kind)
    measure = measure_training if kind == "train" else measure_inference
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row |= measure(llm, setting(o, mode, kind, Na, Nt), o, device)
    except RuntimeError as e:  # torch's out of memory is one, on every device
        if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
            raise
        return row | OUT_OF_MEMORY
    llm.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return row | {"rate": rate, "peak": peak}


OUT_OF_MEMORY = {"error": "out of memory"}


def in_own_process(o, kind, mode, rows, bar):
    """The rows of a mode, all in one process; if that is killed, for memory, in another one."""
    spawn, done = multiprocessing.get_context("spawn"), []
    while len(done) < len(rows):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            try:
                for Na, Nt in rows[len(done):]:
                    done.append(process.submit(work, o, kind, mode, Na, Nt).result())
                    bar.update()
            except BrokenProcessPool:
                done.append({"mode": mode, "Na": Na, "Nt": Nt} | OUT_OF_MEMORY)
    return done


def peer_step(llm, ids, audio):
    """The same PLITS step by transformers' code, with the same weights: a function to be called."""
    try:
        import transformers as peers
    except ImportError:
        raise ValueError("--peer needs transformers: pip install transformers") from None
    name = "Qwen2" if llm.config.qkv_bias else "Llama"
    known = {k: v for k, v in asdict(llm.config).items() if k not in ("qkv_bias", "rope_scaling")}
    config = getattr(peers, name + "Config")(**known, attn_implementation="sdpa")
    peer = getattr(peers, name + "ForCausalLM")(config).to(audio.device, audio.dtype)
    missing, surprising = peer.load_state_dict(llm.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surprising, (missing, surprising)

    def step():
        peer.zero_grad(set_to_none=True)
        embeds = torch.cat([audio, peer.get_input_embeddings()(ids)], dim=1)
        logits = peer(inputs_embeds=embeds, logits_to_keep=ids.shape[1], use_cache=False).logits
        loss_of(logits, ids).backward()

    return step


def in_turn(o, Na, Nt):
    """Training steps of every mode (and the peer's), in turn, in one process; the best of each."""
    llm = make_llm(o, getattr(torch, o.dtype))
    steps, flops = {}, {}
    for mode in SHARES:
        b = setting(o, mode, "train", Na, Nt)
        ids, *audio = inputs(llm, b)
        flops[mode] = train_flops(LLMS[o.llm], b)
        steps[mode] = partial(train_step, llm, b, ids, *audio)
        if mode == "plits" and o.peer:
            steps["peer"], flops["peer"] = peer_step(llm, ids, audio[0]), flops[mode]
    best = {name: min(t) for name, t in timed(steps, torch.device(o.device), o.rounds).items()}
    return [{"step": name, "best s": took, "GFLOPs": flops[name] / 1e9,
             "x PLITS": best["plits"] / took, "predicted": flops["plits"] / flops[name],
             "reached %": 100 * best["plits"] / took * flops[name] / flops["plits"],
             "x peer": best["peer"] / took if o.peer else None} for name, took in best.items()]


# ----------------------------------------------------------------------------------- the report

def table(title, rows):
    """Print dicts as aligned columns, named by the keys of the longest."""
    def show(x):
        return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)

    columns = [[name.strip(), *(show(row.get(name)) for row in rows)]
               for name in max(rows, key=len)]
    print(f"\n{title}")
    for line in zip(*columns):
        print("  " + "  ".join(cell.rjust(max(map(len, column)))
                               for cell, column in zip(line, columns)))


def report(o, kind, found, encoding):
    """The lines of a table: prediction, measurement, the paper's word, side by side."""
    c, plits = LLMS[o.llm], {(r["Na"], r["Nt"]): r for r in found if r["mode"] == "plits"}
    cost = train_flops if kind == "train" else partial(answer_flops, new=o.new_tokens)
    lines = []
    for row in found:
        at = row["Na"], row["Nt"]
        base, b, beside = plits[at], *(setting(o, m, kind, *at) for m in (row["mode"], "plits"))
        flops, seen = ([cost(c, x, causal=causal) for x in (b, beside)]
                       for causal in (False, True))
        line = {"mode": row["mode"], "Na": at[0], "Nt": at[1], "GFLOPs": flops[0] / 1e9,
                "causal": seen[0] / 1e9, "samples/s": row.get("error")}
        lines.append(line)
        if "error" in row:
            continue
        times, lal = row["seconds"].values(), row["mode"] == "lal"
        took, other, peaks = seconds(row), seconds(base), (row["peak"], base.get("peak"))
        line |= {"samples/s": b.B / took,
                 "spread %": 100 * sum(max(t) - min(t) for t in times) / took,
                 "with encoders": encoding and b.B / (took + b.B * encoding),
                 "x PLITS predicted": flops[1] / flops[0], "causal ": seen[1] / seen[0],
                 "measured": other and other / took, "paper": SAYS["speed"] if lal else None,
                 **(training if kind == "train" else inference)(o, row, b, beside),
                 "peak MB": peaks[0] and peaks[0] / 1e6,
                 "saved %": 100 * (1 - peaks[0] / peaks[1]) if all(peaks) else None,
                 "paper ": SAYS[kind] if lal else None,
                 "utilisation %": 100 * seen[0] / took / row["rate"]}
    return lines


def seconds(row):
    """Median seconds of everything that a row does; None if it could not."""
    return sum(map(statistics.median, row["seconds"].values())) if "seconds" in row else None


def training(o, row, b, plits):
    """Columns of the training table alone."""
    peak, other = (memory(LLMS[o.llm], x, **number(o))["+ gradients"] for x in (b, plits))
    return {"attention": "+".join(row["kernels"]), "kept MB predicted": kept(o, b) / 1e6,
            "measured ": row["kept"] / 1e6, "peak MB predicted": peak / 1e6,
            "saved % predicted": 100 * (1 - peak / other)}


def number(o):
    """What kept_bytes wants to know of the device and of the numbers there."""
    return {"size": getattr(torch, o.dtype).itemsize, "fused": o.device.startswith("cuda")}


def kept(o, b):
    """What a training step keeps, the softmax of its logits too: what saved_bytes measures."""
    c = LLMS[o.llm]
    return kept_bytes(c, b, **number(o)) + 4 * b.B * b.text * c.vocab_size


def inference(o, row, b, plits):
    """Columns of the inference table alone; a second question costs what is left after hearing."""
    c, size = LLMS[o.llm], getattr(torch, o.dtype).itemsize
    hears, answers = map(statistics.median, row["seconds"].values())
    reads, ask = statistics.median(row["read"]), ask_flops(c, b, o.new_tokens)
    return {"s to hear": hears, "to read": reads, "to write": answers - reads,
            "2nd question, % of 1st, predicted": 100 * ask / answer_flops(c, b, o.new_tokens),
            "measured ": 100 * answers / (hears + answers),
            "cache MB": cache_bytes(c, b, size, o.new_tokens) / 1e6}


def arithmetic(o, Na, Nt):
    """What needs no machine: costs part by part, limits, and what the paper may have counted."""
    c, costs, counts = LLMS[o.llm], [], []
    for mode in SHARES:
        b = setting(o, mode, "train", Na, Nt)
        parts = {name: n / 1e9 for name, n in forward_flops(c, b).items()}
        costs.append({"mode": mode, **parts, "forward": sum(parts.values()),
                      "backward": backward_flops(c, b) / 1e9, "kept MB": kept_bytes(c, b, 2) / 1e6,
                      "cache MB": cache_bytes(c, b, 2) / 1e6})
    for count in memory(c, b, 2):
        line = {"counted": count}
        for text in (16, 64, 256):
            line[f"Nt {text}: 64.1% at Na"], line[f"Nt {text}: 247.5% at Na"] = headline(
                c, o.batch, text, 2, count)
        counts.append(line | {"both at (Na, Nt)": both(c, o.batch, 2, count)})
    return {"costs": costs, "limits": limits(c, Nt), "accounting": counts}


def machine(device):
    """What the numbers were measured on, and of which commit (+: files differ from it)."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True,
                              text=True).stdout.strip()

    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = text.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return {"cpu": cpu, "gpu": torch.cuda.get_device_name(device) if "cuda" in device else None,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "-s", "-uno"))}


def picture(o, measured, Na, Nt):
    """Memory and throughput against Na, and where one layer's FLOPs go, as one PNG in o.out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs pip install matplotlib", file=sys.stderr)
        return
    c = LLMS[o.llm]
    figure = Figure(figsize=(13, 4), layout="constrained")
    stored, speed, layer = figure.subplots(1, 3)
    rate = max((row["rate"] for row in measured if "rate" in row), default=1e12)
    stored.set_title("kept for backward, MB")
    speed.set_title(f"training steps, samples/s\n(lines: all FLOPs at {rate / 1e9:.3g} GFLOP/s)")
    layer.set_title(f"GFLOPs of one layer, forward, Na {Na}")
    for mode, colour in zip(SHARES, ("tab:red", "tab:blue", "tab:purple")):
        line = sorted({max(1, Na * i // 100) for i in range(101)})
        batches = [setting(o, mode, "train", n, Nt) for n in line]
        rows = [r for r in measured if (r["mode"], r["Nt"]) == (mode, Nt) and "error" not in r]
        for axis, predicted, dots in (
                (stored, [kept(o, b) / 1e6 for b in batches], [r["kept"] / 1e6 for r in rows]),
                (speed, [o.batch * rate / train_flops(c, b, causal=True) for b in batches],
                 [o.batch / seconds(r) for r in rows])):
            axis.plot(line, predicted, color=colour, label=mode.upper())
            axis.plot([r["Na"] for r in rows], dots, "o", color=colour)
            axis.set(xlabel=f"audio tokens Na (Nt {Nt}); lines predicted, dots measured",
                     yscale="log")
        low, parts = 0, forward_flops(c, batches[-1])
        for part, shade in zip(layer_flops(c, 1, 0, 1), ("C0", "C1", "C2", "C3")):
            high = parts[part] / c.num_hidden_layers / 1e9
            layer.bar(mode.upper(), high, bottom=low, color=shade, label=part)
            low += high
    stored.legend()
    layer.legend(list(layer_flops(c, 1, 0, 1)))
    figure.suptitle(f"{o.llm}, {o.dtype}, batch {o.batch}")
    path = Path(o.out) / f"bench-{o.llm}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)


# ------------------------------------------------------------------------------- what is learnt

ARMS = {  # train.py's options
    "plits": {"mode": "plits"}, "lal": {}, "pal": {"mode": "pal"}, "attn": {"mode": "attn"},
    "ffn": {"mode": "ffn"}, "flamingo": {"mode": "flamingo"},
    "lal-upper": {"lal_layers": "2:"}, "lal-no-rope": {"audio_rope": "off"},
    "lal-qformer": {"connector": "qformer"}, "lal-lfst": {"connector": "lfst"},
    "lal-ffn-frozen": {"freeze": "ffn"},
}


BATCH = 16


def quality(o):
    """Train and score every arm on the listening world: one table. What was done before, with the
    same options, is read from out/quality.jsonl."""
    arms = list(ARMS) if o.arms == "all" else o.arms.split(",")
    if not set(arms) <= set(ARMS):
        raise ValueError(f"--arms {o.arms}: choose all, or from {','.join(ARMS)}")
    mark = {name: getattr(o, name) for name in ("steps", "clips", "test_clips", "difficulty")}
    path = Path(o.out) / "quality.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    rows = [row for row in map(json.loads, path.open()) if mark.items() <= row.items()]
    done = {(row["arm"], row["seed"]): row for row in rows}
    for seed in tqdm(range(o.seeds), desc="seeds"):
        missing, sets = [arm for arm in arms if (arm, seed) not in done], None
        for arm in tqdm(missing, desc="arms", leave=False):
            sets = sets or heard_world(o, seed)
            row = done[arm, seed] = {"arm": arm, "seed": seed, **mark, **learn(o, arm, seed, sets)}
            with path.open("a") as file:
                print(json.dumps(row), file=file)
    lines = []
    for arm in arms:
        rows = [done[arm, seed] for seed in range(o.seeds)]
        lines.append({"arm": arm, **{task: spread([100 * row["right"][task] for row in rows])
                                     for task in rows[0]["right"]}, "trained": rows[0]["trained"],
                      "GFLOPs": rows[0]["flops"] / 1e9, "kept MB": rows[0]["kept"] / 1e6,
                      "ms a step": 1000 * statistics.median(row["seconds"] for row in rows)})
    table(f"% exactly right, mean ± sample standard deviation over seeds; {o.steps} steps of "
          f"{BATCH}; cost of a step of stage 3", lines)
    print(json.dumps({"settings": asdict(o), "machine": machine("cpu"), "quality": list(
        done[arm, seed] for arm in arms for seed in range(o.seeds))}))


def spread(values):
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{sd}"


def arm_of(o, arm, seed, folder=""):
    """train.py's Options for an arm, and the AudioLLM that they name."""
    first, second = o.steps // 12, o.steps // 5  # as in train.py
    options = train.Options(**ARMS[arm], seed=seed, out=folder, batch=BATCH, steps1=first,
                            steps2=second, steps3=o.steps - first - second)
    torch.manual_seed(seed)
    model = train.load_base(o.base, options.mode, train.WINDOWS, arm=train.arm_of(options))
    return options, model


def heard_world(o, seed):
    """A seed's training, validation and test set, each (features, items), for all arms. Of the
    general encoders every token is there, for LFST takes them unpooled."""
    _, model = arm_of(o, "lal", seed)
    model.windows |= dict.fromkeys(set(model.windows) - {"whisper"}, 1)
    sets = []
    for split, clips in (("train", o.clips), ("val", 1), ("test", o.test_clips)):
        clips, items = train.world(split, clips, seed, o.difficulty)
        sets.append((train.hear_all(model, clips), items))
    train.with_ids(model.tokenizer, sets[0][1])
    return sets


def learn(o, arm, seed, sets):
    """Train an arm and score it: shares of right answers by task, and what a step costs."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        options, model = arm_of(o, arm, seed, folder)
        windows = model.windows | {"whisper": 1}  # whose tokens are pooled already
        sets = [({clip: {kind: pool(x, windows[kind]) for kind, x in kinds.items()}
                  for clip, kinds in features.items()}, items) for features, items in sets]
        with open(f"{folder}/metrics.jsonl", "w") as file:
            train.train(model, *sets[:2], options, file, train.beginning(model, options, None))
        features, items = sets[2]
        right = {"all": []}
        for item, answer in zip(items, train.answers(model, features, items)):
            for task in (item["task"], "all"):
                right.setdefault(task, []).append(float(answer == item["output"]))
    model.train()
    about = {item["clip"]: item for item in sets[0][1]}  # a question about each of some clips
    step = partial(train.answer_loss, model, sets[0][0], [*about.values()][:BATCH])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step().backward()
    times = timed({arm: lambda: step().backward()}, model.device, 5)[arm]
    return {"right": {task: statistics.mean(r) for task, r in sorted(right.items())},
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "flops": counter.get_total_flops(), "kept": saved_bytes(step, model.parameters()),
            "seconds": statistics.median(times)}


# ----------------------------------------------------------------------------------------- options

@dataclass(frozen=True)
class Options:
    llm: str = option("small", "whose shapes; the weights are random", choices=list(LLMS))
    na: str = option("auto", "audio tokens, like 64,256 (auto: 64,256 for small; else 64 to 2048)")
    nt: str = option("64", "text tokens, like 16,64")
    batch: int = option(0, "clips in a training step (0: the paper's 8; for small 2)")
    infer_batch: int = option(0, "clips answered at once (0: the paper's 12; for small 2)")
    new_tokens: int = option(32, "length of an answer", low=2)
    share: float = option(0.5, "of PAL's audio tokens, how many run the PLITS way (the speech "
                               "encoder's); the rest is written the LAL way", high=1)
    measure: str = option("sweep", "every mode in a process of its own, or training steps of all "
                                   "modes in turn in one process, at the last Na and Nt",
                          choices=["sweep", "turns", "nothing"])
    rounds: int = option(5, "runs that count, after one that does not", low=1)
    peer: bool = option(False, "with --measure turns: beside them transformers' PLITS step")
    encoders: bool = option(False, "the encoders' time too: whisper small, sslam, clap tiny")
    compile: bool = option(False, "torch.compile the decoder")
    memory: float = option(0.0, "GB that a process may have (0: all there is)")
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("auto", "of training (auto: bfloat16 on cuda, then float16 for inference; "
                                "else float32)", choices=["auto", "float32", "bfloat16", "float16"])
    out: str = option("out", "folder for the picture, which needs matplotlib, and quality.jsonl")
    quality: bool = option(False, "instead of all that, train and score arms on train.py's world")
    arms: str = option("all", "with --quality: which, like lal,pal: " + ", ".join(ARMS))
    seeds: int = option(3, "with --quality: runs of each arm, seeds 0, 1...", low=1)
    steps: int = option(500, "with --quality: training steps of an arm")
    clips: int = option(2000, "with --quality: training clips", low=1)
    test_clips: int = option(200, "with --quality: test clips", low=1)
    difficulty: int = option(1, "with --quality: of the world", high=2)
    base: str = option("assets/base.pt", "with --quality: the prepared encoders and LLM")


def numbers(text, flag):
    """"256,64" as [64, 256]. ValueError if it says anything else."""
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= MOST for part in parts):
        raise ValueError(f"{flag} {text}: expected whole numbers of 1 to {MOST}, like 64,256")
    return sorted({int(part) for part in parts})


def setting(o, mode, kind, Na, Nt):
    """The Batch that the options make of a mode, for kind train or infer."""
    return batch(LLMS[o.llm], mode, o.batch if kind == "train" else o.infer_batch, Na, Nt, o.share)


def settle(o):
    """The options made definite, and every row (Na, Nt) of the sweep."""
    device, small = pick_device(o.device, o.dtype), o.llm == "small"
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if o.dtype == "auto" else o.dtype
    Na = "64,256" if small else "64,128,256,512,1024,2048"
    rows = [(a, t) for t in numbers(o.nt, "--nt")
            for a in numbers(Na if o.na == "auto" else o.na, "--na")]
    o = replace(o, device=str(device), dtype=dtype, batch=o.batch or (2 if small else 8),
                infer_batch=o.infer_batch or (2 if small else 12),
                memory=o.memory or (
                    torch.cuda.mem_get_info(device)[0] if device.type == "cuda"
                    else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 1e9)
    needed = parameters(LLMS[o.llm]) * getattr(torch, dtype).itemsize / 1e9
    if needed > o.memory and o.measure != "nothing":
        raise ValueError(f"--llm {o.llm}: its weights alone take {needed:.2g} GB of {dtype}, and "
                         f"there are {o.memory:.2g} GB on {device}")
    return o, rows


def main(o):
    if o.quality:
        return quality(o)
    o, rows = settle(o)
    result = {"settings": asdict(o), "machine": machine(o.device), **arithmetic(o, *rows[-1])}
    print(f"{o.llm}, {o.dtype}, training batch {o.batch}, inference batch {o.infer_batch}; PAL "
          f"runs {o.share:.0%} of its audio tokens and writes the rest")
    print(*(f"{name} {value}" for name, value in result["machine"].items()), sep=", ")
    table(f"arithmetic: GFLOPs of a step at (Na, Nt) = {rows[-1]}; MB at 2 bytes a number",
          result["costs"])
    table("PLITS / LAL as Na grows", [result["limits"]])
    table(f"accounting at batch {o.batch}: where LAL reaches the paper's figures, by causal FLOPs",
          result["accounting"])
    measured = {"train": [], "infer": []}
    if o.measure == "turns":
        result["in turn"] = in_turn(o, *rows[-1])
        table(f"training steps in turn in one process, best of {o.rounds}, (Na, Nt) = {rows[-1]}",
              result["in turn"])
    if o.measure == "sweep":
        encoding = None
        if o.encoders:
            result["encoders"] = measure_encoders(o)
            encoding = sum(result["encoders"].values())
            table("encoders, seconds a clip", [result["encoders"]])
        with tqdm(total=2 * len(SHARES) * len(rows), desc="sweep", leave=False) as bar:
            for kind, found in measured.items():
                for mode in SHARES:
                    found += in_own_process(o, kind, mode, rows, bar)
        result |= {"measured": measured,
                   "training": report(o, "train", measured["train"], encoding),
                   "inference": report(o, "infer", measured["infer"], encoding)}
        table("training, forward and backward, each mode in its own process", result["training"])
        table(f"inference, {o.new_tokens} new tokens", result["inference"])
    picture(o, measured["train"], *rows[-1])
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Options, __doc__, main)
