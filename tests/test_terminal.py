"""Text from outside does nothing to a terminal, wherever it is printed."""

import logging

import pytest

from common.cli import run_script
from common.evaluation.results import table
from common.terminal import PrintableFormatter, names, one_line, printable

EVIL = "\x1b]0;PWNED\x07\x1b[2J\r\x9b\u202eok\u2066\x7f"


def test_what_acts_on_a_terminal_is_written_out_and_text_stays():
    assert printable("caf\u00e9 \u4e2d \U0001f600\n\tx") == "caf\u00e9 \u4e2d \U0001f600\n\tx"
    assert printable(EVIL) == r"\x1b]0;PWNED\x07\x1b[2J\r\x9b\u202eok\u2066\x7f"
    assert printable("\ud800") == r"\ud800"


def test_a_name_is_one_short_line():
    assert one_line("a\nerror: b\t") == r"a\nerror: b\t"
    assert one_line("n" * 10_000) == "n" * 80 + "... (9920 characters more)"
    assert names(range(30)).endswith("18, 19, ... (10 more)")


def test_an_error_of_ours_is_printed_escaped(capsys):
    def main() -> None:
        from common.cli import parse_config  # noqa: F401  a frame of this project raises
        from common.data.rows import read_rows

        read_rows(f"/tmp/{EVIL}.jsonl", "train", None)

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("error: ") and message.strip().isprintable()


def test_log_messages_are_written_escaped():
    record = logging.LogRecord("nanorlhf", logging.WARNING, "", 1, "row %s", (EVIL,), None)
    assert PrintableFormatter("%(message)s").format(record).isprintable()


def test_a_table_of_evaluations_shows_names_of_models_escaped():
    score = {
        "model": EVIL, "adapter": None, "task": "countdown", "num_problems": 1, "num_samples": 1, "num_too_long": 1,
        "num_left_out": 0, "score": 0.5, "score_ci95": None, "rewards": {EVIL: 0.5, "b": 1.0}, "length": 3.0,
        "truncated": 0.0, "tokens_per_second": 5.0,
        "settings": {
            "rewards": ["x.py"], "temperature": 1, "top_p": 1, "top_k": 0, "seed": 0, "max_completion_length": 9,
        },
    }  # fmt: skip
    text = table([score])
    assert r"\x1b[2J" in text and all(line.isprintable() for line in text.splitlines())
