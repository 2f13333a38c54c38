"""What many prompts cost at a run's start: `python -m benchmarks.data`, or with another checkout to compare with.

Dialogues are made here, in a file of JSON lines; a tiny chat model with a byte-level tokenizer reads them. Each start
is a process of its own that builds the trainer: first with an empty cache, then again. Given is what all rows cost
above the first 2,000: seconds by the clock, CPU seconds with those of other processes, and growth of peak memory.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
FEW = 2_000
THINGS = ("river", "stone", "bread", "chair", "house", "garden", "letter", "window", "basket", "candle", "bridge")
KINDS = (
    "red",
    "blue",
    "green",
    "tall",
    "short",
    "round",
    "flat",
    "fast",
    "slow",
    "warm",
    "cold",
    "new",
    "old",
    "kind",
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START = """
import json, resource, sys, time
import common
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
import datasets
def used():
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
    return time.perf_counter(), cpu, own.ru_maxrss / 1024
before = used()
trainer = GRPOTrainer(GRPOConfig(**json.loads(sys.argv[1])))
after = used()
print(json.dumps([after[0] - before[0], after[1] - before[1], after[2]]))
"""


def write_dialogues(path: Path, count: int) -> None:
    """Dialogues of one or three turns with a column besides, all different."""
    source = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            messages = [
                {"role": "user", "content": f"Describe the {source.choice(KINDS)} {source.choice(THINGS)} {number}."}
            ]
            if number % 2:
                answer = f"It is a {source.choice(KINDS)} {source.choice(THINGS)}."
                messages.append({"role": "assistant", "content": answer})
                messages.append({"role": "user", "content": f"And is it {source.choice(KINDS)}?"})
            file.write(json.dumps({"prompt": messages, "topic": source.choice(THINGS)}) + "\n")


def save_chat_model(folder: Path) -> None:
    """An untrained model of 64 hidden units with a byte-level tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        [" ".join(["Describe the short candle. It is a calm window. And warm?"])] * 50, trainer
    )
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    chat.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None}
    ends = {"eos_token_id": chat.eos_token_id, "pad_token_id": chat.pad_token_id}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(chat), **sizes, **heads, **ends)).save_pretrained(folder)
    chat.save_pretrained(folder)


def start(root: Path, folder: Path, rows: int) -> list[float]:
    """Seconds by the clock, CPU seconds and peak MiB of a trainer's start in a checkout."""
    settings = {"model": str(folder / "chat"), "task": "prompts", "dataset": str(folder / f"{rows}.jsonl")}
    settings |= {"rewards": [f"{folder / 'reward.py'}:score"], "sampler": "transformers", "num_eval_prompts": 16}
    settings |= {"max_prompt_length": 128, "max_completion_length": 8, "num_steps": 1, "prompts_per_step": 4}
    settings |= {"output_dir": str(folder / "run"), "progress": False}
    shutil.rmtree(folder / "run", ignore_errors=True)
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "kept"),
    }
    command = [sys.executable, "-c", START, json.dumps(settings)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="another checkout to compare with")
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--rounds", type=int, default=3, help="the least of these counts: other work only adds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_chat_model(folder / "chat")
        (folder / "reward.py").write_text(
            "def score(completions, **columns):\n    return [0.0 for _ in completions]\n", encoding="utf-8"
        )
        for rows in (FEW, options.rows):
            write_dialogues(folder / f"{rows}.jsonl", rows)
        found: dict[str, list[list[float]]] = {}
        for _ in range(options.rounds):
            for where, root in [("there", options.other)] * bool(options.other) + [("here", ROOT)]:
                shutil.rmtree(folder / "kept", ignore_errors=True)
                few = start(root.resolve(), folder, FEW)
                for which in ("first start", "second start")[: 1 + (where == "here")]:
                    many = start(root.resolve(), folder, options.rows)
                    found.setdefault(f"{where}, {which}", []).append([a - b for a, b in zip(many, few, strict=True)])
    print(f"| {options.rows} rows above {FEW} | seconds | CPU seconds | MiB |\n|---|---|---|---|")
    for name, rounds in found.items():
        print("| {} | {:.1f} | {:.1f} | {:.0f} |".format(name, *map(min, zip(*rounds, strict=True))))


if __name__ == "__main__":
    main()
