"""How audio gets into a large language model (LLM): the paper's method, all of it in this file.

"PAL: Probing Audio Encoders via LLMs" (arXiv 2506.10423v2), section 3. Later tokens see earlier
ones only through cached keys and values, so a model can hear by having its KV cache written:

- PLITS (Prepend to the LLM's Input Token Space) writes it the ordinary way: the audio tokens run
  through every layer as words do.
- LAL (Lightweight Audio LLM Integration) writes it directly: at each layer, k = W_K norm(a) and
  v = W_V norm(a) of the same audio tokens a, with that layer's own W_K, W_V and input norm. The
  audio asks no queries and passes no feed-forward part.
- PAL does both: the speech encoder's tokens go the PLITS way, the general encoders' the LAL way.

Positions follow one layout in every mode: beginning of sequence, Whisper's tokens, SSLAM's, CLAP's,
then the question and its answer. A query sees every key whose position is not after its own.

Read `hear` and `prefill` first, and try:  python train.py --mode lal

B batch, T text tokens, N audio tokens, S all tokens, D the LLM's width, De an encoder's width, W a
connector's, L queries, H heads, K key-value heads, d head width, V vocabulary.
"""
import math
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from encoders import ENCODERS
from lib.checkpoints import load_model, save_model
from lib.cli import layers_by_encoder
from lib.lora import add_lora
from model import (PAD_POSITION, KVCache, Linear, cat_broadcast, make_positions, pad_batch, rotary,
                   rotate)


class Segment(NamedTuple):
    """Neighbouring tokens that go into the LLM the same way."""
    route: str                     # plits: run through the LLM; any other is for `write`, as lal is
    tokens: torch.Tensor           # (B or 1, N, D): embedded text, or audio in the LLM's width
    lengths: torch.Tensor = None   # (B,): rows may have fewer than N tokens, the rest is padding
    layers: list = None            # the layers that LAL writes; None: all


def hear(llm, audio, route, cache=None, layers=None, positions=None, rotate_keys=True):
    """Write audio tokens (B, N, D), already in the LLM's width, into the LLM's KV cache.

    route: "plits" (run them through every layer) or "lal" (write keys and values directly).
    cache: what came before (None: nothing). positions (1 or B, N): None means in order, after what
    the cache holds; PAD_POSITION marks padding. For LAL alone: layers, the ones to write (None:
    all); rotate_keys=False leaves the keys as if all stood at position 0. Returns the cache.
    """
    cache = KVCache(llm.config.num_hidden_layers) if cache is None else cache
    if route == "plits":
        assert layers is None, "PLITS runs through every layer: only LAL can leave some out"
        llm.model(audio, positions, cache)
        return cache

    assert route == "lal", f"route {route!r}: expected plits or lal"
    layers = range(llm.config.num_hidden_layers) if layers is None else layers
    positions = cache.extend(audio, positions, layers)
    angles = rotary(positions if rotate_keys else 0 * positions, llm.config, audio.dtype)
    # norm(a) = a / rms(a) * gain. The same tokens go to every layer, so a / rms(a) is computed once
    # and each layer's gain is multiplied into its W_K and W_V, which are smaller than the audio.
    normalized = F.rms_norm(audio, audio.shape[-1:], eps=llm.config.rms_norm_eps)  # (B, N, D)
    for i in layers:
        gain = llm.model.layers[i].input_layernorm.weight
        attention = llm.model.layers[i].self_attn
        k = project_normalized(attention.k_proj, normalized, gain)  # W_K norm(a)
        v = project_normalized(attention.v_proj, normalized, gain)  # W_V norm(a)
        k, v = attention.split_heads(k), attention.split_heads(v)  # (B, N, K, d)
        cache.append(i, rotate(k, angles), v)
    return cache


def project_normalized(proj, normalized, gain):
    """W (a / rms(a) * gain) + b, of a / rms(a) (B, N, D)."""
    if type(proj) is Linear and not (proj._forward_hooks or proj._forward_pre_hooks):
        return F.linear(normalized, proj.weight * gain, proj.bias)  # it is these two alone
    return proj(normalized * gain)  # what was put in its place, as LoRA is


def prefill(llm, segments, cache=None, write=hear):
    """Run or write segments, in order of position, into the cache; returns the last hidden states.

    Neighbours of one route and layers are joined to a group. A PLITS group is one call of the
    decoder over the cache. Any other group is passed to write(llm, tokens, route, cache, layers,
    positions), by default `hear`, which calls cache.extend once, then cache.append at each layer.
    segments: a list of Segment; text is "plits". cache: a KVCache that is extended in place (None:
    a new one). Returns (B, n, D), the hidden states of the last group, None if it was not run.

    For example, LAL with 1 beginning-of-sequence token, 4 audio tokens and 3 text tokens:

        segments                            group    positions   cache slots at each layer
        Segment("plits", beginning (1, D))  run      0           0: k, v of the layer's own input
        Segment("lal", audio (4, D))        written  1 2 3 4     1-4: W_K norm(a), W_V norm(a)
        Segment("plits", text (3, D))       run      5 6 7       5-7: k, v of the layer's own input

    The first text token, at position 5, sees slots 0 to 5; the last, at 7, sees 0 to 7. Slot order
    is position order, in every mode. PLITS would be one group and one call, positions 0 to 7.
    """
    cache = KVCache(llm.config.num_hidden_layers) if cache is None else cache
    hidden, B = None, 1
    segments = [segment for segment in segments if segment.tokens.shape[1]]
    for (route, layers), group in groupby(segments, key=lambda s: (s.route, s.layers)):
        group = list(group)
        tokens = reduce(cat_broadcast, [segment.tokens for segment in group])  # (1 or B, n, D)
        positions = padded_positions(group, cache.next_position)
        B = max(B, tokens.shape[0])
        if route == "plits":
            hidden = llm.model(tokens.expand(B, -1, -1), positions, cache)
        else:
            hidden = None
            write(llm, tokens, route, cache, layers, positions)
    return hidden


def padded_positions(group, start):
    """Positions (1 or B, n) of a group's tokens from `start` on; None if no segment is padded."""
    if all(segment.lengths is None for segment in group):
        return None
    positions = []
    for segment in group:
        new, start = make_positions(start, segment.tokens.shape[1], segment.lengths)
        positions.append(new.to(segment.tokens.device))
    return reduce(cat_broadcast, positions)


# The method in one call, for reading, tests and bench.py; AudioLLM calls `prefill` itself.

def pal(llm, ids, prefix, side, before=None, layers=None):
    """Logits (B, T, V) of text ids (B, T) after `prefix`, heard the PLITS way, and `side`, LAL's.

    prefix, side: audio tokens (B, N, D) in the LLM's width, or None; prefix comes first, so it sees
    nothing of side. before (B or 1, Tb): ids in front of the audio, which see nothing of it.
    """
    segments = [] if before is None else [Segment("plits", llm.embed(before))]
    segments += [] if prefix is None else [Segment("plits", prefix)]
    segments += [] if side is None else [Segment("lal", side, layers=layers)]
    segments.append(Segment("plits", llm.embed(ids)))
    hidden = prefill(llm, segments)
    return llm.head(hidden[:, -ids.shape[1]:])


def plits(llm, ids, audio, before=None):
    """Logits (B, T, V) of ids (B, T) after audio (B, N, D) run through the LLM: the baseline."""
    return pal(llm, ids, audio, None, before)


def lal(llm, ids, audio, layers=None, before=None):
    """Logits (B, T, V) of ids (B, T); audio (B, N, D) is keys and values only, in `layers`."""
    return pal(llm, ids, None, audio, before, layers)


# Modes, each with the function that changes a new AudioLLM into it. The paper's need none: there a
# mode is nothing but a route for each encoder. lib/variants.py enters modes beyond the paper.
MODES = {"plits": None, "lal": None, "pal": None}


def mode_routes(mode, encoders):
    """{kind: route} of these encoders {kind: module} in a mode, which may itself be such a table:
    "whisper=plits,sslam=lal,clap=lal". ValueError for an unknown mode or a table of others."""
    if "=" in mode:
        entries = mode.split(",")
        routes = dict(entry.partition("=")[::2] for entry in entries)
        known = set(routes) == set(encoders) and set(routes.values()) <= {"plits", "lal"}
        if not known or len(entries) > len(routes):
            raise ValueError(f"routes {mode}: expected plits or lal for each of "
                             f"{', '.join(encoders)}, like {next(iter(encoders), 'clap')}=lal")
        return routes
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(MODES)}")
    if mode == "pal":
        return {kind: "lal" if e.general else "plits" for kind, e in encoders.items()}
    return dict.fromkeys(encoders, mode)


# ------------------------------------------------------------------------------- connectors

@dataclass(frozen=True)
class IntegrationConfig:
    """The choices beside the mode; a checkpoint keeps them. A field that an older checkpoint does
    not know gets its default."""
    connector: str = "auto"    # of CONNECTORS; auto: lfst for two general encoders, else mlp
    connector_layers: int = 2  # of a Q-Former or LFST
    queries: int = 32          # of a Q-Former
    grid_steps: int = 32       # of LFST, but no more than the coarsest of its encoders has
    grid_bands: int = 2        # of LFST
    lal_layers: str = "all"    # the layers that LAL writes, see layers_by_encoder
    audio_rope: str = "on"     # off: LAL's keys are not rotated; the mask knows their positions
    flamingo_every: int = 1    # flamingo: one gated layer for so many of the LLM's
    whisper_seconds: int = 30  # no more of a clip: short clips then cost less, see Whisper.crop
    summary_tokens: int = 8    # pal-summary: of each connector
    lora_rank: int = 0         # above 0: low-rank updates of the LLM's q_proj and v_proj


def pool(tokens, size):
    """Average each `size` tokens of (n, De), and what is left over: (ceil(n / size), De)."""
    pooled = F.avg_pool1d(tokens.T[None].float(), size, ceil_mode=True)
    return pooled[0].T.to(tokens.dtype)


def make_mlp(width, out, hidden=None):
    """Linear, exact GELU, Linear: (..., width) -> (..., out), `hidden` between (None: as out)."""
    hidden = hidden or out
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class MLPConnector(nn.Module):
    """Linear, GELU, Linear from an encoder's width to the LLM's: out = W_2 gelu(W_1 x + b_1) + b_2.

    Every connector is made from a list of encoders, the LLM's width and an IntegrationConfig. It
    takes lists of features (B, N, De) and their lengths (B,) or None, one for each of its encoders,
    and gives tokens (B, N', D) and their lengths. A new one is a class like this, entered in
    CONNECTORS. `joint`: one connector reads all general encoders, unpooled; otherwise
    AudioLLM.encode first averages each encoder's pool_size tokens into one. `has_time`: its tokens
    are in order of time, so that sample.py --listen can draw them.
    """
    joint = False
    has_time = True

    def __init__(self, encoders, llm_width, config):
        super().__init__()
        self.net = make_mlp(encoders[0].width, llm_width)

    def forward(self, features, lengths):
        return self.net(features[0]), lengths[0]  # (B, N, De) -> (B, N, D)


class CrossAttentionBlock(nn.Module):
    """x + W_o softmax(q k^T / sqrt(d)) v, then x + MLP(LayerNorm x): queries read other tokens.

    q is of LayerNorm x (B, L, W). k and v come from several sources, each with weights of its own,
    in one joint softmax. The MLP is as wide as x inside, as in Cambrian-1.
    """

    def __init__(self, width, sources, heads, mlp_width=None):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(sources))
        self.mlp = make_mlp(width, width, mlp_width or width)

    def project_kv(self, sources):
        """k and v, each (B, S, H, d), of all sources (B, N, W), one after another."""
        kv = torch.cat([proj(source) for proj, source in zip(self.kv, sources)], dim=1)
        return kv.unflatten(2, (2, self.heads, -1)).unbind(2)

    def attend(self, x, k, v, mask):
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1))  # (B, L, H, d)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, L, W)

    def forward(self, x, k, v, mask):
        x = x + self.attend(x, k, v, mask)
        return x + self.mlp(self.norm2(x))


class QFormer(nn.Module):
    """Querying transformer: learnt queries read an encoder's tokens, layer by layer, and become the
    audio tokens. It is BLIP-2's without self-attention among the queries."""
    joint = False
    has_time = False

    def __init__(self, encoders, llm_width, config):
        super().__init__()
        width = max(encoder.width for encoder in encoders)
        self.queries = nn.Parameter(torch.randn(config.queries, width) / math.sqrt(width))
        self.in_proj = nn.ModuleList(
            nn.Sequential(*make_mlp(e.width, width), nn.LayerNorm(width)) for e in encoders)
        self.layers = nn.ModuleList(
            CrossAttentionBlock(width, len(encoders), max(1, width // 64))
            for _ in range(config.connector_layers))
        self.out = make_mlp(width, llm_width)

    def read(self, queries, features, mask):
        """Queries (L, W) read features, a list of (B, N, De), where the mask (B, 1, 1 or L, all N)
        allows it -> (B, L, D)."""
        sources = [proj(x) for proj, x in zip(self.in_proj, features)]  # (B, N, W) each
        x = queries.expand(len(mask), -1, -1)  # (B, L, W)
        for layer in self.layers:
            x = layer(x, *layer.project_kv(sources), mask)
        return self.out(x)

    def forward(self, features, lengths):
        mask = valid_mask(features[0], lengths[0])[:, None, None]  # (B, 1, 1, N)
        return self.read(self.queries, features, mask), None


class LFST(QFormer):
    """The paper's connector (figure 3), after Cambrian-1's spatial aggregator: one latent token at
    each cell of a time-frequency grid reads what the encoders say of that cell alone; after the
    projection a newline token closes each time step.

    The grid is as long as the longest encoder's window. Of a shorter clip it has the time steps
    that begin before the clip's features end.
    """
    joint = True
    has_time = True

    def __init__(self, encoders, llm_width, config):
        super().__init__(encoders, llm_width, replace(config, queries=1))
        self.grid = min(config.grid_steps, *(e.grid[0] for e in encoders)), config.grid_bands
        longest = max(e.seconds for e in encoders)
        self.encoder_grids = [(*e.grid, e.seconds / longest) for e in encoders]
        self.newline = nn.Parameter(torch.randn(llm_width) / math.sqrt(llm_width))

    def forward(self, features, lengths):
        (steps, bands), masks, ends = self.grid, [], []
        for x, n, (own_steps, own_bands, share) in zip(features, lengths, self.encoder_grids):
            # which of the encoder's time steps have sound; clips of one length share one mask
            valid = valid_mask(x[:1] if n is None else x, n).unflatten(1, (-1, own_bands))[..., 0]
            time = nearest_parts(steps, own_steps, share, valid)  # (1 or B, steps, n)
            band = nearest_parts(bands, own_bands, 1, valid.new_ones(1, own_bands))
            mask = time[:, :, None, :, None] & band[:, None, :, None]  # (., steps, bands, n, own)
            masks.append(mask.flatten(3).flatten(1, 2).expand(len(x), -1, -1))  # (B, cells, N)
            ends.append((steps * valid.sum(1) / own_steps * share).ceil().expand(len(x)))  # (B,)
        latents = self.queries.expand(steps * bands, -1)
        x = self.read(latents, features, torch.cat(masks, dim=2)[:, None])  # (B, cells, D)
        x = x.unflatten(1, (steps, bands))
        x = torch.cat([x, self.newline.expand(len(x), steps, 1, -1)], dim=2)
        heard = torch.stack(ends).amax(0).long()  # (B,): the time steps of each clip
        x = x[:, :heard.max()].flatten(1, 2)  # (B, (bands + 1) steps, D)
        return x, (bands + 1) * heard if (heard < heard.max()).any() else None


CONNECTORS = {"mlp": MLPConnector, "qformer": QFormer, "lfst": LFST}


def plan_connectors(encoders, name):
    """{connector's name in the model, such as whisper: (class, [kinds of its encoders])}. name: one
    of CONNECTORS, or auto. Encoders that a joint connector leaves over have an MLP each."""
    general = [kind for kind, encoder in encoders.items() if encoder.general]
    if name == "auto":
        name = "lfst" if len(general) == 2 else "mlp"
    if name not in CONNECTORS:
        raise ValueError(f"connector {name}: choose auto, {', '.join(CONNECTORS)}")
    if not CONNECTORS[name].joint:
        return {kind: (CONNECTORS[name], [kind]) for kind in encoders}
    if not general:
        raise ValueError(f"connector {name}: needs sslam or clap, and there is neither")
    plan = {kind: (MLPConnector, [kind]) for kind in encoders if kind not in general}
    return plan | {name: (CONNECTORS[name], general)}


def valid_mask(x, lengths):
    """(B, N) bool: which tokens of x (B, N, ...) are not padding."""
    positions, _ = make_positions(0, x.shape[1], lengths)
    return (positions < PAD_POSITION).to(x.device).expand(len(x), -1)


def nearest_parts(cells, count, share, valid):
    """(B, cells, n) bool: which parts of an encoder's axis belong to each cell of a grid's axis.

    The axis, 0 to 1, has `cells` equal cells. The encoder covers 0 to `share` of it in `count`
    equal parts; those in `valid` (B, n) have sound. To a cell belong the parts whose centres lie in
    it; if there is none, the nearest.
    """
    n = valid.shape[1]
    centres = (torch.arange(n, dtype=torch.float64) + 0.5) / count * share
    edges = torch.arange(cells + 1, dtype=torch.float64)[:, None] / cells
    inside = (edges[:-1] <= centres) & (centres < edges[1:])  # (cells, n)
    distance = ((edges[:-1] + edges[1:]) / 2 - centres).abs()  # (cells, n)
    rank = distance.argsort(dim=-1, stable=True).argsort(dim=-1).to(valid.device)
    nearest = rank.where(valid[:, None], n).argmin(-1)  # (B, cells)
    inside = inside.to(valid.device) & valid[:, None]
    return inside.where(inside.any(-1, keepdim=True), F.one_hot(nearest, n).bool())


# ------------------------------------------------------------------------------- the whole model

class AudioLLM(nn.Module):
    """Encoders, their connectors, the LLM, and a route for each encoder.

    What a mode of lib/variants.py trains beside the LLM stands among the connectors too: train.py
    knows the parts of a model by the first part of a parameter's name.

    encoders: {kind: module of encoders.py}. mode: a name of MODES. An encoder is frozen unless
    its `frozen` is False. ValueError for a mode, connector or layers that do not exist.
    """
    Config = IntegrationConfig

    def __init__(self, llm, tokenizer, encoders, mode, config=IntegrationConfig()):
        super().__init__()
        self.llm, self.tokenizer = llm, tokenizer
        self.mode, self.config, self.options = mode, config, {}
        if config.lora_rank:
            add_lora(llm, config.lora_rank)
        self.encoders = nn.ModuleDict({k: encoders[k] for k in ENCODERS if k in encoders})
        if "whisper" in self.encoders:
            self.encoders["whisper"].crop(config.whisper_seconds)
        # seconds of a clip that the encoders hear: of files no more needs to be read
        self.seconds = max((encoder.seconds for encoder in self.encoders.values()), default=0.0)
        self.routes = mode_routes(mode, self.encoders)
        plan = plan_connectors(self.encoders, config.connector)
        self.connector_inputs = {name: kinds for name, (_, kinds) in plan.items()}
        self.connectors = nn.ModuleDict({
            name: connector([encoders[kind] for kind in kinds], llm.config.hidden_size, config)
            for name, (connector, kinds) in plan.items()})
        # a joint connector reads the encoders' tokens one by one
        self.pool_sizes = {kind: 1 if connector.joint else encoders[kind].pool_size
                           for connector, kinds in plan.values() for kind in kinds}
        if config.audio_rope not in ("on", "off"):
            raise ValueError(f"audio_rope {config.audio_rope}: expected on or off")
        self.write = partial(hear, rotate_keys=config.audio_rope == "on")
        if MODES.get(mode):
            MODES[mode](self)
        self.layers = layers_by_encoder(config.lal_layers, self.routes,
                                        llm.config.num_hidden_layers)
        for kinds in self.connector_inputs.values():
            if len({(self.routes[kind], str(self.layers[kind])) for kind in kinds}) > 1:
                raise ValueError(f"{' and '.join(kinds)} share a connector: give them one route, "
                                 "and the same layers")
        if config.audio_rope == "off" and "lal" not in self.routes.values():
            raise ValueError(f"audio_rope: mode {mode} has no keys of LAL's")
        for encoder in self.encoders.values():
            encoder.requires_grad_(not encoder.frozen)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.train(mode and not encoder.frozen)
        return self

    @property
    def device(self):
        return self.llm.model.embed_tokens.weight.device

    def spectrograms(self, clip):
        """What a data worker does for one clip, on the CPU: {kind: (its spectrogram, the clip's
        length in seconds)}. clip: a function rate -> (samples,)."""
        waves = {rate: clip(rate) for rate in {e.rate for e in self.encoders.values()}}
        spectrograms = {}
        for kind, encoder in self.encoders.items():
            wave = waves[encoder.rate][:math.ceil(encoder.seconds * encoder.rate)]
            spectrograms[kind] = encoder.front_end(wave[None]), len(wave) / encoder.rate
        return spectrograms

    def encode(self, spectrograms):
        """Features of a batch of clips, on the model's device: a list of {kind: (n, De)}.

        spectrograms: a list of what `spectrograms` gives. Encoder tokens are pooled; those wholly
        after a clip's end, and SSLAM's cls token, are left out.
        """
        features, dtype = [{} for _ in spectrograms], self.llm.model.embed_tokens.weight.dtype
        for kind, encoder in self.encoders.items():
            batch = torch.cat([clip[kind][0] for clip in spectrograms]).to(self.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen):
                encoded = encoder(batch)  # (B, N, De)
            for clip_features, clip, tokens in zip(features, spectrograms, encoded):
                tokens = tokens[encoder.num_prefix_tokens:encoder.num_tokens(clip[kind][1])]
                clip_features[kind] = pool(tokens, self.pool_sizes[kind]).to(dtype)
        return features

    @torch.no_grad()
    def features(self, clips):
        """Features of clips, on the CPU: a list of {kind: (n, De)}. Those of frozen encoders can be
        computed once and trained on many times. clips: functions rate -> (samples,)."""
        encoded = self.encode([self.spectrograms(clip) for clip in clips])
        return [{kind: x.cpu() for kind, x in features.items()} for features in encoded]

    def segments(self, features):
        """The beginning of a chat and the audio of a batch, as `prefill` takes them. features: as
        `encode` gives them; without any, [{}], this is the LLM alone."""
        before = torch.tensor([self.tokenizer.chat("")[0]], device=self.device)
        segments = [Segment("plits", self.llm.embed(before))]
        for name, kinds in self.connector_inputs.items() if any(features) else ():
            batches = [pad_batch([f[kind] for f in features], self.device) for kind in kinds]
            tokens, lengths = self.connectors[name](*zip(*batches))
            segments.append(Segment(self.routes[kinds[0]], tokens, lengths, self.layers[kinds[0]]))
        return segments

    def forward(self, features, ids, clip_index=None):
        """Hidden states (B, T, D) of text ids (B, T), padded at the end, after a batch of clips.

        Row i is about clip clip_index[i], which is heard once for all its rows; without clip_index
        it is about clip i.
        """
        segments, text = self.segments(features), Segment("plits", self.llm.embed(ids))
        cache = KVCache(self.llm.config.num_hidden_layers)
        if clip_index is None:
            segments.append(text)
        else:
            prefill(self.llm, segments, cache, self.write)
            segments, cache = [text], cache.fork(clip_index, ids.shape[1])
        hidden = prefill(self.llm, segments, cache, self.write)
        return hidden[:, -ids.shape[1]:]

    @torch.no_grad()
    def hear(self, features):
        """Hear a batch of clips once, to ask about them many times. Returns a KVCache."""
        cache = KVCache(self.llm.config.num_hidden_layers)
        prefill(self.llm, self.segments(features), cache, self.write)
        return cache

    def ask(self, cache, questions, clip_index=None, max_new_tokens=48, **sampling):
        """Answers (strings) to questions about what `hear` heard; question i is about clip
        clip_index[i], without clip_index about clip i. The rest as in LLM.generate."""
        prompts = [self.tokenizer.chat(question)[1] for question in questions]
        new = self.llm.generate(prompts, max_new_tokens, cache=cache, clip_index=clip_index,
                                eos_id=self.tokenizer.eos_ids, **sampling)
        return [self.tokenizer.decode(ids).strip() for ids in new]

    def save(self, path, **extra):
        """Write everything to one file; `extra` is kept beside it. See lib/checkpoints.py."""
        save_model(self, path, extra)

    @classmethod
    def load(cls, path, checkpoint_paths=None):
        """The AudioLLM that `save` wrote, in eval mode. ValueError, one line, if it is not one.

        checkpoint_paths: {kind or "llm": path} of files that have moved since.
        """
        return load_model(cls, path, checkpoint_paths or {})


import lib.variants  # noqa: E402, F401 - at the end, as it builds on this file: adds to MODES
