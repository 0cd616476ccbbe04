"""Tiny models with random weights and a byte tokenizer: real shapes, no download, all reproducible.

The weights are drawn so that the models are not degenerate: residual streams keep their scale,
attention is peaked enough that what is evicted matters, and greedy continuations wander over the
vocabulary instead of repeating one token. What they write is noise.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pagedkv.errors import ModelNotFound

__all__ = ["TINY_MODELS", "byte_tokenizer", "tiny_config", "tiny_model"]

# Ids 0-255 are the bytes themselves; these follow them.
_END_OF_TEXT, _TURN_START, _TURN_END, _PAD = 256, 257, 258, 259
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_VOCAB_SIZE = 256 + len(_SPECIAL_TOKENS)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Attention scores get a standard deviation of about 4: a few tokens stand out, as in real models.
_SCORE_GAIN = 2.0
# Averages over many tokens come out below what each of them says, or all contexts look alike.
_OUTPUT_GAIN = 0.7
_GAINS = {
    "q_proj": _SCORE_GAIN,
    "k_proj": _SCORE_GAIN,
    "query_key_value": _SCORE_GAIN,
    "c_attn": _SCORE_GAIN,
    "o_proj": _OUTPUT_GAIN,
    "attn.c_proj": _OUTPUT_GAIN,
    "attention.dense": _OUTPUT_GAIN,
}


def _llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
    )


def _qwen2() -> Qwen2Config:
    return Qwen2Config(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )


def _qwen3() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )


def _mistral(window: int | None) -> MistralConfig:
    return MistralConfig(
        hidden_size=160,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=40,
        max_position_embeddings=2048,
        sliding_window=window,
    )


def _gpt2() -> GPT2Config:
    return GPT2Config(n_embd=96, n_layer=3, n_head=3, n_positions=1024)


def _gpt_neox() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    )


TINY_MODELS: dict[str, Callable[[], Any]] = {
    "tiny-random": _llama,
    "tiny-random-llama": _llama,
    "tiny-random-qwen2": _qwen2,
    "tiny-random-qwen3": _qwen3,
    "tiny-random-mistral": lambda: _mistral(None),
    "tiny-random-mistral-window": lambda: _mistral(32),
    "tiny-random-gpt2": _gpt2,
    "tiny-random-gpt_neox": _gpt_neox,
}


def tiny_config(name: str) -> Any:
    """The transformers config of a tiny model, its vocabulary being `byte_tokenizer`'s.

    Raises:
        ModelNotFound: `name` is not a key of `TINY_MODELS`.
    """
    if name not in TINY_MODELS:
        raise ModelNotFound(
            f"there is no tiny model called {name!r}", remedy=f"use one of {', '.join(TINY_MODELS)}"
        )
    config = TINY_MODELS[name]()
    config.vocab_size = _VOCAB_SIZE
    config.bos_token_id = None
    config.eos_token_id = [_END_OF_TEXT, _TURN_END]
    config.pad_token_id = _PAD
    # Tied to the embedding, every token would find itself the likeliest successor.
    config.tie_word_embeddings = False
    return config


def tiny_model(name: str, *, seed: int = 0, attn_implementation: str = "sdpa") -> torch.nn.Module:
    """Build a tiny model in fp32 on the CPU; 0.3 to 1.7 million parameters, some 20 ms.

    The weights depend on `seed` and on nothing else: not on the global generator, which is left as
    it was, nor on torch's defaults, the attention implementation or the order of the parameters.

    Raises:
        ModelNotFound: `name` is not a key of `TINY_MODELS`.
    """
    config = tiny_config(name)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    for parameter_name, parameter in model.named_parameters():
        _draw(parameter_name, parameter.data, seed)
    model.eval()
    return model  # type: ignore[no-any-return]


def _draw(name: str, weight: torch.Tensor, seed: int) -> None:
    """Fill one parameter in place, from a generator of its own."""
    # torch's CPU generator looks at 32 bits of its seed only, so seed and name are hashed together.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    if weight.ndim == 1:
        # Norm gains near 1 and biases near 0, but off them, so that a lost one shows.
        gain = 0.0 if name.endswith("bias") else 1.0
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            gain = _SCORE_GAIN
        weight.copy_(0.1 * noise + gain)
    elif "lm_head" in name or "embed_out" in name:
        weight.copy_(noise * 2.0 / weight.shape[1] ** 0.5)
    elif any(part in name for part in ("embed", "wte", "wpe")):
        weight.copy_(noise)
    else:
        # GPT-2 keeps its matrices as [in, out], all others as [out, in].
        fan_in = weight.shape[0 if ".c_" in name else 1]
        gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
        weight.copy_(noise * gain / fan_in**0.5)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are UTF-8 bytes, plus four special tokens; every text round-trips."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    core = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, normalized=False) for t in _SPECIAL_TOKENS])
    end_of_text, turn_start, turn_end, pad = _SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=end_of_text,
        pad_token=pad,
        additional_special_tokens=[turn_start, turn_end],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
