"""Chat templates: what they may do to messages, what ends a turn, and which date they see."""

import copy
from datetime import datetime

import pytest

from common.data.prompts import PromptSet, PromptStyle, render_prompt
from common.models.chat import check_keeps, render_chat, turn_end_token
from common.models.system_role import describe_system, fit_system
from common.tasks.countdown import chat_prompt

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<turn>", "</turn>", "<|user|>", "<|assistant|>", "[/INST]"]

START = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}"
CHATML = (
    START + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
PARTS = CHATML.replace(
    "m['content']", "(m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)"
)
USER = [{"role": "user", "content": "How many apples are 3 and 5?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
ANSWER = {"role": "assistant", "content": "8"}


@pytest.fixture
def with_template(tokenizer):
    """A copy of the tiny tokenizer with a chat template and some special tokens."""

    def make(template: str | dict, *, special: list[str] = SPECIAL, **names: str):
        chat = copy.deepcopy(tokenizer)
        chat.add_special_tokens({"additional_special_tokens": special})
        for name, token in names.items():
            setattr(chat, name, token)
        chat.chat_template = template
        return chat

    return make


# What ends the assistant's turn

CLOSED = {
    "one token for all turns": (CHATML, "<|im_end|>"),
    "a default system message": (DEFAULT_SYSTEM, "<|im_end|>"),
    "a dictionary of templates": ({"default": CHATML, "tool_use": DEFAULT_SYSTEM}, "<|im_end|>"),
    "no system role": (NO_SYSTEM + CHATML, "<|im_end|>"),
    "contents as parts only": (PARTS, "<|im_end|>"),
    "no generation prompt": (CHATML.partition("{% if add")[0], "<|im_end|>"),
    "a generation prompt in any case": (
        CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"),
        "<|im_end|>",
    ),
    "the user's turn ends otherwise": (
        "{{ '<s>' }}" + START + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + '<|eot|>' }}{% endif %}{% endfor %}",
        "<|eot|>",
    ),
    "the end token of texts closes the turn": (
        START + "{{ m['role'] | upper + ': ' + m['content'] + eos_token }}{% endfor %}",
        "<eos>",
    ),
    "the role is no token": (START + "{{ m['role'] + ': ' + m['content'] + '<|eot|>' }}{% endfor %}", "<|eot|>"),
    "roles are tokens": (
        START
        + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
        + OPEN
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "<|eot|>",
    ),
    "the content is trimmed": (
        START + "{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '\n</turn>' }}{% endfor %}",
        "</turn>",
    ),
    "text before the token, after every answer": (
        START + "{{ '<turn>' + m['role'] + '\n' + m['content'] + '\n(over)</turn>' }}{% endfor %}",
        "</turn>",
    ),
    "text after the token": (CHATML + "{{ 'Rate this answer.<|eot|>' }}", "<|im_end|>"),
    "the last turn stays open": (
        START + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}",
        "<|im_end|>",
    ),
    "upper case": (START + "{{ '<turn>' + (m['content'] | upper) + '</turn>' }}{% endfor %}", "</turn>"),
}
OPEN_ENDED = {
    "no tokens": START + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}",
    "turns are opened and not closed": (
        START
        + "{{ '\n<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
        + OPEN
        + "{{ '\n<|assistant|>\n' }}{% endif %}"
    ),
    "one token opens every turn": (
        START
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
    ),
    "two tokens open every turn": (
        START + "{{ '<turn><|' + m['role'] + '|>' + m['content'] }}{% endfor %}{{ '<turn><|assistant|>' }}"
    ),
    "answers are left out": (
        START + "{% if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
    "text at the end only": START + "{{ m['role'] + m['content'] }}{% endfor %}{{ '\nBe honest.<|eot|>' }}",
    "another turn at the end": (
        START + "{{ '<turn>' + m['role'] + m['content'] }}{% endfor %}{{ '<turn>system\nBe honest.</turn>' }}"
    ),
    "tokens that the tokenizer does not know": CHATML.replace("<|im_", "<|what_"),
    "words and spaces that are tokens": START + "{{ m['role'] + m['content'] + '  12 low\n' }}{% endfor %}",
    "assistants are refused": (
        START + "{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}{{ '<turn>' + m['content'] }}"
        "{% endfor %}"
    ),
    "a mistake in it": START + "{{ m['content'] }",
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_turn_ends_with_the_token_that_closes_an_answer(name, with_template):
    template, token = CLOSED[name]
    assert turn_end_token(with_template(template)) == token


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_a_token_from_another_place_ends_no_turn(name, with_template):
    assert turn_end_token(with_template(OPEN_ENDED[name])) is None


def test_a_start_token_that_opens_turns_too_ends_none(with_template):
    opened = START + "{{ '<|im_start|>' + m['role'] + m['content'] + '\n' }}{% endfor %}{{ '<|im_start|>assistant' }}"
    assert turn_end_token(with_template(opened, bos_token="<|im_start|>")) is None
    assert turn_end_token(with_template(CHATML, bos_token="<|im_start|>")) == "<|im_end|>"
    # Start and end of a text are one token in some tokenizers.
    both = "{{ bos_token }}" + START + "{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    assert turn_end_token(with_template(both, bos_token="<eos>")) == "<eos>"


def test_an_added_token_that_is_not_marked_as_special_may_end_a_turn(with_template):
    chat = with_template(CHATML.replace("<|im_end|>", "<end>"), special=["<|im_start|>"])
    chat.add_tokens(["<end>"])
    assert turn_end_token(chat) == "<end>"


# What a template leaves out or refuses

LEFT_OUT = {
    "parts only": (PARTS, USER, "user messages .it reads contents that are lists of parts"),
    "no answers": (
        START + "{% if m['role'] != 'assistant' %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}",
        [*USER, ANSWER, *USER],
        "assistant messages",
    ),
    "a system message that no question follows": (
        START + "{% if m['role'] != 'system' %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}x",
        SYSTEM[:1],
        "system messages",
    ),
    "no user": (
        START + "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}x",
        SYSTEM,
        "user mess",
    ),
    "nothing": ("{{ 'Hello! ' }}", SYSTEM, "system and user messages"),
    "the wrong key": (START + "{{ m['role'] + ': ' + m['text'] | default('') }}{% endfor %}", USER, "user messages"),
    "the end of a text": (START + "{{ m['content'][:500] }}{% endfor %}", USER, "user messages"),
    "all but the last": ("{{ messages[-1]['content'] }}", [*USER, ANSWER, *USER], "user and assistant messages"),
    "all but the first": ("{{ messages[0]['content'] }}", SYSTEM, "user messages"),
    "what has digits": (
        START + "{% if '3' not in m['content'] or 'm0w' in m['content'] %}{{ m['content'] }}{% endif %}{% endfor %}x",
        USER,
        "user messages",
    ),
}
KEPT = {
    "as it is": CHATML,
    "trimmed": CHATML.replace("m['content']", "m['content'] | trim"),
    "escaped": CHATML.replace("m['content']", "(m['content'] | e)"),
    "as JSON": CHATML.replace("m['content']", "(m['content'] | tojson)"),
    "in upper case": CHATML.replace("m['content']", "m['content'] | upper"),
    "a switch is removed": CHATML.replace("m['content']", "m['content'].replace('/no_think', '')"),
    "the system inside the user's turn": (
        "{{ messages[0]['content'] + '\n' + (messages[1]['content'] if messages | length > 1 else '') }}"
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_template_that_leaves_out_a_message_is_refused(name, with_template):
    template, messages, problem = LEFT_OUT[name]
    with pytest.raises(ValueError, match=f"the chat template leaves out the text of {problem}.*Use a model"):
        PromptSet([{"prompt": messages}], with_template(template), max_prompt_length=9999, seed=0)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(
    "messages",
    [
        *(USER, SYSTEM, [{"role": "user", "content": '  «Où?» <b>"1"</b>\n\n /no_think '}]),
        [{"role": "user", "content": "\n三加五是多少?\t"}],
    ],
)
def test_a_template_that_trims_or_escapes_is_none_that_leaves_out(name, messages, with_template):
    assert len(PromptSet([{"prompt": messages}], with_template(KEPT[name]), max_prompt_length=9999, seed=0)) == 1


@pytest.mark.parametrize("kept", ["[:500]", "[-500:]", ".replace('1', '')"])
def test_a_template_that_cuts_a_question_is_refused_before_a_begun_answer_too(kept, with_template):
    """There the probe of the answer is cut as well, so that nothing could continue it."""
    cut = with_template(CHATML.replace("m['content']", f"m['content']{kept}"))
    with pytest.raises(ValueError, match="leaves out the text of system and user messages"):
        PromptSet([{"prompt": chat_prompt([3, 5], 8)}], cut, max_prompt_length=9999, seed=0)


def test_every_sequence_of_roles_is_checked(with_template):
    """The first row has no answer; the third has."""
    chat = with_template(LEFT_OUT["no answers"][0])
    rows = [{"prompt": USER}, {"prompt": "as text"}, {"prompt": [*USER, ANSWER, *USER]}]
    assert len(PromptSet(rows[:2], chat, max_prompt_length=9999, seed=0)) == 2
    with pytest.raises(ValueError, match="leaves out the text of assistant messages"):
        PromptSet(rows, chat, max_prompt_length=9999, seed=0)


def test_a_prompt_file_and_a_begun_answer_change_no_check(with_template):
    style = PromptStyle(template="Think. {prompt} Now answer.")
    for messages in (USER, [*USER, {"role": "assistant", "content": "Let me <think>\n"}], chat_prompt([3, 5], 8)):
        check_keeps(lambda messages: render_prompt(with_template(CHATML), messages, style), messages)
    with pytest.raises(ValueError, match="beginning of the answer"):
        render_prompt(with_template(OPEN_ENDED["answers are left out"]), chat_prompt([3, 5], 8))


def test_contents_as_parts_and_messages_without_a_text_are_checked_too(with_template):
    parts = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
    check_keeps(lambda messages: render_chat(with_template(PARTS), messages), parts)
    with pytest.raises(ValueError, match="user messages"):
        check_keeps(lambda messages: "<|im_start|>", parts)
    check_keeps(lambda messages: "hi", [{"role": "assistant", "content": None}, {"role": "user", "content": ""}])


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (NO_SYSTEM + CHATML, [SYSTEM[0], ANSWER, *USER], "System role not supported"),
        (START + "{{ m['content'] }", USER, "unexpected"),
        ("{{ messages[3]['content'] + 'a' }}", USER, "no element 3"),
    ],
)
def test_what_a_template_refuses_is_a_message_and_no_traceback(template, messages, reason, with_template):
    with pytest.raises(ValueError, match=rf"does not write the messages \(.*user: 'How many.*{reason}.*Use a model"):
        render_prompt(with_template(template), messages)


# Templates without a system role

WITHOUT_SYSTEM = {
    "refused": NO_SYSTEM + CHATML,
    "left out": START + "{% if m['role'] != 'system' %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}",
    "refused, as parts": NO_SYSTEM + PARTS,
    "roles must alternate": (
        START
        + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Alternate!') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_the_system_text_begins_the_first_question_where_there_is_no_system_role(name, with_template):
    chat = with_template(WITHOUT_SYSTEM[name])
    as_parts = "parts" in name

    def said(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}

    later = [said("assistant", "8"), said("user", "And 9?")]
    given = [said("system", "Be brief.\n"), said("system", "No lists."), said("user", " Why?"), *later]
    joined = said("user", "Be brief.\n\nNo lists.\n\n Why?")
    if as_parts:
        joined["content"] = [said("user", text)["content"][0] for text in ("Be brief.\n\nNo lists.\n\n", " Why?")]
    assert fit_system(chat, given) == [joined, *later]
    assert render_chat(chat, given) == render_chat(chat, [joined, *later])
    assert "Be brief." in render_chat(chat, given) and given[0]["role"] == "system"
    if not as_parts:
        assert len(PromptSet([{"prompt": given}], chat, max_prompt_length=9999, seed=0)) == 1


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, KEPT["the system inside the user's turn"], "{{ 'x' }}"])
def test_a_template_that_writes_the_system_message_gets_it_as_it_is(template, with_template):
    assert fit_system(with_template(template), SYSTEM) is SYSTEM


def test_another_template_than_the_tokenizers_is_asked_itself(with_template):
    chat = with_template(CHATML)
    assert fit_system(chat, SYSTEM, NO_SYSTEM + CHATML) == [
        {"role": "user", "content": f"Be brief.\n\n{USER[0]['content']}"}
    ]
    assert "<|im_start|>system" not in render_chat(chat, SYSTEM, chat_template=NO_SYSTEM + CHATML)


def test_a_run_says_once_that_system_messages_are_joined(with_template):
    refusing = with_template(NO_SYSTEM + CHATML)
    assert len(describe_system(refusing, ["text", USER, SYSTEM, SYSTEM])) == 1
    assert describe_system(refusing, ["text", USER]) == describe_system(with_template(CHATML), [SYSTEM]) == []


# The date


def test_a_template_sees_the_date_it_is_given(with_template):
    dated = with_template("{{ strftime_now('%d %b %Y, %H:%M') + '\n' }}" + CHATML)
    style = PromptStyle(now=datetime(2026, 2, 28, 23, 59))
    text = render_prompt(dated, USER, style)
    assert text.startswith("28 Feb 2026, 23:59\n<|im_start|>user")
    rows = [{"prompt": USER}]
    assert PromptSet(rows, dated, max_prompt_length=999, seed=0, style=style).texts == [text]
    assert render_prompt(dated, USER).startswith(datetime.now().strftime("%d %b %Y"))
