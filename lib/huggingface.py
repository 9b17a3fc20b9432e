"""Reads a decoder LLM from a Hugging Face folder; refuses settings that are not computed here.

    python -c "from model import *; print(LLM.from_pretrained('SmolLM2-135M-Instruct').config)"
"""
from dataclasses import replace
from pathlib import Path

import torch

from lib.weights import (as_value_error, build_for, load_tensors, load_weights, read_json,
                         strip_prefixes)

# The numbers of Llama 3's RoPE
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The settings that change results, and what can be computed here: anything else is refused.
SUPPORTED = {
    "architectures": ("LlamaForCausalLM", "Qwen2ForCausalLM"), "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"), "attention_bias": (False,), "mlp_bias": (False,),
    "partial_rotary_factor": (1,), "use_sliding_window": (False,), "quantization_config": (),
    "full_attention": ()}  # RoPE settings of its own for each kind of layer
REQUIRED_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads")


def read_rope(config):
    """The RoPE settings of a config.json: rope_parameters or, by its older name, rope_scaling.
    ValueError if a setting stands there twice with two values: programs differ in which they use.
    """
    default = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    ropes = [default | {"rope_type": rope.get("type", "default")} | rope
             for rope in map(config.get, ("rope_parameters", "rope_scaling")) if rope] or [default]
    for key, value in ropes[0].items():
        for other in (ropes[-1], config):
            if other.get(key) not in (value, None):
                raise ValueError(f"its rope_parameters or rope_scaling say {key} {value!r}, and it "
                                 f"says {other[key]!r} elsewhere: leave in the right one")
    return ropes[0]


def read_config(folder, make_config):
    """make_config, such as LLMConfig, of what the config.json of a Hugging Face folder says.
    ValueError for all that we would compute wrongly."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    with as_value_error(path, "model that can be computed here"):
        rope, architecture = read_rope(config), str((config["architectures"] or [None])[0])
        settings = config | rope | {"architectures": architecture}
        for setting, supported in SUPPORTED.items():
            if settings.get(setting) not in (*supported, None):
                raise ValueError(f"{setting} is {settings[setting]!r}, and can only be "
                                 f"{' or '.join(map(repr, supported or (None,)))} here")
        heads = config["num_attention_heads"]
        sizes = {size: config[size] for size in REQUIRED_SIZES}
        sizes["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        sizes["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        llama3 = rope["rope_type"] == "llama3"
        return make_config(
            **sizes, qkv_bias=architecture == "Qwen2ForCausalLM",
            rms_norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=rope["rope_theta"],
            rope_scaling={key: rope[key] for key in LLAMA3_ROPE} if llama3 else None,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")))


def load_pretrained(cls, folder, dtype, device):
    """The LLM of class cls in a folder, config.json and weights, in eval mode, as
    LLM.from_pretrained says."""
    config, tensors = read_config(folder, cls.Config), load_tensors(folder)
    with as_value_error(folder, "weights of such a model"):
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": tensor
                   for name, tensor in strip_prefixes(tensors).items()
                   if not name.endswith("rotary_emb.inv_freq")}  # which old Llamas store
        # a head that is no copy of the embedding is used, as transformers 5 does
        head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
        tied = config.tie_word_embeddings and (head is None or torch.equal(head, embedding))
        if tied:
            tensors.pop("lm_head.weight", None)
        with build_for(tensors):
            llm = cls(replace(config, tie_word_embeddings=tied))
    load_weights(llm, tensors, folder, dtype, device)
    llm.checkpoint_path = str(folder)
    return llm.eval()
