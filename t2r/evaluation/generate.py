"""Text from a prompt, as it is made, with what it cost."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import TextStreamer, set_seed
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took.

    Attributes:
        prompt_tokens: tokens of the prompt, its chat template included.
        new_tokens: tokens generated.
        prompt_seconds: until the first new token.
        seconds: in all.
        state_bytes: what the model keeps of the sequence at its end: slots, and keys and values of softmax layers.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float
    state_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: new tokens after the first, by the time after the first (over everything if alone)."""
        if self.new_tokens < 2:
            return self.new_tokens / self.seconds
        return (self.new_tokens - 1) / (self.seconds - self.prompt_seconds)


def generate_stream(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> GenerationStats:
    """Continue a prompt.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompt: what to continue, or with `chat` the user's message.
        max_new_tokens: tokens to generate at most.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample from the most likely tokens that reach this probability together.
        seed: of sampling; not seeded when None.
        chat: whether to put the prompt through the tokenizer's chat template; None does if there is one.
        on_text: called with each piece of finished text.

    Raises:
        ValueError: the prompt is empty, an option out of range, or `chat` asked for without a chat template.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p)
    inputs = _encode(tokenizer, prompt, chat).to(model.device)
    if seed is not None:
        set_seed(seed)
    streamer = _Streamer(tokenizer, on_text)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            return_dict_in_generate=True,
            pad_token_id=_pad_token(model, tokenizer),
        )
    seconds = perf_counter() - streamer.start
    prompt_tokens = inputs["input_ids"].shape[1]
    return GenerationStats(
        prompt_tokens=prompt_tokens,
        new_tokens=output.sequences.shape[1] - prompt_tokens,
        prompt_seconds=(streamer.first or streamer.start) - streamer.start,
        seconds=seconds,
        state_bytes=cache_bytes(output.past_key_values),
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, over all layers and sequences."""
    total = 0
    for layer in cache.layers:
        slots = [x for group in getattr(layer, "groups", ()) for x in group.tensors()]
        total += sum(x.nbytes for x in (layer.keys, layer.values, *slots) if torch.is_tensor(x))
    return total


class _Streamer(TextStreamer):
    """Hands finished text on, and notes when the prompt came and when the first token did."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.start = perf_counter()
        self.first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self.on_text(text)


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _encode(tokenizer, prompt: str, chat: bool | None):
    if chat is None:
        chat = tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template; generate without chat (--no-chat)")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def _pad_token(model, tokenizer) -> int | None:
    """Nothing is padded here, but `generate` warns when it has no padding token."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end
