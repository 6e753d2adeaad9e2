import pytest
from huggingface_hub import ModelCard

from t2r.hub import build_card, own_card
from tests.tiny import REPORT, tiny_llama, tiny_t2r, write_record

CONVERSION = {"source": "someone/llama-tiny", "license": "apache-2.0", "family": "llama", "num_slots": 8}
TRAINING = {"recipe": {"learning_rate": 0.001, "lora": {"rank": 8}}, "tokens": 123456, "steps": 25, "hardware": "1 × X"}


@pytest.fixture
def folder(tmp_path):
    tiny_t2r(tmp_path, layer_types=["linear_attention", "full_attention"])
    return tmp_path


def test_card_of_a_trained_model(folder):
    after = REPORT | {"student": 26.5, "ratio": 1.06}
    evaluation = {"text": "topics.txt", "before": REPORT, "after": after}
    write_record(folder, conversion=CONVERSION, training=TRAINING, evaluation=evaluation)
    card = build_card(folder, "me/tiny")
    assert card.data.base_model == "someone/llama-tiny"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert [result.metric_value for result in card.data.eval_results] == [26.5]
    assert [result.dataset_name for result in card.data.eval_results] == ["topics.txt"]
    assert "Perplexity on `topics.txt`" in card.text
    assert "| tokens | 123,456 |" in card.text
    assert "learning_rate: 0.001<br>lora: rank: 8" in card.text
    assert "Before training (2 windows, 126 tokens predicted)" in card.text
    assert "| all | 31.25 | 25.00 | 1.250 |" in card.text
    assert "| all | 26.50 | 25.00 | 1.060 |" in card.text
    assert "not trained since" not in card.text


def test_card_says_how_to_load_and_what_the_state_takes(folder):
    card = build_card(folder, "me/tiny")
    for line in (
        "pip install t2r",
        "import t2r",
        'AutoModelForCausalLM.from_pretrained("me/tiny"',
        "trust_remote_code=True",
    ):
        assert line in card.text
    assert "softmax attention of 1 of its 2 layers is replaced" in card.text
    # one layer × 2 heads × 8 slots × keys and values × 8 wide, fp32; the other layer's cache in fp32 as the weights
    state, cache = 1 * 2 * 8 * 2 * 8 * 4, 1 * 2 * 2048 * 2 * 8 * 4
    assert f"| Recurrent state of one sequence | {state:,} bytes |" in card.text
    assert f"{state + cache:,} bytes (softmax attention: {2 * cache:,})" in card.text


def test_card_of_a_hybrid(tmp_path):
    tiny_t2r(tmp_path, layer_types=["hybrid_sliding", "full_attention"], hybrid_window=5)
    text = build_card(tmp_path, "me/tiny").text
    assert "softmax attention of 1 of its 2 layers is replaced" in text
    assert "beside a softmax window of 5 tokens" in text
    assert "1 Gated Slot Attention beside a softmax window, 1 softmax attention" in text
    assert "keeps 8 slots of each key/value head and the last 5 tokens" in text


def test_a_recurrent_source_had_no_softmax_attention_to_replace(folder):
    write_record(folder, conversion=CONVERSION | {"family": "gsa"})
    text = build_card(folder, "me/tiny").text
    assert "as there, 1 of its 2 layers are [Gated Slot Attention]" in text
    assert "is replaced" not in text


def test_what_was_not_recorded_is_not_said(folder):
    write_record(folder, conversion={"source": "llama-tiny"})
    card = build_card(folder)
    assert "made from `llama-tiny`" in card.text
    assert "not trained since" in card.text
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text
    for field in ("base_model", "license", "eval_results", "model_name"):
        assert card.data.get(field) is None


@pytest.mark.parametrize("source", ["/home/me/models/llama", "./models/llama", "~/models/llama", "models/llama.gguf"])
def test_paths_of_this_machine_stay_out(folder, source):
    write_record(folder, conversion={"source": source}, training={"recipe": {"model": "/home/me/run"}})
    content = str(build_card(folder, "me/tiny"))
    assert source not in content
    assert "/home" not in content
    assert source.split("/")[-1] in content
    assert str(folder) not in content


def test_a_teacher_that_was_not_evaluated_is_a_dash(folder):
    bands = [REPORT["bands"][0] | {"teacher": None, "ratio": None}]
    write_record(folder, evaluation={"before": REPORT | {"teacher": None, "ratio": None, "bands": bands}})
    assert "| 0–63 | 31.25 | – | – |" in build_card(folder).text


def test_card_reads_back(folder):
    write_record(folder, conversion=CONVERSION, training=TRAINING, evaluation={"after": REPORT})
    card = build_card(folder, "me/tiny")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert again.text == card.text


def test_only_a_card_without_the_mark_is_someone_s_own(folder):
    assert own_card(folder) is None
    build_card(folder).save(folder / "README.md")
    assert own_card(folder) is None
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert own_card(folder).text.strip() == "# Mine"


def test_a_plain_softmax_model_has_no_state(tmp_path):
    tiny_llama(tmp_path)
    assert "Recurrent state" not in build_card(tmp_path).text


def test_damaged_record(folder):
    (folder / "t2r_record.json").write_text("{")
    with pytest.raises(ValueError, match=r"t2r_record\.json: not JSON"):
        build_card(folder)


def test_stages_are_a_table(folder):
    stage = {"stage": "1-align", "steps": 4, "tokens": 4096, "sequence_length": 1024, "trains": "gates"}
    stages = [stage | {"objective": {"align": 1.0}}, stage | {"stage": "2-distill", "objective": {"distill": 1.0}}]
    write_record(folder, conversion=CONVERSION, training=TRAINING | {"stages": stages})
    card = build_card(folder)
    assert "| stage | steps | tokens | sequence length | trains | objective |" in card.text
    assert "| 1-align | 4 | 4,096 | 1,024 | gates | align: 1.0 |" in card.text
    assert "| 2-distill | 4 | 4,096 | 1,024 | gates | distill: 1.0 |" in card.text
    assert "| stages |" not in card.text
