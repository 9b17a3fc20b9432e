"""The numbers: what PLITS, LAL and PAL cost, derived, checked, measured, and seen. How to read the
result: one table for training, one for inference, a row for each mode and number of audio tokens
Na. "Predicted" is this file's own arithmetic (matrix products only: 2 m k n operations for (m, k)
times (k, n)), "measured" is this machine's clock and memory, "paper" is what the paper says of its
own setting, which it does not describe in full. Speed-ups are against PLITS of the same row: the
prediction is the ratio of FLOPs, so a measured speed-up below it is time lost on work that is not
a matrix product, and the utilisation is the share of this machine's own matrix product rate that
the mode reaches. "Kept" is what forward stores for backward; "peak" is everything, weights and
gradients too. The accounting table asks what the paper may have counted: for each way to count
memory, the Na at which the paper's 64.1% falls out, and the Na at which its 247.5% does. Where
the two are equal, both headlines hold at one setting. Each mode runs in a process of its own, one
after another; "out of memory" is a result too. The last line of stdout is all of it, as JSON.

    python bench.py                                     # a small LLM, a minute or two on a CPU
    python bench.py --llm llama-3.2-1b                  # shapes only, random weights: for a GPU
    python bench.py --no-sweep                          # the arithmetic alone, nothing measured
    python bench.py --no-sweep --na 512 --nt 64 --batch 8 --rounds 5 --peer

The paper: arXiv 2506.10423v2, figure 1 and section 3.
"""
import bisect
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from encoders import make_encoder
from integrate import hear, pal, pick_layers
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
SAYS = {"plits": ("1", "0"), "lal": ("up to 3.475", "up to 64.1"), "pal": ("not given",) * 2}


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


def kept_bytes(c, b, size, frozen=False, fused=True):
    """Bytes that forward keeps for backward, without the logits: what each product and each bend
    will want to see again. Attention that never stores its T x S scores is taken for granted.

    fused: RMSNorm is one kernel (cuda); else it keeps x / rms besides (cpu).
    """
    (D, Hd, Kd), H, L = widths(c), c.num_attention_heads, c.num_hidden_layers
    run, trained = b.prefix + b.text, not frozen
    norm = D * (1 if frozen or fused else 2)    # x, and x / rms for the gain's gradient
    layer = (2 * (norm + D * trained)           # both norms; their outputs, for weight gradients
             + 2 * Hd                           # q, and softmax(...) v
             + (3 + trained) * c.intermediate_size)  # gate, silu(gate), up; their product
    row = run * (L * layer + norm) + b.text * D * trained       # the last norm, the logits' input
    row += sum(layers * (run + written) * 2 * Kd for written, layers in b.kinds(c))  # k, v
    if b.side:
        row += b.side * D * (1 + trained)       # the audio and, once for all layers, its norm
    once = len(b.layers) * 2 * D * Kd if b.side else 0          # W_K, W_V with the gain folded in
    once += run * (run + b.side) if b.side else 0               # the mask
    if b.side and len(b.layers) < L:
        once += run * run                       # the mask of the layers that have no audio
    row32 = run * (L * (H + 2) + 1) + b.side    # float32: one a row of scores, one a norm
    if frozen and not b.prefix:                 # what comes before the audio keeps nothing
        first = min(b.layers, default=L)
        row -= b.text * (first * (layer + 2 * Kd) + norm)
        row32 -= b.text * (first * (H + 2) + 1)
    once += 2 * (run + b.side) * c.head_dim     # cos and sin of the positions
    return size * (b.B * row + once) + 4 * b.B * row32


def memory(c, b, size, frozen=False, fused=True):
    """Bytes of a training step, counted in five ways, each on top of the one before it."""
    P = parameters(c)
    logits = b.B * b.text * c.vocab_size * (size + 4)  # as they come, and their softmax in float32
    counts = {"activations kept": kept_bytes(c, b, size, frozen, fused),
              "+ logits, softmax": logits,
              "+ weights": size * P, "+ gradients": 0 if frozen else size * P,
              "+ Adam's state": 0 if frozen else 8 * P}  # two float32 each
    total, sums = 0, {}
    for name, n in counts.items():
        total += n
        sums[name] = total
    return sums


def infer_bytes(c, b, size, new):
    """Bytes at the peak of inference: weights, what was heard, and the fuller of two moments.

    Hearing: the widest place of the widest layer. Asking: the copy of the cache that goes on.
    """
    def moment(run, written=0):  # residual stream, norm; silu(gate), up and their product
        return size * b.B * max(run * (2 * c.hidden_size + 3 * c.intermediate_size),
                                written * 2 * c.hidden_size)

    heard = cache_bytes(c, Batch(b.B, b.prefix, b.side, 0, b.layers), size)
    ask = cache_bytes(c, b, size, new) + moment(b.text)
    return size * parameters(c) + heard + max(moment(b.prefix, b.side), ask)


def limits(c, Nt, size=2):
    """What PLITS / LAL tends to as Na grows and all else stays: the cost of one more audio token.

    Memory: a constant. FLOPs: under PLITS each one more costs more than the last, for attention's
    Na^2 stays; so the ratio starts near one constant and in the end grows with Na by another.
    """
    def cost(f, mode, Na):
        b = batch(c, mode, 1, Na, Nt)
        return f(c, b) if f is train_flops else f(c, b, size)

    def more(f, mode, Na=0):
        return cost(f, mode, Na + 1) - cost(f, mode, Na)

    lal = more(train_flops, "lal")
    growth = more(train_flops, "plits", 1) - more(train_flops, "plits", 0)
    return {"FLOPs, at first": more(train_flops, "plits") / lal,
            "FLOPs, more for each audio token": growth / 2 / lal,
            "kept": more(kept_bytes, "plits", 1) / more(kept_bytes, "lal", 1),
            "cache": more(cache_bytes, "plits") / more(cache_bytes, "lal")}


# ----------------------------------------------------------------- what the paper may have counted

MOST = 1 << 16  # audio tokens, where the search ends


def smallest(f, target):
    """The smallest Na with f(Na) >= target, for an f that grows; None beyond MOST."""
    found = bisect.bisect_left(range(1, MOST), target, key=f) + 1
    return found if found < MOST else None


def headline(c, B, Nt, size, count, causal=True):
    """The Na from which on LAL saves the paper's share of memory, counted so, and of time."""
    def saving(Na):
        plits, lal = (memory(c, batch(c, mode, B, Na, Nt), size)[count]
                      for mode in ("plits", "lal"))
        return 1 - lal / plits

    def speed(Na):
        plits, lal = (train_flops(c, batch(c, mode, B, Na, Nt), causal=causal)
                      for mode in ("plits", "lal"))
        return plits / lal - 1

    return smallest(saving, PAPER["memory"]), smallest(speed, PAPER["speed"])


def both(c, B, size, count, causal=True):
    """(Na, Nt) where both headlines hold at once, `headline` giving one Na; or None."""
    def gap(Nt):
        saved, sped = headline(c, B, Nt, size, count, causal)
        return (saved or MOST) - (sped or MOST)

    steps = [round(2 ** (i / 2)) for i in range(2, 25)]  # 2 ... 4096 text tokens
    gaps = [gap(Nt) for Nt in steps]
    for low, high, a, z in zip(steps, steps[1:], gaps, gaps[1:]):
        if a and (a > 0) != (z > 0):
            sign = 1 if z > a else -1
            Nt = bisect.bisect_left(range(low, high), 0, key=lambda n: sign * gap(n)) + low
            return headline(c, B, Nt, size, count, causal)[1], Nt
    return None


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


def train_step(llm, b, ids, prefix, side):
    llm.zero_grad(set_to_none=True)
    loss(llm, b, ids, prefix, side).backward()


@torch.no_grad()
def listen(llm, b, prefix, side):
    """Write the audio into a new cache."""
    cache = None if prefix is None else hear(llm, prefix, "plits")
    return cache if side is None else hear(llm, side, "lal", cache, b.layers)


def seconds(f, device):
    """How long f() takes, everything that it set going on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def timed(f, device, repeats):
    """Median, smallest and largest of so many runs of f, after one that does not count."""
    f()
    times = [seconds(f, device) for _ in range(repeats)]
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def product_rate(device, dtype):
    """FLOPs a second of a large matrix product: the most that anything here could reach."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / timed(lambda: a @ a, device, 5)["min"]


def forget_peak(device):
    """Start to look for the peak of memory anew; what is measured is `peak`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """Bytes at the peak since forget_peak: of the GPU's tensors, on CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class AttentionKernels(TorchDispatchMode):
    """Which attention kernels ran inside: flash, efficient, cudnn; none: math, the slow one."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.partition("_scaled_dot_product_")[2]
        if name:
            self.names.add(name.split("_attention")[0])
        return operation(*args, **(kwargs or {}))


def measure_training(llm, b, o, floor):
    device = llm.model.embed_tokens.weight.device
    batch = inputs(llm, b)
    kept = saved_bytes(lambda: loss(llm, b, *batch), [*llm.parameters(), batch[0]])

    step = partial(train_step, llm, b, *batch)
    forget_peak(device)
    row = {"seconds": timed(step, device, o.repeats), "peak": peak(device) - floor, "kept": kept}
    with AttentionKernels() as kernels:
        if not o.compile:  # which has its own idea of what an operation is
            loss(llm, b, *batch)
    return {**row, "kernels": sorted(kernels.names)}


def measure_inference(llm, b, o, floor):
    """Hear, read the question, answer, apart; a second question costs the latter two again."""
    device = llm.model.embed_tokens.weight.device
    ids, *audio = inputs(llm, b)
    forget_peak(device)
    times = {"hear": timed(lambda: listen(llm, b, *audio), device, o.repeats)}
    cache = listen(llm, b, *audio)
    for name, new in (("ask", 1), ("all", o.new_tokens)):
        times[name] = timed(lambda: llm.generate(ids, new, cache=cache), device, o.repeats)
    return {"seconds": times, "peak": peak(device) - floor}


def measure_encoders(o, device, dtype):
    """Seconds a clip of each encoder, at a public size: the same in every mode."""
    took = {}
    for kind, size in ENCODERS.items():
        encoder = make_encoder(kind, size).eval().requires_grad_(False).to(device)
        wave = torch.randn(2, int(encoder.seconds * encoder.rate), device=device)
        with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
            found = timed(lambda: encoder(encoder.front_end(wave)), device, o.repeats)
        took[kind] = found["median"] / len(wave)
    return took


def make_llm(o, device, dtype):
    """A new LLM of these shapes, its random weights made where and as they are needed."""
    torch.manual_seed(o.seed)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        llm = LLM(LLMS[o.llm])
    torch.set_default_dtype(torch.float32)
    if o.compile:
        llm.model.forward = torch.compile(llm.model.forward)
    return llm


def work(o, kind, mode, rows, pipe):
    """One mode's process: measure every row (Na, Nt) and send what came out, row by row."""
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if device.type == "cuda":
        share = o.memory * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    elif o.memory:  # more than there is would stop the machine; this way it is an error of torch's
        resource.setrlimit(resource.RLIMIT_DATA, (int(o.memory * 1e9),) * 2)
    if kind == "encoders":
        pipe.send(None)
        pipe.send(measure_encoders(o, device, dtype))
        return
    if kind == "infer" and dtype == torch.bfloat16:
        dtype = torch.float16  # the paper's
    pipe.send(product_rate(device, dtype))
    forget_peak(device)
    floor = 0 if device.type == "cuda" else peak(device)
    llm = make_llm(o, device, dtype).requires_grad_(kind == "train" and not o.frozen)
    for Na, Nt in rows:
        try:
            pipe.send(MEASURES[kind](llm, o.make(mode, kind, Na, Nt), o, floor))
        except RuntimeError as e:  # torch's out of memory is one, on every device
            if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
                raise
            pipe.send({"error": "out of memory"})
        llm.zero_grad(set_to_none=True)


MEASURES = {"train": measure_training, "infer": measure_inference}


def in_own_process(o, kind, mode, rows, bar):
    """What `work` sends of all rows. A process that is killed ran out of memory."""
    spawn, done = multiprocessing.get_context("spawn"), []
    while len(done) < len(rows):
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=work, args=(o, kind, mode, rows[len(done):], there))
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        try:
            rate = here.recv()
            while len(done) < len(rows):
                done.append({"mode": mode, "rate": rate, **here.recv()})
                bar.update()
        except EOFError:
            process.join()
            if process.exitcode >= 0:
                raise ValueError(f"{mode}: its process failed, for the reason above") from None
            done.append({"mode": mode, "error": "out of memory"})
        process.join()
    return [{"Na": Na, "Nt": Nt, **row} for (Na, Nt), row in zip(rows, done)]


# ------------------------------------------------------------------------- one beside the other

def peer_step(llm, ids, audio):
    """The same PLITS step by transformers' code, with the same weights: a function to be called."""
    try:
        import transformers as peers
    except ImportError:
        raise ValueError("--peer needs transformers: pip install transformers") from None
    c, name = llm.config, "Qwen2" if llm.config.qkv_bias else "Llama"
    known = {k: v for k, v in asdict(c).items() if k not in ("qkv_bias", "rope_scaling")}
    config = getattr(peers, name + "Config")(**known, attn_implementation="sdpa")
    peer = getattr(peers, name + "ForCausalLM")(config).to(audio.device, audio.dtype)
    missing, surprising = peer.load_state_dict(llm.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surprising, (missing, surprising)
    peer.requires_grad_(llm.model.norm.weight.requires_grad)

    def step():
        peer.zero_grad(set_to_none=True)
        embeds = torch.cat([audio, peer.get_input_embeddings()(ids)], dim=1)
        logits = peer(inputs_embeds=embeds, logits_to_keep=ids.shape[1], use_cache=False).logits
        loss_of(logits, ids).backward()

    return step


def side_by_side(o):
    """Training steps of every mode (and the peer's), in turn, in one process; the best of each."""
    device, (Na, Nt) = torch.device(o.device), o.rows[-1]
    llm = make_llm(o, device, getattr(torch, o.dtype)).requires_grad_(not o.frozen)
    steps, flops, gradients = {}, {}, {}
    for mode in SHARES:
        b = o.make(mode, "train", Na, Nt)
        ids, *audio = inputs(llm, b)
        flops[mode] = train_flops(LLMS[o.llm], b, o.frozen)
        steps[mode] = partial(train_step, llm, b, ids, *audio)
        if mode == "plits" and o.peer:
            steps["peer"], flops["peer"] = peer_step(llm, ids, audio[0]), flops[mode]
            for name in steps:
                audio[0].grad = None
                steps[name]()
                gradients[name] = audio[0].grad.float()
            far = (gradients["plits"] - gradients["peer"]).norm() / gradients["peer"].norm()
            assert far < (1e-3 if o.dtype == "float32" else 0.1), f"the peer is off by {far}"
    best = dict.fromkeys(steps, float("inf"))
    for turn in tqdm(range(o.rounds + 1), desc="side by side", leave=False):
        for name, step in steps.items():
            took = seconds(step, device)
            best[name] = min(best[name], took) if turn else best[name]  # the first one warms up
    rows = []
    for name, took in best.items():
        ratio, sped = flops["plits"] / flops[name], best["plits"] / took
        row = {"step": name, "best s": took, "GFLOPs": flops[name] / 1e9, "speed-up": sped,
               "predicted": ratio, "reached %": 100 * sped / ratio}
        rows.append(row | ({"x peer": best["peer"] / took} if o.peer else {}))
    return rows


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


def training_report(o, found, encoding):
    """Rows of the training table: prediction, measurement, the paper's word, side by side."""
    c, size, fused = LLMS[o.llm], getattr(torch, o.dtype).itemsize, o.device.startswith("cuda")
    lines, plits = [], {(r["Na"], r["Nt"]): r for r in found if r["mode"] == "plits"}
    for row in found:
        at, mode = (row["Na"], row["Nt"]), row["mode"]
        both = [o.make(m, "train", *at) for m in ("plits", mode)]
        flops = [train_flops(c, b, o.frozen) for b in both]
        seen = [train_flops(c, b, o.frozen, causal=True) for b in both]
        peaks = [memory(c, b, size, o.frozen, fused)["+ gradients"] for b in both]
        line = {"mode": mode, "Na": at[0], "Nt": at[1], "GFLOPs": flops[1] / 1e9,
                "causal": seen[1] / 1e9, "samples/s": row.get("error")}
        lines.append(line)
        if "error" in row:
            continue
        took, base = row["seconds"]["median"], plits[at] if "error" not in plits[at] else None
        line |= {"samples/s": o.batch / took,
                 "spread %": 100 * (row["seconds"]["max"] - row["seconds"]["min"]) / took,
                 "with encoders": encoding and o.batch / (took + o.batch * encoding),
                 "x PLITS predicted": flops[0] / flops[1], "causal ": seen[0] / seen[1],
                 "measured": base and base["seconds"]["median"] / took, "paper": SAYS[mode][0],
                 "kept MB predicted": kept(o, both[1]) / 1e6, "measured ": row["kept"] / 1e6,
                 "peak MB predicted": peaks[1] / 1e6, "measured  ": row["peak"] / 1e6,
                 "saved % predicted": 100 * (1 - peaks[1] / peaks[0]),
                 "measured   ": base and 100 * (1 - row["peak"] / base["peak"]),
                 "paper ": SAYS[mode][1], "utilisation %": 100 * seen[1] / took / row["rate"],
                 "attention": "+".join(row["kernels"]) or ("?" if o.compile else "math")}
    return lines


def kept(o, b):
    """What a training step keeps, the softmax of its logits too: what saved_bytes measures."""
    c, size, fused = LLMS[o.llm], getattr(torch, o.dtype).itemsize, o.device.startswith("cuda")
    return kept_bytes(c, b, size, o.frozen, fused) + 4 * b.B * b.text * c.vocab_size


def inference_report(o, found, encoding):
    """Rows of the inference table; a second question costs what is left when hearing is not."""
    c, size = LLMS[o.llm], getattr(torch, o.dtype).itemsize
    lines, plits = [], {(r["Na"], r["Nt"]): r for r in found if r["mode"] == "plits"}
    for row in found:
        at, B = (row["Na"], row["Nt"]), o.infer_batch
        b = o.make(row["mode"], "infer", *at)
        heard, asked = hear_flops(c, b), ask_flops(c, b, o.new_tokens)
        line = {"mode": row["mode"], "Na": at[0], "Nt": at[1], "GFLOPs to hear": heard / 1e9,
                "to answer": asked / 1e9, "s to hear": row.get("error")}
        lines.append(line)
        if "error" in row:
            continue
        hears, reads, answers = (row["seconds"][name]["median"] for name in ("hear", "ask", "all"))
        base = plits[at] if "error" not in plits[at] else None
        whole = base and base["seconds"]["hear"]["median"] + base["seconds"]["all"]["median"]
        line |= {"s to hear": hears, "to read": reads, "to answer ": answers - reads,
                 "samples/s": B / (hears + answers),
                 "with encoders": encoding and B / (hears + answers + B * encoding),
                 "x PLITS": whole and whole / (hears + answers),
                 "2nd question, % of 1st, predicted": 100 * asked / (heard + asked),
                 "measured": 100 * answers / (hears + answers),
                 "cache MB": cache_bytes(c, b, size, o.new_tokens) / 1e6,
                 "peak MB predicted": infer_bytes(c, b, size, o.new_tokens) / 1e6,
                 "measured ": row["peak"] / 1e6,
                 "saved %": base and 100 * (1 - row["peak"] / base["peak"]),
                 "paper": {"plits": "0", "lal": "up to 83", "pal": "not given"}[row["mode"]]}
    return lines


def arithmetic_report(o):
    """What needs no machine: costs part by part, limits, and what the paper may have counted."""
    c, (Na, Nt) = LLMS[o.llm], o.rows[-1]
    costs, counts = [], []
    for mode in SHARES:
        b = o.make(mode, "train", Na, Nt)
        parts = {name: n / 1e9 for name, n in forward_flops(c, b).items()}
        costs.append({"mode": mode, **parts, "forward": sum(parts.values()),
                      "backward": backward_flops(c, b, o.frozen) / 1e9,
                      "both, causal": train_flops(c, b, o.frozen, causal=True) / 1e9,
                      "kept MB": kept_bytes(c, b, 2, o.frozen) / 1e6,
                      "cache MB": cache_bytes(c, b, 2) / 1e6})
    for count in memory(c, b, 2):
        line = {"counted": count}
        for text in (16, 64, 256):
            line[f"Nt {text}: 64.1% at Na"], line[f"Nt {text}: 247.5% at Na"] = headline(
                c, o.batch, text, 2, count)
        line["both at (Na, Nt)"] = both(c, o.batch, 2, count)
        counts.append(line)
    return {"costs": costs, "limits": limits(c, Nt), "accounting": counts}


def machine(device):
    """What the numbers were measured on, and of which commit (+: files differ from it)."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True,
                              text=True).stdout.strip()

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": names[0] if names else platform.processor(), "gpu": gpu,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "-s", "-uno"))}


def picture(o, measured):
    """Memory and throughput against Na, and where one layer's FLOPs go, as one PNG in o.out."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs pip install matplotlib", file=sys.stderr)
        return
    c, (Na, Nt) = LLMS[o.llm], o.rows[-1]
    figure = Figure(figsize=(13, 4), layout="constrained")
    stored, speed, layer = figure.subplots(1, 3)
    rate = max((row["rate"] for row in measured if "rate" in row), default=1e12)
    for mode, colour in zip(SHARES, ("tab:red", "tab:blue", "tab:purple")):
        line = sorted({max(1, Na * i // 100) for i in range(101)})
        batches = [o.make(mode, "train", n, Nt) for n in line]
        rows = [r for r in measured if (r["mode"], r["Nt"]) == (mode, Nt) and "error" not in r]
        for axis, predicted, dots in (
                (stored, [kept(o, b) / 1e6 for b in batches], [r["kept"] / 1e6 for r in rows]),
                (speed, [o.batch * rate / train_flops(c, b, o.frozen, True) for b in batches],
                 [o.batch / r["seconds"]["median"] for r in rows])):
            axis.plot(line, predicted, color=colour, label=mode.upper())
            axis.plot([r["Na"] for r in rows], dots, "o", color=colour)
    low = [0] * len(SHARES)
    for part in layer_flops(c, 1, 0, 1):
        high = [forward_flops(c, o.make(mode, "train", Na, Nt))[part] / c.num_hidden_layers / 1e9
                for mode in SHARES]
        layer.bar([mode.upper() for mode in SHARES], high, bottom=low, label=part)
        low = [a + b for a, b in zip(low, high)]
    stored.set_title("kept for backward, MB")
    speed.set_title(f"training steps, samples/s\n(lines: all FLOPs at {rate / 1e9:.3g} GFLOP/s)")
    layer.set_title(f"GFLOPs of one layer, forward, Na {Na}")
    for axis in (stored, speed):
        axis.set(xlabel=f"audio tokens Na (Nt {Nt}); lines predicted, dots measured", yscale="log")
    stored.legend()
    layer.legend()
    figure.suptitle(f"{o.llm}, {o.dtype}, batch {o.batch}")
    path = Path(o.out) / f"bench-{o.llm}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    print(f"wrote {path}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- options

def numbers(text, flag):
    """"256,64" as [64, 256]. ValueError if it says anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 1 << 20 for part in parts):
        raise ValueError(f"{flag} {text}: expected whole numbers of 1 to {1 << 20}, like 64,256")
    return sorted({int(part) for part in parts})


def available(device):
    """Bytes of memory that a new process could have on the device; 0 if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    words = Path("/proc/meminfo").read_text().split() if sys.platform == "linux" else []
    return int(words[words.index("MemAvailable:") + 1]) * 1024 if words else 0


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
    lal_layers: str = option("all", "layers that read written audio, like 4: or ::2 or 0,4,8")
    frozen: bool = option(False, "train the audio tokens alone: stage 1")
    sweep: bool = option(True, "measure every mode in a process of its own")
    repeats: int = option(5, "runs whose median is taken, after one that does not count", low=1)
    rounds: int = option(0, "also run all modes' training steps in turn in one process, so often, "
                            "at the last Na and Nt, and keep the best")
    peer: bool = option(False, "beside them transformers' PLITS step (5 rounds unless --rounds)")
    encoders: bool = option(False, "the encoders' time too: whisper small, sslam, clap tiny")
    compile: bool = option(False, "torch.compile the decoder")
    memory: float = option(0.0, "GB that a process may have (0: all there is)")
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("auto", "of training (auto: bfloat16 on cuda, then float16 for inference; "
                                "else float32)", choices=["auto", "float32", "bfloat16", "float16"])
    seed: int = option(0, "of weights and inputs")
    out: str = option("out", "folder for the picture, which needs matplotlib")


@dataclass(frozen=True)
class Settings(Options):
    """The options, made definite: every row (Na, Nt) of the sweep, the layers that read audio."""
    rows: tuple = ()
    layers: tuple = ()

    def make(self, mode, kind, Na, Nt):
        B = self.batch if kind == "train" else self.infer_batch
        return batch(LLMS[self.llm], mode, B, Na, Nt, self.share, self.layers)


def settle(o):
    """Settings from Options; ValueError says what cannot be."""
    device = pick_device(o.device)
    c, small = LLMS[o.llm], o.llm == "small"
    Na = "64,256" if small else "64,128,256,512,1024,2048"
    rows = [(a, t) for t in numbers(o.nt, "--nt") for a in
            numbers(Na if o.na == "auto" else o.na, "--na")]
    layers = pick_layers(o.lal_layers, c.num_hidden_layers) or range(c.num_hidden_layers)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if o.dtype == "auto" else o.dtype
    s = Settings(**{**asdict(o), "device": str(device), "dtype": dtype, "rows": tuple(rows),
                    "layers": tuple(layers), "batch": o.batch or (2 if small else 8),
                    "infer_batch": o.infer_batch or (2 if small else 12),
                    "rounds": o.rounds or 5 * o.peer,
                    "memory": o.memory or available(device) / 1e9})
    needed = parameters(c) * getattr(torch, dtype).itemsize / 1e9
    if s.memory and needed > s.memory and (o.sweep or s.rounds):
        raise ValueError(f"--llm {o.llm}: its weights alone take {needed:.2g} GB of {dtype}, and "
                         f"there are {s.memory:.2g} GB on {device}")
    return s


def main(o):
    o = settle(o)
    result = {"settings": asdict(o), "machine": machine(torch.device(o.device))}
    print(f"{o.llm}, {o.dtype}, training batch {o.batch}, inference batch {o.infer_batch}; PAL "
          f"runs {o.share:.0%} of its audio tokens and writes the rest; "
          f"{'the LLM is frozen' if o.frozen else 'all is trained'}")
    print(*(f"{name} {value}" for name, value in result["machine"].items()), sep=", ")
    result |= arithmetic_report(o)
    table(f"arithmetic: GFLOPs of a step at (Na, Nt) = {o.rows[-1]}; MB at 2 bytes a number",
          result["costs"])
    table("PLITS / LAL as Na grows", [result["limits"]])
    table(f"accounting at batch {o.batch}: where LAL reaches the paper's figures, by causal FLOPs",
          result["accounting"])
    measured = {"train": [], "infer": []}
    if o.sweep:
        steps = len(measured) * len(SHARES) * len(o.rows) + o.encoders
        with tqdm(total=steps, desc="sweep", leave=False) as bar:
            encoders = in_own_process(o, "encoders", "all", [(0, 0)], bar) if o.encoders else []
            for kind, found in measured.items():
                for mode in SHARES:
                    found += in_own_process(o, kind, mode, o.rows, bar)
        encoding = sum(encoders[0].get(kind, 0) for kind in ENCODERS) if encoders else None
        result |= {"encoders": encoders, "measured": measured,
                   "training": training_report(o, measured["train"], encoding),
                   "inference": inference_report(o, measured["infer"], encoding)}
        if encoders:
            table("encoders, seconds a clip", [{**ENCODERS, **encoders[0]}])
        table("training, forward and backward, each mode in its own process", result["training"])
        table(f"inference, {o.new_tokens} new tokens", result["inference"])
    if o.rounds:
        result["side by side"] = side_by_side(o)
        table(f"training steps in turn in one process, best of {o.rounds}, (Na, Nt) = {o.rows[-1]}",
              result["side by side"])
    picture(o, measured["train"])
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Options, __doc__, main)
