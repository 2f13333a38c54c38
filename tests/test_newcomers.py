"""Mistakes that newcomers make, in every command: one short message that says what to do, status 2, no traceback."""

import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest

from tests.toy import ROOT

MOST_LINES = 8
# A run of one step that takes seconds; MODEL becomes an untrained policy of two layers.
QUICK = (
    "--preset cpu --model MODEL --task countdown --sampler transformers --prompts_per_step 2 --num_generations 2 "
    "--num_steps 1 --max_completion_length 4 --eval_every 0 --num_eval_prompts 0 --save_every 0 --output_dir run"
)
PROMPTS = f"GRPO/grpo.py {QUICK} --task prompts --reward rewards.py:ones"

FILES = {
    "list.yaml": "learning_rate: [1e-4]\n",
    "unknown.yaml": "learning-rate: 1e-4\nnum_stps: 3\n",
    "indented.yaml": "num_steps: 3\n task: countdown\n",
    "text.yaml": "just text\n",
    "number.yaml": "num_steps: ten\n",
    "twice.yaml": "num_steps: 3\nseed: 1\nnum-steps: 9\n",
    "nested.yaml": "optimizer:\n  learning_rate: 1e-4\n",
    "pipeline.yaml": "sft:\n  dataset: a.jsonl\n",
    "rewards.py": (
        "def ones(completions, **columns):\n    return [1.0 for _ in completions]\n"
        "def raises(completions, **columns):\n    return [1 / 0 for _ in completions]\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def scalar(completions, **columns):\n    return 1.0\n"
        "def long(completions, **columns):\n    raise KeyError('\\n'.join(['line'] * 30 + ['x' * 3000]))\n"
        "def texts(completions, **columns):\n    return ['one' for _ in completions]\n"
        "def column(completions, solution):\n    return [0.0 for _ in completions]\n"
        "def nan(completions, **columns):\n    return [float('nan') for _ in completions]\n"
        "def nothing(completions, **columns):\n    return [None for _ in completions]\n"
        "def huge(completions, **columns):\n    return [3e38 for _ in completions]\n"
        "class Judge:\n    def __call__(self, completions, **columns):\n        return [0.0 for _ in completions]\n"
    ),
    "syntax.py": "def f(completions, **columns)\n    return [0.0]\n",
    "imports.py": "import numpyy\ndef f(completions, **columns): return [0.0]\n",
    "broken.jsonl": '{"prompt": "1 2 make 3"}\n{"prompt": "1 2 make 3", target: 3}\n',
    "question.jsonl": '{"question": "1 2 make 3", "target": 3}\n',
    "blank.jsonl": '{"prompt": "", "target": 3}\n',
    "empty.jsonl": "",
    "list.json": '{"prompt": "1 2 make 3"}',
    "surrogate.jsonl": '{"prompt": "3 \\ud83d make 8"}\n',
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "1 2 make 3"}]}\n',
    "not_a_model/readme.txt": "nothing\n",
    "empty/.keep": "",
    "file": "",
}

# command -> words of its message
MISTAKES = {
    # names and values of settings
    "GRPO/grpo.py --learning_rat 1e-4": "'learning_rat' Did you mean learning_rate?",
    "GRPO/grpo.py --beta 0.04": "'beta' kl_coef",
    "PPO/ppo.py --num_generations 0": "num_generations=0: at least 1",
    "RLOO/rloo.py --num_generations 1": "num_generations=1: at least 2",
    "GRPO/grpo.py --learning_rate abc": "learning_rate 'abc'",
    "GRPO/grpo.py --learning_rate": "learning_rate",
    "GRPO/grpo.py --temperature 0": "temperature=0.0: --eval_temperature 0",
    "GRPO/grpo.py --num_steps 1.5": "num_steps '1.5'",
    "ReMax/remax.py --preset a100": "preset='a100' gpu-80gb",
    "Reinforce/reinforce.py --task gsm8K": "task='gsm8K' gsm8k",
    "GRPO/grpo.py num_steps=3": "num_steps=3 --name value",
    "GRPO/grpo.py --num_steps 2 3": "3: no setting reads it",
    "VinePPO/vineppo.py --use_lora maybe": "use_lora",
    # files of settings
    "GRPO/grpo.py --config gone.yaml": "gone.yaml: there is no such file",
    "GRPO/grpo.py --config": "--config",
    "GRPO/grpo.py --config list.yaml": "learning_rate",
    "RAFT/raft.py --config unknown.yaml": "num_stps num_steps?",
    "GRPO/grpo.py --config indented.yaml": "indented.yaml line 2",
    "GRPO/grpo.py --config text.yaml": "text.yaml setting: value",
    "GRPO/grpo.py --config number.yaml": "num_steps 'ten'",
    "GRPO/grpo.py --config nested.yaml": "optimizer learning_rate: 1e-4",
    "GRPO/grpo.py --config twice.yaml": "twice.yaml num-steps is there twice line 3",
    "GRPO/grpo.py --config latin1.yaml": "latin1.yaml UTF-8",
    "GRPO/grpo.py --config text.yaml --config number.yaml": "--config 2 times",
    # rewards
    "GRPO/grpo.py --rewards equation --reward rewards.py:ones": "--reward beside --rewards",
    "GRPO/grpo.py --reward equation 0.5 --reward_weights 3": "--reward beside --reward_weights",
    "GRPO/grpo.py --reward eqation": "'eqation' format, equation",
    "GRPO/grpo.py --reward": "--reward without a name",
    "GRPO/grpo.py --reward rewards.py:gone": "rewards.py 'gone' ones, raises",
    "GRPO/grpo.py --reward gone.py:f": "no file gone.py",
    "GRPO/grpo.py --reward syntax.py:f": "syntax.py SyntaxError line 1",
    "GRPO/grpo.py --reward imports.py:f": "imports.py numpyy",
    "GRPO/grpo.py --reward rewards.py": "'rewards.py' file.py:function",
    "GRPO/grpo.py --reward rewards.py:Judge": "Judge is a class",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:raises": "'raises' ZeroDivisionError row 0 of 4",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:long": "'long' KeyError ...;",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:short": "'short' 1 values for 4",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:scalar": "'scalar' 1.0 for 4",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:texts": "'texts' 'one'",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:column": "'column' solution nums, target",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:nan": "'nan' nan",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:nothing": "every reward is None",
    f"GRPO/grpo.py {QUICK} --reward rewards.py:huge": "'huge' 3e+38",
    # data
    "GRPO/grpo.py --task prompts": "--dataset",
    f"{PROMPTS} --dataset broken.jsonl": "broken.jsonl line 2",
    f"{PROMPTS} --dataset question.jsonl": "question.jsonl question, target",
    f"{PROMPTS} --dataset blank.jsonl": "blank.jsonl row 1 prompt=''",
    f"{PROMPTS} --dataset empty.jsonl": "empty.jsonl",
    f"{PROMPTS} --dataset list.json": "list.json [...]",
    f"{PROMPTS} --dataset gone.jsonl": "gone.jsonl",
    f"{PROMPTS} --dataset latin1.jsonl": "latin1.jsonl UTF-8 iconv",
    f"{PROMPTS} --dataset surrogate.jsonl": "surrogate.jsonl line 1",
    f"{PROMPTS} --dataset chat.jsonl": "chat template",
    f"{PROMPTS} --dataset notes.docx": "notes.docx .jsonl",
    # models and folders
    "GRPO/grpo.py --model not_a_model": "model='not_a_model'",
    "GRPO/grpo.py --model empty": "model='empty'",
    "GRPO/grpo.py --model Qwen/Qwen2.5-0.5B-Instructt --preset none": "Qwen/Qwen2.5-0.5B-Instructt",
    # the comparison of algorithms relies on it
    "Distill/distill.py --plan --preset cpu --teacher nowhere": "error: teacher='nowhere'",
    f"GRPO/grpo.py {QUICK} --output_dir file": "output_dir=file: it is a file",
    f"GRPO/grpo.py {QUICK} --output_dir link": "output_dir=link: a link to nowhere",
    f"GRPO/grpo.py {QUICK} --output_dir /proc/x": "output_dir=/proc/x",
    f"GRPO/grpo.py {QUICK} --use_lora true --lora_target_modules c_attn": "c_attn q_proj",
    f"GRPO/grpo.py {QUICK} --report_to wandbb": "report_to='wandbb' wandb",
    # other commands
    "-m common.evaluation --model tiny --task contdown": "contdown countdown",
    "-m common.evaluation --model gone --task countdown": "gone",
    "-m common.evaluation --task countdown": "model",
    "-m common.merge --model gone --output merged": "gone",
    "-m common.merge --model tiny --adapter empty --output merged": "empty",
    "-m common.samples gone": "gone",
    "-m common.samples": "RUN",
    "examples/compare_algorithms/compare_algorithms.py --algorithms grpo foo": "foo GRPO",
    "examples/sft/sft.py --model tiny --dataset question.jsonl": "question.jsonl question, target",
    "examples/pipeline/pipeline.py --config pipeline.yaml": "pipeline.yaml sft.yaml",
    "examples/pipeline/pipeline.py --rl.learning_rat 3": "learning_rat",
    "examples/reward_model/reward_model.py --model tiny --dataset question.jsonl": "question.jsonl",
    "examples/r1-v0/grpo_r1.py --learning_rat 1": "learning_rate?",
    "examples/nano-r1/nano_r1.py --learning_rat 1": "learning_rate?",
}


@pytest.fixture
def newcomer(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files that have something wrong, where the commands are typed."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "Où?"}\n'.encode("latin-1"))
    (tmp_path / "latin1.yaml").write_bytes("task: ça\n".encode("latin-1"))
    (tmp_path / "notes.docx").write_bytes(b"PK")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "MODEL").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return tmp_path


def type_in(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process as Python would, and return its status."""
    script, *arguments = shlex.split(command)
    name, run = str(ROOT / script), runpy.run_path
    if script == "-m":
        name, *arguments = arguments
        run = runpy.run_module
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "path", [str(Path(name).parent), *sys.path])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore")  # modules that other tests have imported are run again
        run(name, run_name="__main__")
    return left.value.code


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_ends_in_a_short_message(command, newcomer, monkeypatch, capsys):
    status = type_in(command, monkeypatch)
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).strip().splitlines()
    assert status == 2 and len(lines) <= MOST_LINES, shown.err
    assert "Traceback" not in shown.err
    message = shown.err[shown.err.rindex("error: ") :] if "error: " in shown.err else shown.err
    assert [word for word in MISTAKES[command].split() if word not in message] == [], message
