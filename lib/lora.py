"""LoRA, low-rank adaptation (Hu et al. 2022): instead of a weight W, learn an update B A of it.

    python train.py --mode lal --freeze lora      # of the LLM only updates of q_proj and v_proj
"""
import torch
from torch import nn


class LoRALinear(nn.Module):
    """y = W x + b + B A x. W (out, in) and b stay as they are; A (rank, in) and B (out, rank) are
    learnt. B starts at zero, so that at first nothing changes."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        width = linear.in_features
        self.lora_a = nn.Parameter(torch.randn(rank, width) / width ** 0.5)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + x @ self.lora_a.T @ self.lora_b.T


def add_lora(llm, rank):
    """Put a LoRALinear in the place of q_proj and v_proj in each layer of an LLM."""
    for block in llm.model.layers:
        attention = block.self_attn
        attention.q_proj = LoRALinear(attention.q_proj, rank)
        attention.v_proj = LoRALinear(attention.v_proj, rank)
