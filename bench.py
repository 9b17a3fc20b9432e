"""What each mode costs, derived and measured, and what it learns from the same training.
How to read the result: a row is a mode with Na audio tokens and Nt text tokens. Predicted FLOPs
(floating-point operations) are those of matrix products alone: 2 m k n for (m, k) times (k, n),
causal ones without the query-key pairs that a causal mask hides. Measured figures are this
machine's. The paper's are of a setting that it does not describe in full. "x" is the speed relative
to PLITS in the same setting, "less %" the memory saved against it. "Saved MB" is what the forward
pass keeps for the backward pass, "peak MB", on a GPU, all memory. Utilisation is relative to this
machine's own rate of matrix products. The accounting table has, for each way to count memory, the
Na from which on LAL needs 64.1% less than PLITS, and the Na from which on it is 247.5% faster. The
last line of stdout is the whole result as JSON.

    python bench.py                                     # a small LLM, a minute or two on a CPU
    python bench.py --llm llama-3.2-1b                  # its shapes, random weights: for a GPU
    python bench.py --measure nothing                   # the arithmetic alone
    python bench.py --measure turns --na 512 --nt 64 --batch 8 --hf-reference
    python bench.py --quality --arms lal,plits          # train them, and score what they learn

The paper: arXiv 2506.10423v2, figure 1 and section 3; integrate.py spells out the modes. Letters:
B rows of a batch, D width of the LLM (large language model), Hd and Kd widths of all its queries
and of all its keys, c an LLMConfig, w a Workload, o the Options.
"""
import bisect
import io
import json
import statistics
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import accumulate, islice, product
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data.features import extract_features
from data.lists import add_token_ids
from data.pretrain import load_base
from data.world import load_world
from integrate import hear, pal
from lib.cli import command_line, option, parse_sizes, pick_device
from lib.plots import COLOURS, draw_costs, draw_if_possible, draw_learning
from lib.profiling import (attention_kernels, available_memory, call_elsewhere, count_flops,
                           count_saved_bytes, describe_machine, hf_reference_step, limit_memory,
                           print_table, product_rate, time_in_turns)
from lib.scores import mean_and_deviation, task_scores
from lib.variant_costs import (VARIANTS, cross_entropy, variant_costs, variant_flops, variant_step,
                               widths)
from lib.variants import ARMS
from model import LLM, LLMConfig

LLMS = {
    "small": LLMConfig(8192, 512, 2048, 8, 8, 2, 64),
    "llama-3.2-1b": LLMConfig(128256, 2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": LLMConfig(128256, 3072, 8192, 28, 24, 8, 128),
    "qwen2.5-1.5b": LLMConfig(151936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True),
}
BATCH_SIZES = {"train": 8, "infer": 12}  # the paper's
SMALL_BATCH = 2  # of the small LLM
NEW_TOKENS = 32  # length of an answer
MAX_AUDIO_TOKENS = 1 << 16  # of --na and --nt, and where the search for a break-even ends
PAPER_GAINS = {"memory": 0.641, "speed": 2.475}  # of LAL over PLITS: share saved, share faster
PAPER_CLAIMS = {"speed": "up to 3.475", "train": "up to 64.1", "infer": "up to 83"}
PREFIX_SHARES = {"plits": 1.0, "lal": 0.0, "pal": 0.5}  # of the audio tokens; PAL's is --share
SUMMARY_TOKENS = 16  # of pal-summary, which run before all of the audio tokens are written
MODES = (*PREFIX_SHARES, "pal-summary")
# Of --fits: the questions of the paper's three stages, and whether the LLM is frozen there
RECIPE = ((2 * 1.2e6, True), (1.92e6, False), (5.68e6, False))
GPU_FLOPS, UTILISATION = 312e12, 0.4  # an A100's in bfloat16, and what is reached of it
MAX_MICRO_BATCH = 4096
LOGIT_BYTES = 12  # at the peak: log-softmax, its gradient and that of the logits, in float32


# ----------------------------------------------------------------------------------- arithmetic

@dataclass(frozen=True)
class Workload:
    """B rows of audio and text, and what the LLM does with them.

    `prefix` audio tokens run through the LLM, `side` audio tokens are only written into the cache
    of each layer, then `text` tokens run. PLITS has no side, LAL no prefix.
    """
    B: int
    prefix: int
    side: int
    text: int

    @property
    def passes(self):
        """(queries, keys) of each run through a layer. Prefix and text are one run, unless
        something is written between them."""
        if self.prefix and self.side:
            return (self.prefix, self.prefix), (self.text, self.prefix + self.side + self.text)
        return ((self.prefix + self.text, self.prefix + self.side + self.text),)

    @property
    def unread(self):
        """Tokens whose output of the last layer nothing reads: a prefix that runs on its own."""
        return self.prefix if self.side else 0


def make_workload(mode, B, Na, Nt, share=None):
    """The Workload of a mode. share: of PAL's audio tokens, how much runs (None: one half)."""
    if mode == "pal-summary":
        return Workload(B, SUMMARY_TOKENS, Na, Nt)
    share = share if mode == "pal" and share is not None else PREFIX_SHARES[mode]
    prefix = round(share * Na)
    return Workload(B, prefix, Na - prefix, Nt)


def count_pairs(passes, causal):
    """Query-key pairs of one row and head; causal: only those where the query sees the key. The
    queries are the last of the keys: the last query sees all of them, each one before it one less.
    """
    return sum(q * k - causal * q * (q - 1) // 2 for q, k in passes)


def layer_flops(c, run, written, pairs):
    """FLOPs of one layer and row: `run` tokens pass through it, `written` leave only k and v; each
    of `pairs` query-key pairs costs 2 Hd in q k^T and 2 Hd where its weight multiplies v."""
    D, Hd, Kd = widths(c)
    return {
        "q, o": run * 2 * D * 2 * Hd,                           # W_Q x, W_O y
        "k, v": (run + written) * 2 * D * 2 * Kd,               # W_K x, W_V x
        "attention": pairs * 2 * 2 * Hd,                        # q k^T, softmax(...) v
        "feed-forward": run * 2 * D * 3 * c.intermediate_size,  # gate, up, down
    }


def forward_flops(c, w, causal=False):
    """FLOPs of one forward pass with logits at every text token, part by part."""
    layer = layer_flops(c, w.prefix + w.text, w.side, count_pairs(w.passes, causal))
    parts = {"logits": w.text * 2 * c.hidden_size * c.vocab_size}
    parts |= {name: c.num_hidden_layers * flops for name, flops in layer.items()}
    return {name: w.B * flops for name, flops in parts.items()}


def backward_flops(c, w, frozen=False, causal=False):
    """FLOPs of the backward pass: a product A B with gradient G needs G B^T for A and A^T G for B.

    So it takes twice the forward pass where weights and inputs both need a gradient. With a frozen
    LLM only the audio does: products with weights count once, attention still twice.
    """
    D, Hd, Kd = widths(c)
    times = 1 if frozen else 2

    def gradient_flops(run, written, passes):
        parts = layer_flops(c, run, written, count_pairs(passes, causal))
        attention = parts.pop("attention")
        return 2 * attention + times * sum(parts.values())

    total = times * w.text * 2 * D * c.vocab_size
    total += c.num_hidden_layers * gradient_flops(w.prefix + w.text, w.side, w.passes)
    # in the last layer unread tokens have a gradient for k, v (not taken off) and for nothing else
    total -= gradient_flops(w.unread, -w.unread, [(w.unread, w.unread)])
    if frozen and w.side:  # text enters the first layer without a gradient: none for its q, k, v
        total -= w.text * 2 * D * (Hd + 2 * Kd) + count_pairs(w.passes[-1:], causal) * 2 * Hd
    return w.B * total


def train_flops(c, w, frozen=False, causal=False):
    return sum(forward_flops(c, w, causal).values()) + backward_flops(c, w, frozen, causal)


def hear_flops(c, w, causal=False):
    """FLOPs of writing the audio into the cache."""
    return sum(forward_flops(c, replace(w, text=0), causal).values())


def ask_flops(c, w, new, causal=False):
    """FLOPs of a question of `text` tokens about what was heard, and of `new` tokens of answer.

    The first new token comes out of the question's own pass; each other one is one more pass.
    """
    keys = w.prefix + w.side + w.text
    passes = [(w.text, keys)] + [(1, keys + i) for i in range(1, new)]
    layer = layer_flops(c, w.text + new - 1, 0, count_pairs(passes, causal))
    logits = new * 2 * c.hidden_size * c.vocab_size  # of one token at a time
    return w.B * (logits + c.num_hidden_layers * sum(layer.values()))


def answer_flops(c, w, new, causal=False):
    return hear_flops(c, w, causal) + ask_flops(c, w, new, causal)


def count_parameters(c):
    D, Hd, Kd = widths(c)
    layer = 2 * D * (Hd + Kd) + 3 * D * c.intermediate_size + 2 * D + c.qkv_bias * (Hd + 2 * Kd)
    return c.num_hidden_layers * layer + D + c.vocab_size * D * (1 if c.tie_word_embeddings else 2)


def cache_bytes(c, w, size, new=0):
    """Bytes of all keys and values, `size` each. Every token leaves them, in every mode."""
    tokens = c.num_hidden_layers * (w.prefix + w.side + w.text + new)
    return 2 * size * w.B * tokens * c.num_key_value_heads * c.head_dim


def saved_activation_bytes(c, w, size, fused=True):
    """Bytes that the forward pass saves for backward, in numbers of `size` bytes; logits left out.

    That is what each product and each nonlinearity needs again. Attention needs no scores, only
    its inputs, its output and a float32 for each query.
    fused: as on CUDA, where RMSNorm (root mean square normalisation) is one kernel and attention
    needs no mask in memory. Else, as on a CPU, RMSNorm saves x / rms too, and attention a mask for
    all layers, unless there are as many queries as keys.
    """
    D, Hd, Kd = widths(c)
    H, L = c.num_attention_heads, c.num_hidden_layers
    run = w.prefix + w.text
    norm = D * (1 if fused else 2)               # x, and x / rms for the gain's gradient
    entry = norm + D                             # the first norm and its output
    rest = (norm + D                             # the second norm and its output
            + 2 * Hd                             # q, and softmax(...) v
            + 4 * c.intermediate_size)           # gate, silu(gate), up; their product
    numbers = run * (L * (entry + rest) + norm) + w.text * D  # last norm, the logits' input
    float32 = run * (L * (2 + H) + 1) + w.side   # rms of each norm, log-sum-exp of each head
    shared = 2 * (run + w.side) * c.head_dim     # cos and sin of the positions, for all rows
    for queries, keys in w.passes:
        numbers += L * keys * 2 * Kd             # k, v
        if not fused and 1 < queries < keys:
            shared += queries * keys             # the mask
    if w.side:
        numbers += w.side * 2 * D                # the audio and, once for all layers, its norm
        shared += L * 2 * D * Kd                 # W_K, W_V with the gain multiplied in
    # of unread tokens the last layer saves no more than the first norm and its output
    numbers -= w.unread * (rest + 2 * Kd + norm)
    float32 -= w.unread * (2 + H)
    return size * (w.B * numbers + shared) + 4 * w.B * float32


def memory(c, w, size, fused=True):
    """Bytes of a training step, counted in five ways, each on top of the one before it."""
    P = count_parameters(c)
    logits = w.B * w.text * c.vocab_size * (size + 4)  # as they come, and their softmax in float32
    counts = {"saved activations": saved_activation_bytes(c, w, size, fused),
              "+ logits, softmax": logits, "+ weights": size * P, "+ gradients": size * P,
              "+ Adam's state": 8 * P}
    return dict(zip(counts, accumulate(counts.values())))


def plits_over_lal(cost, c, B, Na, Nt):
    """cost(c, workload) of PLITS relative to LAL's."""
    return cost(c, make_workload("plits", B, Na, Nt)) / cost(c, make_workload("lal", B, Na, Nt))


def limits(c, Nt):
    """PLITS / LAL as Na grows. For saved and cached bytes that tends to a constant. For FLOPs it
    grows with Na, as only PLITS has Na^2 pairs: given are the ratio for the first audio token
    alone, and the number that, times Na, the whole ratio tends to."""
    def first_token(c, w):
        return train_flops(c, w) - train_flops(c, replace(w, prefix=0, side=0))

    many = 10 ** 12
    return {"FLOPs, the first token": plits_over_lal(first_token, c, 1, 1, Nt),
            "FLOPs, over Na": plits_over_lal(train_flops, c, 1, many, Nt) / many,
            "saved": plits_over_lal(partial(saved_activation_bytes, size=2), c, 1, many, Nt),
            "cache": plits_over_lal(partial(cache_bytes, size=2), c, 1, many, Nt)}


def break_even(c, B, Nt, size, count):
    """From which Na on LAL saves the paper's share of memory, counted so, and from which on it is
    faster by the paper's share, by causal FLOPs; MAX_AUDIO_TOKENS if it never is."""
    costs = {"memory": lambda c, w: memory(c, w, size)[count],
             "speed": partial(train_flops, causal=True)}
    ratios = {"memory": 1 / (1 - PAPER_GAINS["memory"]), "speed": 1 + PAPER_GAINS["speed"]}
    return [bisect.bisect_left(range(MAX_AUDIO_TOKENS), ratios[name], lo=1,
                               key=lambda Na: plits_over_lal(cost, c, B, Na, Nt))
            for name, cost in costs.items()]


# ---------------------------------------------------------------------------------- measurement

def random_inputs(llm, w):
    """Random text ids (B, Nt), and audio (B, n, D) to run and to write, None where n is 0."""
    weight = llm.model.embed_tokens.weight
    ids = torch.randint(llm.config.vocab_size, (w.B, w.text), device=weight.device)
    audio = [weight.new_empty(w.B, n, weight.shape[1]).normal_().requires_grad_() if n else None
             for n in (w.prefix, w.side)]  # a connector is trained behind it: it needs a gradient
    return ids, *audio


def text_loss(llm, ids, prefix, side):
    return cross_entropy(pal(llm, ids, prefix, side), ids)


def train_step(llm, *inputs):
    llm.zero_grad(set_to_none=True)
    text_loss(llm, *inputs).backward()


@torch.no_grad()
def write_cache(llm, prefix, side):
    """Write the audio into a new cache."""
    kv_cache = None if prefix is None else hear(llm, prefix, "plits")
    return kv_cache if side is None else hear(llm, side, "lal", kv_cache)


def measure_training(llm, w, o, device):
    """Seconds of a step, and the columns of the training table that are of memory."""
    ids, *audio = random_inputs(llm, w)
    loss = partial(text_loss, llm, ids, *audio)
    columns = {"attention": "+".join(attention_kernels(loss)),
               "saved MB predicted": predict_saved_bytes(o, w) / 1e6,
               "saved MB": count_saved_bytes(loss, [*llm.parameters(), ids]) / 1e6}
    step = partial(train_step, llm, ids, *audio)
    return {"columns": columns, "seconds": time_in_turns({"step": step}, device, o.rounds)}


def measure_inference(llm, w, o, device):
    """Seconds to hear and to answer, and the columns that are of the inference table alone. A
    second question costs what is left after hearing."""
    ids, *audio = random_inputs(llm, w)
    heard = write_cache(llm, *audio)
    seconds = time_in_turns({"hear": lambda: write_cache(llm, *audio),
                             "answer": lambda: llm.generate(ids, NEW_TOKENS, cache=heard),
                             "read": lambda: llm.generate(ids, 1, cache=heard)}, device, o.rounds)
    hearing, answering, reading = map(statistics.median, seconds.values())
    del seconds["read"]  # which is a part of answering
    c = llm.config
    share = ask_flops(c, w, NEW_TOKENS) / answer_flops(c, w, NEW_TOKENS)
    columns = {"s to hear": hearing, "s to read": reading, "s to write": answering - reading,
               "2nd question, % of 1st, predicted": 100 * share,
               "2nd question %": 100 * answering / (hearing + answering),
               "cache MB": cache_bytes(c, w, number_format(o)["size"], NEW_TOKENS) / 1e6}
    return {"columns": columns, "seconds": seconds}


def make_llm(o, phase="train"):
    """An LLM of these shapes; its random weights are made on the device and in their dtype."""
    dtype = getattr(torch, o.dtype)
    if phase == "infer" and dtype == torch.bfloat16:
        dtype = torch.float16  # as in the paper
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(o.device):
        llm = LLM(LLMS[o.llm]).requires_grad_(phase == "train")
    torch.set_default_dtype(torch.float32)
    return llm


@cache
def prepare_process(o, phase):
    """What a process needs for all its rows: an LLM, and the rate of matrix products."""
    limit_memory(torch.device(o.device), o.memory)
    llm = make_llm(o, phase)
    return llm, product_rate(llm.model.embed_tokens.weight)


def measure_row(o, phase, mode, Na, Nt):
    """A row of the sweep, in the process of its mode. phase: train or infer."""
    device, row = torch.device(o.device), {"mode": mode, "Na": Na, "Nt": Nt}
    llm, rate = prepare_process(o, phase)
    measure = measure_training if phase == "train" else measure_inference
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row |= measure(llm, workload(o, mode, phase, Na, Nt), o, device)
    except RuntimeError as error:  # torch's out of memory is one, on every device
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        return row | {"error": "out of memory"}
    llm.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return row | {"rate": rate, "peak": peak}


def measure_rows(o, phase, mode, rows, bar):
    """The rows of a mode, all in a process of their own."""
    results = call_elsewhere(measure_row, [(o, phase, mode, *row) for row in rows], bar)
    return [result or {"mode": mode, "Na": Na, "Nt": Nt, "error": "out of memory"}
            for (Na, Nt), result in zip(rows, results)]


def sweep(o, rows):
    """Every mode at every (Na, Nt), measured and beside the prediction."""
    measured = {"train": [], "infer": []}
    with tqdm(total=2 * len(MODES) * len(rows), desc="sweep", leave=False) as bar:
        for phase, mode in product(measured, MODES):
            measured[phase] += measure_rows(o, phase, mode, rows, bar)
    return {"measured": measured, "training": report(o, "train", measured["train"]),
            "inference": report(o, "infer", measured["infer"])}


def compare_in_turns(o, Na, Nt):
    """Training steps of every mode, and transformers', in turns in one process; each one's best."""
    llm, steps, flops = make_llm(o), {}, {}
    for mode in MODES:
        w = workload(o, mode, "train", Na, Nt)
        ids, *audio = random_inputs(llm, w)
        flops[mode] = train_flops(llm.config, w)
        steps[mode] = partial(train_step, llm, ids, *audio)
        if mode == "plits" and o.hf_reference:
            flops["transformers"] = flops[mode]
            steps["transformers"] = hf_reference_step(llm, ids, audio[0], cross_entropy)
        if mode == "lal":  # the variants have the same inputs
            steps |= {name: variant_step(llm, name, ids, audio[1]) for name in VARIANTS}
            flops |= {name: variant_flops(llm.config, name, w.B, Na, Nt) for name in VARIANTS}
    times = time_in_turns(steps, torch.device(o.device), o.rounds)
    best = {name: min(seconds) for name, seconds in times.items()}
    return [{"step": name, "best s": seconds, "GFLOPs": flops[name] / 1e9,
             "x PLITS": best["plits"] / seconds, "x predicted": flops["plits"] / flops[name],
             "x transformers": best["transformers"] / seconds if o.hf_reference else None}
            for name, seconds in best.items()]


# --------------------------------------------------------------------------------------- report

def report(o, phase, measured):
    """The lines of a table: prediction, measurement and the paper's claim, side by side."""
    c = LLMS[o.llm]
    cost = train_flops if phase == "train" else partial(answer_flops, new=NEW_TOKENS)
    baselines = {(row["Na"], row["Nt"]): row for row in measured if row["mode"] == "plits"}
    lines = []
    for row in measured:
        Na, Nt = row["Na"], row["Nt"]
        w, plits = (workload(o, mode, phase, Na, Nt) for mode in (row["mode"], "plits"))
        causal = cost(c, w, causal=True)
        line = {"mode": row["mode"], "Na": Na, "Nt": Nt, "GFLOPs": cost(c, w) / 1e9,
                "causal": causal / 1e9, "samples/s": row.get("error")}
        lines.append(line)
        if "error" in row:
            continue
        claims = PAPER_CLAIMS if row["mode"] == "lal" else {}
        seconds, plits_seconds = total_seconds(row), total_seconds(baselines[Na, Nt])
        peak, plits_peak = row["peak"], baselines[Na, Nt].get("peak")
        line |= {"samples/s": w.B / seconds,
                 "x predicted": cost(c, plits) / cost(c, w),
                 "x causal": cost(c, plits, causal=True) / causal,
                 "x measured": plits_seconds and plits_seconds / seconds,
                 "x paper": claims.get("speed"), **row["columns"], "peak MB": peak and peak / 1e6,
                 **(predict_peak(o, w, plits) if phase == "train" else {}),
                 "less %": 100 * (1 - peak / plits_peak) if peak and plits_peak else None,
                 "less % paper": claims.get(phase),
                 "utilisation %": 100 * causal / seconds / row["rate"]}
    return lines


def total_seconds(row):
    """Median seconds of everything that a row does; None if it could not."""
    return sum(map(statistics.median, row["seconds"].values())) if "seconds" in row else None


def number_format(o):
    """What saved_activation_bytes has to know of the device and of the numbers there."""
    return {"size": getattr(torch, o.dtype).itemsize, "fused": o.device.startswith("cuda")}


def predict_saved_bytes(o, w):
    """What count_saved_bytes counts of a training step, the softmax of its logits included."""
    c = LLMS[o.llm]
    return saved_activation_bytes(c, w, **number_format(o)) + 4 * w.B * w.text * c.vocab_size


def predict_peak(o, w, plits):
    """Columns of the training table: the most memory of a step, and how much less than PLITS'."""
    peak, plits_peak = (memory(LLMS[o.llm], x, **number_format(o))["+ gradients"]
                        for x in (w, plits))
    return {"peak MB predicted": peak / 1e6, "less % predicted": 100 * (1 - peak / plits_peak)}


def fit(o, Na, Nt):
    """For each mode the largest micro-batch that train.py could run on a GPU with o.fits GB, and
    the hours of the paper's training there, of the LLM's matrix products alone."""
    c, rows = LLMS[o.llm], []
    # weights, gradients and Adam's two numbers in float32, and autocast's copy in bfloat16
    fixed = (4 + 4 + 8 + 2) * count_parameters(c)
    for mode in MODES:
        def needed(B, mode=mode):
            w = make_workload(mode, B, Na, Nt, o.share)
            logits = LOGIT_BYTES * w.B * w.text * c.vocab_size
            return fixed + saved_activation_bytes(c, w, 2) + logits

        batch = bisect.bisect_right(range(1, 1 + MAX_MICRO_BATCH), 1e9 * o.fits, key=needed)
        w = make_workload(mode, 1, Na, Nt, o.share)
        flops = sum(n * train_flops(c, w, frozen, causal=True) for n, frozen in RECIPE)
        rows.append({"mode": mode, "largest micro-batch": batch, "GB without a clip": fixed / 1e9,
                     "GB a clip": (needed(2) - needed(1)) / 1e9,
                     f"GB at batch {o.batch}": needed(o.batch) / 1e9,
                     "hours": flops / (UTILISATION * GPU_FLOPS) / 3600})
    return rows


def arithmetic(o, Na, Nt):
    """What needs no machine: costs part by part, limits, and what the paper may have counted."""
    c, costs, accounting = LLMS[o.llm], [], []
    for mode in MODES:
        w = workload(o, mode, "train", Na, Nt)
        parts = {name: flops / 1e9 for name, flops in forward_flops(c, w).items()}
        costs.append({"mode": mode, **parts, "forward": sum(parts.values()),
                      "backward": backward_flops(c, w) / 1e9,
                      "saved MB": saved_activation_bytes(c, w, 2) / 1e6,
                      "cache MB": cache_bytes(c, w, 2) / 1e6})
    costs += [variant_costs(c, mode, o.batch, Na, Nt) for mode in VARIANTS]
    for count in memory(c, w, 2):
        line = {"counted": count}
        for text in (16, 64, 256):
            line[f"Nt {text}: 64.1% at Na"], line[f"Nt {text}: 247.5% at Na"] = break_even(
                c, o.batch, text, 2, count)
        accounting.append(line)
    return {"costs": costs, "limits": limits(c, Nt), "accounting": accounting}


def draw_picture(o, measured, Na, Nt):
    """Memory and speed against Na, as bench-LLM.png in o.out."""
    c = LLMS[o.llm]
    rate = max((row["rate"] for row in measured if "rate" in row), default=1e12)
    sizes = sorted({max(1, Na * i // 100) for i in range(101)})
    memory_lines, speed_lines = {}, {}
    for mode in MODES:
        line = [workload(o, mode, "train", size, Nt) for size in sizes]
        rows = [r for r in measured if (r["mode"], r["Nt"]) == (mode, Nt) and "rate" in r]
        dots = [row["Na"] for row in rows]
        memory_lines[mode] = (sizes, [predict_saved_bytes(o, w) / 1e6 for w in line],
                              dots, [row["columns"]["saved MB"] for row in rows])
        speed_lines[mode] = (sizes, [w.B * rate / train_flops(c, w, causal=True) for w in line],
                             dots, [o.batch / total_seconds(row) for row in rows])
    draw_if_possible(
        draw_costs, Path(o.out) / f"bench-{o.llm}.png",
        f"{o.llm}, {o.dtype}, batch {o.batch}; lines predicted, dots measured",
        f"audio tokens Na (Nt {Nt})",
        {"MB saved for backward": memory_lines,
         f"training steps, samples/s\n(lines: at {rate / 1e9:.3g} GFLOP/s)": speed_lines})


# -------------------------------------------------------------------------------------- quality

QUESTIONS = 16  # in a training step
CLIPS = {"clips": 2000, "test_clips": 200}


def quality(o):
    """Train and score every arm on the listening world, each in a folder of its own: one table."""
    arms = list(ARMS) if o.arms == "all" else o.arms.split(",")
    if not set(arms) <= set(ARMS):
        raise ValueError(f"--arms {o.arms}: choose all, or from {','.join(ARMS)}")
    if o.curves and len(arms) > len(COLOURS):
        raise ValueError(f"--curves: name up to {len(COLOURS)} --arms, one for each colour")
    lengths = [o.steps // 8, o.steps // 4, o.steps // 2, o.steps] if o.curves else [o.steps]
    device = pick_device(o.device)
    runs = {run: None for run in product(range(o.seeds), lengths, arms)}
    for seed, steps, arm in tqdm(runs, desc="runs"):
        runs[seed, steps, arm] = train_and_score(arm_options(o, arm, seed, steps))
    rows, curves = [], {arm: [] for arm in arms}
    for arm in arms:
        cost = step_cost(arm_options(o, arm, 0, o.steps), device, o.rounds)
        for steps in lengths:
            scores = [task_scores(runs[seed, steps, arm]["scores"]) for seed in range(o.seeds)]
            shares = {task: [100 * s[task] for s in scores] for task in scores[0]}
            means = {task: mean_and_deviation(values) for task, values in shares.items()}
            rows.append({"arm": arm, "steps": steps, **means, **cost})
            curves[arm].append((steps * cost["GFLOPs"] / 1000, steps * cost["ms"] / 1000,
                                shares["all"]))
    print_table("% exactly right, mean ± sample standard deviation over seeds, and what a step of "
                f"{QUESTIONS} questions costs", rows)
    if o.curves:
        draw_if_possible(draw_learning, Path(o.out) / "learning.png", curves)
    runs = [{"arm": arm, "seed": seed, **run} for (seed, _, arm), run in runs.items()]
    print(json.dumps({"settings": asdict(o), "machine": describe_machine(str(device)),
                      "quality": rows, "runs": runs}))


def arm_options(o, arm, seed, steps):
    """train.py's Options for an arm. The arms of a seed share a cache of features."""
    steps1, steps2 = steps // 12, steps // 5  # more of so few steps than train.py's
    folder = Path(o.out) / "quality"
    return train.Options(**ARMS[arm], **CLIPS, seed=seed, difficulty=o.difficulty, base=o.base,
                         batch=QUESTIONS, steps1=steps1, steps2=steps2,
                         steps3=steps - steps1 - steps2, device=o.device,
                         out=str(folder / f"{arm}-{seed}-{steps}"),
                         feature_cache=str(folder / "features"))


def train_and_score(options):
    """The last line of an arm's metrics.jsonl, which holds its scores. If there is none of the same
    options, the arm is trained first; an unfinished training goes on."""
    if not read_scores(options):
        with redirect_stdout(io.StringIO()):
            train.main(replace(options, resume=bool(train.list_steps(options.out))))
    return read_scores(options)


def read_scores(options):
    path = Path(options.out) / "metrics.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1:] if path.exists() else []
    for line in map(json.loads, last):
        names = set(asdict(options)) - train.RESUMABLE_CHANGES
        if all(line.get("options", {}).get(name) == getattr(options, name) for name in names):
            return line


def make_arm(options):
    """The AudioLLM of an arm, new, with the parameters that stage 3 trains."""
    torch.manual_seed(options.seed)
    model = load_base(options.base, options.routes or options.mode, train.make_config(options),
                      options.encoders)
    train.make_optimizer(model, train.curriculum(options)[-1].rates, options.freeze)
    return model.train()


def step_cost(options, device, rounds):
    """What a step of stage 3 costs an arm of new weights, the mean of one pass over a few clips."""
    model = make_arm(options).to(device)
    clips, items = load_world("train", QUESTIONS, options.seed, options.difficulty)
    add_token_ids(model.tokenizer, items)
    with redirect_stdout(io.StringIO()):
        batches = train.plan_stages(items, replace(options, stage="3"))[0][2]
    features = extract_features(model, clips)
    batches = [[items[i] for i in batch] for batch in islice(batches, len(items) // QUESTIONS)]
    losses = [partial(train.answer_loss, model.train(), features, batch) for batch in batches]

    def steps():
        for loss in losses:
            loss().backward()

    times = time_in_turns({"steps": steps}, device, rounds)["steps"]
    return {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "GFLOPs": count_flops(steps)[0] / len(losses) / 1e9,
            "saved MB": statistics.mean(count_saved_bytes(loss, model.parameters())
                                        for loss in losses) / 1e6,
            "ms": 1000 * statistics.median(times) / len(losses)}


# -------------------------------------------------------------------------------------- options

@dataclass(frozen=True)
class Options:
    llm: str = option("small", "whose shapes; the weights are random", choices=list(LLMS),
                      group="what is computed and measured")
    na: str = option("auto", "audio tokens, like 64,256 (auto: 64,256 for small; else 64 to 2048)")
    nt: str = option("64", "text tokens, like 16,64")
    batch: int = option(0, "clips in a training step (0: the paper's 8; for small 2)")
    share: float = option(0.5, "of PAL's audio tokens, the share that runs the PLITS way", high=1)
    measure: str = option("sweep", "each mode in a process of its own; or training steps in turns, "
                                   "at the last Na and Nt", choices=["sweep", "turns", "nothing"])
    rounds: int = option(5, "runs that count, after one that does not", low=1)
    hf_reference: bool = option(False, "with --measure turns: transformers' PLITS step too")
    fits: float = option(0.0, "instead: the largest micro-batch of each mode in so many GB of GPU "
                              "memory, and the hours of the paper's training, by arithmetic")
    memory: float = option(0.0, "GB that a process may have (0: all there is)")
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("auto", "of training (auto: bfloat16 on cuda, then float16 for inference; "
                                "else float32)", choices=["auto", "float32", "bfloat16", "float16"])
    out: str = option("out", "folder for the picture, which needs matplotlib, and for quality/")
    quality: bool = option(False, "instead, train and score arms on the listening world",
                           group="learning")
    arms: str = option("all", "with --quality: which, like lal,pal: " + ", ".join(ARMS))
    seeds: int = option(3, "with --quality: runs of each arm, seeds 0, 1...", low=1)
    steps: int = option(500, "with --quality: training steps of an arm", low=8)
    curves: bool = option(False, "with --quality: train an eighth, a quarter and half as long too, "
                                 "and draw what is learnt by how much computing")
    difficulty: int = option(1, "with --quality: of the world", high=2)
    base: str = option("assets/base.pt", "with --quality: the miniature encoders and LLM")


def workload(o, mode, phase, Na, Nt):
    """The Workload that the options make of a mode. phase: train or infer."""
    infer_batch = SMALL_BATCH if o.llm == "small" else BATCH_SIZES["infer"]
    B = o.batch if phase == "train" else infer_batch
    return make_workload(mode, B, Na, Nt, o.share)


def resolve_options(o):
    """The options with every "auto" and 0 resolved, and the rows (Na, Nt) of the sweep."""
    device, small = pick_device(o.device, o.dtype), o.llm == "small"
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if o.dtype == "auto" else o.dtype
    na = ("64,256" if small else "64,128,256,512,1024,2048") if o.na == "auto" else o.na
    rows = [(Na, Nt) for Nt in parse_sizes(o.nt, "--nt", MAX_AUDIO_TOKENS)
            for Na in parse_sizes(na, "--na", MAX_AUDIO_TOKENS)]
    o = replace(o, device=str(device), dtype=dtype, memory=o.memory or available_memory(device),
                batch=o.batch or (SMALL_BATCH if small else BATCH_SIZES["train"]))
    needed = count_parameters(LLMS[o.llm]) * getattr(torch, dtype).itemsize / 1e9
    if needed > o.memory and o.measure != "nothing" and not o.fits:
        raise ValueError(f"--llm {o.llm}: its weights alone take {needed:.2g} GB of {dtype}, and "
                         f"there are {o.memory:.2g} GB on {device}")
    return o, rows


def main(o):
    if o.quality:
        return quality(o)
    o, rows = resolve_options(o)
    Na, Nt = rows[-1]
    if o.fits:
        rows = fit(o, Na, Nt)
        print_table(f"{o.llm} on a GPU of {o.fits:g} GB, Na {Na}, Nt {Nt}", rows)
        return print(json.dumps({"settings": asdict(o), "fits": rows}))
    result = {"settings": asdict(o), "machine": describe_machine(o.device), **arithmetic(o, Na, Nt)}
    print(f"{o.llm}, {o.dtype}, training batch {o.batch}, inference batch "
          f"{workload(o, 'lal', 'infer', Na, Nt).B}; PAL runs {o.share:.0%} of its audio tokens "
          "and writes the rest")
    print(*(f"{name} {value}" for name, value in result["machine"].items()), sep=", ")
    print_table(f"arithmetic: GFLOPs of a step at Na {Na}, Nt {Nt}; MB at 2 bytes a number",
                result["costs"])
    print_table("PLITS / LAL as Na grows", [result["limits"]])
    print_table(f"accounting at batch {o.batch}: where LAL reaches the paper's figures, by causal "
                "FLOPs", result["accounting"])
    if o.measure == "turns":
        result["in turns"] = compare_in_turns(o, Na, Nt)
        print_table(f"training steps in turns in one process, best of {o.rounds}",
                    result["in turns"])
    if o.measure == "sweep":
        result |= sweep(o, rows)
        print_table("training, forward and backward, each mode in its own process",
                    result["training"])
        print_table(f"inference, {NEW_TOKENS} new tokens", result["inference"])
    draw_picture(o, result["measured"]["train"] if o.measure == "sweep" else [], Na, Nt)
    print(json.dumps(result))


if __name__ == "__main__":
    command_line(Options, __doc__, main)
