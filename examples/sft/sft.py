"""Supervised fine-tuning before RL: `python sft.py`; any setting can be overridden: `--model tiny --dataset my.jsonl`.

trl.SFTTrainer does the training, on the assistant's turns alone and packed. This script adds the data, with the
prompts of the RL tasks, and a folder like that of an RL run: the same command continues an interrupted run, and final/
holds the model, or the adapter with --use_lora, for `python -m common.merge`.
"""

import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: F401, I001  it prepares the environment before torch loads

import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from common.runs.checkpoints import FINAL_FOLDER, damage_of, latest_checkpoint, save_final, write_file
from common.runs.folder import has_begun, prepare_run_folder
from common.runs.manifest import write_manifest
from common.runs.writable import check_folder
from common.runs.prompt_record import Record, check_record, describe_examples, start_time
from common.cli import parse_settings, run_script
from common.config import DTYPES
from common.data.prompts import PromptStyle
from common.runs.log import METRICS_FILE
from common.embedded import check_model
from common.models.bases import forget_origin, name_base_from_folder
from common.models.configs import ADAPTER_CONFIG, read_config
from common.models.loading import resolve_dtype
from common.data.rows import read_rows
from common.data.rows import split_held_out
from examples.sft.conversations import FORMS, encode, end_of_turn, example_key, read_examples
from examples.sft.tiny_model import build_tokenizer, save_tiny

RESULT_FILE = "loss.json"
BASE_FOLDER = "base"


@dataclass(kw_only=True)
class SFTSettings:
    """What to fine-tune, on what and how. Lengths are in tokens; counts are totals over all processes."""

    model: str = "Qwen/Qwen3-0.6B-Base"
    """Hub id or folder; "tiny" is made here, untrained, with a tokenizer learned from the data."""
    dataset: str = "AI-MO/NuminaMath-CoT"
    """Hub id, or local .jsonl, .json, .csv, .tsv or .parquet file or folder."""
    dataset_split: str = "train[:20%]"
    """Split or slice of a hub data set."""
    form: str = "auto"
    """Form of the rows: "gsm8k", "math", "completion", "messages", or "auto": by their columns."""
    num_eval_prompts: int = 1000
    """Examples held out: the same rows that an RL task holds out of the same file with this setting."""
    prompt_file: str | None = None
    """Text file with {prompt} in it, put around every prompt, as in RL."""
    enable_thinking: bool | None = None
    """Passed to the chat template, as in RL; None: its default."""
    max_length: int = 4096
    """Of a pack, and of its longest example; longer examples are dropped."""
    num_epochs: int = 1
    num_steps: int | None = None
    """Optimizer steps instead of num_epochs."""
    batch_size: int = 16
    """Packs per optimizer step."""
    learning_rate: float = 1e-5
    """Highest rate; rises over warmup_steps, then falls along a cosine to 0."""
    warmup_steps: int = 50
    weight_decay: float = 0.0
    use_lora: bool = False
    """Train an adapter on all linear layers; final/ then holds the adapter alone."""
    lora_r: int = 64
    lora_alpha: int = 64
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, much less memory."""
    attn_implementation: str = "sdpa"
    """Attention of transformers; "flash_attention_2" saves the mask of a long pack."""
    dtype: str = "auto"
    """Precision of forward passes; weights are float32 in any case. "auto": bfloat16 on a GPU; "fast": also on a CPU
    that computes in it."""
    save_every: int = 200
    """Optimizer steps between checkpoints."""
    output_dir: str = "runs/sft"
    """The run's folder."""
    seed: int = 0


@dataclass(kw_only=True)
class TinySettings(SFTSettings):
    """Defaults with `--model tiny`."""

    num_eval_prompts: int = 64
    max_length: int = 512
    num_epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    gradient_checkpointing: bool = False
    save_every: int = 100


def read_settings(args: list[str] | None = None) -> SFTSettings:
    """The defaults above, those of "tiny" with that model, a YAML file (--config) and the command line.

    Raises:
        ValueError: for an unknown setting or an invalid value.
    """
    settings = parse_settings(SFTSettings, args)
    return parse_settings(TinySettings, args) if settings.model == "tiny" else settings


def check_settings(settings: SFTSettings) -> None:
    """Refuse invalid settings before anything is read.

    Raises:
        ValueError: what was given, what is needed and why, what to do.
    """
    if settings.form not in ("auto", *FORMS):
        raise ValueError(
            f"form={settings.form!r}: there is no such form. Pass --form auto, or one of {', '.join(FORMS)}."
        )
    for name in ("num_eval_prompts", "num_epochs", "batch_size", "save_every", "max_length"):
        if vars(settings)[name] < 1:
            raise ValueError(f"{name}={vars(settings)[name]}: at least 1 is needed. Pass a larger --{name}.")
    if settings.dtype not in DTYPES:
        raise ValueError(
            f"dtype={settings.dtype!r}: there is no such precision. Pass --dtype with one of {', '.join(DTYPES)}."
        )
    num_processes = PartialState().num_processes
    if settings.batch_size % num_processes:
        raise ValueError(
            f"batch_size={settings.batch_size}: {num_processes} processes take one pack each at a time, so a multiple "
            f"of {num_processes} is needed. Pass another --batch_size."
        )


def load_tokenizer(settings: SFTSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer; that of "tiny" is learned from the data, once."""
    base = base_folder(settings)
    if settings.model == "tiny" and not base.exists():
        return build_tokenizer(read_rows(settings.dataset, settings.dataset_split, None))
    if settings.model != "tiny":
        read_config(base, own_code_remedy="This example does not run it. Pass another model.")
    check_model(str(base))
    return AutoTokenizer.from_pretrained(base, trust_remote_code=False)


def base_folder(settings: SFTSettings) -> Path | str:
    """Hub id or absolute folder of the model to start from, which an adapter records."""
    if settings.model == "tiny":
        return Path(settings.output_dir).resolve() / BASE_FOLDER
    return Path(settings.model).resolve() if Path(settings.model).is_dir() else settings.model


def read_data(
    settings: SFTSettings, tokenizer: PreTrainedTokenizerBase, now: datetime | None = None
) -> tuple[Dataset, Dataset, dict[str, int]]:
    """Examples to train on, held-out examples, and how many there are of each and were dropped.

    Raises:
        ValueError: the data cannot be read, or nothing would be left to train on.
    """
    source, num_held_out = settings.dataset, settings.num_eval_prompts
    examples, num_unboxed = read_examples(source, settings.dataset_split, form=settings.form, tokenizer=tokenizer)
    parts = split_held_out(examples, num_held_out, key=example_key)
    style = PromptStyle.of(settings, now)
    train, held_out = (encode(part, tokenizer, settings.max_length, style) for part in parts)
    counts = {
        "num_train_examples": len(train),
        "num_eval_examples": len(held_out),
        "num_too_long": sum(map(len, parts)) - len(train) - len(held_out),
        "num_unboxed": num_unboxed,
    }
    return train, held_out, counts


def make_config(settings: SFTSettings, end_token: str) -> SFTConfig:
    """The settings under trl's names."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SFTConfig(
        output_dir=settings.output_dir,
        model_init_kwargs={"dtype": "float32", "attn_implementation": settings.attn_implementation},
        eos_token=end_token,
        max_length=settings.max_length,
        # Examples of a pack do not see each other: from positions that restart at 0 and no attention mask,
        # transformers builds a block mask for sdpa and eager; flash attention gets the lengths.
        packing=True,
        packing_strategy="bfd",
        num_train_epochs=settings.num_epochs,
        max_steps=settings.num_steps or -1,
        # trl puts the packs of a pass into one row, whose mask would grow with the square of their number.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.batch_size // PartialState().num_processes,
        gradient_checkpointing=settings.gradient_checkpointing,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        bf16=resolve_dtype(settings.dtype, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",  # else bf16 is refused
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_on_start=True,
        eval_strategy="epoch",
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to="none",
        seed=settings.seed,
    )


def make_trainer(
    settings: SFTSettings, data: tuple[Dataset, Dataset], tokenizer: PreTrainedTokenizerBase
) -> SFTTrainer:
    """Pass model, data and settings to trl."""
    lora = LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return SFTTrainer(
        model=str(base_folder(settings)),
        args=make_config(settings, end_of_turn(tokenizer)),
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        peft_config=lora if settings.use_lora else None,
        callbacks=[WriteManifest()],
    )


class WriteManifest(TrainerCallback):
    """Gives every checkpoint a manifest, by which a damaged one is found."""

    def on_save(self, args: SFTConfig, state: TrainerState, *_: object, **__: object) -> None:
        """See TrainerCallback."""
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def prepare_folder(
    settings: SFTSettings, tokenizer: PreTrainedTokenizerBase, record: Record | None = None
) -> str | None:
    """Make the run's folder, or find the checkpoint to continue from; a new folder gets the "tiny" model.

    Raises:
        ValueError: the folder is another run's, or a finished one, or the run had other examples.
    """
    folder = Path(settings.output_dir)
    if (folder / FINAL_FOLDER).exists() and damage_of(folder / FINAL_FOLDER) is None:
        raise ValueError(
            f"output_dir={folder}: the run there has finished, and nothing is overwritten. Pass another --output_dir."
        )
    state = PartialState()
    if state.is_main_process:
        is_new = not has_begun(folder)
        may = {"may_change": ("output_dir", "save_every"), "may_grow": ()}
        prepare_run_folder(folder, asdict(settings), **may, in_place=True)
        if record is not None:
            check_record(folder, record, is_new=is_new)
        if settings.model == "tiny" and not base_folder(settings).exists():
            temporary = folder / f"{BASE_FOLDER}.part"
            save_tiny(temporary, tokenizer, settings.seed)
            temporary.rename(base_folder(settings))
    state.wait_for_everyone()
    checkpoint = latest_checkpoint(folder)
    return str(checkpoint) if checkpoint else None


def train_sft(settings: SFTSettings) -> dict[str, float]:
    """Train, save and measure.

    Returns:
        What loss.json holds: the held-out loss per token of the assistant (mean over packs) and the share of tokens
        that were the most likely ones, before and after, and how many examples there were and were dropped.

    Raises:
        ValueError: for settings and data that do not fit, and for a folder that is another run's or finished.
    """
    check_settings(settings)
    if PartialState().is_main_process:
        check_folder(settings.output_dir)
    tokenizer = load_tokenizer(settings)
    # A chat template that writes the date sees that of the run's start, also if the run is continued.
    now = start_time(Path(settings.output_dir), "auto", PartialState())
    train, held_out, counts = read_data(settings, tokenizer, now)
    record = describe_examples(train, held_out, tokenizer=tokenizer, style=PromptStyle.of(settings, now))
    checkpoint = prepare_folder(settings, tokenizer, record)
    trainer = make_trainer(settings, (train, held_out), tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    evaluations = [line for line in history if "eval_loss" in line]
    result = {
        f"{name}_{when}": line[f"eval_{key}"]
        for when, line in (("before", evaluations[0]), ("after", evaluations[-1]))
        for name, key in (("loss", "loss"), ("token_accuracy", "mean_token_accuracy"))
    }
    result |= counts | {"num_packs": len(trainer.train_dataset), "num_steps": trainer.state.global_step}
    if trainer.is_world_process_zero():
        folder = Path(settings.output_dir)
        write_file(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in history).encode())
        write_file(folder / RESULT_FILE, (json.dumps(result, indent=2) + "\n").encode())
        save_final(folder, trainer.state.global_step, fill=lambda final: save(trainer, final))
    return result


def save(trainer: SFTTrainer, folder: Path) -> None:
    """Save the model or adapter with tokenizer and end tokens, which may differ from those of an adapter's base."""
    trainer.model.save_pretrained(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        name_base_from_folder(folder)
    trainer.model.generation_config.save_pretrained(folder)
    forget_origin(trainer.processing_class).save_pretrained(folder)


def main() -> None:
    """Train with the settings above."""
    disable_progress_bars()
    settings = read_settings()
    result = train_sft(settings)
    if PartialState().is_main_process:
        print(
            f"{result['num_train_examples']} examples in {result['num_packs']} packs, {result['num_steps']} steps; "
            f"left out: {result['num_too_long']} too long, {result['num_unboxed']} without a boxed answer\n"
            f"held-out loss on {result['num_eval_examples']} examples: {result['loss_before']:.3f} before, "
            f"{result['loss_after']:.3f} after\nmodel: {(Path(settings.output_dir) / FINAL_FOLDER).resolve()}"
        )


if __name__ == "__main__":
    run_script(main)
