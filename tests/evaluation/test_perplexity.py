import io
import math

import pytest
import torch
from rich.console import Console

from t2r.evaluation import cut_windows, evaluate_perplexity, render, summarise, window_nlls
from tests.tiny import tiny_llama, tiny_t2r, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_t2r(folder / "student"), tiny_llama(folder / "teacher", seed=1), tiny_tokenizer(folder)


def test_perplexity_is_that_of_the_model_s_own_loss(models):
    student, teacher, tokenizer = models
    text = tiny_text(70)
    report = evaluate_perplexity(student, tokenizer, text, teacher=teacher, window=30)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    for model, measured in ((student, report.overall.student), (teacher, report.overall.teacher)):
        with torch.no_grad():
            losses = [model(input_ids=x[None], labels=x[None]).loss.item() for x in (ids[:30], ids[30:60])]
        assert measured == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert report.overall.ratio == report.overall.student / report.overall.teacher
    assert (report.windows, report.tokens) == (2, 58)


def test_a_likelihood_belongs_to_the_position_of_its_query(models):
    student, _, tokenizer = models
    windows = cut_windows(tokenizer, tiny_text(20), 20)
    nlls = window_nlls(student, windows)
    with torch.no_grad():
        expected = student(input_ids=windows).logits[0, 7].log_softmax(-1)[windows[0, 8]]
    assert nlls.shape == (1, 19)
    assert nlls.dtype == torch.float64
    assert nlls[0, 7].item() == pytest.approx(-expected.item(), rel=1e-5)


def test_batches_and_slices_of_positions_change_nothing(models, monkeypatch):
    student, _, tokenizer = models
    windows = cut_windows(tokenizer, tiny_text(150), 50)
    calls = []
    expected = window_nlls(student, windows)
    monkeypatch.setattr("t2r.evaluation.perplexity.POSITIONS_AT_ONCE", 7)
    measured = window_nlls(student, windows, batch_size=2, progress=lambda *amounts: calls.append(amounts))
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5)
    assert calls == [(2, 3), (3, 3)]


def test_a_model_in_training_stays_in_training(models):
    student, _, tokenizer = models
    student.train()
    window_nlls(student, cut_windows(tokenizer, tiny_text(20), 20))
    assert student.training
    student.eval()


@pytest.mark.parametrize(
    ("window", "bands"),
    [
        (2, [(0, 1)]),
        (40, [(0, 39)]),
        (64, [(0, 63)]),
        (65, [(0, 63)]),  # position 64 is predicted and predicts nothing
        (66, [(0, 63), (64, 65)]),
        (1000, [(0, 63), (64, 255), (256, 511), (512, 999)]),
        (1024, [(0, 63), (64, 255), (256, 511), (512, 1023)]),
        (4096, [(0, 63), (64, 255), (256, 511), (512, 1023), (1024, 2047), (2048, 4095)]),
    ],
)
def test_bands_are_cut_to_the_window(window, bands):
    report = summarise(torch.ones(3, window - 1))
    assert [(band.start, band.end) for band in report.bands] == bands
    assert all(band.student == pytest.approx(math.e) for band in report.bands)


def test_bands_average_their_own_positions():
    nlls = torch.zeros(2, 255)
    nlls[:, 64:] = 2.0
    report = summarise(nlls, torch.ones(2, 255))
    assert [band.student for band in report.bands] == pytest.approx([1.0, math.exp(2)])
    assert [band.ratio for band in report.bands] == pytest.approx([math.exp(-1), math.e])
    assert report.overall.student == pytest.approx(math.exp(2 * 191 / 255))


def test_the_curve_has_the_mean_likelihood_of_every_position_once():
    nlls = torch.arange(100.0).repeat(2, 1)
    curve = summarise(nlls).per_position
    assert len(curve) == 32
    assert [point.start for point in curve[1:]] == [point.end + 1 for point in curve[:-1]]
    assert (curve[0].start, curve[-1].end) == (0, 99)
    assert all(point.student == pytest.approx((point.start + point.end) / 2) for point in curve)
    assert len(summarise(torch.ones(1, 5)).per_position) == 5


def test_dict_form_is_exact():
    report = summarise(torch.full((2, 63), math.log(4)), torch.full((2, 63), math.log(2)))
    content = report.as_dict()
    assert list(content) == ["windows", "tokens", "student", "teacher", "ratio", "bands"]
    assert list(content["bands"][0]) == ["from", "to", "student", "teacher", "ratio"]
    assert (content["windows"], content["tokens"]) == (2, 126)
    figures = {"student": pytest.approx(4), "teacher": pytest.approx(2), "ratio": pytest.approx(2)}
    assert content["bands"] == [{"from": 0, "to": 63, **figures}]


def test_without_a_teacher_its_figures_are_none():
    content = summarise(torch.ones(1, 63)).as_dict()
    for figures in (content, content["bands"][0]):
        assert figures["teacher"] is figures["ratio"] is None


@pytest.mark.parametrize("teacher", [None, torch.zeros(1, 63)])
def test_table_shows_the_figures(teacher):
    console = Console(width=80, file=io.StringIO())
    console.print(render(summarise(torch.full((1, 63), math.log(8)), teacher), title="Step 0"))
    text = console.file.getvalue()
    assert "Step 0" in text
    assert "0–63" in text
    assert text.count(" 8.00 ") == 2
    assert ("ratio" in text) == (teacher is not None)


def test_windows_do_not_overlap_and_an_incomplete_one_is_dropped(models):
    tokenizer = models[2]
    text = tiny_text(29)
    windows = cut_windows(tokenizer, text, 10)
    assert windows.shape == (2, 10)
    assert windows.flatten().tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:20]
    assert torch.equal(cut_windows(tokenizer, text, 10, limit=1), windows[:1])
    assert len(cut_windows(tokenizer, text, 10, limit=9)) == 2


@pytest.mark.parametrize(
    ("window", "limit", "message"),
    [
        (30, None, "the text has 29 tokens, less than one window of 30: use a longer text or a window of at most 29"),
        (1, None, "window must be at least 2"),
        (10, 0, "limit must be at least 1"),
    ],
)
def test_windows_that_cannot_be_cut(models, window, limit, message):
    with pytest.raises(ValueError, match=message):
        cut_windows(models[2], tiny_text(29), window, limit)


def test_tokens_outside_the_vocabulary_are_refused(models):
    windows = torch.tensor([[1, 22, 3]])
    with pytest.raises(ValueError, match="token 22, but the model's vocabulary only 22"):
        window_nlls(models[0], windows)


def test_a_broken_model_is_refused(models, tmp_path):
    model = tiny_llama(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="not finite in window 0"):
        window_nlls(model, torch.ones(2, 8, dtype=torch.long))


def test_teacher_and_student_must_have_seen_the_same_windows():
    with pytest.raises(ValueError, match=r"\[2, 63\] and \[1, 63\]"):
        summarise(torch.ones(2, 63), torch.ones(1, 63))
