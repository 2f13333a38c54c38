"""examples/reward_model: a reward model is trained from pairs, ranks held-out ones, and can be used as a reward."""

import json
import random
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.models.pool import ModelPool
from common.rewards.reward_model import RewardModel
from examples.reward_model.reward_model import (
    SETTINGS,
    TINY,
    RewardModelSettings,
    equal_batches,
    freeze_below,
    make_trainer,
    parse_settings,
    read_pairs,
    tokenize,
    train_reward_model,
)
from tests import forked
from tests.test_hh_rlhf import RECORDS, needs_records

FOLDER = Path(__file__).parent.parent / "examples" / "reward_model"
POLITE, RUDE = ("please", "gladly", "thanks"), ("shut", "never", "stupid")


def write_pairs(path: Path, num_pairs: int = 160) -> Path:
    """Questions of random words; the preferred answer has a polite word among words that say nothing."""
    words, draw = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "so", "ne")], random.Random(0)

    def text(question: str, choices: tuple[str, ...]) -> str:
        answer = draw.choices(words, k=draw.randint(2, 6))
        answer.insert(draw.randint(0, len(answer)), draw.choice(choices))
        return f"\n\nHuman: {question}\n\nAssistant: {' '.join(answer)}"

    with path.open("w") as file:
        for number in range(num_pairs):
            question = " ".join([str(number), *draw.choices(words, k=4)])
            file.write(json.dumps({"chosen": text(question, POLITE), "rejected": text(question, RUDE)}) + "\n")
    return path


def tiny_settings(dataset: Path, output_dir: Path, *more: str) -> RewardModelSettings:
    return parse_settings(["--model", "tiny", "--dataset", str(dataset), "--output_dir", str(output_dir), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that learned that polite answers are preferred."""
    folder = tmp_path_factory.mktemp("reward_model")
    pairs = write_pairs(folder / "pairs.jsonl")
    more = ["--num_eval_pairs", "32", "--num_epochs", "8", "--batch_size", "16", "--pairs_per_pass", "16"]
    train_reward_model(tiny_settings(pairs, folder / "model", *more, "--learning_rate", "0.01"))
    return folder / "model"


def test_a_simple_preference_is_learned_and_the_accuracy_written_down(trained):
    result = json.loads((trained / "accuracy.json").read_text())
    assert result["num_eval_pairs"] == 32 and result["num_train_pairs"] == 128
    assert result["accuracy_before"] < 0.8 and result["accuracy_after"] > 0.95
    assert result["settings"]["model"] == "tiny"


def test_the_folder_holds_a_model_with_one_label_and_its_tokenizer(trained):
    model, report = AutoModelForSequenceClassification.from_pretrained(trained, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.num_labels == 1 and not report["missing_keys"]
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(ids) == "\n\nHuman: Hi\nyou\n\nAssistant: Hello<eos>"


def test_the_folder_is_a_reward(trained):
    reward, models = RewardModel(str(trained)), ModelPool(torch.device("cpu"), "never")
    reward.load(models)
    prompts = [[{"role": "user", "content": f"{i} kara"}] for i in range(6)]
    scores = reward(prompts, ["lora please miso", "lora stupid miso"] * 3)
    assert all(polite > rude + 1 for polite, rude in zip(scores[::2], scores[1::2], strict=True))
    assert reward.max_length == TINY["max_length"]


def test_a_model_from_a_folder_is_trained_further_and_keeps_its_chat_template(trained, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_pairs=24)
    arguments = ["--dataset", str(pairs), "--output_dir", str(tmp_path / "model"), "--num_eval_pairs", "8"]
    settings = parse_settings(["--model", str(trained), *arguments, "--batch_size", "4", "--pairs_per_pass", "2"])
    assert settings.max_length == SETTINGS.max_length  # TINY is for the model that is made here alone
    assert train_reward_model(settings)["accuracy_before"] > 0.95
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (trained, tmp_path / "model")]
    assert templates[0] == templates[1]


def test_only_the_last_layers_are_trained_if_asked(trained, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_pairs=24)
    more = ["--num_eval_pairs", "8", "--batch_size", "4", "--pairs_per_pass", "2", "--learning_rate", "0.01"]
    more += ["--num_trained_layers", "1", "--gradient_checkpointing", "true"]
    arguments = ["--model", str(trained), "--dataset", str(pairs), "--output_dir", str(tmp_path / "model")]
    train_reward_model(parse_settings(arguments + more))
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (trained, tmp_path / "model")
    )
    kept = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert kept == {"model.embed_tokens.weight"}
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    with pytest.raises(ValueError, match=r"num_trained_layers=2: the model has 1 layers"):
        freeze_below(model, 2)


def test_no_training_pair_begins_as_a_held_out_one(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {side: "\n\nHuman: {0}\n\nAssistant: " + side for side in ("chosen", "rejected")}
    rows = [{side: text.format(i % 10) for side, text in row.items()} for i in range(40)]
    rows += [{"chosen": "\n\nHuman: empty\n\nAssistant: ", "rejected": "\n\nHuman: empty\n\nAssistant: a"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, held_out = read_pairs(tiny_settings(path, tmp_path, "--num_eval_pairs", "3"))
    openings = [{pair["chosen"][0]["content"] for pair in pairs} for pairs in (train, held_out)]
    assert len(held_out) == 3 and not openings[0] & openings[1]
    assert len(train) == 4 * (10 - len(openings[1])) and "empty" not in openings[0] | openings[1]
    assert train[0]["rejected"][-1] == {"role": "assistant", "content": "rejected"}
    assert read_pairs(tiny_settings(path, tmp_path, "--num_eval_pairs", "3", "--seed", "1"))[1] != held_out


def test_a_special_token_that_a_pair_spells_is_text(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    answers = [
        [{"role": "user", "content": "please"}, {"role": "assistant", "content": f"a{end}"}] for end in ("<eos>", "")
    ]
    row = tokenize([{"chosen": answers[0], "rejected": answers[1]}], tokenizer, 1000)[0]
    counts = {row[f"{side}_ids"].count(tokenizer.eos_token_id) for side in ("chosen", "rejected")}
    assert counts == {1} and tokenizer.decode(row["chosen_ids"]).endswith("Assistant: a<eos><eos>")


def test_training_reads_what_scoring_reads(trained):
    """Also a default system message, and dialogues or answers that are too long."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    start = "{% if messages[0]['role'] != 'system' %}be kind<eos>{% endif %}"
    tokenizer.chat_template = start + tokenizer.chat_template
    judge = RewardModel(str(trained))
    judge.tokenizer = tokenizer
    question = {"role": "user", "content": "kara lora"}
    dialogues = [
        [*before, question, {"role": "assistant", "content": answer}]
        for answer in ("miso", "miso please " * 30 + "miso")
        for before in ([], [question, {"role": "assistant", "content": "please " * 8 + "kara"}])
    ]
    for max_length in (1000, 30, 12):
        judge.max_length = max_length
        rows = tokenize([{"chosen": each, "rejected": each} for each in dialogues], tokenizer, max_length)
        scored = judge._encode([each[:-1] for each in dialogues], [each[-1]["content"] for each in dialogues])
        assert rows["chosen_ids"][:] == [row["input_ids"] for row in scored]


def test_batches_of_an_evaluation_are_equal_and_change_no_accuracy(trained, tmp_path):
    assert [equal_batches(*each) for each in [(300, 1, 8), (200, 2, 32), (7, 1, 4), (7, 2, 4), (8, 1, 8)]] == [
        *(6, 25, 1, 1, 8),
    ]
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_pairs=40)
    accuracies = {}
    for pairs_per_pass in ("1", "4"):
        words = ["--num_eval_pairs", "12", "--batch_size", "4", "--pairs_per_pass", pairs_per_pass]
        settings = parse_settings(["--model", str(trained), "--dataset", str(pairs), "--output_dir", "x", *words])
        train, held_out = read_pairs(settings)
        held_out[:5] = [{"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in held_out[:5]]
        trainer = make_trainer(settings, train, held_out)
        assert trainer.args.per_device_eval_batch_size == int(pairs_per_pass)
        accuracies[pairs_per_pass] = trainer.evaluate()["eval_accuracy"]
    assert accuracies["1"] == pytest.approx(7 / 12) and accuracies["4"] == pytest.approx(7 / 12)


def test_long_dialogues_lose_their_beginning_and_keep_their_first_token(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    messages = [{"role": "user", "content": "kara " * 50}, {"role": "assistant", "content": "please"}]
    pair = {"chosen": messages, "rejected": messages[:1] + messages}
    whole, cut = (tokenize([pair], tokenizer, length)["chosen_ids"][0] for length in (1000, 20))
    assert cut == whole[:1] + whole[-19:] and tokenizer.decode(cut).endswith("Assistant: please<eos>")


@pytest.mark.parametrize("name", [name for name in SETTINGS.__dataclass_fields__ if name != "model"])
def test_every_setting_can_be_given(name):
    value = vars(SETTINGS)[name]
    other = {str: "x", int: 3, float: 0.5, bool: False, type(None): 3}[type(value)]
    assert vars(parse_settings([f"--{name}", str(other)]))[name] == other
    tiny = vars(parse_settings(["--model", "tiny", f"--{name}", str(other)]))
    assert tiny == vars(SETTINGS) | TINY | {"model": "tiny", name: other}


def test_settings_reach_the_training(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_pairs=8)
    options = {"num_epochs": 3, "learning_rate": 0.5, "warmup_steps": 7, "weight_decay": 0.25, "seed": 9}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    more = ["--num_eval_pairs", "2", "--batch_size", "6", "--pairs_per_pass", "2", "--center_rewards", "0.125"]
    settings = tiny_settings(pairs, tmp_path / "model", *words, *more)
    args = make_trainer(settings, *read_pairs(settings)).args
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps, args.weight_decay, args.seed) == tuple(
        options.values()
    )
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 6
    assert args.center_rewards_coefficient == 0.125 and args.max_length is None


# Bad input


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return forked.run(["reward_model.py", *arguments], cwd=FOLDER)


@pytest.mark.slow
def test_the_script_ends_with_one_message_when_the_model_is_not_there(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_pairs=8)
    done = run_script(
        *("--model", "no/model", "--dataset", str(pairs), "--num_eval_pairs", "2"),
        *("--output_dir", str(tmp_path / "out")),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: model=no/model: cannot be loaded" in done.stderr and "--model tiny" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_eval_pairs", "8"], "num_eval_pairs=8: .*has 8 pairs"),
        (["--num_eval_pairs", "0"], "num_eval_pairs=0"),
        (
            ["--num_eval_pairs", "2", "--batch_size", "5", "--pairs_per_pass", "2"],
            "batch_size=5: 1 processes.*multiple",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, options, message):
    settings = tiny_settings(write_pairs(tmp_path / "pairs.jsonl", num_pairs=8), tmp_path / "out", *options)
    with pytest.raises(ValueError, match=message):
        train_reward_model(settings)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"unknown setting 'modl'.*Did you mean model\?"):
        parse_settings(["--modl", "x"])


def test_a_folder_with_something_in_it_is_refused(trained, tmp_path):
    settings = tiny_settings(write_pairs(tmp_path / "pairs.jsonl", num_pairs=8), trained)
    with pytest.raises(ValueError, match=r"output_dir=.*nothing is overwritten.*--output_dir"):
        train_reward_model(settings)


# The real records


@needs_records
@pytest.mark.slow
def test_on_real_pairs_held_out_ones_are_ranked_above_chance(tmp_path):
    """Three times 200 held-out pairs: a coin reaches 0.55 on 600 pairs in 1 of 100 cases."""
    results = [
        train_reward_model(tiny_settings(RECORDS, tmp_path / seed, "--num_eval_pairs", "200", "--seed", seed))
        for seed in ("0", "1", "2")
    ]
    assert all(result["num_eval_pairs"] == 200 and result["num_train_pairs"] > 2000 for result in results)
    assert sum(result["accuracy_after"] for result in results) / 3 > 0.55
