"""Prompts: which are dropped, how they become token ids, and which of them a step has on which process."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.config import RLConfig
from common.data.prompts import PromptSet, PromptStyle, render_prompt

START, UNKNOWN = "<s>", "<unk>"
# As many instruction-tuned models have it: the template writes the first special token itself.
CHAT_TEMPLATE = (
    "<s> {% for message in messages %}{{ message['role'] }} : {{ message['content'] }} "
    "{% if not loop.last %}; {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}; assistant : {% endif %}"
)


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word, and a start token in front of every text, as Llama's."""
    words = [START, UNKNOWN, ":", ";", "system", "user", "assistant", "add", "one", "two", "now", "well"]
    words += [f"w{i}" for i in range(50)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, unk_token=UNKNOWN, chat_template=chat_template
    )


def numbered(count: int, *, seed: int = 0, **settings: int) -> PromptSet:
    """`count` prompts "w0", "w1", ... with their number in a column."""
    rows = [{"prompt": f"w{i}", "number": i} for i in range(count)]
    return PromptSet(rows, word_tokenizer(), max_prompt_length=settings.get("max_prompt_length", 8), seed=seed)


def order_of(prompts: PromptSet, steps: range, num_prompts: int) -> list[int]:
    """The prompts that these steps have, one after the other."""
    return [i for step in steps for i in prompts.batch(step, num_prompts=num_prompts).columns["number"]]


# From rows to token ids


def test_text_is_taken_as_it_is():
    assert render_prompt(word_tokenizer(), "  add one \n") == "  add one \n"


def test_chat_messages_end_where_the_assistant_begins():
    messages = [{"role": "system", "content": "now"}, {"role": "user", "content": "add one"}]
    rendered = render_prompt(word_tokenizer(CHAT_TEMPLATE), messages)
    assert rendered == "<s> system : now ; user : add one ; assistant : "


def test_a_prompt_file_goes_around_text_and_around_the_last_user_message(tmp_path):
    (tmp_path / "style.txt").write_text("now {prompt} \\boxed{} well")
    style = PromptStyle.of(RLConfig(prompt_file=str(tmp_path / "style.txt")))
    assert render_prompt(word_tokenizer(), "add one", style) == "now add one \\boxed{} well"
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"w{i}"} for i, role in enumerate(roles)]
    contents = [message["content"] for message in style.around(messages)]
    assert contents == ["w0", "w1", "now w2 \\boxed{} well", "w3"] and messages[2]["content"] == "w2"
    rows = [{"prompt": messages}, {"prompt": "w5"}]
    config = RLConfig(prompt_file=str(tmp_path / "style.txt"), max_prompt_length=40)
    prompts = PromptSet.of(rows, word_tokenizer(CHAT_TEMPLATE), config)
    assert prompts.texts[1] == "now w5 \\boxed{} well" and "now w2" in prompts.texts[0]
    assert prompts.raw == [messages, "w5"]  # what reward models judge


def test_a_prompt_file_goes_around_the_texts_of_a_message_in_parts():
    style, image = PromptStyle(template="now {prompt} well"), {"type": "image"}

    def around(*parts: dict) -> list[dict]:
        return style.around([{"role": "user", "content": list(parts)}])[0]["content"]

    one, two = ({"type": "text", "text": text} for text in ("w1", "w2"))
    assert around(one) == [{"type": "text", "text": "now w1 well"}]
    assert around(image, one, two) == [image, one | {"text": "now w1"}, two | {"text": "w2 well"}]
    assert one["text"] == "w1"
    with pytest.raises(ValueError, match=r"prompt_file with a user message .*no text.*Leave prompt_file out"):
        around(image)


@pytest.mark.parametrize("text", ["no place", "{prompt} twice {prompt}"])
def test_a_prompt_file_has_one_place_for_the_prompt(tmp_path, text):
    (tmp_path / "style.txt").write_text(text)
    with pytest.raises(ValueError, match=r"has \{prompt\} [02] times; need it once"):
        PromptStyle.of(RLConfig(prompt_file=str(tmp_path / "style.txt")))
    with pytest.raises(ValueError, match="there is no such file"):
        PromptStyle.of(RLConfig(prompt_file=str(tmp_path / "nowhere.txt")))


def test_the_thinking_switch_reaches_the_chat_template_or_is_refused():
    template = CHAT_TEMPLATE + "{% if enable_thinking is defined %}w{{ 1 if enable_thinking else 0 }}{% endif %}"
    messages = [{"role": "user", "content": "add one"}]
    ends = {
        switch: render_prompt(word_tokenizer(template), messages, PromptStyle(enable_thinking=switch)).split()[-1]
        for switch in (None, True, False)
    }
    assert ends == {None: ":", True: "w1", False: "w0"}
    with pytest.raises(ValueError, match="has no such switch"):
        render_prompt(word_tokenizer(CHAT_TEMPLATE), messages, PromptStyle(enable_thinking=False))
    with pytest.raises(ValueError, match="prompts that are plain text"):
        PromptSet.of([{"prompt": "w1"}], word_tokenizer(template), RLConfig(enable_thinking=True))


def test_a_begun_answer_is_continued_and_not_closed():
    messages = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "well"}]
    assert render_prompt(word_tokenizer(CHAT_TEMPLATE), messages) == "<s> user : add one ; assistant : well"


def test_chat_messages_without_a_template_are_refused_before_any_model_is_loaded(tokenizer):
    with pytest.raises(ValueError, match=r"1 chat messages.*without a chat template.*--model"):
        PromptSet([{"prompt": [{"role": "user", "content": "hi"}]}], tokenizer, max_prompt_length=9, seed=0)


def test_every_prompt_starts_with_exactly_one_start_token():
    """Plain text gets it from the tokenizer, a chat template has written it already."""
    chat = [{"role": "user", "content": "add one"}]
    rows = [{"prompt": chat}, {"prompt": "add one"}, {"prompt": chat}, {"prompt": "two"}]
    prompts = PromptSet(rows, word_tokenizer(CHAT_TEMPLATE), max_prompt_length=20, seed=0)
    assert prompts.ids == [[0, 5, 2, 7, 8, 3, 6, 2], [0, 7, 8], [0, 5, 2, 7, 8, 3, 6, 2], [0, 9]]
    assert prompts.texts[1] == "add one" and prompts.texts[0].startswith("<s> user")


def test_the_tiny_policys_prompts_survive_the_way_to_ids_and_back(tokenizer):
    prompts = PromptSet([{"prompt": "3 5 6 make 48\n"}], tokenizer, max_prompt_length=16, seed=0)
    assert tokenizer.decode(prompts.ids[0]) == prompts.texts[0] == "3 5 6 make 48\n"


# Dropping


def test_prompts_that_are_too_long_are_dropped_and_counted_with_their_columns():
    rows = [{"prompt": "w0", "n": 0}, {"prompt": "w1 w2 w3", "n": 1}, {"prompt": "w4 w5", "n": 2}]
    prompts = PromptSet(rows, word_tokenizer(), max_prompt_length=3, seed=0)  # the start token counts
    assert prompts.num_dropped == 1 and len(prompts) == 2
    assert prompts.columns == {"n": [0, 2]} and prompts.texts == ["w0", "w4 w5"]
    assert max(map(len, prompts.ids)) == 3


def test_a_prompt_of_exactly_the_limit_stays_and_one_token_more_does_not():
    rows = [{"prompt": "w0 w1 w2"}]
    assert len(PromptSet(rows, word_tokenizer(), max_prompt_length=4, seed=0)) == 1
    with pytest.raises(ValueError, match=r"max_prompt_length=3: no prompt of 1 .*shortest has 4.*--max_prompt_length"):
        PromptSet(rows, word_tokenizer(), max_prompt_length=3, seed=0)


def test_no_prompt_is_ever_cut_short():
    prompts = numbered(5)
    assert [len(ids) for ids in prompts.ids] == [2] * 5 and prompts.num_dropped == 0


def test_data_without_rows_or_without_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompt of 0"):
        PromptSet([], word_tokenizer(), max_prompt_length=3, seed=0)
    with pytest.raises(ValueError, match=r"row 1 has the columns question, answer.*`prompt`"):
        PromptSet([{"prompt": "w1"}, {"question": 1, "answer": 2}], word_tokenizer(), max_prompt_length=3, seed=0)


def test_a_prompt_without_tokens_is_refused_before_any_model_is_loaded(tokenizer):
    """There is nothing to continue; the sampler would refuse it, after everything is loaded."""
    with pytest.raises(ValueError, match=r"row 1.*token"):
        PromptSet([{"prompt": "3 make 3\n"}, {"prompt": ""}], tokenizer, max_prompt_length=16, seed=0)


# Which prompts a step has


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5))
def test_every_prompt_comes_once_before_any_comes_again(count, num_prompts, seed):
    prompts = numbered(count, seed=seed)
    order = order_of(prompts, range(1, 9), num_prompts)
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    rest = order[len(order) // count * count :]
    assert len(set(rest)) == len(rest)


def test_refills_are_other_prompts_of_the_same_step_with_seeds_of_their_own():
    prompts = numbered(30)
    step = [prompts.batch(2, num_prompts=4, refill=refill) for refill in (0, 1, 2)]
    assert [batch.rows for batch in step] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({tuple(batch.prompts) for batch in step}) == 3
    assert prompts.batch(2, num_prompts=4, refill=1).prompts == step[1].prompts
    halves = [prompts.batch(2, num_prompts=4, refill=1, process=process, num_processes=2) for process in (0, 1)]
    assert halves[0].prompts + halves[1].prompts == step[1].prompts
    assert halves[0].rows + halves[1].rows == step[1].rows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9))
def test_spare_prompts_of_a_step_are_all_others_each_once(count, num_prompts, step):
    prompts = numbered(count)
    own = prompts.batch(step, num_prompts=num_prompts).columns["number"]
    spare = list(prompts.spare(step, num_prompts=num_prompts))
    assert sorted(spare + list(set(own))) == list(range(count))
    assert spare == list(numbered(count).spare(step, num_prompts=num_prompts))


def test_a_prompt_that_the_data_have_twice_is_spare_once_and_not_if_the_step_has_it():
    rows = [{"prompt": f"w{number // 2}"} for number in range(8)]
    prompts = PromptSet(rows, word_tokenizer(), max_prompt_length=8, seed=0)
    own = set(prompts.batch(1, num_prompts=2).prompts)
    spare = [prompts.texts[index] for index in prompts.spare(1, num_prompts=2)]
    assert len(spare) == len(set(spare)) and set(spare) == {"w0", "w1", "w2", "w3"} - own


def test_each_pass_over_the_data_has_another_order():
    order = order_of(numbered(30), range(1, 10), 10)
    assert len({tuple(order[start : start + 30]) for start in (0, 30, 60)}) == 3
    assert order[:30] != list(range(30))


def test_the_order_depends_on_the_seed_and_on_no_global_generator():
    orders = []
    for generator_seed in (1, 2):
        torch.manual_seed(generator_seed), random.seed(generator_seed)
        state = torch.get_rng_state()
        orders.append(order_of(numbered(30, seed=3), range(1, 4), 10))
        assert torch.equal(torch.get_rng_state(), state)
    assert orders[0] == orders[1] != order_of(numbered(30, seed=4), range(1, 4), 10)


def test_a_step_can_be_had_without_those_before_it():
    """So a resumed run needs no cursor."""
    one_after_the_other = order_of(numbered(7), range(1, 9), 3)
    assert order_of(numbered(7), range(5, 6), 3) == one_after_the_other[12:15]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.integers(1, 20))
def test_processes_share_a_step_out_among_them(count, share, num_processes, step):
    prompts, num_prompts = numbered(count), share * num_processes
    whole = prompts.batch(step, num_prompts=num_prompts)
    parts = [
        prompts.batch(step, num_prompts=num_prompts, process=process, num_processes=num_processes)
        for process in range(num_processes)
    ]
    assert all(len(part) == share and part.step == step for part in parts)
    for name in ("rows", "prompt_ids", "prompts"):
        assert [value for part in parts for value in vars(part)[name]] == vars(whole)[name]
    assert [n for part in parts for n in part.columns["number"]] == whole.columns["number"]
    assert whole.rows == list(range(num_prompts))


def test_text_ids_and_columns_of_a_prompt_stay_together():
    batch = numbered(20).batch(2, num_prompts=6)
    assert batch.prompts == [f"w{number}" for number in batch.columns["number"]]
    assert batch.prompt_ids == [[0, 12 + number] for number in batch.columns["number"]]


def test_a_prompt_keeps_what_the_data_set_has_beside_what_the_policy_reads():
    chat = [{"role": "user", "content": "add one"}]
    rows = [{"prompt": chat}, {"prompt": "w0 " * 30}, {"prompt": "two"}]  # the second is too long
    prompts = PromptSet(rows, word_tokenizer(CHAT_TEMPLATE), max_prompt_length=20, seed=0)
    assert prompts.share().raw_prompts == [chat, "two"] and prompts.share().prompts[0].startswith("<s> user")
    batch = prompts.batch(1, num_prompts=2)
    assert [isinstance(raw, list) for raw in batch.raw_prompts] == [text.startswith("<s>") for text in batch.prompts]


# Evaluation


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_evaluation_has_every_prompt_once_over_all_processes(num_processes):
    prompts = numbered(5)
    parts = [prompts.share(process=process, num_processes=num_processes) for process in range(num_processes)]
    rows = [row for part in parts for row in part.rows]
    numbers = [number for part in parts for number in part.columns["number"]]
    assert sorted(rows) == list(range(5)) and rows == numbers
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_is_the_same_at_any_time_and_with_any_seed():
    assert numbered(5, seed=1).share().prompts == numbered(5, seed=2).share().prompts == [f"w{i}" for i in range(5)]
    assert numbered(5).share().step == 0


def test_a_column_with_the_name_of_an_argument_of_reward_functions_is_refused(tokenizer):
    rows = [{"prompt": "1 2 make 3\n", "completions": "x"}]
    with pytest.raises(ValueError, match=r"columns completions.*Rename"):
        PromptSet(rows, tokenizer, max_prompt_length=10, seed=0)
