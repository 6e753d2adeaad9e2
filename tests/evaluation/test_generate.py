import pytest
import torch

from t2r.evaluation import generate_stream
from tests.tiny import SHAPE, tiny_llama, tiny_t2r, tiny_tokenizer

HEAD_DIM = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
PER_TOKEN = SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 2 * HEAD_DIM * 4


@pytest.fixture(scope="module")
def t2r(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2r")
    model = tiny_t2r(folder)
    model.generation_config.eos_token_id = None  # a random model may end at once
    return model, tiny_tokenizer(folder)


def run(model, tokenizer, prompt="the cat sat", count=20, **options):
    pieces = []
    stats = generate_stream(model, tokenizer, prompt, count, on_text=pieces.append, **options)
    return "".join(pieces), stats


def test_text_is_what_generate_gives(t2r):
    model, tokenizer = t2r
    text, stats = run(model, tokenizer)
    inputs = tokenizer("the cat sat", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, 3:]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (stats.prompt_tokens, stats.new_tokens) == (3, 20)
    assert 0 < stats.prompt_seconds < stats.seconds
    assert stats.tokens_per_second == pytest.approx(19 / (stats.seconds - stats.prompt_seconds))


def test_state_does_not_grow_with_the_text(t2r):
    model, tokenizer = t2r
    sizes = {run(model, tokenizer, count=count)[1].state_bytes for count in (1, 30)}
    assert sizes == {model.config.state_bytes(4)}


def test_state_of_a_softmax_model_is_its_cache(tmp_path):
    model = tiny_llama(tmp_path)
    model.generation_config.eos_token_id = None
    _, stats = run(model, tiny_tokenizer(tmp_path), count=5)
    assert stats.state_bytes == PER_TOKEN * (3 + 5 - 1)  # the last token is not fed back


def test_sampling_repeats_with_its_seed(t2r):
    first, second, other = (run(*t2r, temperature=1.5, top_p=0.95, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_top_p_near_zero_is_greedy(t2r):
    assert run(*t2r, temperature=1.5, top_p=1e-6, seed=1)[0] == run(*t2r)[0]


def test_chat_template_is_used_if_there_is_one(tmp_path, t2r):
    model = t2r[0]
    tokenizer = tiny_tokenizer(tmp_path, chat=True)
    chatting, stats = run(model, tokenizer, "the cat")
    assert stats.prompt_tokens == 3
    assert chatting == run(model, tokenizer, "the cat and", chat=False)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"chat": True}, "no chat template"),
        ({"count": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be above 0"),
    ],
)
def test_bad_options(t2r, options, message):
    with pytest.raises(ValueError, match=message):
        run(*t2r, **options)


def test_generation_leaves_no_gradients(t2r):
    run(*t2r, count=2)
    assert torch.is_grad_enabled()
