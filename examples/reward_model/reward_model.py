"""Trains a reward model on pairs of answers: `python reward_model.py`; to override a setting: `--model tiny`.

trl.RewardTrainer does the training. This script adds the pairs of hh-rlhf, a model small enough for a CPU, and the
share of held-out pairs that the model ranks as people did, before and after. Pass its folder to `--rewards`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: F401, I001  it prepares the environment before torch loads

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

from common import cli
from common.data.rows import read_rows
from common.data.dialogues import dialogue, turns
from common.environment import cpu_computes_bfloat16
from common.mistakes import first_line
from common.models.chat import render_chat
from common.models.configs import read_config
from common.models.spellings import Spellings
from common.models.system_role import fit_system
from common.rewards.reward_model import without_beginning
from common.runs.own_files import let_others_read
from common.runs.writable import check_folder

RESULT_FILE = "accuracy.json"

# For tokenizers without a chat template: dialogues as hh-rlhf has them, between the tokenizer's first and last token.
CHAT_TEMPLATE = (
    "{{ bos_token or cls_token }}{% for message in messages %}"
    "{{ '\n\nHuman: ' if message['role'] == 'user' else '\n\nAssistant: ' }}{{ message['content'] }}"
    "{% endfor %}{{ eos_token or sep_token }}"
)


@dataclass(kw_only=True)
class RewardModelSettings:
    """What to train a reward model on, and how. Lengths are in tokens."""

    model: str
    """Hub id or folder of any model; "tiny" is made here, with a tokenizer learned from the pairs."""
    dataset: str
    """Hub id, or local .jsonl, .json, .csv or .parquet file or folder, with the columns `chosen` and `rejected`."""
    dataset_split: str
    """Split or slice of a hub data set, such as "train[:10%]"."""
    num_eval_pairs: int
    """Pairs held out, drawn by `seed`; no training pair begins with the same turn as one of them."""
    max_length: int
    """Longer dialogues lose their beginning, in training and when the model scores."""
    num_epochs: int
    batch_size: int
    """Pairs per optimizer step."""
    pairs_per_pass: int
    """Pairs per forward pass and process, a divisor of batch_size; memory only."""
    num_trained_layers: int | None
    """Train only so many layers, the last ones, and the head: much faster, for few pairs or a CPU. None: all."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: slower, much less memory."""
    learning_rate: float
    """Highest rate; rises over warmup_steps and falls linearly to 0."""
    warmup_steps: int
    weight_decay: float
    center_rewards: float
    """Weight of the squared sum of a pair's scores in the loss: keeps the mean score near 0."""
    output_dir: str
    """A new folder for model, tokenizer and accuracy.json."""
    seed: int


SETTINGS = RewardModelSettings(
    model="Qwen/Qwen2.5-0.5B",
    dataset="Anthropic/hh-rlhf",
    dataset_split="train",
    num_eval_pairs=1000,
    max_length=1024,
    num_epochs=1,
    batch_size=64,
    pairs_per_pass=8,
    num_trained_layers=None,
    gradient_checkpointing=True,
    learning_rate=1e-5,
    warmup_steps=50,
    weight_decay=0.0,
    center_rewards=0.01,
    output_dir="runs/reward-model",
    seed=0,
)

# Other settings with `--model tiny`, for a thousand pairs or more: a larger model would memorize so few pairs.
TINY = {
    "num_eval_pairs": 200,
    "max_length": 96,
    "num_epochs": 2,
    "batch_size": 32,
    "pairs_per_pass": 32,
    "gradient_checkpointing": False,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
}
TINY_VOCABULARY = 2048
TINY_WIDTH = 32


def parse_settings(args: list[str] | None = None) -> RewardModelSettings:
    """SETTINGS, with `--model tiny` also TINY, then a YAML file (`--config`) and the command line.

    Raises:
        ValueError: for an unknown setting.
    """
    settings = cli.parse_settings(RewardModelSettings, args, defaults=asdict(SETTINGS))
    if settings.model == "tiny":
        settings = cli.parse_settings(RewardModelSettings, args, defaults=asdict(SETTINGS) | TINY)
    return settings


def read_pairs(settings: RewardModelSettings) -> tuple[list[dict], list[dict]]:
    """Read pairs of dialogues in which people preferred one last answer to another, and hold some out.

    Returns:
        Pairs to train on and held-out pairs: {"chosen": chat messages, "rejected": chat messages}, the last message of
        each an answer. Pairs with an empty answer are left out.

    Raises:
        ValueError: the data cannot be read, or no pair would be left to train on.
    """
    rows = read_rows(settings.dataset, settings.dataset_split, ["chosen", "rejected"])
    pairs = [{side: turns(row[side]) for side in row} for row in rows]
    pairs = [pair for pair in pairs if all(m and m[-1]["role"] == "assistant" for m in pair.values())]
    order = np.random.default_rng(settings.seed).permutation(len(pairs)).tolist()
    held_out = [pairs[index] for index in order[: settings.num_eval_pairs]]
    openings = {pair["chosen"][0]["content"] for pair in held_out}
    rest = [pairs[index] for index in order[settings.num_eval_pairs :]]
    train = [pair for pair in rest if pair["chosen"][0]["content"] not in openings]
    if not train or not held_out:
        raise ValueError(
            f"num_eval_pairs={settings.num_eval_pairs}: {settings.dataset} has {len(pairs)} pairs of answers, and "
            "both training and evaluation need some. Pass another --num_eval_pairs or more data."
        )
    return train, held_out


def build_tiny(pairs: list[dict], max_length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make an untrained model of one layer and a tokenizer whose words are those of the pairs.

    At first its last token attends to all others equally, so it starts by judging which words a text has.
    """
    texts = [dialogue(messages) for pair in pairs for messages in pair.values()]
    # The class is Qwen2's, since AutoTokenizer loads no other with a Qwen2 model.
    blank = Qwen2Tokenizer(unk_token=None, eos_token="<eos>", pad_token="<pad>")
    tokenizer = blank.train_new_from_iterator(texts, TINY_VOCABULARY, show_progress=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=TINY_WIDTH,
        intermediate_size=2 * TINY_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForSequenceClassification(config), tokenizer


def tokenize(pairs: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of both sides under trl's names. trl would drop long dialogues; here they lose their beginning."""
    spellings = Spellings(tokenizer)

    def ids(messages: list[list[dict]]) -> list[list[int]]:
        messages = [fit_system(tokenizer, dialogue) for dialogue in messages]
        rows = tokenizer.apply_chat_template(messages, return_dict=False, tokenizer_kwargs={"verbose": False})
        for row, each in enumerate(messages):
            if spellings.may_occur(each):  # a text that spells special tokens begins no turn
                rows[row] = spellings.encode(spellings.written(each, partial(render_chat, tokenizer)))
        return [without_beginning(row, max_length) for row in rows]

    return Dataset.from_dict({f"{side}_ids": ids([pair[side] for pair in pairs]) for side in ("chosen", "rejected")})


def make_trainer(settings: RewardModelSettings, train: list[dict], held_out: list[dict]) -> RewardTrainer:
    """Load or make the model and its tokenizer, and pass both and the pairs to trl.

    Raises:
        ValueError: there is no such model, it has fewer layers than are to be trained, or batch_size is not a multiple
            of what the processes take at a time.
    """
    set_seed(settings.seed)
    if settings.model == "tiny":
        model, tokenizer = build_tiny(train, settings.max_length)
    else:
        model, tokenizer = settings.model, _load_tokenizer(settings.model)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = settings.max_length
    args = RewardConfig(
        output_dir=settings.output_dir,
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=settings.pairs_per_pass,
        per_device_eval_batch_size=equal_batches(len(held_out), PartialState().num_processes, settings.pairs_per_pass),
        gradient_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        center_rewards_coefficient=settings.center_rewards,
        max_length=None,
        bf16=torch.cuda.is_available() or cpu_computes_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
    )
    pairs_at_a_time = settings.pairs_per_pass * args.world_size
    if settings.batch_size % pairs_at_a_time:
        raise ValueError(
            f"batch_size={settings.batch_size}: {args.world_size} processes with pairs_per_pass="
            f"{settings.pairs_per_pass} take {pairs_at_a_time} pairs at a time, so a multiple of "
            f"{pairs_at_a_time} is needed. Pass another --batch_size or --pairs_per_pass."
        )
    args.gradient_accumulation_steps = settings.batch_size // pairs_at_a_time
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=tokenize(train, tokenizer, settings.max_length),
        eval_dataset=tokenize(sorted(held_out, key=_num_characters), tokenizer, settings.max_length),  # less padding
        processing_class=tokenizer,
    )
    if settings.num_trained_layers is not None:
        freeze_below(trainer.model, settings.num_trained_layers)
    return trainer


def equal_batches(num_pairs: int, num_processes: int, most: int) -> int:
    """The largest number of pairs per batch that makes all batches of an evaluation equal.

    trl averages accuracy over batches, whatever their size, so that of a smaller last batch would count too much.

    Args:
        num_pairs: of all processes.
        num_processes: each evaluates an equal part.
        most: pairs per batch that there is memory for, at least 1.
    """
    own, rest = divmod(num_pairs, num_processes)
    return 1 if rest else next(size for size in range(most, 0, -1) if own % size == 0)


def _num_characters(pair: dict) -> int:
    return max(sum(len(message["content"]) for message in messages) for messages in pair.values())


def train_reward_model(settings: RewardModelSettings) -> dict[str, float]:
    """Train, save and measure.

    Returns:
        What accuracy.json holds: the share of held-out pairs with the higher score for the chosen answer, before and
        after training, the half width of its 95 % interval, and how many pairs there were.

    Raises:
        ValueError: for settings and data that do not fit, and for a folder that is not empty.
    """
    folder = Path(settings.output_dir)
    if PartialState().is_main_process:
        check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir={folder}: it is not empty, and nothing is overwritten. Pass another --output_dir."
        )
    train, held_out = read_pairs(settings)
    trainer = make_trainer(settings, train, held_out)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        let_others_read(folder)
    result = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_ci95": 1.96 * math.sqrt(after * (1 - after) / len(held_out)),
        "num_train_pairs": len(train),
        "num_eval_pairs": len(held_out),
    }
    if trainer.is_world_process_zero():
        (folder / RESULT_FILE).write_text(
            json.dumps(result | {"settings": asdict(settings)}, indent=2) + "\n", encoding="utf-8"
        )
        print(
            f"chosen above rejected on {len(held_out)} held-out pairs: {before:.3f} before, {after:.3f} "
            f"± {result['accuracy_ci95']:.3f} after training on {len(train)}\nreward model: {folder.resolve()}"
        )
    return result


def freeze_below(model: PreTrainedModel, num_trained_layers: int) -> None:
    """Freeze the embeddings and all but the last layers.

    Args:
        model: with a list of layers.
        num_trained_layers: how many of them are trained.

    Raises:
        ValueError: there are not so many.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    if not 0 < num_trained_layers <= len(layers):
        raise ValueError(
            f"num_trained_layers={num_trained_layers}: the model has {len(layers)} layers. Pass a number from 1 to "
            f"{len(layers)}, or leave it out to train the whole model."
        )
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in [*layers[: len(layers) - num_trained_layers], *embeddings]:
        module.requires_grad_(False)


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    remedy = (
        "Need a folder with weights and tokenizer, or a hub id that this machine can reach. Pass --model with one, or "
        "--model tiny."
    )
    own_code = "This example does not run it. Pass another model."
    read_config(model, label=f"model={model}", remedy=remedy, own_code_remedy=own_code)
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"model={model}: cannot be loaded: {reason}. {remedy}") from error


def main() -> None:
    """Train with the settings above."""
    train_reward_model(parse_settings())


if __name__ == "__main__":
    cli.run_script(main)
