"""A plain decoder LLM (large language model) of the Llama family. It knows nothing of audio.

Tokens enter as embeddings, with positions and a cache of keys and values (KV cache): that is all
that integrate.py needs to let the model hear. One rule says what sees what: a query sees every key
whose position is not after its own. Try:

    python -c "from model import *; llm = LLM(LLMConfig()); print(llm.generate([1, 2, 3], 5))"

LLM.from_pretrained(folder) reads Llama 2, Llama 3.2, Qwen2.5 and SmolLM2 as Hugging Face stores
them, whose names for modules and parameters stand here; tokenizers are in lib/tokenizers.py.

Letters in shapes: B batch, T new tokens, S all tokens so far, D width, H heads, K key-value heads,
d head width, V vocabulary. RoPE is rotary position embedding, GQA grouped-query attention.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from lib.huggingface import LLAMA3_ROPE, load_pretrained
from lib.weights import check_values

PAD_POSITION = 1 << 30  # the position of padding: after every query, so no query sees it


@dataclass(frozen=True)
class LLMConfig:
    """Sizes of the decoder, named as in Hugging Face's config.json; by default our miniature."""
    vocab_size: int = 768
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
    rope_scaling: dict = None  # Llama 3's four numbers, see LLAMA3_ROPE and `rotary`

    def __post_init__(self):
        check_values(vars(self), {field.name: field.default for field in fields(self)})
        if self.rope_scaling:
            check_values(self.rope_scaling, dict.fromkeys(LLAMA3_ROPE, 1.0))
        H, K = self.num_attention_heads, self.num_key_value_heads
        assert H % K == 0, f"{H} heads cannot share {K} key-value heads evenly"
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim}: RoPE rotates pairs of numbers"


# ---------------------------------------------------------------------- positions, cache and mask

def make_positions(start, count, lengths=None):
    """Positions (1 or B, count) of `count` tokens from `start` on, and the position after them.

    start: an int, or a tensor (B, 1) when the rows differ. lengths (B,): how many of the tokens
    each row really has; the rest of the row is padding, at PAD_POSITION.
    """
    known = start if torch.is_tensor(start) else lengths
    steps = torch.arange(count, device=None if known is None else known.device)[None]
    if lengths is None:
        return start + steps, start + count
    lengths = lengths[:, None].to(steps.device)
    return (start + steps).masked_fill(steps >= lengths, PAD_POSITION), start + lengths


class KVCache:
    """The keys and values (B, S, K, d) of each layer, and their positions (1 or B, S).

    Without `capacity` new keys are concatenated; with it, as after `fork`, each layer reserves
    that many slots at once and writes in place. Gradients flow through either. Layers may hold
    different tokens: those that hold the same share one tensor of positions, and so one mask.
    """

    def __init__(self, layers, capacity=0):
        self.keys = [None] * layers
        self.values = [None] * layers
        self.positions = [None] * layers
        self.capacity = capacity
        self.next_position = 0  # of the next token: an int, or (B, 1) when the rows differ
        self.in_order = True  # every token stands right after the one before it
        self.extra = {}  # tensors (B, ...) by name, for lib/variants.py; `fork` takes them along

    def extend(self, tokens, positions=None, layers=None):
        """Announce new tokens (B, T, D) to these layers (None: all); returns their positions.

        positions (1 or B, T): None means in order, after what the cache holds. Every announced
        layer must then `append` its keys and values.
        """
        if positions is None:
            positions, self.next_position = make_positions(self.next_position, tokens.shape[1])
        else:
            last = positions.masked_fill(positions == PAD_POSITION, -1).amax(1, keepdim=True)
            self.next_position = torch.maximum(last + 1, torch.as_tensor(self.next_position))
            self.in_order = False
        positions = positions.to(tokens.device)
        longer = {}  # old positions -> old and new ones, computed once for layers that share them
        for i in range(len(self.positions)) if layers is None else layers:
            old = self.positions[i]
            if id(old) not in longer:
                longer[id(old)] = positions if old is None else cat_broadcast(old, positions)
            self.positions[i] = longer[id(old)]
        return positions

    def append(self, layer, k, v):
        """Add a layer's new keys and values (B, T, K, d), after `extend`; returns all it has."""
        S, T = self.positions[layer].shape[1], k.shape[1]
        for store, new in ((self.keys, k), (self.values, v)):
            if not self.capacity:
                store[layer] = new if store[layer] is None else cat_broadcast(store[layer], new)
                continue
            if store[layer] is None:
                store[layer] = new.new_empty(new.shape[0], self.capacity, *new.shape[2:])
            slots = store[layer].shape[1]
            assert S <= slots, f"{S} tokens do not fit into a cache of {slots} slots"
            store[layer][:, S - T:S] = new
        return self.keys[layer][:, :S], self.values[layer][:, :S]  # (B, S, K, d)

    def fork(self, clip_index, capacity):
        """A copy with `capacity` more slots, whose row i continues row clip_index[i] of this one.

        The original stays as it is: hear a clip once, ask many questions. Positions, next_position,
        in_order and `extra` go along; what has one row stands for all rows. Keys and values are
        copied to (rows, S + capacity, K, d); an empty layer stays None.
        """
        index = torch.as_tensor(list(clip_index))

        def select(x):
            if not torch.is_tensor(x) or x.shape[0] == 1:  # one row stands for all
                return x
            return x.index_select(0, index.to(x.device))  # its backward is quicker than x[index]'s

        new = KVCache(len(self.keys), capacity)
        new.next_position = select(self.next_position)
        new.in_order = self.in_order
        new.extra = {name: select(x) for name, x in self.extra.items()}
        selected = {id(p): select(p) for p in self.positions}  # layers go on sharing positions
        for i, positions in enumerate(self.positions):
            new.positions[i] = selected[id(positions)]
            S = 0 if positions is None else positions.shape[1]
            for old, store in ((self.keys[i], new.keys), (self.values[i], new.values)):
                if S:
                    store[i] = old.new_empty(len(index), S + capacity, *old.shape[2:])
                    store[i][:, :S] = select(old)[:, :S]
        return new


def cat_broadcast(a, b):
    """Concatenate along dimension 1; a batch of one stands for every row."""
    B = max(a.shape[0], b.shape[0])
    return torch.cat([a.expand(B, *a.shape[1:]), b.expand(B, *b.shape[1:])], dim=1)


def position_mask(queries, keys, dtype):
    """The one rule: 0 where the key's position is not after the query's, else -inf.

    queries (1 or B, T), keys (1 or B, S) are positions -> (1 or B, 1, T, S), to be added to scores.
    """
    hidden = keys[:, None, None, :] > queries[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -torch.inf)


def attention_mask(queries, keys, in_order, dtype):
    """The one rule as arguments of scaled_dot_product_attention, in the form that its kernel runs
    fastest; queries, keys as above, in_order as in KVCache.

    Without padding the T queries are the last of the S keys, so the rule is the causal mask
    aligned at the lower right. The kernels know it by name where T = S, and CUDA's where T < S
    too. A single query sees all keys and needs no mask. Otherwise the positions are compared.
    """
    T, S = queries.shape[1], keys.shape[1]
    if in_order and T == 1:
        return {}
    if in_order and T == S:
        return {"is_causal": True}
    if in_order and queries.is_cuda:
        from torch.nn.attention.bias import causal_lower_right  # which takes a second to import
        return {"attn_mask": causal_lower_right(T, S)}
    return {"attn_mask": position_mask(queries, keys, dtype)}


def rotary(positions, config, dtype):
    """cos and sin (1 or B, T, 1, d) of the angles position * theta^(-2i/d), i < d/2, twice.

    The first half of sin is negative, ready for `rotate`. Llama 3 slows down slow pairs: a
    frequency w makes context * w / (2 pi) turns in the context it was first trained on. With
    s = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), kept within 0 and 1, it
    becomes w * (s + (1 - s) / factor). Computed in float64 for float64, else in float32.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    i = torch.arange(0, config.head_dim, 2, dtype=exact, device=positions.device)
    frequency = config.rope_theta ** (-i / config.head_dim)  # radians per position (d/2,)
    if config.rope_scaling:
        factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
        turns = context * frequency / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (unscaled + (1 - unscaled) / factor)
    angles = (positions[..., None].to(exact) * frequency)[:, :, None]  # (1 or B, T, 1, d/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, angles):
    """Rotate each pair (x[i], x[i + d/2]) of x (B, T, heads, d) by its position's angle.

    Under autocast the angles are more precise than x; the result has the precision of x again.
    """
    cos, sin = angles
    rotated = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
    return rotated.to(x.dtype)


# ------------------------------------------------------------------------------------- the decoder

def linear(x, weight, bias=None):
    """W x + b of every row of x. A single row, as in generation, goes to torch.mv: the kernel of
    F.linear is made for many rows and takes half as long again in bfloat16."""
    if x.numel() != weight.shape[1] or torch.is_grad_enabled():
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
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

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

    def split_heads(self, x):
        B, T, width = x.shape
        return x.view(B, T, width // self.head_dim, self.head_dim)  # (B, T, heads, d)

    def forward(self, x, angles, mask, cache, layer):
        B, T, _ = x.shape
        q = rotate(self.split_heads(self.q_proj(x)), angles)  # (B, T, H, d)
        k = rotate(self.split_heads(self.k_proj(x)), angles)  # (B, T, K, d)
        v = self.split_heads(self.v_proj(x))
        k, v = cache.append(layer, k, v)  # (B, S, K, d)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, d), (B, K, S, d)
        # y = softmax(q k^T / sqrt(d) + mask) v
        if T == 1:  # the H / K heads that share a key-value head are its rows: it is read once
            q = q.reshape(B, k.shape[1], -1, self.head_dim)  # (B, K, H / K, d): heads, not time
            y = F.scaled_dot_product_attention(q, k, v, **mask)
            return self.o_proj(y.reshape(B, 1, -1))  # (B, 1, D)
        if x.is_cuda and (type(mask.get("attn_mask")) is torch.Tensor or v.element_size() != 2):
            # with an explicit mask, or in float32, CUDA's fast kernels refuse keys that heads share
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, **mask, enable_gqa=True)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


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

    def forward(self, x, angles, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
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
        """x (B, T, D) -> hidden states (B, T, D). See LLM.forward for positions and cache."""
        cache = KVCache(len(self.layers)) if cache is None else cache
        positions = cache.extend(x, positions)
        angles = rotary(positions, self.config, x.dtype)
        masks = {}  # one for each set of keys: there is one set, unless layers were left out
        for i, block in enumerate(self.layers):
            keys = cache.positions[i]
            if id(keys) not in masks:
                masks[id(keys)] = attention_mask(positions, keys, cache.in_order, x.dtype)
            x = block(x, angles, masks[id(keys)], cache, i)
        return self.norm(x)


class LLM(nn.Module):
    """A decoder LLM: `llm(ids)` gives logits, `llm.generate(ids, n)` gives new ids."""
    Config = LLMConfig
    checkpoint_path = None  # the folder that the weights came from
    frozen = False          # they are never trained: a checkpoint need not copy them

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
            for output in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(output.weight,
                                std=std / math.sqrt(2 * self.config.num_hidden_layers))

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """A Llama or Qwen2 from a Hugging Face folder (config.json and weights), in eval mode.

        Weights stored in `dtype` stay mapped to the file until they are used. Raises ValueError,
        one line, for a file that is missing, damaged, or of a model that is not computed here.
        """
        return load_pretrained(cls, folder, dtype, device)

    def embed(self, ids):
        return self.model.embed_tokens(ids)  # (B, T) -> (B, T, D)

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., D)."""
        tied = self.config.tie_word_embeddings
        return linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def forward(self, ids=None, embeds=None, positions=None, cache=None):
        """Logits (B, T, V) of ids (B, T) or of their embeddings (B, T, D), one of the two.

        positions (1 or B, T): None means in order, after what the cache holds; padding is at
        PAD_POSITION. cache: a KVCache; these tokens see what it holds, and are added to it.
        """
        assert (ids is None) != (embeds is None), "give ids or embeds, one of the two"
        embeds = self.embed(ids) if embeds is None else embeds
        return self.head(self.model(embeds, positions, cache))

    def loss(self, hidden, ids, weights):
        """Sum over t of weights[t] * -log p(ids[t] | what comes before t), a scalar.

        hidden (B, T - 1, D): hidden states of all tokens but the last. ids (B, T). weights (B, T):
        0 for tokens that are not to be learnt, as those of a prompt; only the others need logits.
        """
        targets, weights = ids[:, 1:], weights[:, 1:]  # state t predicts token t + 1
        learnt = weights > 0  # (B, T - 1)
        losses = F.cross_entropy(self.head(hidden[learnt]), targets[learnt], reduction="none")
        return (losses * weights[learnt].to(losses.dtype)).sum()

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=0.0, top_p=1.0, cache=None,
                 clip_index=None, eos_id=None, seed=None, on_token=None):
        """Continue one prompt (a list of ids) or a batch of them (a list of lists, or (B, T)).

        temperature 0 takes the likeliest token; above 0 it samples among the likeliest tokens that
        together have probability top_p. An answer ends after max_new_tokens, or before eos_id:
        an id, or a list of those that all end it.
        cache: what was read before; it is left as it is. Prompt i continues its row clip_index[i];
        without clip_index the cache has one row for all prompts, or one each.
        on_token: called with the list of the step's ids, one a row (None: that row has ended).
        Returns the new ids: a list, or for a batch a list of lists. ValueError for an empty prompt.
        """
        single = not torch.is_tensor(ids) and (len(ids) == 0 or isinstance(ids[0], int))
        prompts = [ids] if single else ids.tolist() if torch.is_tensor(ids) else ids
        if not prompts or not all(prompts):
            raise ValueError("nothing to continue: every prompt needs at least one token")
        device = self.model.embed_tokens.weight.device
        batch, lengths = pad_batch([torch.tensor(prompt) for prompt in prompts], device)
        B, T = batch.shape
        cache = KVCache(self.config.num_hidden_layers) if cache is None else cache
        cache = cache.fork(range(B) if clip_index is None else clip_index, T + max_new_tokens)
        positions, last = None, -1  # of each prompt, the last token
        if lengths is not None:
            positions, last = make_positions(cache.next_position, T, lengths)[0], lengths - 1
        rng = None if seed is None else torch.Generator(device).manual_seed(seed)
        hidden = self.model(self.embed(batch), positions, cache)[torch.arange(B), last]  # (B, D)
        answers, rows, ended = [[] for _ in prompts], list(range(B)), [False] * B
        eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
        for step in range(max_new_tokens):
            token = sample_token(self.head(hidden), temperature, top_p, rng)  # (rows,)
            ended = [e or t in eos_ids for e, t in zip(ended, token.tolist())]
            new = {row: t for row, t, e in zip(rows, token.tolist(), ended) if not e}
            for row, t in new.items():
                answers[row].append(t)
            if on_token:
                on_token([new.get(row) for row in range(B)])
            if not new or step == max_new_tokens - 1:
                break
            if 2 * len(new) <= len(rows):  # rows that have ended would cost as much as the others
                going = [i for i, e in enumerate(ended) if not e]
                rows, ended, token = list(new), [False] * len(new), token[going]
                cache = cache.fork(going, max_new_tokens - step)
            hidden = self.model(self.embed(token[:, None]), None, cache)[:, 0]
        return answers[0] if single else answers


def pad_batch(rows, device=None):
    """Rows (n_i, ...) as one (B, N, ...), padded with zeros; their lengths (B,), None if equal."""
    lengths = [len(row) for row in rows]
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return batch, None if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)


def sample_token(logits, temperature, top_p, rng=None):
    """The next token (B,) from logits (B, V). At temperature 0 the likeliest, else drawn (nucleus
    sampling): of softmax(logits / temperature) the fewest likeliest tokens stay whose sum reaches
    top_p, at least one, and one of them is drawn in proportion."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # the likeliest token always stays
    return order.gather(1, torch.multinomial(p, 1, generator=rng))[:, 0]
