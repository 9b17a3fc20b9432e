"""What a program takes: seconds, FLOPs, saved bytes, attention kernels; transformers' step beside
it; processes of their own; the machine; and tables of all that.

    python -c "from lib.profiling import *; print(describe_machine('cpu'))"
"""
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode


def time_in_turns(functions, device, rounds):
    """Run functions {name: f} in turns: {name: seconds in each round}, including what f leaves to
    the device. A round before them is for warming up."""
    times = {name: [] for name in functions}
    wait = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type, torch.cpu).synchronize
    for _ in range(1 + rounds):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def product_rate(like):
    """FLOPs (floating-point operations) a second of a large matrix product of this tensor's dtype
    and device: the most that anything there could reach."""
    n = 8192 if like.is_cuda else 1024
    a = torch.randn(n, n, device=like.device).to(like.dtype)
    return 2 * n ** 3 / min(time_in_turns({"product": lambda: a @ a}, like.device, 5)["product"])


@contextmanager
def biases_outside_modes():
    """While a dispatch mode of torch is on, torch cannot make the CausalBias that attention takes.
    Inside this context it is made without the mode."""
    from torch.nn.attention.bias import CausalBias

    def make_bias(cls, *sizes):
        with _disable_current_modes():
            return torch.Tensor.__new__(cls, *sizes)

    with patch.object(CausalBias, "__new__", make_bias):
        yield


def count_flops(function):
    """(FLOPs of function() as torch counts them, its result), attention as plain products."""
    vector = {torch.ops.aten.mv: lambda matrix, vector, **kwargs: 2 * matrix[0] * matrix[1]}
    counter = FlopCounterMode(display=False, custom_mapping=vector)  # which leaves these out
    with biases_outside_modes(), sdpa_kernel(SDPBackend.MATH), counter:
        result = function()
    return counter.get_total_flops(), result


class SavedTensor:
    """A tensor that autograd has saved. It lives as long as autograd needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


def count_saved_bytes(forward, shared):
    """Bytes that autograd holds when forward() has returned; tensors in `shared` count nothing."""
    saved = weakref.WeakSet()

    def pack(tensor):
        packed = SavedTensor(tensor.detach())  # not what it was made from
        saved.add(packed)
        return packed

    with saved_tensors_hooks(pack, lambda packed: packed.tensor):
        result = forward()  # noqa: F841 - holds the graph until all is counted
    storages = [packed.tensor.untyped_storage() for packed in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in shared:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


class OperationNames(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:  # in inference mode torch leaves it to us to take a composite operation apart
            result = operation.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.names.add(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def attention_kernels(function):
    """Names of the attention kernels that it runs: flash, efficient, cudnn; else the slow math."""
    with biases_outside_modes(), OperationNames() as operations:
        function()
    kernels = [re.search("_(flash|efficient|cudnn)_attention", name) for name in operations.names]
    return sorted({kernel[1] for kernel in kernels if kernel}) or ["math"]


def hf_reference_step(llm, ids, audio, loss):
    """A PLITS step by transformers' code, with the weights of an LLM: a function to be called.
    ids (B, T), audio (B, N, D); loss: a function of logits and ids."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--hf-reference needs transformers: pip install transformers") from None
    name = "Qwen2" if llm.config.qkv_bias else "Llama"
    sizes = {k: v for k, v in asdict(llm.config).items() if k not in ("qkv_bias", "rope_scaling")}
    config = getattr(transformers, name + "Config")(**sizes, attn_implementation="sdpa")
    reference = getattr(transformers, name + "ForCausalLM")(config).to(audio.device, audio.dtype)
    missing, unexpected = reference.load_state_dict(llm.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)

    def step():
        reference.zero_grad(set_to_none=True)
        embeds = torch.cat([audio, reference.get_input_embeddings()(ids)], dim=1)
        output = reference(inputs_embeds=embeds, logits_to_keep=ids.shape[1], use_cache=False)
        loss(output.logits, ids).backward()

    return step


def available_memory(device):
    """GB that a process could have on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError):  # not on Windows
        return sys.maxsize / 1e9


def limit_memory(device, gigabytes):
    """Make it an error of torch's to take more than this: all that there is would stop the machine.
    Without CUDA only Linux can."""
    if device.type == "cuda":
        share = gigabytes * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device.index or 0)
    elif sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9),) * 2)


def call_elsewhere(function, calls, bar):
    """[function(*arguments) for arguments in calls], all in one new process. If that is killed, as
    for memory, the result of the call is None, and another process goes on with the next."""
    spawn, results = multiprocessing.get_context("spawn"), []
    while len(results) < len(calls):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            try:
                for arguments in calls[len(results):]:
                    results.append(process.submit(function, *arguments).result())
                    bar.update()
            except BrokenProcessPool:
                results.append(None)
    return results


def describe_machine(device):
    """What numbers were measured on, and the commit (+: files differ from it; empty: no git)."""
    def git(*words):
        try:
            return subprocess.run(["git", "-C", Path(__file__).parent, *words],
                                  capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    cpu = text.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return {"cpu": cpu, "gpu": torch.cuda.get_device_name(device) if "cuda" in device else None,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "-s", "-uno"))}


def print_table(title, rows):
    """Print dicts as aligned columns, named by their keys."""
    def show(x):
        return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [[name, *(show(row.get(name)) for row in rows)] for name in names]
    print(f"\n{title}")
    for line in zip(*columns):
        print("", *(cell.rjust(max(map(len, col))) for cell, col in zip(line, columns)), sep="  ")
