"""Turning a GGUF file into a directory of safetensors that loads in seconds.

transformers reads many GGUF architectures and undoes their layouts (llama.cpp stores the rows of Q
and K interleaved), but takes most of a minute; so it is done once and the result kept. Before that
the file's header is walked here, so that a damaged file is named as one at once. After it the
tokenizer's word splitting is repaired where transformers drops what `tokenizer.ggml.pre` says.
"""

import copy
import importlib.util
import io
import mmap
import struct
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pagedkv.device.bridge import progress_bars
from pagedkv.device.support import check_config, read_config
from pagedkv.errors import CorruptModel, UnsupportedBackend

__all__ = ["GgufHeader", "convert_gguf", "read_gguf_header"]

# Splitters of llama.cpp that cut out every digit and then split as GPT-2 does.
_DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
# Scalar kinds in the order of their numbers; 8 and 9 are strings and arrays.
_SCALARS = {kind: code for kind, code in enumerate("BbHhIif?__Qqd") if code != "_"}
_STRING, _ARRAY = 8, 9
_WANTED = ("general.architecture", "general.alignment", "split.count", "tokenizer.ggml.pre")
# Rotary scaling that llama.cpp keeps as tensors and transformers' reader passes over.
_ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight"})


class GgufHeader(NamedTuple):
    """What a GGUF file's header says, as far as it is needed here."""

    architecture: str
    pre_tokenizer: str
    num_splits: int
    tensors: frozenset[str]
    num_bytes: int


class _Cursor:
    """A place in a GGUF file, read little-endian; reading past the end raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise struct.error("a value runs past the end of the file")

    def string(self) -> str:
        start = self.at + 8
        self.skip(8 + self.take_ahead())
        return self.data[start : self.at].decode("utf-8")

    def take_ahead(self) -> int:
        """The length in front of a string, not moving past it."""
        return int(struct.unpack_from("<Q", self.data, self.at)[0])

    def value(self, kind: int) -> Any:
        """One metadata value; arrays are stepped over and come back as None."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        item, count = self.take("I"), self.take("Q")
        if item in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[item]}"))
        elif item == _STRING:
            for _ in range(count):
                self.skip(8 + self.take_ahead())
        else:
            for _ in range(count):
                self.value(item)
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header and check that the file is as long as it says. 0.1 s.

    Raises:
        CorruptModel: Not a GGUF file, or damaged or shorter than its header says.
    """
    remedy = "fetch the file again; it must be an unmodified .gguf of version 2 or 3"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CorruptModel("does not begin with GGUF", where=str(path), remedy=remedy)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _walk(_Cursor(data))
            except (struct.error, KeyError, UnicodeDecodeError) as error:
                raise CorruptModel(
                    f"its header is damaged or cut short ({error})", where=str(path), remedy=remedy
                ) from error
            if header.num_bytes > len(data):
                raise CorruptModel(
                    f"holds {len(data):,} bytes of {header.num_bytes:,}",
                    where=str(path),
                    remedy=remedy,
                )
    return header


def _walk(cursor: _Cursor) -> GgufHeader:
    """Step over the whole header, keeping the few values that matter."""
    cursor.skip(4)
    version = cursor.take("I")
    if version not in (2, 3):
        raise struct.error(f"version {version}")
    num_tensors, num_values = cursor.take("Q"), cursor.take("Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        value = cursor.value(cursor.take("I"))
        if key in _WANTED:
            values[key] = value
    ends = dict(_tensor(cursor) for _ in range(num_tensors))
    alignment = int(values.get("general.alignment", 32))
    data_start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        architecture=str(values["general.architecture"]),
        pre_tokenizer=str(values.get("tokenizer.ggml.pre", "")),
        num_splits=int(values.get("split.count", 1)),
        tensors=frozenset(ends),
        num_bytes=data_start + max(ends.values(), default=0),
    )


def _tensor(cursor: _Cursor) -> tuple[str, int]:
    """Read one tensor's entry: its name, and where its data ends from the start of all data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    elements = 1
    for _ in range(cursor.take("I")):
        elements *= cursor.take("Q")
    kind, offset = cursor.take("I"), cursor.take("Q")
    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError as error:
        raise KeyError(f"tensor type {kind}") from error
    return name, int(offset + elements // block_elements * block_bytes)


def convert_gguf(path: Path, directory: Path, *, progress: bool = True) -> None:
    """Write a GGUF file's model and tokenizer into a directory as fp32 safetensors.

    Not atomic: `weights` gives it a directory of its own and publishes that when it is whole.
    Takes 30-60 s for 135 M parameters on two cores, most of it parsing in Python; needs about
    eight bytes of memory per parameter.

    Args:
        path: The .gguf file.
        directory: Where to write; it exists and is empty.
        progress: Show transformers' bars on standard error.

    Raises:
        CorruptModel: The file is damaged or truncated.
        UnsupportedBackend: Its architecture cannot be served or cannot be read by transformers, or
            the packages that read GGUF are not installed.
    """
    _check_packages()
    header = read_gguf_header(path)
    # Other files beside a GGUF (a tokenizer, a generation config) must not leak into the result.
    with tempfile.TemporaryDirectory() as folder, progress_bars(progress):
        alone = Path(folder, path.name)
        alone.symlink_to(path.resolve())
        # The reader's own bar obeys no setting; it draws on what standard error is at the time.
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            model = _read_model(alone, header, str(path))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        _unquantized(model).save_pretrained(directory)
    if header.pre_tokenizer in _DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.save_pretrained(directory)


def _read_model(path: Path, header: GgufHeader, name: str) -> Any:
    """The model in a GGUF file, dequantized; UnsupportedBackend or CorruptModel if it cannot be."""
    instead = "use the model's safetensors instead"
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except OSError as error:  # how transformers says that a header made no sense
        raise CorruptModel(
            "the header does not describe a model", where=name, remedy="fetch the file again"
        ) from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedBackend(
            f"transformers cannot read a GGUF of architecture {header.architecture!r} ({error})",
            where=name,
            remedy=instead,
        ) from error
    check_config(config, name)
    if header.num_splits > 1:
        raise UnsupportedBackend(
            f"the model is split over {header.num_splits} files", where=name, remedy=instead
        )
    rope = read_config(config, "rope_parameters") or {}
    if header.tensors & _ROPE_TENSORS and rope.get("rope_type", "default") == "default":
        raise UnsupportedBackend(
            "transformers drops the rotary scaling of this file", where=name, remedy=instead
        )
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise CorruptModel(
            f"{len(report['missing_keys'])} weights are missing, {first} among them",
            where=name,
            remedy=f"fetch the file again, or {instead}",
        )
    return model


def _check_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedBackend(
            f"reading GGUF files needs {' and '.join(missing)}",
            remedy="install pagedkv[gguf]",
        )


def _unquantized(model: Any) -> Any:
    """A plain model around the same tensors: one that came from GGUF refuses to be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
