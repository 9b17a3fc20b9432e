"""
What the originals make of a clip, for tests/test_encoders.py: small models with their published
code, weights that everyone can make again, and the tokens that come out, in one .npz each.

    pip install torch==2.13.0 transformers openai-whisper scipy librosa
    pip install --no-deps laion-clap msclap torchlibrosa
    python tests/golden/make_encoders.py

SSLAM has no package: it is put together from torch's TransformerEncoderLayer and transformers'
Kaldi filterbank (that of its AST model).
"""

import importlib
import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def sound(seconds, rate, seed=0):
    """A chirp, hits and noise, (samples,) float32: something at every frequency and time."""
    rng = np.random.RandomState(seed)
    t = np.arange(round(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) + 0.03 * rng.standard_normal(len(t)) + 0.05
    x += 0.4 * rng.standard_normal(len(t)) * np.exp(-20 * (t % 0.7))
    return x.astype(np.float32)


def weight(name, shape):
    """Random numbers that depend on the name alone, far from any starting value."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if name.endswith("running_mean"):
        x = 5 * x - 30
    elif name.endswith("running_var"):
        x = 400 * np.exp(x / 4)
    elif len(shape) == 1:
        x = 0.3 * x + (name.endswith("weight") and 1)  # norms; all else of one dimension is a bias
    elif "bias_table" not in name:
        x = x / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


def sslam_positions(columns):
    """(1, columns * 8, 128), as found in SSLAM's files: the band in the first half, then time."""
    angle = [[place / 10000 ** (i / 32) for i in range(32)] for place in range(columns)]
    wave = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (columns, 64)
    return np.stack([np.concatenate([wave[f], wave[t]])
                     for t in range(columns) for f in range(8)])[None].astype(np.float32)


FIXED = ("positional_embedding", "embed_positions.weight", "positions", "melW", "conv_real.weight",
         "conv_imag.weight", "relative_position_index", "attn_mask", "num_batches_tracked")


def fill(model):
    """Set all that is learned to weight(name); returns what of the state dict that leaves out."""
    import torch
    fixed, state = {}, model.eval().state_dict()
    for name, tensor in state.items():
        if name.endswith(FIXED):
            fixed[name] = tensor.numpy()
        else:
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    return {name: tuple(t.shape) for name, t in state.items() if name not in fixed}, fixed


def save(name, learned, fixed, features, tokens, **more):
    """Not every frame, and of many tokens every seventh: it is enough, and stays small."""
    kept = {n: t for n, t in fixed.items() if "conv_" not in n}
    tokens = tokens[:, ::7 if tokens.shape[1] > 100 else 1]
    np.savez_compressed(HERE / f"{name}.npz", learned=json.dumps(learned), features=features,
                        tokens=tokens, **{f"fixed:{n}": t for n, t in kept.items()}, **more)
    print(name, features.shape, tokens.shape, (HERE / f"{name}.npz").stat().st_size)


def whisper_openai():
    import torch
    import whisper
    model = whisper.model.AudioEncoder(80, 50, 128, 2, 2)
    learned, fixed = fill(model)
    wave = torch.from_numpy(sound(0.7, 16000))
    x = whisper.log_mel_spectrogram(whisper.pad_or_trim(wave, 16000))[None]
    save("whisper_openai", learned, fixed, x[:, :, ::8].numpy(), model(x).detach().numpy())


def whisper_hf():
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
    model = WhisperModel(WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, vocab_size=10,
        decoder_attention_heads=2, encoder_ffn_dim=512, decoder_ffn_dim=8, num_mel_bins=128,
        max_source_positions=50, max_target_positions=4, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0))
    learned, fixed = fill(model)
    fixed.pop("decoder.embed_positions.weight", None)
    extract = WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    x = extract(sound(0.7, 16000), sampling_rate=16000)["input_features"][0]
    x = torch.from_numpy(x)[None]
    save("whisper_hf", learned, fixed, x[:, :, ::8].numpy(),
         model.encoder(x).last_hidden_state.detach().numpy())


def sslam():
    import torch
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
    wave = sound(3.3, 16000).astype(np.float64)
    mel = spectrogram(
        wave - wave.mean(), window_function(400, "hann", periodic=False), 400, 160, fft_length=512,
        power=2.0, center=False, preemphasis=0.97, log_mel="log", mel_floor=2.0 ** -23,
        remove_dc_offset=True, mel_filters=mel_filter_bank(
            257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi",
            triangularize_in_mel_space=True)).T
    mel = np.pad(mel, ((0, 512 - len(mel)), (0, 0)))
    x = torch.from_numpy((mel + 4.268) / (2 * 4.569)).float()[None, None]  # (1, 1, 512, 128)
    schemes = {
        "sslam_hf": ("model.", "model.", "pre_norm"),
        "sslam_pretrained": ("", "modality_encoders.IMAGE.", "context_encoder.norm"),
        "sslam_finetuned": ("model.", "model.modality_encoders.IMAGE.", "context_encoder.norm"),
    }
    for scheme, (top, image, norm) in schemes.items():
        shapes = {image + "extra_tokens": (1, 1, 128), image + "local_encoder.proj.weight":
                  (128, 1, 16, 16), image + "local_encoder.proj.bias": (128,),
                  image + norm + ".weight": (128,), image + norm + ".bias": (128,)}
        parts = {"norm1.": (128,), "norm2.": (128,), "attn.qkv.": (384, 128),
                 "attn.proj.": (128, 128), "mlp.fc1.": (512, 128), "mlp.fc2.": (128, 512)}
        for n in range(2):
            for part, shape in parts.items():
                shapes[f"{top}blocks.{n}.{part}weight"] = shape
                shapes[f"{top}blocks.{n}.{part}bias"] = shape[:1]
        w = {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}
        h = torch.nn.functional.conv2d(x, w[image + "local_encoder.proj.weight"],
                                       w[image + "local_encoder.proj.bias"], stride=16)
        h = h.permute(0, 2, 3, 1).reshape(1, 256, 128) + torch.from_numpy(sslam_positions(32))
        h = torch.cat([w[image + "extra_tokens"], h], 1)
        h = torch.nn.functional.layer_norm(h, (128,), w[image + norm + ".weight"],
                                           w[image + norm + ".bias"], 1e-6)
        names = {"norm1.": "norm1.", "norm2.": "norm2.", "attn.qkv.": "self_attn.in_proj_",
                 "attn.proj.": "self_attn.out_proj.",
                 "mlp.fc1.": "linear1.", "mlp.fc2.": "linear2."}
        for n in range(2):
            layer = torch.nn.TransformerEncoderLayer(128, 2, 512, 0, "gelu", 1e-6, True)
            layer.load_state_dict({theirs + end: w[f"{top}blocks.{n}.{ours}{end}"]
                                   for ours, theirs in names.items()
                                   for end in ("weight", "bias")})
            h = layer(h)
        save(scheme, shapes, {}, x[:, :, ::8].numpy(), h.detach().numpy())


def htsat(package, **settings):
    """The HTSAT of laion_clap or msclap, without the rest of the package."""
    for stub in ("h5py", "torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules.setdefault(stub, types.ModuleType(stub))
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = None
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    inner = "clap_module" if package == "laion_clap" else "models"
    shell = types.ModuleType(package + "_shell")
    shell.__path__ = [f"{folder}/{inner}"]
    sys.modules[shell.__name__] = shell
    code = importlib.import_module(shell.__name__ + ".htsat")
    settings = dict(spec_size=256, patch_size=4, patch_stride=(4, 4), embed_dim=16, num_classes=3,
                    num_heads=[4, 8, 16, 32], window_size=8) | settings
    if package == "msclap":
        settings["config"] = importlib.import_module(shell.__name__ + ".config")
    else:
        settings["config"] = types.SimpleNamespace(
            mel_bins=64, sample_rate=48000, window_size=1024, hop_size=480, fmin=50, fmax=14000)
    return code.HTSAT_Swin_Transformer(**settings)


def clap_originals():
    import torch
    from transformers import ClapFeatureExtractor
    seen = {}
    laion, microsoft = "audio_branch.", "audio_encoder.base.htsat."
    for name, package, top, settings, rate, seconds in (
            ("clap_laion", "laion_clap", laion, dict(depths=[2, 2, 2, 2]), 48000, 10),
            ("clap_laion_base", "laion_clap", laion, dict(depths=[2, 2, 4, 2]), 48000, 10),
            ("clap_laion_fused", "laion_clap", laion, dict(
                depths=[2, 2, 2, 2], enable_fusion=True, fusion_type="aff_2d"), 48000, 10),
            ("clap_microsoft", "msclap", microsoft, dict(depths=[2, 2, 2, 2]), 44100, 7)):
        shell = torch.nn.Module()
        inner = shell
        for part in top[:-1].split("."):
            inner.add_module(part, torch.nn.Module() if part != top.split(".")[-2] else
                             htsat(package, **settings))
            inner = getattr(inner, part)
        learned, fixed = fill(shell)
        fixed = {n: t for n, t in fixed.items()
                 if n.endswith(("melW", "num_batches_tracked")) or "layers.0.blocks.1" in n}
        wave = sound(3.3, rate)
        if package == "msclap":
            wave = np.tile(wave, 3)[:seconds * rate]
        else:
            wave = np.pad(np.tile(wave, 3), (0, seconds * rate - 3 * len(wave)))
        wave = torch.from_numpy(wave)[None]
        inner.norm.register_forward_hook(lambda module, x, y: seen.update(tokens=y))
        inner.bn0.register_forward_hook(lambda module, x, y: seen.update(features=x[0]))
        if "fused" in name:  # torchaudio's mel spectrogram there; transformers' copy of it here
            extract = ClapFeatureExtractor(
                truncation="fusion", padding="repeatpad", frequency_min=50)
            mel = extract(wave[0].numpy(), sampling_rate=rate)["input_features"]
            inner({"mel_fusion": torch.from_numpy(np.asarray(mel)).float().view(1, 4, 1001, 64),
                   "longer": torch.zeros(1)})
            seen["features"] = seen["features"][..., :1]
        else:
            inner(wave if package == "msclap" else {"waveform": wave})
        # (1, 4 pieces * 2 bands * 8 steps, D) -> (1, 32 steps * 2 bands, D)
        tokens = seen["tokens"].unflatten(1, (4, 2, 8)).transpose(2, 3).flatten(1, 3)
        features = seen["features"].transpose(1, 3)[:, :, ::32]
        save(name, learned, fixed, features.numpy(), tokens.detach().numpy())


def clap_hf():
    import torch
    from transformers import ClapAudioConfig, ClapAudioModel, ClapFeatureExtractor
    for fused in (False, True):
        model = ClapAudioModel(ClapAudioConfig(
            patch_embeds_hidden_size=16, hidden_size=128, depths=[2, 2, 2, 2], num_classes=3,
            enable_fusion=fused, fusion_type="aff_2d" if fused else None))
        learned, fixed = fill(model)
        extract = ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc",
                                       padding="repeatpad", frequency_min=50)
        x = torch.from_numpy(np.asarray(extract(sound(3.3, 48000), sampling_rate=48000)
                                        ["input_features"])).float()
        y = model(x, is_longer=torch.zeros(1, 1, dtype=torch.bool)).last_hidden_state
        tokens = y.permute(0, 3, 2, 1).flatten(1, 2)  # (1, D, 2 bands, 32 steps) -> (1, 64, D)
        fixed = {n: t for n, t in fixed.items() if n.endswith("num_batches_tracked")}
        save("clap_hf_fused" if fused else "clap_hf", learned, fixed,
             x[:, :1, ::32].numpy(), tokens.detach().numpy())


if __name__ == "__main__":
    for make in (whisper_openai, whisper_hf, sslam, clap_originals, clap_hf):
        make()
