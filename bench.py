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

    python bench.py                                     # a small LLM, about a minute on a CPU
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from encoders import make_encoder
from integrate import hear, pal
from model import LLM, LLMConfig
from sample import command_line, option, pick_device

LLMS = {
    "small": LLMConfig(8192, 512, 2048, 8, 8, 2, 64),
    "llama-3.2-1b": LLMConfig(128256, 2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": LLMConfig(128256, 3072, 8192, 28, 24, 8, 128),
    "qwen2.5-1.5b": LLMConfig(151936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True),
}
PAPER = {"memory": 0.641, "speed": 2.475}  # of LAL against PLITS: less, and more


# ------------------------------------------------------------------------------------- the math

@dataclass(frozen=True)
class Batch:
    """What a mode makes of B rows with Na audio tokens and Nt text tokens each.

    Of the audio, `prefix` tokens run through the LLM and `side` tokens are only written into the
    cache, of those layers that are in `layers`. PLITS is all prefix, LAL all side, PAL some of each.
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


def layer_flops(c, run, written, pairs):
    """FLOPs of one layer and row: `run` tokens pass through it, `written` leave only k and v.

    pairs: how many (query, key) there are, in each head. (m, k) times (k, n) takes 2 m k n.
    """
    D, Hd, Kd = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
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
    D, V = c.hidden_size, c.vocab_size
    Hd, Kd = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    first = min(b.layers, default=c.num_hidden_layers) if frozen and not b.prefix else 0
    if frozen and first == c.num_hidden_layers:
        return 0
    total = (1 if frozen else 2) * b.text * 2 * D * V
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
    D, Hd, Kd = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * D * (Hd + Kd) + 3 * D * c.intermediate_size + 2 * D
    layer += c.qkv_bias * (Hd + 2 * Kd)
    return c.num_hidden_layers * layer + D + c.vocab_size * D * (1 if c.tie_word_embeddings else 2)


def cache_bytes(c, b, size, new=0):
    """Bytes of keys and values, `size` each: the same in every mode, for every token leaves them."""
    tokens = sum(layers * (b.prefix + written + b.text + new) for written, layers in b.kinds(c))
    return 2 * size * b.B * tokens * c.num_key_value_heads * c.head_dim


def kept_bytes(c, b, size, frozen=False, fused=True):
    """Bytes that forward keeps for backward, without the logits: what each product and each bend
    will want to see again. Attention that never stores its T x S scores is taken for granted.

    fused: RMSNorm is one kernel (cuda); else it keeps x / rms besides (cpu).
    """
    D, F_, H, d = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.head_dim
    Hd, Kd, L, run = H * d, c.num_key_value_heads * d, c.num_hidden_layers, b.prefix + b.text
    trained = not frozen
    norm = D * (1 if frozen or fused else 2)    # x, and x / rms for the gain's gradient
    layer = (2 * (norm + D * trained)           # both norms; their outputs, for weight gradients
             + 2 * Hd                           # q, and softmax(...) v
             + (3 + trained) * F_)              # gate, silu(gate), up; their product
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
    once += 2 * (run + b.side) * d              # cos and sin of the positions
    return size * (b.B * row + once) + 4 * b.B * row32


def memory(c, b, size, frozen=False, fused=True):
    """Bytes of a training step, counted in five ways, each on top of the one before it."""
    P = parameters(c)
    logits = b.B * b.text * c.vocab_size * (size + 4)  # as they come, and their softmax in float32
    counts = {"activations kept": kept_bytes(c, b, size, frozen, fused), "+ logits, softmax": logits,
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
        plits, lal = (memory(c, batch(c, mode, B, Na, Nt), size)[count] for mode in ("plits", "lal"))
        return 1 - lal / plits

    def speed(Na):
        plits, lal = (train_flops(c, batch(c, mode, B, Na, Nt), causal=causal)
                      for mode in ("plits", "lal"))
        return plits / lal - 1

    return smallest(saving, PAPER["memory"]), smallest(speed, PAPER["speed"])


def both(c, B, size, count, causal=True):
    """(Na, Nt) where both headlines hold at once, that is where `headline` gives one Na; or None."""
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


def attention_kernels(f):
    """The names of the attention kernels that f() calls: "math" is the slow one."""
    with torch.profiler.profile() as profile:
        f()
    start = "aten::_scaled_dot_product_"
    return sorted({e.key.removeprefix(start).removesuffix("_for_cpu").removesuffix("_attention")
                   for e in profile.key_averages() if e.key.startswith(start)
                   and "backward" not in e.key})


def out_of_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)


def measure_training(llm, b, o, floor):
    device = llm.model.embed_tokens.weight.device
    batch = inputs(llm, b)
    kept = saved_bytes(lambda: loss(llm, b, *batch), [*llm.parameters(), batch[0]])

    def step():
        llm.zero_grad(set_to_none=True)
        loss(llm, b, *batch).backward()

    forget_peak(device)
    row = {"seconds": timed(step, device, o.repeats), "peak": peak(device) - floor, "kept": kept}
    return {**row, "kernels": attention_kernels(step)}


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


def make_llm(o, device, dtype):
    """A new LLM of these shapes, its random weights made where and as they are needed."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        llm = LLM(LLMS[o.llm])
    torch.set_default_dtype(torch.float32)
    return llm


def work(o, mode, kind, rows, pipe):
    """One mode's process: measure every row (Na, Nt) and send what came out, row by row."""
    torch.manual_seed(o.seed)
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if kind == "infer" and dtype == torch.bfloat16:
        dtype = torch.float16  # the paper's
    if o.memory:
        hold_back(o.memory, device)
    forget_peak(device)
    floor = 0 if device.type == "cuda" else peak(device)
    pipe.send(product_rate(device, dtype))
    if kind == "encoders":
        pipe.send(measure_encoders(o, device, dtype))
        return
    llm = make_llm(o, device, dtype).requires_grad_(kind == "train" and not o.frozen)
    if o.compile:
        llm.model.forward = torch.compile(llm.model.forward)
    for Na, Nt in rows:
        b = o.make(mode, kind, Na, Nt)
        try:
            row = {"train": measure_training, "infer": measure_inference}[kind](llm, b, o, floor)
        except RuntimeError as e:  # torch's out of memory, of any device, is one
            if not out_of_memory(e):
                raise
            row = {"error": "out of memory"}
        llm.zero_grad(set_to_none=True)
        pipe.send(row)


def hold_back(gb, device):
    """Let this process have so many GB, no more, for its data."""
    if device.type == "cuda":
        share = gb * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gb * 1e9),) * 2)


def in_own_process(o, mode, kind, rows, bar):
    """What `work` sends of all rows, and the rate. A process that is killed ran out of memory."""
    spawn, done, rate = multiprocessing.get_context("spawn"), [], None
    while len(done) < len(rows):
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=work, args=(o, mode, kind, rows[len(done):], there))
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        try:
            rate = here.recv()
            while len(done) < len(rows):
                done.append(here.recv())
                bar.update()
        except EOFError:
            process.join()
            if process.exitcode >= 0:
                raise ValueError(f"{mode}: its process failed, see above") from None
            done.append({"error": "out of memory"})
            bar.update()
        process.join()
    return done, rate


def measure_encoders(o, device, dtype):
    """Seconds a clip of each encoder, at its public size: the same in every mode."""
    times = {}
    for kind, size in ENCODERS.items():
        encoder = make_encoder(kind, size).eval().requires_grad_(False).to(device)
        wave = torch.randn(2, int(encoder.seconds * encoder.rate), device=device)
        with torch.inference_mode(), torch.autocast(device.type, dtype, dtype != torch.float32):
            found = timed(lambda: encoder(encoder.front_end(wave)), device, o.repeats)
        times[kind] = found["median"] / len(wave)
    return {"encoder": times, "seconds a clip": sum(times.values())}


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
    for ours, theirs in zip(llm.parameters(), peer.parameters()):
        theirs.requires_grad_(ours.requires_grad)

    def step():
        peer.zero_grad(set_to_none=True)
        audio.grad = None
        embeds = torch.cat([audio, peer.get_input_embeddings()(ids)], dim=1)
        logits = peer(inputs_embeds=embeds, logits_to_keep=ids.shape[1], use_cache=False).logits
        loss_of(logits, ids).backward()

    return step


def side_by_side(o):
    """Training steps of every mode (and the peer's), in turn, in one process; the best of each."""
    torch.manual_seed(o.seed)
    device, (Na, Nt) = torch.device(o.device), o.rows[-1]
    llm = make_llm(o, device, getattr(torch, o.dtype)).requires_grad_(not o.frozen)
    batches = {mode: o.make(mode, "train", Na, Nt) for mode in SHARES}
    ids, audio = inputs(llm, batches["plits"])
    steps = {mode: lambda b=b: train_step(llm, ids, audio, b) for mode, b in batches.items()}
    if o.peer:
        steps["peer"], gradients = peer_step(llm, ids, audio), []
        for name in ("plits", "peer"):
            steps[name]()
            gradients.append(audio.grad.float())
        far = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        assert far < (1e-3 if o.dtype == "float32" else 0.1), f"the peer computes otherwise: {far}"
    best = dict.fromkeys(steps, float("inf"))
    for turn in tqdm(range(o.rounds + 1), desc="side by side", leave=False):
        for name, step in steps.items():
            took = seconds(step, device)
            if turn:  # the first one warms up
                best[name] = min(best[name], took)
    flops = {mode: train_flops(LLMS[o.llm], b, o.frozen) for mode, b in batches.items()}
    flops["peer"] = flops["plits"]
    rows = []
    for name, took in best.items():
        ratio, sped = flops["plits"] / flops[name], best["plits"] / took
        row = {"step": name, "best s": took, "FLOPs T": flops[name] / 1e12, "speed-up": sped,
               "predicted": ratio, "reached %": 100 * sped / ratio}
        rows.append(row | ({"against peer": best["peer"] / took} if o.peer else {}))
    return {"Na": Na, "Nt": Nt, "batch": o.batch, "rounds": o.rounds, "rows": rows}


# ----------------------------------------------------------------------------------- the report

def table(title, rows):
    """Print dicts, all with the same keys, as aligned columns."""
    def show(x):
        return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)

    columns = [[name, *(show(row.get(name)) for row in rows)] for name in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    print(f"\n{title}")
    for line in zip(*columns):
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def against(row, rows, f):
    """f of PLITS's row with the same Na and Nt, and f of this one; None if one ran out of memory."""
    base = next(r for r in rows if r["mode"] == "plits" and (r["Na"], r["Nt"]) == (row["Na"], row["Nt"]))
    return None if "error" in row or "error" in base else (f(base), f(row))


def training_report(o, found, encoding):
    """Rows of the training table: prediction, measurement, the paper's word, side by side."""
    c, size, fused = LLMS[o.llm], getattr(torch, o.dtype).itemsize, o.device.startswith("cuda")
    lines = []
    for row in found:
        base, b = (o.make(mode, "train", row["Na"], row["Nt"]) for mode in ("plits", row["mode"]))
        flops, of_plits = (train_flops(c, x, o.frozen) for x in (b, base))
        seen = train_flops(c, b, o.frozen, causal=True)
        keeps = kept_bytes(c, b, size, o.frozen, fused) + 4 * b.B * b.text * c.vocab_size
        least, most = (memory(c, x, size, o.frozen, fused)["+ gradients"] for x in (b, base))
        line = {"mode": row["mode"], "Na": row["Na"], "Nt": row["Nt"], "GFLOPs": flops / 1e9,
                "causal": seen / 1e9}
        lines.append(line)
        if "error" in row:
            line["samples/s"] = row["error"]
            continue
        t = row["seconds"]
        line |= {"samples/s": b.B / t["median"],
                 "spread %": 100 * (t["max"] - t["min"]) / t["median"]}
        if encoding:
            line["with encoders"] = b.B / (t["median"] + b.B * encoding)
        sped = against(row, found, lambda r: r["seconds"]["median"])
        saved = against(row, found, lambda r: r["peak"])
        line |= {"speed-up predicted": of_plits / flops,
                 "causal ": train_flops(c, base, o.frozen, causal=True) / seen,
                 "measured": sped and sped[0] / sped[1],
                 "paper": {"lal": "up to 3.475", "pal": "not given"}.get(row["mode"], "1"),
                 "kept MB predicted": keeps / 1e6, "measured ": row["kept"] / 1e6,
                 "peak MB predicted": least / 1e6, "measured  ": row["peak"] / 1e6,
                 "saved % predicted": 100 * (1 - least / most),
                 "measured   ": saved and 100 * (1 - saved[1] / saved[0]),
                 "paper ": {"lal": "up to 64.1", "pal": "not given"}.get(row["mode"], "0"),
                 "utilisation %": 100 * seen / t["median"] / row["rate"],
                 "attention": "+".join(row["kernels"])}
    return lines


def inference_report(o, found, encoding):
    """Rows of the inference table; the second question costs what is left when hearing is not."""
    c, size = LLMS[o.llm], 2 if o.dtype == "bfloat16" else getattr(torch, o.dtype).itemsize
    lines = []
    for row in found:
        b = o.make(row["mode"], "infer", row["Na"], row["Nt"])
        heard, asked = hear_flops(c, b), ask_flops(c, b, o.new_tokens)
        line = {"mode": row["mode"], "Na": row["Na"], "Nt": row["Nt"],
                "hear GFLOPs": heard / 1e9, "ask": asked / 1e9}
        lines.append(line)
        if "error" in row:
            line["hear s"] = row["error"]
            continue
        hears, prompt, whole = (row["seconds"][name]["median"] for name in ("hear", "ask", "all"))
        sped = against(row, found, lambda r: sum(r["seconds"][n]["median"] for n in ("hear", "all")))
        saved = against(row, found, lambda r: r["peak"])
        line |= {"hear s": hears, "question s": prompt, "answer s": whole - prompt,
                 "samples/s": b.B / (hears + whole)}
        if encoding:
            line["with encoders"] = b.B / (hears + whole + b.B * encoding)
        line |= {"speed-up": sped and sped[0] / sped[1],
                 "2nd question % of 1st predicted": 100 * asked / (heard + asked),
                 "measured": 100 * whole / (hears + whole),
                 "cache MB": cache_bytes(c, b, size, o.new_tokens) / 1e6,
                 "peak MB predicted": infer_bytes(c, b, size, o.new_tokens) / 1e6,
                 "measured ": row["peak"] / 1e6,
                 "saved %": saved and 100 * (1 - saved[1] / saved[0])}
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
                      "causal, both": train_flops(c, b, o.frozen, causal=True) / 1e9,
                      "kept MB": kept_bytes(c, b, 2, o.frozen) / 1e6,
                      "cache MB": cache_bytes(c, b, 2) / 1e6})
    for count in tqdm(memory(c, b, 2), desc="accounting", leave=False):
        line = {"counted": count}
        for text in sorted({16, 64, 256}):
            saved, line[f"Na for 247.5%, Nt {text}"] = headline(c, o.batch, text, 2, count)
            line[f"Na for 64.1%, Nt {text}"] = saved
        line["both at (Na, Nt)"] = both(c, o.batch, 2, count)
        counts.append(line)
    return {"costs": costs, "limits": limits(c, Nt), "accounting": counts}


def machine(device):
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__}


def commit():
    """The commit that these numbers are of, with + if files differ from it; None outside of git."""
    def git(*words):
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None


def pictures(o, training, rate):
    """Two pictures in o.out: memory and throughput against Na; the FLOPs of one layer."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    c, size = LLMS[o.llm], getattr(torch, o.dtype).itemsize
    (Na, Nt), fused = o.rows[-1], o.device.startswith("cuda")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = dict(zip(SHARES, ("tab:red", "tab:blue", "tab:purple")))
    for mode, colour in colours.items():
        lengths = [n for n, text in o.rows if text == Nt]
        line = range(min(lengths), max(lengths) + 1, max(1, max(lengths) // 200))
        batches = [o.make(mode, "train", n, Nt) for n in line]
        keeps = [(kept_bytes(c, b, size, o.frozen, fused) + 4 * b.B * b.text * c.vocab_size) / 1e6
                 for b in batches]
        axes[0].plot(line, keeps, color=colour, label=mode.upper())
        if rate:
            speeds = [b.B * rate / train_flops(c, b, o.frozen, causal=True) for b in batches]
            axes[1].plot(line, speeds, color=colour)
        dots = [r for r in training if (r["mode"], r["Nt"]) == (mode, Nt) and "error" not in r]
        axes[0].plot([r["Na"] for r in dots], [r["kept"] / 1e6 for r in dots], "o", color=colour)
        axes[1].plot([r["Na"] for r in dots], [o.batch / r["seconds"]["median"] for r in dots], "o",
                     color=colour)
    bottoms = dict.fromkeys(SHARES, 0)
    for part in layer_flops(c, 1, 0, 1):
        heights = [forward_flops(c, o.make(mode, "train", Na, Nt))[part] / c.num_hidden_layers / 1e9
                   for mode in SHARES]
        axes[2].bar([mode.upper() for mode in SHARES], heights, bottom=list(bottoms.values()), label=part)
        bottoms = dict(zip(SHARES, (a + b for a, b in zip(bottoms.values(), heights))))
    for axis, title in zip(axes, ("kept for backward, MB", "training, samples/s",
                                  f"GFLOPs of one layer, forward, Na {Na}")):
        axis.set_title(title)
    for axis in axes[:2]:
        axis.set_xlabel(f"audio tokens Na (Nt {Nt}, batch {o.batch}); lines predicted, dots measured")
        axis.set_yscale("log")
    axes[0].legend()
    axes[2].legend()
    path = Path(o.out)
    path.mkdir(parents=True, exist_ok=True)
    figure.suptitle(f"{o.llm}, {o.dtype}")
    figure.savefig(path / f"bench-{o.llm}.png", dpi=80)
    print(f"wrote {path / f'bench-{o.llm}.png'}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- options

ENCODERS = {"whisper": "small", "sslam": "base", "clap": "tiny"}  # public sizes, for --encoders


def numbers(text, flag, low=1, high=1 << 20):
    """"4,8-10" as [4, 8, 9, 10], in order. ValueError if it says anything else."""
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise ValueError(f"{flag} {text}: expected whole numbers, like 64,256 or 4-15")
        found += range(int(first), int(last or first) + 1)
    if not found or not all(low <= n <= high for n in found):
        raise ValueError(f"{flag} {text}: expected {low} to {high}")
    return sorted(set(found))


def available(device):
    """Bytes of memory that a new process could have on the device; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    return None


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
    lal_layers: str = option("all", "layers that read written audio, like 4-15")
    frozen: bool = option(False, "train the audio tokens alone: stage 1")
    sweep: bool = option(True, "measure every mode in a process of its own")
    repeats: int = option(5, "runs whose median is taken, after one that does not count", low=1)
    rounds: int = option(0, "also run the modes' training steps in turn in one process, so often, at "
                            "the last Na and Nt, and keep the best")
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
    last = c.num_hidden_layers - 1
    layers = numbers(f"0-{last}" if o.lal_layers == "all" else o.lal_layers, "--lal-layers", 0, last)
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if o.dtype == "auto" else o.dtype
    s = Settings(**{**asdict(o), "device": str(device), "dtype": dtype, "rows": tuple(rows),
                    "layers": tuple(layers), "batch": o.batch or (2 if small else 8),
                    "infer_batch": o.infer_batch or (2 if small else 12),
                    "rounds": o.rounds or 5 * o.peer,
                    "memory": o.memory or (available(device) or 0) / 1e9})
    needed = parameters(c) * getattr(torch, dtype).itemsize / 1e9
    if s.memory and needed > s.memory and (o.sweep or s.rounds):
        raise ValueError(f"--llm {o.llm}: its weights alone take {needed:.2g} GB of {dtype}, and "
                         f"there are {s.memory:.2g} GB on {device}")
    return s


def main(o):
    o = settle(o)
    device = torch.device(o.device)
    result = {"settings": asdict(o), "machine": machine(device), "commit": commit()}
    print(f"{o.llm}, {o.dtype}, training batch {o.batch}, inference batch {o.infer_batch}; "
          f"PAL runs {o.share:.0%} of its audio tokens; {'LLM frozen' if o.frozen else 'all trained'}")
    result |= arithmetic_report(o)
    table(f"arithmetic: GFLOPs of a step at Na, Nt = {o.rows[-1]}; MB at 2 bytes a number",
          result["costs"])
    table("PLITS / LAL as Na grows", [result["limits"]])
    table("accounting: the smallest Na where LAL reaches the paper's figures (causal FLOPs)",
          result["accounting"])
    rate, encoding = None, 0
    if o.sweep:
        measured = {"train": [], "infer": []}
        with tqdm(total=2 * len(SHARES) * len(o.rows) + o.encoders, desc="sweep", leave=False) as bar:
            if o.encoders:
                result["encoders"] = in_own_process(o, "encoders", "encoders", [(0, 0)], bar)[0][0]
                encoding = result["encoders"].get("seconds a clip", 0)
                print(f"encoders: {result['encoders']}")
            for kind, found in measured.items():
                for mode in SHARES:
                    rows, rate = in_own_process(o, mode, kind, o.rows, bar)
                    found += [{"mode": mode, "Na": Na, "Nt": Nt, "rate": rate, **row}
                              for (Na, Nt), row in zip(o.rows, rows)]
        result |= {"training": training_report(o, measured["train"], encoding),
                   "inference": inference_report(o, measured["infer"], encoding),
                   "measured": measured}
        table("training, forward and backward", result["training"])
        table(f"inference, {o.new_tokens} new tokens", result["inference"])
        rate = max(row["rate"] for row in measured["train"])
        pictures(o, measured["train"], rate)
    if o.rounds:
        result["side by side"] = side_by_side(o)
        table(f"training steps in turn in one process, best of {o.rounds}, Na, Nt = {o.rows[-1]}",
              result["side by side"]["rows"])
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Options, __doc__, main)
