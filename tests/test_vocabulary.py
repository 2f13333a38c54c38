"""What a tokenizer and a model know of a prompt."""

import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.data.prompts import PromptSet
from common.data.vocabulary import Characters, check_vocabulary, describe_unknown
from GRPO.grpo_trainer import GRPOTrainer
from tests.toy import toy_config, toy_task

LETTERS = {letter: number for number, letter in enumerate("abcde ", start=1)}


def letters(*, unknown: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of five letters, which replaces others by the unknown token or leaves them out."""
    vocabulary = LETTERS | ({unknown: 0} if unknown else {})
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


def with_bytes_for_others() -> PreTrainedTokenizerFast:
    vocabulary = {f"<0x{byte:02X}>": byte + 7 for byte in range(256)} | LETTERS | {"<unk>": 0}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def unknown_in(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return Characters(tokenizer).unknown_in([text], [tokenizer(text)["input_ids"]])[0]


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_character_that_no_token_stands_for_is_unknown(unknown):
    tokenizer = letters(unknown=unknown)
    assert unknown_in(tokenizer, "abe dace") == unknown_in(tokenizer, "") == ""
    assert unknown_in(tokenizer, "zabe 三z?") == "?z三"
    texts = ["z", "a", "bz三"]
    assert Characters(tokenizer).unknown_in(texts, tokenizer(texts)["input_ids"]) == ["z", "", "z三"]


@pytest.mark.parametrize(
    ("space", "split"),
    [("▁", pre_tokenizers.Metaspace()), ("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=True))],
)
def test_the_space_before_a_word_does_not_stand_for_its_letters(space, split):
    tokenizer = Tokenizer(models.BPE(LETTERS | {space: 7}, []))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast("z")["input_ids"] == [7]
    assert unknown_in(fast, "abz az") == "z" and unknown_in(fast, "ab a") == ""
    assert unknown_in(fast, "▁") == ("" if space == "▁" else "▁")


def test_a_character_that_becomes_another_or_is_cleaned_away_is_known():
    tokenizer = letters(unknown=None)
    assert unknown_in(tokenizer, "ABÉ") == ""
    assert unknown_in(tokenizer, "a\u200bb\n\t\u0301\ufe0f\xa0") == ""


def test_a_tokenizer_of_bytes_knows_every_character(tokenizer):
    text = "Où? 三 🎉 \\ {x}"
    assert unknown_in(tokenizer, text) == unknown_in(with_bytes_for_others(), text) == ""


def test_a_letter_within_a_word_is_known_though_no_word_begins_with_it():
    assert unknown_in(words(), "ab a") == ""
    assert unknown_in(words(), "ab a ß")[-1] == "ß"


def prompts_of(tokenizer: PreTrainedTokenizerFast, *texts: str) -> PromptSet:
    return PromptSet([{"prompt": text} for text in texts], tokenizer, max_prompt_length=4, seed=0)


def test_a_run_says_once_how_many_of_its_prompts_have_unknown_characters():
    prompts = prompts_of(letters(unknown="<unk>"), "abe", "za", "三b", "abcdez")  # the last is too long
    assert describe_unknown(prompts.encoded) == [
        "2 of 3 prompts have characters that the tokenizer does not know, so the model does not see them: z 三"
    ]
    assert describe_unknown(prompts_of(letters(unknown=None), "abe").encoded) == []
    with_ids = PromptSet([{"prompt_ids": [0, 1]}], letters(unknown="<unk>"), max_prompt_length=4, seed=0)
    assert describe_unknown(with_ids.encoded) == []  # the token was asked for


def test_a_token_beyond_the_embedding_is_refused_with_its_prompt():
    added = letters(unknown="<unk>")
    added.add_tokens(["<new>"])
    prompts = prompts_of(added, "abe", "<new>a", "abcd<new>")
    check_vocabulary(prompts.encoded, 8)
    with pytest.raises(ValueError, match=r"the prompt '<new>a' has the token 7, and the model has 7, from 0 to 6"):
        check_vocabulary(prompts.encoded, 7)
    check_vocabulary(prompts_of(added, "abe", "abcd<new>").encoded, 7)  # the long one is dropped


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_run_refuses_tokens_that_were_added_without_an_embedding(split, tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)
    task = toy_task()
    getattr(task, split).append({"prompt": "3 5 make 8\n<new1>", "total": 8})
    monkeypatch.delattr("common.trainer.load_policy")
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        GRPOTrainer(toy_config(folder, tmp_path / "run"), task=task)
