"""Loading a model by name, from a directory, a GGUF file or a hub, ready to be served.

"tiny-random", "tiny-random-<architecture>"   random weights made on the spot (`tiny`)
"smollm2-135m"                                a known model, from the registry (`weights`)
"some/directory"                              config.json, *.safetensors, tokenizer files
"some/file.gguf"                              converted once, then cached (`conversion`)
"organisation/name"                           a repository on the Hugging Face hub
"""

import difflib
import inspect
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pagedkv.device import packing
from pagedkv.device.bridge import ATTENTION_NAME, progress_bars, register
from pagedkv.device.geometry import ModelGeometry
from pagedkv.device.layers import substitute_layers
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.probe import probe
from pagedkv.device.substitutes import substitute
from pagedkv.device.support import check_config
from pagedkv.device.tiny import TINY_MODELS, byte_tokenizer, tiny_config, tiny_model
from pagedkv.device.weights import KNOWN_MODELS, converted_gguf, pull
from pagedkv.errors import ConfigError, CorruptModel, ModelNotFound, UnsupportedBackend

__all__ = ["load_model"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Never pickled weights: a model file must not be able to run code.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    pack_weights: str = "none",
    progress: bool = True,
) -> LoadedModel:
    """Find, load and examine a model.

    The first use of a known name downloads and converts it (about a minute for SmolLM2-135M); later
    ones read the converted copy, offline, in seconds. Registers the "pagedkv" attention function
    with transformers. No code that comes with a model is ever run.

    Args:
        model: One of the five forms listed at the head of this module.
        dtype: "float32", "bfloat16" or "float16", which weights are converted to; or "auto":
            float32 on the CPU, and on CUDA what the model's files hold, float16 for float32.
        device: A torch device, "cpu" or "cuda" or "cuda:1".
        seed: Of the tiny models' weights; no other model looks at it.
        pack_weights: Which matrices are kept in the order that the processor multiplies in, for
            faster steps (fp32 on the CPU): "none", "lm_head", the output embedding, or "all" that
            linear layers have. A tied output embedding is kept once more for it.
        progress: Show bars for download, conversion and loading on standard error.

    Raises:
        ModelNotFound: The name, path or repository leads nowhere; near names are offered.
        CorruptModel: It leads to files that are damaged, truncated or incomplete.
        UnsupportedBackend: The architecture or the device cannot be served, or the weights
            cannot be packed.
        ConfigError: `dtype`, `device` or `pack_weights` is not one of the above.
    """
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"the model is {model!r:.80}", where="model", remedy="give a name or a path"
        )
    model = os.fspath(model)
    asked, torch_device = _dtype(dtype), _device(device)
    register()
    with progress_bars(progress):
        if model in TINY_MODELS:
            check_config(tiny_config(model), model)
            network = tiny_model(model, seed=seed, attn_implementation=ATTENTION_NAME)
            # Parameters only: rotary frequencies are buffers, and must stay fp32.
            for parameter in network.parameters():
                parameter.data = parameter.data.to(asked or usual_dtype(torch_device, None))
            tokenizer: Any = byte_tokenizer()
        else:
            directory = _locate(model, progress)
            network, tokenizer = _read_directory(directory, model, asked, torch_device)
    network.to(device=torch_device).eval().requires_grad_(False)
    packing.pack_weights(network, pack_weights, model)
    # Steps are packed, never padded; some models look for padding in every call to warn about it.
    config: Any = network.config
    config.pad_token_id = None
    return _examined(network, tokenizer, model)


def _examined(network: Any, tokenizer: Any, name: str) -> LoadedModel:
    """Put the parts together, let the probe fill the geometry in, and speed up what can be."""
    unknown = ModelGeometry(
        num_layers=0,
        num_query_heads=0,
        num_kv_heads=0,
        head_dim=0,
        max_model_len=0,
        vocab_size=0,
        eos_token_ids=(),
        rope=False,
        sliding_window=(),
        rope_frequencies=(),
    )
    narrows = "logits_to_keep" in inspect.signature(network.forward).parameters
    loaded = LoadedModel(network, tokenizer, name, unknown, narrows)
    loaded = replace(loaded, geometry=probe(loaded))
    substitute(network, loaded.geometry)
    substitute_layers(network, loaded.geometry)
    return loaded


def _dtype(name: str) -> torch.dtype | None:
    """Return the element type of a name; None for ``auto``."""
    if name == "auto":
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise ConfigError(
            f"{name!r} is not a dtype that models can be loaded in",
            where="dtype",
            remedy=f"use one of auto, {', '.join(_DTYPES)}",
        )
    return _DTYPES[name]


def usual_dtype(device: torch.device, own: torch.dtype | None) -> torch.dtype:
    """Return what ``auto`` means on a device, for weights that are stored as ``own``.

    On the CPU exactness is to be had for the asking. On CUDA no operator reads float32 keys, and
    bfloat16 weights may not fit into float16's range.
    """
    if device.type == "cpu":
        return torch.float32
    return own if own in (torch.float16, torch.bfloat16) else torch.float16


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name!r} is not a torch device", where="device", remedy='use "cpu" or "cuda"'
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedBackend(
            f"no operator runs on device={device.type}",
            where="device",
            remedy='use device "cpu" or "cuda"',
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedBackend(
            f"torch sees {torch.cuda.device_count()} CUDA devices, not {name!r}",
            where="device",
            remedy='use device "cpu", or install a CUDA build of torch on a machine with a GPU',
        )
    return device


def _locate(model: str, progress: bool) -> Path:
    """The directory of safetensors that a name stands for, made or fetched if need be."""
    if model in KNOWN_MODELS:
        return pull(model, progress=progress)
    path = Path(model).expanduser()
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name that no file system takes
        raise _unknown(model) from None
    if is_directory and model:
        return path
    if is_file:
        if path.suffix == ".gguf":
            return converted_gguf(path, progress=progress)
        raise ModelNotFound(
            "this file is not a .gguf file",
            where=model,
            remedy="give the directory that holds config.json and *.safetensors, or a .gguf file",
        )
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _hub_snapshot(model)
    raise _unknown(model)


def _unknown(model: str) -> ModelNotFound:
    known = [*KNOWN_MODELS, *TINY_MODELS]
    near = difflib.get_close_matches(model.lower(), known, n=3, cutoff=0.4)
    return ModelNotFound(
        f"there is no model, directory or file called {model!r}",
        remedy=f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}",
    )


def _hub_snapshot(repository: str) -> Path:
    """Fetch a hub repository's safetensors and tokenizer, or its cached copy when offline."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=_HUB_FILES, etag_timeout=5
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFound(
            f"neither a directory here nor a hub repository that can be fetched ({first_line})",
            where=repository,
            remedy=f"check the name and the network, or use one of {', '.join(KNOWN_MODELS)}, "
            "tiny-random, or a local directory",
        ) from error
    return Path(folder)


def _read_directory(
    directory: Path, name: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[Any, Any]:
    """Load model and tokenizer from a directory, refusing anything damaged or missing."""
    config = _read_config(directory, name)
    check_config(config, name)
    _check_weights(directory)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would report is raised below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype or usual_dtype(device, config.dtype),
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except Exception as error:  # a wrong number in a config surfaces as anything
        raise CorruptModel(
            f"no model can be built from config.json and these weights ({_first_line(error)})",
            where=str(directory),
            remedy="check that config.json is undamaged and belongs to these weights",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    misshapen = sorted(key[0] for key in report["mismatched_keys"])
    absent = sorted(report["missing_keys"]) + misshapen
    if absent:
        # transformers would fill these with random numbers and go on.
        raise CorruptModel(
            f"{len(absent)} weights are missing or misshapen, {absent[0]} among them",
            where=str(directory),
            remedy="fetch the model again, or check that config.json belongs to these weights",
        )
    return model, _read_tokenizer(directory)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _read_config(directory: Path, name: str) -> Any:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFound(
            "the directory has no config.json",
            where=str(directory),
            remedy="give a directory in Hugging Face format: config.json, *.safetensors, tokenizer",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptModel(
            f"not a JSON object ({error})", where=str(path), remedy="fetch the model again"
        ) from error
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise types of their own, not under one root
        raise UnsupportedBackend(
            f"transformers cannot read a configuration of model_type {model_type!r} "
            f"({str(error).strip().splitlines()[0]})",
            where=str(path) if name == str(directory) else name,
            remedy="update transformers, or use a model whose code is part of transformers",
        ) from error


def _check_weights(directory: Path) -> None:
    """Raise unless every safetensors file is there and as long as its own header says."""
    index = directory / "model.safetensors.index.json"
    paths = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptModel(
                "not an index of weights", where=str(index), remedy="fetch the model again"
            ) from error
        paths = sorted(directory / str(name) for name in listed)
    if not paths:
        raise ModelNotFound(
            "the directory has no *.safetensors file",
            where=str(directory),
            remedy="convert the weights to safetensors; pickled weights are never loaded",
        )
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise CorruptModel(
                f"damaged, truncated or missing weights ({error})",
                where=str(path),
                remedy="fetch the model again",
            ) from error


def _read_tokenizer(directory: Path) -> Any:
    """The tokenizer, or None if the directory has none."""
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        raise CorruptModel(
            f"the tokenizer cannot be read ({str(error).strip().splitlines()[0]})",
            where=str(directory),
            remedy="fetch the model again, or take the tokenizer files away and use token ids",
        ) from error
