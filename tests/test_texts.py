"""The text of a completion: every token but its end and padding, exactly as written."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.data.texts import completion_texts
from common.embedded.policy import EOS, PAD, build_tokenizer
from common.rollouts import Completion
from common.samples.page import read_run
from common.tasks import Task
from common.tasks.countdown import equation_reward, format_reward
from tests.toy import algorithms, samples_of, toy_config

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SOLVED = "<think>3+5=8</think>\n<answer>(3+5)*6</answer>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_special(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def text_of(tokenizer, text: str, ends: tuple[str, ...] = (EOS,)) -> str:
    """The text of a completion that was sampled as the tokens of `text`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [found] = completion_texts(tokenizer, [ids], tokenizer.convert_tokens_to_ids(list(ends)))
    return found


@pytest.mark.parametrize("special", [[], TAGS, ["<answer>", "</answer>"]], ids=["none", "all", "answer"])
def test_tags_reach_the_rewards_whether_or_not_they_are_special_tokens(special):
    text = text_of(with_special(*special), SOLVED + EOS)
    assert text == SOLVED
    assert equation_reward([""], [text], nums=[[3, 5, 6]], target=[48]) == format_reward([""], [text]) == [1.0]


def test_what_ends_a_completion_and_padding_is_no_text_and_nothing_after_it_is():
    tokenizer = with_special("<|im_end|>")
    ends = (EOS, "<|im_end|>")
    for written in (
        f"yes{EOS}",
        "yes<|im_end|>",
        f"yes{EOS}{PAD}{PAD}",
        f"{PAD}yes{EOS}",
        f"yes<|im_end|>no{EOS}",
        "yes",
        f"ye{PAD}s",
    ):
        assert text_of(tokenizer, written, ends) == "yes", written
    assert text_of(tokenizer, "yes<|im_end|>no", (EOS,)) == "yes<|im_end|>no"  # here it ends nothing
    assert completion_texts(tokenizer, [], [1]) == [] and completion_texts(tokenizer, [[]], [1]) == [""]
    assert text_of(tokenizer, EOS) == ""


def test_a_padding_token_that_ends_completions_is_their_end():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = EOS
    assert text_of(tokenizer, f"yes{EOS}{EOS}no") == "yes"


def test_a_tokenizer_without_padding_keeps_every_token():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    assert text_of(tokenizer, f"yes{PAD}no{EOS}") == f"yes{PAD}no"


def test_a_turn_that_a_model_begins_on_its_own_can_be_seen():
    tokenizer = with_special("<|im_start|>", "<|im_end|>", "<s>")
    tokenizer.bos_token = "<s>"
    written = "4<|im_start|>user\nThanks!<s>"
    assert text_of(tokenizer, written + EOS) == written


def test_the_token_that_ends_a_turn_is_no_text_even_if_the_tokenizer_does_not_call_it_special():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False), AddedToken("<|im_start|>", special=False)])
    tokenizer.chat_template = CHATML
    assert text_of(tokenizer, "yes<|im_end|>\n", (EOS, "<|im_end|>")) == "yes"


def test_an_end_token_that_is_ordinary_text_stays():
    """A generation configuration may name a line break or a closing bracket."""
    assert text_of(build_tokenizer(), "3}\nmore", ("}", EOS)) == "3}"
    assert text_of(build_tokenizer(), "<answer>3</answer> so", ("</answer>", EOS)) == "<answer>3</answer>"


def test_letters_beyond_ascii_in_a_tag_are_not_taken_for_bytes():
    tokenizer = with_special(
        "<réponse>", "</réponse>", "<\N{FULLWIDTH VERTICAL LINE}end▁of▁thought\N{FULLWIDTH VERTICAL LINE}>"
    )
    text = "né<réponse>日本 3</réponse> ü<\N{FULLWIDTH VERTICAL LINE}end▁of▁thought\N{FULLWIDTH VERTICAL LINE}>"
    assert text_of(tokenizer, text + EOS) == text
    tokenizer.add_tokens("<größe>")
    assert text_of(tokenizer, "a<größe>b") == "a<größe>b"


@pytest.mark.parametrize("model", ["words", "bytes"])
def test_no_space_is_taken_away_before_punctuation(model):
    text = "it 's 3 , 4 . do n't !"
    if model == "words":
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *text.split()])}, "<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    else:
        letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
        pieces = Tokenizer(models.BPE(letters, []))
        pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=pieces,
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
        )
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) != text  # what its clean-up makes of it
    assert completion_texts(tokenizer, [ids], []) == [text]


class Scripted:
    """A sampler that writes the same text after every prompt."""

    needs_push, has_weights, resident_bytes, samples_apart = False, True, 0, False

    def __init__(self, token_ids: list[int]) -> None:
        self.completion = Completion(token_ids, [-1.0] * len(token_ids), False)

    def generate(self, prompt_ids, settings, *, num_generations=1, seeds=None, finished=None):
        return [self.completion] * (len(prompt_ids) * num_generations)

    def sleep(self):
        pass

    def wake(self):
        pass


def test_rewards_samples_and_evaluation_see_special_tags_and_no_end_token(tiny_folder, tmp_path: Path):
    """A whole run, whose policy writes a right answer with tags that its tokenizer holds as special."""
    seen = set()

    def right(prompts, completions, nums, target, **columns):
        seen.update(completions)
        return equation_reward(prompts, completions, nums=nums, target=target)

    rows = [{"prompt": f"3 5 6 make 48{'!' * i}\n", "nums": [3, 5, 6], "target": 48} for i in range(8)]
    task = Task(train=rows[:4], eval=rows[4:], rewards={"right": right}, reward_weights={"right": 1}, accuracy="right")
    shared = {"num_steps": 1, "eval_every": 1, "max_completion_length": 40}
    config = toy_config(tiny_folder, tmp_path / "run", **shared, max_logprob_diff=0)  # written, not sampled
    trainer = algorithms()["GRPO"].trainer(config, task=task)
    trainer.tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    ids = trainer.tokenizer(SOLVED + EOS, add_special_tokens=False)["input_ids"]
    trainer.policy_sampler.sampler = Scripted(ids)
    metrics = trainer.train()
    assert seen == {SOLVED} and metrics["eval/accuracy"] == 1
    assert {row["completion"] for row in samples_of(tmp_path / "run")} == {SOLVED}
    assert {row["completion"] for row in read_run(tmp_path / "run")["samples"]} == {SOLVED}
    assert torch.isfinite(torch.tensor(metrics["score"]))
