"""How audio gets into an LLM: the paper's method, all of it in this file.

"PAL: Probing Audio Encoders via LLMs" (arXiv 2506.10423v2), section 3. An LLM's layer that has
read something keeps only its keys and values, so a model can hear by having its KV cache written:

- PLITS writes it the ordinary way: audio tokens run through every layer like words.
- LAL writes it directly: at each layer k, v = W_K n(a), W_V n(a) of the same audio tokens a, with
  n that layer's own input norm. No audio queries, no feed-forward, no work between layers.
- PAL does both: the speech encoder's tokens the PLITS way, the general encoders' the LAL way.

Between PLITS and LAL lie attn and ffn: audio that runs only that half of each layer. Flamingo's way
stands beside them: gated layers of its own.

Positions follow one layout in every mode: beginning of text, whisper, sslam, clap, then the
question and its answer (flamingo's audio has no place in it). Try:  python train.py --mode lal
"""
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from encoders import ENCODERS, load_encoder
from model import (FAR, LLM, KVCache, LLMConfig, end, join_rows, place, read_tokenizer, rotary,
                   rotate, visibility)

# What audio tokens do in each layer beside leaving keys and values there: attend, feed forward.
WORK = {"plits": (True, True), "lal": (False, False), "attn": (True, False), "ffn": (False, True)}

# A mode is nothing but the route of each encoder; only flamingo, with layers of its own, has none.
ROUTES = {mode: dict.fromkeys(ENCODERS, mode) for mode in WORK}
ROUTES["pal"] = {"whisper": "plits", "sslam": "lal", "clap": "lal"}
MODES = ("plits", "lal", "pal", "attn", "ffn", "flamingo")


@dataclass(frozen=True)
class Arm:
    """The choices beside the mode, kept in the checkpoint. train.py has an option for each."""
    connector: str = "auto"    # mlp, qformer, lfst; auto is lfst for sslam with clap, else mlp
    connector_layers: int = 2  # of a Q-Former or LFST
    queries: int = 32          # of a Q-Former
    grid_steps: int = 32       # of LFST, but no more than the coarsest of its encoders has
    grid_bands: int = 2
    lal_layers: str = "all"    # where LAL writes, see pick_layers
    audio_rope: str = "on"     # off: LAL's keys have no positions
    flamingo_every: int = 1    # one gated layer for so many of the LLM's


def pick_layers(text, count):
    """The layers, of so many, that "4:", "::2" or "0,4,8" names; None for "all"."""
    if text == "all":
        return None
    try:
        numbers = [int(n) if n else None for n in text.split(":" if ":" in text else ",")]
        chosen = set(range(count)[slice(*numbers)] if ":" in text else numbers)
    except (ValueError, TypeError):
        chosen = ()
    if not chosen or not chosen <= set(range(count)):
        raise ValueError(f"lal-layers {text}: expected all, or of 0 to {count - 1}: "
                         "2: or ::2 or 0,1")
    return sorted(chosen)


# --------------------------------------------------------------------------------- hearing

def hear(llm, audio, how, cache=None, layers=None, positions=None, rope=True):
    """Write audio tokens (B, N, D), already in the LLM's width, into the LLM's KV cache.

    how: plits (run them through every layer) or lal (write keys and values directly), or between
    the two attn (run attention, no feed-forward) or ffn (feed-forward, no attention).
    cache: what came before (None: nothing). layers: with lal, the layers to write (None: all).
    positions (1 or B, N): None means in order, after what the cache holds; FAR marks padding.
    rope: False leaves the keys as if all were at position 0. Returns the cache. Paper, section 3.
    """
    assert how in WORK, f"how is {how!r}: plits or lal, or between them attn or ffn"
    assert layers is None or how == "lal", f"{how} runs through every layer: only lal can choose"
    attend, feed_forward = WORK[how]
    cache = cache or KVCache(llm.config.num_hidden_layers)
    if attend and feed_forward:
        llm.model(audio, positions, cache)
        return cache
    in_order = positions is None
    if in_order:
        positions, cache.next = place(cache.next, audio.shape[1])
    else:
        cache.next, cache.plain = end(positions), False
    positions = positions.to(audio.device)
    layers = range(llm.config.num_hidden_layers) if layers is None else layers
    cache.extend(positions, layers)
    angles = rotary(positions if rope else 0 * positions, llm.config, audio.dtype)
    mask = visibility(positions, cache.positions[0], audio.dtype) if attend else None

    x = audio  # (B, N, D)
    for i in layers:
        block, attention = llm.model.layers[i], llm.model.layers[i].self_attn
        if attend:
            x = x + attention(block.input_layernorm(x), angles, mask, cache, i)
        else:
            # Under LAL the same tokens go to every layer, so their RMS is the same at every layer
            # and only the norm's gain differs: normalise once, fold each gain into W_K and W_V.
            if i == layers[0] or feed_forward:
                unit = F.rms_norm(x, x.shape[-1:], eps=llm.config.rms_norm_eps)
            gain = block.input_layernorm.weight
            k, v = (attention.heads(F.linear(unit, proj.weight * gain, proj.bias))  # (B, N, K, d)
                    for proj in (attention.k_proj, attention.v_proj))
            cache.append(i, rotate(k, angles), v)
        if feed_forward:
            x = x + block.mlp(block.post_attention_layernorm(x))
    return cache


def run(llm, segments, cache=None, layers=None, rope=True):
    """Lay segments out in order and run what has to run, as one sequence unless they say otherwise.

    segments: (how, tokens (B or 1, N, D), lengths (B,) or None) each, in order of position. how as
    in `hear`; text is plits. Rows shorter than N say so in lengths: the rest is padding.
    cache: where to write; without one, and with nothing to write, the sequence is plain causal.
    layers, rope: of what goes the LAL way. Returns the hidden states (B, n, D) of all plits, in
    order.
    """
    B = max(tokens.shape[0] for _, tokens, _ in segments)
    plain = all(lengths is None for _, _, lengths in segments)
    if cache is None and not (plain and all(how == "plits" for how, _, _ in segments)):
        cache = KVCache(llm.config.num_hidden_layers)
    start = cache.next if cache else 0
    plain = plain and (cache is None or cache.plain)
    waiting, hidden = [], []

    def together(placed):  # tokens and positions, each as one tensor
        return [reduce(join_rows, parts) for parts in zip(*placed)]

    def run_waiting(in_order=False):
        tokens, positions = together(waiting)
        tokens = tokens.expand(B, -1, -1)
        hidden.append(llm.model(tokens, None if in_order else positions, cache))
        waiting.clear()

    for how, neighbours in groupby(segments, lambda segment: segment[0]):
        placed = []
        for _, tokens, lengths in neighbours:
            positions, start = place(start, tokens.shape[1], lengths)
            placed.append((tokens, positions.to(tokens.device)))
        if how == "plits":
            waiting += placed
            continue
        if how == "attn" and waiting:  # what it attends to has to run first
            run_waiting()
        # goes into the cache at its own place in the layout, before what is still to run
        tokens, positions = together(placed)
        hear(llm, tokens, how, cache, layers if how == "lal" else None, positions, rope)
    if waiting:
        run_waiting(in_order=plain and len(waiting) == len(segments))
    if cache:
        cache.next, cache.plain = start, plain
    return torch.cat(hidden, dim=1) if hidden else None


def pal(llm, ids, prefix, side, before=None, layers=None):
    """Logits (B, T, V) of text ids (B, T) that heard `prefix` the PLITS way and `side` the LAL way.

    prefix, side: audio tokens (B, Na, D) in the LLM's width, or None; prefix comes first, so it
    sees nothing of side. before (B or 1, Tb): ids in front of the audio, which they never see.
    """
    text = ("plits", llm.embed(ids), None)
    front = [("plits", llm.embed(before), None)] if before is not None else []
    audio = [(how, a, None) for how, a in (("plits", prefix), ("lal", side)) if a is not None]
    return llm.head(run(llm, front + audio + [text], layers=layers)[:, -ids.shape[1]:])


def plits(llm, ids, audio, before=None):
    """Logits (B, T, V) of ids (B, T) after audio (B, Na, D) run through the LLM: the baseline."""
    return pal(llm, ids, audio, None, before)


def lal(llm, ids, audio, layers=None, before=None):
    """Logits (B, T, V) of ids (B, T); audio (B, Na, D) is keys and values only, in `layers`."""
    return pal(llm, ids, None, audio, before, layers)


# ------------------------------------------------------------------------------- connectors

def pool(tokens, window):
    """Average each `window` tokens of (n, D), and what is left over: (ceil(n / window), D)."""
    return F.avg_pool1d(tokens.T[None].float(), window, ceil_mode=True)[0].T.to(tokens.dtype)


def two_layers(width, out, inner=None):
    inner = inner or out
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out))


class MLPConnector(nn.Module):
    """Linear, GELU, Linear from an encoder's width to the LLM's, after average pooling.

    A connector takes lists of features (B, N, De) and their lengths (B,) or None, one for each of
    its encoders, and gives tokens (B, N', D) and their lengths.
    """

    def __init__(self, encoders, llm_width, arm):
        super().__init__()
        self.net = two_layers(encoders[0].width, llm_width)

    def forward(self, features, lengths):
        return self.net(features[0]), lengths[0]  # (B, N, De) -> (B, N, D)


class Cross(nn.Module):
    """A layer that listens: x + a W_o softmax(q k^T / sqrt(d)) v, then x + b MLP(LN x).

    q is of LN x (B, L, W); k and v are of several sources, each with its own weights, in one
    softmax. a and b are 1, or if gated tanh of what is learnt from 0 on (Flamingo). The MLP is as
    wide as x inside, Cambrian-1's; Flamingo's is four times as wide.
    """

    def __init__(self, width, sources, heads, gated=False):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(sources))
        self.mlp = two_layers(width, width, 4 * width if gated else width)
        self.gates = nn.Parameter(torch.zeros(2)) if gated else None

    def remember(self, sources):
        """k and v, each (B, S, H, d), of all sources (B, N, W), one after another."""
        kv = torch.cat([proj(source) for proj, source in zip(self.kv, sources)], dim=1)
        return kv.unflatten(2, (2, self.heads, -1)).unbind(2)

    def forward(self, x, k, v, mask):
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1))  # (B, L, H, d)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
        a, b = (1, 1) if self.gates is None else self.gates.tanh()
        x = x + a * self.out(y.transpose(1, 2).flatten(2))
        return x + b * self.mlp(self.norm2(x))  # (B, L, W)


class QFormer(nn.Module):
    """Learned queries listen to an encoder, layer by layer, and become the tokens. It is BLIP-2's
    without self-attention among the queries."""

    def __init__(self, encoders, llm_width, arm):
        super().__init__()
        width = max(encoder.width for encoder in encoders)
        self.queries = nn.Parameter(torch.randn(arm.queries, width) / math.sqrt(width))
        self.enter = nn.ModuleList(
            nn.Sequential(*two_layers(e.width, width), nn.LayerNorm(width)) for e in encoders)
        self.layers = nn.ModuleList(
            Cross(width, len(encoders), max(1, width // 64)) for _ in range(arm.connector_layers))
        self.out = two_layers(width, llm_width)

    def listen(self, queries, features, mask):
        sources = [enter(x) for enter, x in zip(self.enter, features)]  # (B, N, W) each
        x = queries.expand(len(mask), -1, -1)  # (B, L, W)
        for layer in self.layers:
            x = layer(x, *layer.remember(sources), mask)
        return self.out(x)  # (B, L, D)

    def forward(self, features, lengths):
        mask = there(features[0], lengths[0])[:, None, None]  # (B, 1, 1, N)
        return self.listen(self.queries, features, mask), None


class LFST(QFormer):
    """One latent token at each place of a time-frequency grid listens to what the encoders say of
    that place alone; after the projector a newline token closes each time step.

    Paper, figure 3, after Cambrian-1. The grid is as long as the longest encoder's window; of a
    shorter clip there are the time steps that begin before its features end.
    """

    def __init__(self, encoders, llm_width, arm):
        super().__init__(encoders, llm_width, replace(arm, queries=1))
        self.shape = min(arm.grid_steps, *(e.grid[0] for e in encoders)), arm.grid_bands
        longest = max(e.seconds for e in encoders)
        self.spans = [(*e.grid, e.seconds / longest) for e in encoders]
        self.newline = nn.Parameter(torch.randn(llm_width) / math.sqrt(llm_width))

    def forward(self, features, lengths):
        (T, bands), masks, ends = self.shape, [], []
        for x, n, (steps, own, share) in zip(features, lengths, self.spans):
            # (1 or B, steps of the longest): clips that are as long as each other share one mask
            heard = there(x[:1] if n is None else x, n).unflatten(1, (-1, own))[..., 0]
            time = near(T, steps, share, heard)
            band = near(bands, own, 1, heard.new_ones(1, own))
            mask = time[:, :, None, :, None] & band[:, None, :, None]  # (., T, bands, steps, own)
            masks.append(mask.flatten(3).flatten(1, 2).expand(len(x), -1, -1))
            ends.append((T * heard.sum(1) / steps * share).ceil().expand(len(x)))  # (B,)
        latents, mask = self.queries.expand(T * bands, -1), torch.cat(masks, dim=2)[:, None]
        x = self.listen(latents, features, mask).unflatten(1, (T, bands))  # (B, T, bands, D)
        x = torch.cat([x, self.newline.expand(len(x), T, 1, -1)], dim=2)
        kept = torch.stack(ends).amax(0).long()  # (B,) time steps
        x = x[:, :kept.max()].flatten(1, 2)  # (B, (bands + 1) kept, D)
        return x, (bands + 1) * kept if (kept < kept.max()).any() else None


def there(x, lengths):
    """(B, N) bool: which of x (B, N, D) is no padding."""
    return (place(0, x.shape[1], lengths)[0] < FAR).to(x.device).expand(len(x), -1)


def near(places, count, share, heard):
    """(B, places, n) bool: the places are equal parts of 0..1, and which of the centres of `count`
    equal parts of 0..share, if heard (B, n), lie in each; where none does, the nearest."""
    centres = (torch.arange(heard.shape[1], dtype=torch.float64) + 0.5) / count * share
    edges = torch.arange(places + 1, dtype=torch.float64)[:, None] / places
    inside = (edges[:-1] <= centres) & (centres < edges[1:])
    far = ((edges[:-1] + edges[1:]) / 2 - centres).abs().to(heard.device)
    nearest = far.where(heard[:, None], torch.inf).argmin(-1)
    inside = inside.to(heard.device) & heard[:, None]
    return inside.where(inside.any(-1, keepdim=True), F.one_hot(nearest, len(centres)).bool())


# ----------------------------------------------------------------------------- the whole thing

class AudioLLM(nn.Module):
    """Frozen encoders, their connectors, the LLM, and a route for each encoder.

    encoders: {kind: module from encoders.py}. mode: one of MODES. arm: the finer choices.
    windows: {kind: how many encoder tokens are averaged into one}; LFST takes them one by one.
    """

    def __init__(self, llm, tokenizer, encoders, mode, windows, arm=Arm()):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(MODES)}")
        self.llm, self.tokenizer, self.mode, self.arm = llm, tokenizer, mode, arm
        self.encoders = nn.ModuleDict({k: encoders[k] for k in ENCODERS if k in encoders})
        general = [kind for kind in self.encoders if kind != "whisper"]
        if arm.connector == "lfst" and not general:
            raise ValueError("connector lfst: needs sslam or clap, and there is neither")
        if not (arm.connector == "lfst" or arm.connector == "auto" and len(general) == 2):
            general = []  # each has its own connector; else LFST joins them
        self.windows = dict(windows) | dict.fromkeys(general, 1)
        own = QFormer if arm.connector == "qformer" else MLPConnector
        parts = {kind: (own, [kind]) for kind in self.encoders if kind not in general}
        parts |= {"lfst": (LFST, general)} if general else {}
        self.joins = {name: kinds for name, (_, kinds) in parts.items()}
        self.connectors = nn.ModuleDict({
            name: kind([encoders[k] for k in kinds], llm.config.hidden_size, arm)
            for name, (kind, kinds) in parts.items()})
        self.routes = ROUTES.get(mode, dict.fromkeys(ENCODERS, mode))
        self.layers = pick_layers(arm.lal_layers, llm.config.num_hidden_layers)
        if (self.layers or arm.audio_rope == "off") and "lal" not in map(self.routes.get, encoders):
            raise ValueError(f"lal-layers, audio-rope: in mode {mode} nothing here goes LAL's way")
        self.cache_layers = llm.config.num_hidden_layers
        if mode == "flamingo":
            self.add_flamingo(llm.config)
        self.encoders.requires_grad_(False)
        self.train(self.training)

    def add_flamingo(self, c):
        """Gated layers before the LLM's. What they hear lies in the KV cache, as of layers beyond
        the LLM's last: heard once, asked many times."""
        self.connectors["flamingo"] = nn.ModuleList()
        for i in range(0, c.num_hidden_layers, self.arm.flamingo_every):
            cross = Cross(c.hidden_size, 1, c.num_attention_heads, gated=True)
            self.connectors["flamingo"].append(cross)
            self.llm.model.layers[i].register_forward_pre_hook(
                partial(listen_first, cross, self.cache_layers))
            self.cache_layers += 1

    def train(self, mode=True):
        super().train(mode)
        self.encoders.eval()  # frozen means frozen
        return self

    def is_elsewhere(self, name):
        """Whether this parameter belongs to an encoder that came from a file of its own."""
        return any(encoder.source and name.startswith(f"encoders.{kind}.")
                   for kind, encoder in self.encoders.items())

    @property
    def device(self):
        return self.llm.model.embed_tokens.weight.device

    def features(self, clips):
        """What the frozen encoders make of some clips, pooled: a list of {kind: (n, De)}.

        Compute it once, keep it, train on it many times. clips: functions rate -> (samples,).
        Tokens that lie wholly after a clip's end are left out, and so is SSLAM's cls.
        """
        return [{kind: tokens.cpu() for kind, tokens in encoded.items()}
                for encoded in self.encode([self.fronts(clip) for clip in clips])]

    def fronts(self, clip):
        """The half of `features` that a data worker does, on the CPU, for one clip: {kind: (what
        its front end makes, the clip's length in seconds)}."""
        waves = {rate: clip(rate) for rate in {e.rate for e in self.encoders.values()}}
        out = {}
        for kind, encoder in self.encoders.items():
            wave = waves[encoder.rate][:math.ceil(encoder.seconds * encoder.rate)]
            out[kind] = encoder.front_end(wave[None]), len(wave) / encoder.rate
        return out

    @torch.no_grad()
    def encode(self, fronts):
        """The other half, for a batch of clips and on the model's device."""
        out = [{} for _ in fronts]
        for kind, encoder in self.encoders.items():
            batch = torch.cat([f[kind][0] for f in fronts]).to(self.device)
            for features, f, tokens in zip(out, fronts, encoder(batch)):
                heard = tokens[encoder.extra:encoder.tokens(f[kind][1])]
                features[kind] = pool(heard, self.windows[kind]).float()
        return out

    def segments(self, features):
        """The start of a chat and the audio of a batch, as `run` takes them. features: see above;
        without any, [{}], this is the LLM alone."""
        before = torch.tensor([self.tokenizer.chat("")[0]], device=self.device)
        out = [("plits", self.llm.embed(before), None)]
        for name, kinds in self.joins.items() if any(features) else ():
            stacks = [stack([f[kind] for f in features], self.device) for kind in kinds]
            out.append((self.routes[kinds[0]], *self.connectors[name](*zip(*stacks))))
        return out

    def read(self, features, text=(), cache=None):
        """`run` what a batch of clips and the text after them come to."""
        before, *audio = self.segments(features)
        if self.mode == "flamingo" and audio:  # it takes no place in the layout
            cache = cache or KVCache(self.cache_layers)
            layers = range(self.llm.config.num_hidden_layers, self.cache_layers)
            cache.extend(torch.cat([there(x, n) for _, x, n in audio], dim=1), layers)
            for i, cross in zip(layers, self.connectors["flamingo"]):
                cache.append(i, *cross.remember([torch.cat([x for _, x, _ in audio], dim=1)]))
            audio = []
        rope = self.arm.audio_rope == "on"
        return run(self.llm, [before, *audio, *text], cache, self.layers, rope)

    def forward(self, features, ids, rows=None):
        """Hidden states (B, T, D) of text ids (B, T), padded at the end, after a batch of clips.

        Row i is about clip rows[i], which is heard once for all its rows; without rows there is
        one row a clip, and all that runs does so as one sequence.
        """
        text = ("plits", self.llm.embed(ids), None)
        if rows is None:
            return self.read(features, [text])[:, -ids.shape[1]:]
        cache = KVCache(self.cache_layers)
        self.read(features, cache=cache)
        return run(self.llm, [text], cache.fork(rows, ids.shape[1]))

    @torch.no_grad()
    def hear(self, features):
        """Hear a batch of clips once; ask about them many times. Returns a KVCache."""
        cache = KVCache(self.cache_layers)
        self.read(features, cache=cache)
        return cache

    def ask(self, cache, questions, rows=None, max_new_tokens=48, **sampling):
        """Answers (strings) to questions about what `hear` heard; question i is about clip rows[i].

        Without rows there is one question a clip. The rest as in LLM.generate.
        """
        prompts = [self.tokenizer.chat(q)[1] for q in questions]
        new = self.llm.generate(prompts, max_new_tokens, cache=cache, rows=rows,
                                eos_id=self.tokenizer.eos_id, **sampling)
        return [self.tokenizer.decode(ids).strip() for ids in new]

    def save(self, path, **extra):
        """Write everything to one file, tensors and plain types only; `extra` is kept beside it.

        Of an encoder that came from a file of its own, only where that file lay is kept.
        """
        state = {name: t for name, t in self.state_dict().items() if not self.is_elsewhere(name)}
        save_atomically(path, {
            "format": FORMAT, "mode": self.mode, "arm": asdict(self.arm), "windows": self.windows,
            "llm": asdict(self.llm.config), "tokenizer": to_bytes(self.tokenizer.proto),
            "encoders": {kind: asdict(e.config) for kind, e in self.encoders.items()},
            "sources": {kind: e.source for kind, e in self.encoders.items()},
            "state": state, **extra})

    @classmethod
    def load(cls, path, sources=None):
        """The AudioLLM that `save` wrote, in eval mode. ValueError if the file is not one.

        sources: {kind: path} of encoders' own files that have moved since.
        """
        saved, encoders = load_checkpoint(path, FORMAT), {}
        try:
            for kind, config in saved["encoders"].items():
                config, source = ENCODERS[kind].Config(**config), saved["sources"][kind]
                source = source and ((sources or {}).get(kind) or source)
                new = load_encoder(kind, source) if source else ENCODERS[kind](config)
                encoders[kind] = new
                if new.config != config:
                    raise ValueError(f"{path}: was trained with another {kind}: {config}")
            with torch.device("meta"):  # no memory for weights that are about to be replaced
                llm = LLM(LLMConfig(**saved["llm"]))
            model = cls(llm, read_tokenizer(from_bytes(saved["tokenizer"])), encoders,
                        saved["mode"], saved["windows"], Arm(**saved["arm"]))
            model.fill(path, saved)
        except (KeyError, TypeError, RuntimeError) as e:
            reason = " ".join(str(e).split())
            raise ValueError(f"{path}: made by another version of this code ({reason})") from None
        return model.eval()

    def fill(self, path, saved):
        """Take the weights out of a checkpoint of this very model. ValueError if of another."""
        mine = {"mode": self.mode, **asdict(self.arm)}
        theirs = {"mode": saved["mode"], **saved["arm"]}
        if mine != theirs:
            differs = [f"{name} {theirs.get(name)}, not {mine.get(name)}"
                       for name in mine | theirs if theirs.get(name) != mine.get(name)]
            raise ValueError(f"{path}: was trained with {'; '.join(differs)}")
        state = {name: t.float() if t.dtype == torch.float16 else t  # half() saves half the room
                 for name, t in saved.pop("state").items()}
        try:
            unread = self.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as e:
            raise ValueError(f"{path}: of another model ({' '.join(str(e).split())})") from None
        missing = [name for name in unread.missing_keys if not self.is_elsewhere(name)]
        if missing or unread.unexpected_keys:
            raise ValueError(f"{path}: of another model: missing {missing}, surprising "
                             f"{unread.unexpected_keys}")


def listen_first(cross, layer, block, args):
    """Flamingo's hook: what a block of the LLM reads has listened, if there is audio."""
    x, _, _, cache, _ = args
    if cache is None or layer >= len(cache.positions) or cache.positions[layer] is None:
        return args
    heard = cache.positions[layer]  # (B, S): whether it is more than padding
    k, v = (store[layer][:, :heard.shape[1]] for store in (cache.keys, cache.values))
    return cross(x, k, v, heard[:, None, None]), *args[1:]


FORMAT = "audio-llm 1"


def stack(rows, device=None):
    """Rows (n_i, D) as one (B, N, D), padded with zeros, and their lengths (B,), None if equal."""
    lengths = torch.tensor([len(r) for r in rows], device=device)
    same = len({len(r) for r in rows}) == 1
    whole = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return whole, None if same else lengths


def to_bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a checkpoint holds tensors


def from_bytes(tensor):
    return tensor.numpy().tobytes()


def save_atomically(path, what, write=torch.save):
    """write(what, file) under a temporary name, then rename: `path` is always whole, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(what, file)
            file.flush()
            os.fsync(file.fileno())  # or the name could outlive the contents in a power cut
        os.replace(temporary, path)
    except RuntimeError as e:  # torch's, who on a full disk complains of a file cut short
        e = e.__context__ or e
        raise OSError(e.errno, e.strerror, str(path)) if isinstance(e, OSError) else e
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would take what room there is


def load_checkpoint(path, format):
    """A dict that save_atomically wrote, with this "format". ValueError says what is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ValueError(f"{path}: cut off, or not a checkpoint of this project") from None
    if not isinstance(saved, dict) or saved.get("format") != format:
        raise ValueError(f"{path}: not a checkpoint of the kind {format!r}")
    return saved
