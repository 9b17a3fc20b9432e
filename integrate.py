"""How audio gets into an LLM: the paper's method, all of it in this file.

"PAL: Probing Audio Encoders via LLMs" (arXiv 2506.10423v2), section 3. An LLM's layer that has
read something keeps only its keys and values, so a model can hear by having its KV cache written:

- PLITS writes it the ordinary way: audio tokens run through every layer like words.
- LAL writes it directly: at each layer k, v = W_K n(a), W_V n(a) of the same audio tokens a, with
  n that layer's own input norm. No audio queries, no feed-forward, no work between layers.
- PAL does both: the speech encoder's tokens the PLITS way, the general encoders' the LAL way.

Positions follow one layout in every mode: beginning of text, whisper, sslam, clap, then the
question and its answer. Try:  python train.py --mode lal
"""
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from encoders import ENCODERS, load_encoder
from model import LLM, KVCache, LLMConfig, end, place, read_tokenizer, rotary, rotate

# A mode is nothing but the route of each encoder, in the order of their tokens.
ROUTES = {
    "plits": {"whisper": "plits", "sslam": "plits", "clap": "plits"},
    "lal": {"whisper": "lal", "sslam": "lal", "clap": "lal"},
    "pal": {"whisper": "plits", "sslam": "lal", "clap": "lal"},
}


# --------------------------------------------------------------------------------- hearing

def hear(llm, audio, how, cache=None, layers=None, positions=None):
    """Write audio tokens (B, N, D), already in the LLM's width, into the LLM's KV cache.

    how: plits (run them through every layer) or lal (write keys and values directly).
    cache: what came before (None: nothing). layers: with lal, the layers to write (None: all).
    positions (1 or B, N): None means in order, after what the cache holds; FAR marks padding.
    Returns the cache. Paper, section 3.
    """
    cache = cache or KVCache(llm.config.num_hidden_layers)
    if how == "plits":
        assert layers is None, "plits runs through every layer: only lal can choose"
        llm.model(audio, positions, cache)
        return cache
    assert how == "lal", f"how is {how!r}: plits or lal"
    in_order = positions is None
    if in_order:
        positions, cache.next = place(cache.next, audio.shape[1])
    else:
        cache.next, cache.plain = end(positions), False
    positions = positions.to(audio.device)
    layers = range(llm.config.num_hidden_layers) if layers is None else layers
    cache.extend(positions, layers)
    rope = rotary(positions, llm.config, audio.dtype)
    # The same tokens go to every layer, so their RMS is the same at every layer and only the
    # norm's gain differs: normalise once, fold each gain into its W_K and W_V.
    unit = F.rms_norm(audio, audio.shape[-1:], eps=llm.config.rms_norm_eps)  # (B, N, D)
    for i in layers:
        gain, attention = llm.model.layers[i].input_layernorm.weight, llm.model.layers[i].self_attn
        k, v = (attention.heads(F.linear(unit, proj.weight * gain, proj.bias))  # (B, N, K, d)
                for proj in (attention.k_proj, attention.v_proj))
        cache.append(i, rotate(k, rope), v)
    return cache


def run(llm, segments, cache=None, layers=None):
    """Lay segments out in order and run what has to run, as one sequence.

    segments: (how, tokens (B or 1, N, D), lengths (B,) or None) each, in order of position. how is
    plits (text comes this way too) or lal. Rows shorter than N say so in lengths: the rest is
    padding.
    cache: where to write; without one, and with nothing to write, the sequence is plain causal.
    Returns the hidden states (B, n, D) of all that ran, in order.
    """
    B = max(tokens.shape[0] for _, tokens, _ in segments)
    plain = all(lengths is None for _, _, lengths in segments)
    if cache is None and not (plain and all(how == "plits" for how, _, _ in segments)):
        cache = KVCache(llm.config.num_hidden_layers)
    start = cache.next if cache else 0
    plain = plain and (cache is None or cache.plain)
    sequence, where = [], []
    for how, tokens, lengths in segments:
        positions, start = place(start, tokens.shape[1], lengths)
        if how == "lal":  # goes into the cache at its own place in the layout, before anything runs
            hear(llm, tokens, "lal", cache, layers, positions)
        else:
            sequence.append(tokens.expand(B, -1, -1))
            where.append(positions.to(tokens.device))
    hidden = torch.cat(sequence, dim=1) if sequence else None
    if len(sequence) == len(segments) and plain:
        return llm.model(hidden, None, cache)
    if sequence:
        rows = max(p.shape[0] for p in where)
        hidden = llm.model(hidden, torch.cat([p.expand(rows, -1) for p in where], dim=1), cache)
    cache.next, cache.plain = start, plain
    return hidden


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


class MLPConnector(nn.Module):
    """Linear, GELU, Linear from an encoder's width to the LLM's, after average pooling."""

    def __init__(self, width, llm_width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))

    def forward(self, x):
        return self.net(x)  # (B, N, De) -> (B, N, D)


# ----------------------------------------------------------------------------- the whole thing

class AudioLLM(nn.Module):
    """Frozen encoders, a connector each, the LLM, and a route for each encoder.

    encoders: {kind: module from encoders.py}. mode: a key of ROUTES.
    windows: {kind: how many encoder tokens are averaged into one}.
    """

    def __init__(self, llm, tokenizer, encoders, mode, windows):
        super().__init__()
        if mode not in ROUTES:
            raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(ROUTES)}")
        self.llm, self.tokenizer, self.mode, self.windows = llm, tokenizer, mode, dict(windows)
        order = [kind for kind in ROUTES[mode] if kind in encoders]
        self.encoders = nn.ModuleDict({kind: encoders[kind] for kind in order})
        self.connectors = nn.ModuleDict(
            {kind: MLPConnector(encoders[kind].width, llm.config.hidden_size) for kind in order})
        self.encoders.requires_grad_(False)
        self.train(self.training)

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
        for kind, connector in self.connectors.items() if any(features) else ():
            tokens, lengths = stack([f[kind] for f in features])
            lengths = None if lengths is None else lengths.to(self.device)
            out.append((ROUTES[self.mode][kind], connector(tokens.to(self.device)), lengths))
        return out

    def forward(self, features, ids):
        """Hidden states (B, T, D) of text ids (B, T), padded at the end, after a batch of clips."""
        text = ("plits", self.llm.embed(ids), None)
        return run(self.llm, self.segments(features) + [text])[:, -ids.shape[1]:]

    @torch.no_grad()
    def hear(self, features):
        """Hear a batch of clips once; ask about them many times. Returns a KVCache."""
        cache = KVCache(self.llm.config.num_hidden_layers)
        run(self.llm, self.segments(features), cache)
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
            "format": FORMAT, "mode": self.mode, "windows": self.windows,
            "llm": asdict(self.llm.config), "tokenizer": to_bytes(self.tokenizer.proto),
            "encoders": {kind: asdict(e.config) for kind, e in self.encoders.items()},
            "sources": {kind: e.source for kind, e in self.encoders.items()},
            "state": state, **extra})

    @classmethod
    def load(cls, path, sources=None):
        """The AudioLLM that `save` wrote, in eval mode. ValueError if the file is not one.

        sources: {kind: path} of encoders' own files that have moved since.
        """
        saved = load_checkpoint(path, FORMAT)
        try:
            return cls.restore(path, saved, sources or {})
        except (KeyError, TypeError, RuntimeError) as e:
            reason = " ".join(str(e).split())
            raise ValueError(f"{path}: made by another version of this code ({reason})") from None

    @classmethod
    def restore(cls, path, saved, sources):
        encoders = {}
        for kind, config in saved["encoders"].items():
            config, source = ENCODERS[kind].Config(**config), saved["sources"][kind]
            if source:
                encoders[kind] = load_encoder(kind, sources.get(kind) or source)
                if encoders[kind].config != config:
                    raise ValueError(f"{path}: was trained with another {kind}: {config}")
            else:
                encoders[kind] = ENCODERS[kind](config)
        tokenizer = read_tokenizer(from_bytes(saved["tokenizer"]))
        with torch.device("meta"):  # no memory for weights that are about to be replaced
            llm = LLM(LLMConfig(**saved["llm"]))
        model = cls(llm, tokenizer, encoders, saved["mode"], saved["windows"])
        model.fill(path, saved)
        return model.eval()

    def fill(self, path, saved):
        """Take the weights out of a checkpoint of this very model. ValueError if of another."""
        if saved["mode"] != self.mode:
            raise ValueError(f"{path}: of mode {saved['mode']}, not {self.mode}")
        try:
            unread = self.load_state_dict(saved.pop("state"), strict=False, assign=True)
        except RuntimeError as e:
            raise ValueError(f"{path}: of another model ({' '.join(str(e).split())})") from None
        missing = [name for name in unread.missing_keys if not self.is_elsewhere(name)]
        if missing or unread.unexpected_keys:
            raise ValueError(f"{path}: of another model: missing {missing}, surprising "
                             f"{unread.unexpected_keys}")


FORMAT = "audio-llm 1"


def stack(rows):
    """Rows (n_i, D) as one (B, N, D), padded with zeros, and their lengths (B,), None if equal."""
    lengths = torch.tensor([len(r) for r in rows])
    same = bool((lengths == lengths[0]).all())
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), None if same else lengths


def to_bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a checkpoint holds tensors


def from_bytes(tensor):
    return tensor.numpy().tobytes()


def save_atomically(path, what):
    """torch.save under a temporary name, then rename: `path` is always whole, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(what, file)
            file.flush()
            os.fsync(file.fileno())  # or the name could outlive the contents in a power cut
        os.replace(temporary, path)
    except RuntimeError as e:  # torch's, who on a full disk complains of a file cut short
        raise e.__context__ or e
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
