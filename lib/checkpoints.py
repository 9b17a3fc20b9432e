"""The one file that holds a whole AudioLLM: integrate.py's `AudioLLM.save` and `AudioLLM.load`.

It has tensors and plain types only. An encoder or LLM that came from a file of its own and is never
trained is not copied into it: the path of that file is kept.
"""
from dataclasses import asdict
from functools import partial

import torch

from encoders import ENCODERS, load_encoder
from lib.tokenizers import tokenizer_from_bytes
from lib.weights import (as_value_error, build_for, bytes_to_tensor, check_values,
                         load_checkpoint, load_weights, save_atomically, tensor_to_bytes)
from model import LLM, LLMConfig

CHECKPOINT_FORMAT = "audio-llm 2"


def is_external(model, name):
    """Whether this parameter's values are, and stay, those of a file of the encoder's or of the
    LLM's own."""
    if name.startswith("llm."):
        return bool(model.llm.checkpoint_path) and model.llm.frozen and "lora_" not in name
    return any(e.checkpoint_path and e.frozen and name.startswith(f"encoders.{kind}.")
               for kind, e in model.encoders.items())


def save_model(model, path, extra):
    """Write an AudioLLM to one file; extra {name: what} is kept beside it."""
    state = {name: t for name, t in model.state_dict().items() if not is_external(model, name)}
    encoders = {kind: {"config": asdict(e.config), "pool_size": e.pool_size,
                       "frozen": e.frozen, "checkpoint_path": e.checkpoint_path}
                for kind, e in model.encoders.items()}
    save_atomically(path, {
        "format": CHECKPOINT_FORMAT, "mode": model.mode, "config": asdict(model.config),
        "llm": asdict(model.llm.config), "tokenizer": bytes_to_tensor(model.tokenizer.serialized),
        "llm_path": model.llm.checkpoint_path if model.llm.frozen else None,
        "encoders": encoders, "state": state, **extra})


def load_model(cls, path, checkpoint_paths):
    """The model of this class, AudioLLM, that `save_model` wrote, in eval mode. ValueError, one
    line, if it is not one. checkpoint_paths: {kind or "llm": path} of files that have moved."""
    saved = load_checkpoint(path, CHECKPOINT_FORMAT)
    guard = partial(as_value_error, path, "AudioLLM of this code", "use the code that wrote it")
    with guard():
        files = {kind: about["checkpoint_path"] for kind, about in saved["encoders"].items()
                 if about["checkpoint_path"] and about["frozen"] and kind in ENCODERS}
        if saved.get("llm_path"):
            files["llm"] = saved["llm_path"]
        parts = {kind: str(checkpoint_paths.get(kind, file)) for kind, file in files.items()}
    for kind in set(checkpoint_paths) - set(files):
        raise ValueError(f"{path} names no file of {kind}: leave out --encoders {kind}=")
    for kind, file in parts.items():
        try:
            parts[kind] = (LLM.from_pretrained(file) if kind == "llm"
                           else load_encoder(kind, file))
        except ValueError as error:
            raise ValueError(f"{error}; {path} needs this file: --encoders {kind}=PATH says "
                             "where it lies now") from None
    with guard(), build_for(saved["state"]):
        encoders = {kind: restore_encoder(kind, about, parts.get(kind))
                    for kind, about in saved["encoders"].items()}
        llm = restore_llm(saved, parts.get("llm"))
        tokenizer = tokenizer_from_bytes(tensor_to_bytes(saved["tokenizer"]))
        embedding = saved["state"].get("llm.model.embed_tokens.weight",
                                       llm.model.embed_tokens.weight)
        sizes = {"tokens": embedding.shape[0], "hidden_size": embedding.shape[1]}
        check_values({"tokens": tokenizer.vocab_size, "hidden_size": llm.config.hidden_size},
                     sizes, times=1)
        config = cls.Config(**saved["config"])
        check_values(vars(config), vars(cls.Config()), times=1000)
    with guard(), build_for(saved["state"], "cpu"):  # a connector may hold plain tensors too
        model = cls(llm, tokenizer, encoders, saved["mode"], config)
    restore_weights(model, path, saved)
    model.options = saved.get("options", {})  # train.py's
    return model.eval()


def restore_encoder(kind, about, encoder=None):
    """The encoder that a checkpoint tells of, as save_model writes it; without weights, unless
    `encoder` comes with those of its own file. ValueError if that is not the same one."""
    config = ENCODERS[kind].Config(**about["config"])
    # its tables of filters and positions take memory: no size far above the public ones
    largest = {name: max(getattr(size, name) for size in ENCODERS[kind].sizes.values())
               for name in vars(config)}
    check_values(vars(config), largest, times=4)
    check_values(about, {"pool_size": 1, "frozen": True})
    encoder = encoder or ENCODERS[kind](config)
    if kind == "whisper":  # its file has the whole window
        encoder.crop(config.seconds)
    if encoder.config != config:
        raise ValueError(f"that was trained with another {kind}: {config}")
    for name in ("pool_size", "frozen", "checkpoint_path"):
        setattr(encoder, name, about[name])
    return encoder


def restore_llm(saved, llm=None):
    """The LLM that a checkpoint tells of, likewise."""
    restored = llm or LLM(LLMConfig(**saved["llm"]))
    if asdict(restored.config) != saved["llm"]:
        raise ValueError(f"that was trained with another LLM: {saved['llm']}")
    restored.frozen = llm is not None
    return restored


def restore_weights(model, path, saved):
    """Take the weights from a checkpoint of this very model. ValueError if it is of another."""
    with as_value_error(path, "AudioLLM of this code", "use the code that wrote it"):
        mine = {"mode": model.mode, **asdict(model.config)}
        theirs = {"mode": saved["mode"], **asdict(model.Config(**saved["config"]))}
        if mine != theirs:
            differences = [f"{name} {theirs[name]}, not {mine[name]}" for name in mine
                           if theirs[name] != mine[name]]
            raise ValueError(f"{path}: was trained with {'; '.join(differences)}")
        external = {name: t for name, t in model.state_dict().items() if is_external(model, name)}
        load_weights(model, saved.pop("state") | external, f"{path}: of another model",
                     torch.float32)


def load_training(path, resume):
    """What train.py saved at the end of a stage or, to resume from, in the middle of one: a dict.
    Its model's weights are for restore_weights. ValueError, one line, if it is not that."""
    saved = load_checkpoint(path, CHECKPOINT_FORMAT)
    middle = {"at": 0, "loss": 0.0, "logged": 0, "data": "a checksum", "options": {},
              "optimizer": {}}
    with as_value_error(path, "training of this code", "go on from another file"):
        check_values(saved, {"stage": "1", "step": 0, **(middle if resume else {})})
    return saved | {"path": path}


def restore_training(optimizer, saved):
    """Put the optimizer and torch's random numbers where they stood in the middle of a stage."""
    with as_value_error(saved["path"], "training of this code", "go on from another file"):
        optimizer.load_state_dict(saved.pop("optimizer"))
        for group in optimizer.param_groups:
            check_values(group, {"lr": 0.0, "peak": 1.0, "weight_decay": 0.0})
        for p, state in optimizer.state.items():
            if not p.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                raise ValueError("its averages have other shapes than the weights")
        torch.set_rng_state(saved["rng"])
