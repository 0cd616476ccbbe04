"""Loading models, and the bridge from transformers to a step, on tiny random models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedkv.device.bridge import Recorder, forward, paged_attention
from pagedkv.device.dispatch import choose_operator
from pagedkv.device.loaded import LoadedModel
from pagedkv.device.models import load_model, usual_dtype
from pagedkv.device.probe import _turn
from pagedkv.device.tiny import TINY_MODELS, byte_tokenizer, tiny_model
from pagedkv.errors import ConfigError, CorruptModel, ModelNotFound, UnsupportedBackend

from .reference import DenseStep, greedy, packed, reference_logits, reference_model

ARCHITECTURES = [name for name in TINY_MODELS if name != "tiny-random"]


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedModel]:
    return {name: load_model(name, progress=False) for name in ARCHITECTURES}


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, in Hugging Face format."""
    directory = tmp_path_factory.mktemp("saved")
    tiny_model("tiny-random").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to break."""
    return shutil.copytree(saved, tmp_path / "damaged")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_batch_equals_single_runs(
    models: dict[str, LoadedModel], name: str, attention: str
) -> None:
    loaded = models[name]
    first, second = tokens(7, 1), tokens(50, 2)
    ids, positions = packed([(first, 0), (second, 0)])
    step = DenseStep(loaded.geometry.sliding_window).begin([(0, 7), (1, 50)])
    logits = forward(loaded, ids, positions, step, torch.arange(57))
    model = reference_model(loaded, attention)
    expected = torch.cat([reference_logits(model, first), reference_logits(model, second)])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert step.calls == list(range(loaded.geometry.num_layers))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunks_with_remembered_keys_equal_single_runs(
    models: dict[str, LoadedModel], name: str
) -> None:
    loaded = models[name]
    texts = tokens(41, 3), tokens(60, 4)
    step = DenseStep(loaded.geometry.sliding_window)
    found: list[list[torch.Tensor]] = [[], []]
    at = [0, 0]
    for chunk in [(16, 0), (8, 33), (1, 1), (16, 26)]:
        parts = [(text[a : a + n], a) for text, a, n in zip(texts, at, chunk, strict=True)]
        ids, positions = packed(parts)
        rows = [(i, n) for i, n in enumerate(chunk) if n]
        logits = forward(loaded, ids, positions, step.begin(rows), torch.arange(sum(chunk)))
        for i, part in enumerate(logits.split(list(chunk))):
            found[i].append(part)
            at[i] += chunk[i]
    assert at == [41, 60]
    model = reference_model(loaded)
    for text, parts_found in zip(texts, found, strict=True):
        expected = reference_logits(model, text)
        torch.testing.assert_close(torch.cat(parts_found), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_only_for_the_rows_asked_for(models: dict[str, LoadedModel], name: str) -> None:
    loaded = models[name]
    ids, positions = packed([(tokens(9, 5), 0)])
    windows = loaded.geometry.sliding_window

    def logits(index: list[int]) -> torch.Tensor:
        step = DenseStep(windows).begin([(0, 9)])
        return forward(loaded, ids, positions, step, torch.tensor(index, dtype=torch.int64))

    every = logits(list(range(9)))
    assert every.shape == (9, loaded.geometry.vocab_size)
    assert every.dtype == torch.float32
    assert not every.requires_grad
    torch.testing.assert_close(logits([8, 2, 2]), every[[8, 2, 2]])
    assert logits([]).shape == (0, loaded.geometry.vocab_size)
    assert loaded.narrows_logits


def test_forward_without_narrowing_gives_the_same(models: dict[str, LoadedModel]) -> None:
    loaded = models["tiny-random-llama"]
    wide = LoadedModel(loaded.model, None, "wide", loaded.geometry, narrows_logits=False)
    ids, positions = packed([(tokens(5, 6), 0)])
    both = [
        forward(one, ids, positions, DenseStep((0,) * 4).begin([(0, 5)]), torch.tensor([4, 1]))
        for one in (loaded, wide)
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tiny-random-llama", (4, 6, 2, 32, 2048)),
        ("tiny-random-qwen2", (3, 4, 1, 32, 2048)),
        ("tiny-random-qwen3", (3, 4, 2, 64, 2048)),
        ("tiny-random-mistral", (3, 8, 2, 40, 2048)),
        ("tiny-random-mistral-window", (3, 8, 2, 40, 2048)),
        ("tiny-random-gpt2", (3, 3, 3, 32, 1024)),
        ("tiny-random-gpt_neox", (3, 8, 8, 16, 2048)),
    ],
)
def test_geometry(models: dict[str, LoadedModel], name: str, shape: tuple[int, ...]) -> None:
    loaded = models[name]
    g = loaded.geometry
    heads = (g.num_layers, g.num_query_heads, g.num_kv_heads, g.head_dim, g.max_model_len)
    assert heads == shape
    assert (g.vocab_size, g.eos_token_ids) == (260, (256, 258))
    assert g.rope == (name != "tiny-random-gpt2")
    assert g.sliding_window == ((32,) * 3 if name.endswith("window") else (0,) * g.num_layers)
    rotary = {"tiny-random-gpt2": 0, "tiny-random-gpt_neox": 8}.get(name, g.head_dim)
    expected = [10000.0 ** (-2 * i / rotary) for i in range(rotary // 2)]
    for frequencies in g.rope_frequencies:
        assert frequencies == pytest.approx(expected, rel=1e-6)
    assert not g.rope_interleaved
    assert g.kv_elements_per_token == 2 * g.num_layers * g.num_kv_heads * g.head_dim


def test_rotating_the_query_further_equals_moving_the_key(models: dict[str, LoadedModel]) -> None:
    """The frequencies in the geometry are the ones the model rotates by."""
    for name in ("tiny-random-llama", "tiny-random-gpt_neox"):
        loaded = models[name]
        queries = []
        for position in (100, 101):
            recorder = Recorder()
            ids = torch.tensor([65])
            forward(loaded, ids, torch.tensor([position]), recorder, torch.tensor([0]))
            queries.append(recorder.calls[-1].query[0])
        frequencies = torch.tensor(loaded.geometry.rope_frequencies[-1], dtype=torch.float64)
        turned = _turn(queries[0].double(), frequencies, loaded.geometry.rope_interleaved)
        torch.testing.assert_close(turned.float(), queries[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_continuations_wander(models: dict[str, LoadedModel], name: str) -> None:
    written = greedy(models[name], tokens(12, 7), 40)
    assert len(set(written)) >= 12
    assert max(written.count(token) for token in set(written)) <= 16


def test_tiny_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return tiny_model("tiny-random", seed=seed).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = weights(3), weights(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_byte_tokenizer_round_trips() -> None:
    tokenizer = byte_tokenizer()
    text = "Naïve  12 日本 \n\t<|im_end|>🙂"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer("AB").input_ids == [65, 66]
    assert tokenizer.decode([72, 105, 258], skip_special_tokens=True) == "Hi"
    chat: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_directory_loads_as_what_was_saved(saved: Path) -> None:
    loaded, tiny = load_model(str(saved), progress=False), load_model("tiny-random")
    assert loaded.geometry == tiny.geometry
    assert loaded.tokenizer("Hi é").input_ids == tiny.tokenizer("Hi é").input_ids
    prompt = tokens(10, 8)
    assert greedy(loaded, prompt, 8) == greedy(tiny, prompt, 8)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


def test_directory_without_tokenizer_has_none(damaged: Path) -> None:
    for file in damaged.glob("*token*"):
        file.unlink()
    assert load_model(str(damaged), progress=False).tokenizer is None


@pytest.mark.parametrize(
    ("device", "own", "usual"),
    [
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", None, torch.float32),
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.float16),
        ("cuda", torch.float32, torch.float16),
        ("cuda", None, torch.float16),
    ],
)
def test_usual_dtype_has_an_operator(
    device: str, own: torch.dtype | None, usual: torch.dtype
) -> None:
    assert usual_dtype(torch.device(device), own) is usual
    assert choose_operator(device, usual)


def test_auto_on_the_cpu_is_float32_whatever_is_stored(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert load_model(damaged).dtype_name == "float32"


def test_bfloat16() -> None:
    loaded = load_model("tiny-random", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.geometry == load_model("tiny-random").geometry


INDEX = "model.safetensors.index.json"
# name: (file to write, its new content or None to delete it, error, what the message names)
DAMAGE: dict[str, tuple[str, bytes | None, type[ModelNotFound], str]] = {
    "no config": ("config.json", None, ModelNotFound, r"config\.json"),
    "cut config": ("config.json", b"{", CorruptModel, r"config\.json"),
    "list config": ("config.json", b"[]", CorruptModel, r"config\.json"),
    "no weights": ("model.safetensors", None, ModelNotFound, "safetensors"),
    "cut weights": ("model.safetensors", b"cut", CorruptModel, r"model\.safetensors"),
    "empty weights": ("model.safetensors", b"", CorruptModel, r"model\.safetensors"),
    "strange tokenizer": ("tokenizer.json", b"{}", CorruptModel, "tokenizer"),
    "strange index": (INDEX, b'{"weight_map": 3}', CorruptModel, r"index\.json"),
    "missing shard": (INDEX, b'{"weight_map": {"a": "b"}}', CorruptModel, "b: damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directory_names_the_file(damaged: Path, name: str) -> None:
    file, content, kind, names = DAMAGE[name]
    path = damaged / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1000] if content == b"cut" else content)
    with pytest.raises(ModelNotFound, match=names) as caught:
        load_model(str(damaged), progress=False)
    assert type(caught.value) is kind
    assert caught.value.remedy


def test_missing_weights_are_not_made_up(damaged: Path) -> None:
    path = damaged / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CorruptModel, match=r"model\.layers\.4\."):
        load_model(str(damaged), progress=False)


def test_unreadable_model_type_is_named(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(UnsupportedBackend, match="nobody_knows"):
        load_model(str(damaged), progress=False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm-135m", "smollm2-135m"),
        ("tiny-randon", "tiny-random"),
        ("zzzz", "known: smollm2-135m"),
        ("./no/such/directory", "known"),
        ("missing/model.gguf", "known"),
    ],
)
def test_unknown_name_offers_near_ones(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFound, match=hint):
        load_model(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"not a \.gguf file"):
        load_model(str(path))


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repository: str, **_: object) -> str:
        raise LocalEntryNotFoundError(f"cannot reach {repository}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFound, match=r"cannot reach org/name\).*check the name") as caught:
        load_model("org/name")
    assert caught.value.where == "org/name"


def test_hub_snapshot_is_loaded(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(saved))
    assert load_model("org/name", progress=False).geometry.num_layers == 4


@pytest.mark.parametrize(
    ("dtype", "device", "kind"),
    [
        ("int8", "cpu", ConfigError),
        ("float32", "toaster", ConfigError),
        ("float32", "cuda:99", UnsupportedBackend),
    ],
)
def test_wrong_dtype_or_device(dtype: str, device: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        load_model("tiny-random", dtype=dtype, device=device)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


EXTRAS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 30.0},
    "position_bias, s_aux": {"s_aux": torch.zeros(2), "position_bias": torch.zeros(1)},
    "is_causal=False": {"is_causal": False},
    "dropout": {"dropout": 0.1},
    "attention_mask": {"attention_mask": torch.zeros(1)},
}


@pytest.mark.parametrize("names", EXTRAS)
def test_attention_refuses_what_it_would_ignore(names: str) -> None:
    module = torch.nn.Module()
    module.layer_idx = 3  # type: ignore[assignment]
    q = torch.zeros(1, 2, 1, 8)
    step = DenseStep((0,)).begin([(0, 1)])
    call = {"attention_mask": None, "pagedkv": step} | EXTRAS[names]
    with pytest.raises(UnsupportedBackend, match=f"layer 3.*{names}"):
        paged_attention(module, q, q, q, **call)
    assert not step.calls


def test_model_called_without_a_step(models: dict[str, LoadedModel]) -> None:
    with pytest.raises(UnsupportedBackend, match="without a pagedkv step"):
        models["tiny-random-llama"].model(torch.tensor([[1]]))
