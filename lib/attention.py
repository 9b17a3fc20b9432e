"""Where an answer's attention fell: on which tokens of the audio, so at which time and frequency.

    python sample.py --audio assets/demo.wav --prompt "Describe the audio." --listen out/listen.png

B rows, T text tokens, S all tokens, H heads, K key-value heads, d head width.
"""
import torch
import torch.nn.functional as F

from encoders import mel_filters, power_spectrum
from lib.plots import draw_listening
from model import position_mask, rotate

RATE = 16000  # samples per second of the spectrogram that is drawn
LISTEN_SECONDS = 60  # how much of a longer recording is drawn


def attention_weights(llm, read):
    """The attention weights behind read(), whatever the LLM reads there with a cache: for each
    layer the weights (B, H, T, S) and the positions (1 or B, S) of its keys.

    They are computed again, beside the model, from its own queries and keys: softmax(q k^T /
    sqrt(d)) over every key that is not after its query. The T queries are the last of the S tokens.
    """
    layers = []

    def record(attention, inputs, _):
        x, angles, _, cache, layer = inputs
        positions = cache.positions[layer]
        T, S = x.shape[1], positions.shape[1]
        q = rotate(attention.split_heads(attention.q_proj(x)), angles)  # (B, T, H, d)
        k = cache.keys[layer][:, :S]
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B, S, K, d) -> (B, S, H, d)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / attention.head_dim ** 0.5
        scores = scores + position_mask(positions[:, S - T:], positions, scores.dtype)
        layers.append((scores.softmax(dim=-1), positions))

    hooks = [block.self_attn.register_forward_hook(record) for block in llm.model.layers]
    try:
        read()
    finally:
        for hook in hooks:
            hook.remove()
    return layers


@torch.no_grad()
def attention_by_source(model, features, question, answer):
    """What had the LLM's attention as it said each token of an answer (ids) about one clip.

    A token is said by the position before it, whose logits chose it. Returns {source: (layers,
    tokens, n)}, averaged over heads: a weight for each of the n tokens of the source, which is
    "start", a connector, or "text" (question and answer). All sources together sum to one.
    """
    for name, connector in model.connectors.items():
        if not getattr(connector, "has_time", False):
            raise ValueError(f"--listen: {name} has no tokens in order of time to draw")
    ids = torch.tensor([model.tokenizer.chat(question)[1] + answer[:-1]], device=model.device)
    cache = model.hear([features])
    layers = attention_weights(model.llm, lambda: model.llm(ids, cache=cache))
    sizes = [s.tokens.shape[1] for s in model.segments([features])] + [ids.shape[1]]
    weights = layers[0][0].new_zeros(len(layers), len(answer), sum(sizes))
    for row, (layer_weights, positions) in zip(weights, layers):
        # a layer that LAL left out holds fewer keys; a key's position is its place in the layout
        row[:, positions[0]] = layer_weights[0].mean(dim=0)[-len(answer):]
    return dict(zip(("start", *model.connectors, "text"), weights.cpu().split(sizes, dim=-1)))


def attention_on_grid(model, source, weights, seconds):
    """Weights (..., n) of a connector's tokens about a clip -> (..., steps, bands) of their grid,
    and the seconds that a step takes. Encoder tokens that were averaged into one share its weight;
    what fell on LFST's newlines, which are of no band, is left out."""
    connector = model.connectors[source]
    encoders = [model.encoders[kind] for kind in model.connector_inputs[source]]
    window = max(encoder.seconds for encoder in encoders)
    if hasattr(connector, "grid"):  # LFST
        steps, bands = connector.grid
        return weights.unflatten(-1, (-1, bands + 1))[..., :bands], window / steps
    encoder, = encoders
    steps, bands = encoder.steps(seconds), encoder.grid[1]
    pooled = torch.arange(steps * bands) // model.pool_sizes[source]  # each encoder token's token
    shared = weights[..., pooled] / pooled.bincount()[pooled]
    return shared.unflatten(-1, (steps, bands)), window / encoder.grid[0]


def word_groups(tokenizer, ids):
    """The words that ids spell: a list of (word, indices of its ids)."""
    if not ids:
        raise ValueError("the answer is empty: there is no word to look at")
    text, groups = tokenizer.decode(ids), []
    ends = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids) + 1)]
    for i in range(len(ids)):
        if not groups or text[ends[i]:ends[i + 1]][:1].isspace():
            groups.append([])
        groups[-1].append(i)
    return [(text[ends[group[0]]:ends[group[-1] + 1]].strip(), group) for group in groups]


def draw_answer(model, features, wave, question, answer, path):
    """Draw where the attention of each word of an answer (ids) fell, on average over heads and
    layers, below the spectrogram of the clip, wave (samples,) at RATE."""
    words, index = zip(*word_groups(model.tokenizer, answer))
    sources = attention_by_source(model, features, question, answer)
    seconds, panels = len(wave) / RATE, []
    for source, kinds in model.connector_inputs.items():
        weights = sources[source].mean(dim=0)  # (tokens, n)
        weights = torch.stack([weights[group].mean(0) for group in index])  # (words, n)
        grids, step = attention_on_grid(model, source, weights, seconds)  # (words, steps, bands)
        panels.append((" and ".join(kinds), words, grids, weights.sum(1), step))
    filters = mel_filters(128, 257, RATE, 20, 8000, "kaldi")  # SSLAM's
    power = power_spectrum(F.pad(wave, (0, 512))[None], torch.hann_window(512), 160)[0]
    mel = (power @ filters).clamp(1e-10).log10()  # (frames, 128), a frame each 10 ms
    title = f"{question}  \u2192  {model.tokenizer.decode(answer).strip()}"
    draw_listening(path, mel, filters.argmax(dim=0) * RATE / 512, seconds, title, panels)
