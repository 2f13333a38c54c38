"""Settings together: runs whose settings are drawn so that as many pairs of values as possible meet.

    python -m tests.covering --runs 500 --seed 1     # so many runs of each algorithm, and what they broke

Each setting has a few values below; an algorithm's own ones are those with which its tests show that it acts, and more
in `VALUES` of its test file. A draw that the configuration refuses must be refused well: the message names a setting,
and another value of one of those it names is tried. What every run must hold is in `broken`.
"""

import argparse
import math
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers

from common.config import RLConfig
from common.trainer import OnPolicyTrainer
from tests.toy import algorithms, facts, metrics_of, samples_of, save_toy_policy, toy_config, toy_task, train_until

# Not drawn: what names a model, data or a place, what only shows something, and what needs another engine.
FIXED = {
    *(
        "model",
        "trust_remote_code",
        "task",
        "dataset",
        "dataset_split",
        "num_eval_prompts",
        "prompt_file",
        "prompt_weights",
        "reward_format",
    ),
    *("enable_thinking", "sampler", "load_in_4bit", "preset", "output_dir", "resume", "push_to_hub", "report_to"),
    *("progress", "save_drop_oldest_first", "stop_grace"),
    *("shard", "vllm_tensor_parallel", "sampler_url", "process_timeout"),
}
# The first value is the one of toy runs.
SHARED = {
    "rewards": [None, ["digits"], ["sum", "digits"]],
    "reward_weights": [None, [0.25, 2.0]],
    "reward_time_limit": [1.0, 0.0],
    "reward_memory_limit": [2.0, 1.0],
    "num_steps": [2, 1, 3],
    "prompts_per_step": [4, 1, 3, 6],
    "num_generations": [4, 1, 2, 3],
    "num_minibatches": [1, 2, 4],
    "num_update_epochs": [1, 2],
    "temperature": [1.0, 0.6, 1.5],
    "max_prompt_length": [32, 8],
    "max_completion_length": [12, 1, 5],
    "max_logprob_diff": [None, 0.0, 1.0],
    "kl_coef": [0.0, 0.1, 5.0],
    "average_over": ["tokens", "rows", "constant"],
    "whiten_advantages": [False, True],
    "mask_truncated": [False, True],
    "sampling_lag": [0, 1],
    "importance_correction": ["auto", "none", "truncate", "mask"],
    "importance_cap": [2.0, 1.5, 4.0],  # not 1: rounding alone would decide which weights are above it
    "missing_eos_penalty": [0.0, 0.5],
    "optimizer": ["adamw", "adamw_host", "adamw_8bit"],
    "learning_rate": [1e-3, 1e-2, 0.0],
    "lr_scheduler": ["constant", "linear", "cosine"],
    "warmup_steps": [0, 1, 5],
    "min_lr_ratio": [0.1, 0.0, 1.0],
    "adam_beta1": [0.9, 0.0],
    "adam_beta2": [0.999, 0.5],
    "weight_decay": [0.0, 0.1],
    "max_grad_norm": [1.0, 0.0, 1e-3],
    "use_lora": [False, True],
    "lora_r": [4, 1],
    "lora_alpha": [4, 16],
    "lora_target_modules": ["all-linear", "q_proj,v_proj"],
    "max_tokens_per_microbatch": ["auto", 1, 40],
    "gradient_checkpointing": [False, True],
    "offload": ["auto", "always", "never"],
    "dtype": ["auto", "bfloat16"],
    "attn_implementation": ["auto", "sdpa", "eager"],
    "vllm_memory_share": ["auto", 0.1],
    "vllm_sleep_level": [1, 2],
    "vllm_enforce_eager": [False, True],
    "vllm_max_num_seqs": [256, 1],
    "eval_every": [0, 1, 2],
    "eval_temperature": [1.0, 0.0, 0.6],
    "eval_top_p": [1.0, 0.5],
    "eval_top_k": [0, 3],
    "eval_num_samples": [1, 2],
    "eval_kl": [False, True],
    "early_stopping_patience": [0, 1],
    "save_every": [0, 1, 2],
    "save_total_limit": [1, 2],
    "samples_every": [1, 0, 2],
    "seed": [0, 1],
}

Settings = dict[str, Any]


def values_of(name: str) -> dict[str, list]:
    """The values of each setting of an algorithm; the first one is its toy run's."""
    own = facts(name)
    toy = own.get("TOY_SETTINGS", {})
    own_fields = fields(algorithms()[name].config)
    names = {each.name for each in own_fields}
    values = {setting: options for setting, options in SHARED.items() if setting in names}
    if algorithms()[name].config().why_no_lag:
        values["sampling_lag"] = [0]
    for each in own_fields:
        setting, default = each.name, toy.get(each.name, each.default)
        assert default is not MISSING
        if setting in own.get("VALUES", {}):
            values[setting] = own["VALUES"][setting]
        elif (
            setting not in SHARED and setting not in FIXED and not callable(default)
        ):  # a function names what it makes
            how = own["ACTS"][setting]
            values[setting] = [default, not default if how is None else how[1]]
    return values


def named_in(message: str, values: dict[str, list]) -> list[str]:
    """The settings that a message is about."""
    return [setting for setting in values if re.search(rf"\b{setting}\b", message)]


def drawn(name: str, values: dict[str, list], draw: random.Random) -> Settings:
    """Settings at random that the configuration takes.

    Raises:
        AssertionError: if a refusal names none of the settings, or no value of those it names helps.
    """
    settings = {setting: draw.choice(options) for setting, options in values.items()}
    for _ in range(200):
        try:
            toy_config(Path("model"), Path("run"), algorithm=name, **settings)
        except ValueError as error:
            named = named_in(str(error), values)
            assert named, f"{name}: a refusal that names no setting: {error}"
            changed = draw.choice(named)
            settings[changed] = draw.choice(values[changed])
        else:
            return settings
    raise AssertionError(f"{name}: no way out of a refusal of {settings}")


def pairs_of(settings: Settings) -> set[tuple[str, ...]]:
    """The pairs of values that meet in a run."""
    return set(combinations(sorted(f"{setting}={value}" for setting, value in settings.items()), 2))


@dataclass
class Draws:
    """Draws for one algorithm, each the one of several that brings the most pairs which have not met yet.

    Args:
        name: the algorithm.
        seed: decides the draws.

    Attributes:
        met: the pairs of values so far.
    """

    name: str
    seed: int
    met: set[tuple[str, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.values = values_of(self.name)
        self.random = random.Random(f"{self.name} {self.seed}")

    def next(self, *, among: int = 10) -> Settings:
        """The next run's settings."""
        candidates = [drawn(self.name, self.values, self.random) for _ in range(among)]
        best = max(candidates, key=lambda settings: len(pairs_of(settings) - self.met))
        self.met |= pairs_of(best)
        return best


def broken(name: str, settings: Settings, model: Path, folder: Path, draw: random.Random) -> list[str]:
    """Train, and say what does not hold; train again in another way, and say what differs.

    Args:
        name: the algorithm.
        settings: which its configuration takes.
        model: the toy policy.
        folder: an empty one for the runs.
        draw: decides the other values.

    Returns:
        A line for each invariant that does not hold.
    """
    whole = _trained(name, settings, model, folder / "whole")
    lines = metrics_of(folder / "whole")
    found = [*_wrong_in_lines(whole.config, lines), *_wrong_in_files(whole, folder / "whole")]
    again = _with_other_idle(name, settings, draw) | {"offload": draw.choice(SHARED["offload"])}
    second = _trained(name, again, model, folder / "again", until=1 if settings["save_every"] == 1 else None)
    found += _differences("idle settings, offload or a resumed run", whole, second)
    if settings["dtype"] == "auto":
        memory = {"max_tokens_per_microbatch": 40 if settings["max_tokens_per_microbatch"] == 1 else 1}
        memory["gradient_checkpointing"] = not settings["gradient_checkpointing"]
        if settings["lr_scheduler"] == "constant":
            memory["num_steps"] = 1  # one step is enough, where its rate does not depend on how many there are
        other = _trained(name, settings | memory, model, folder / "memory")
        found += _far_apart(lines, metrics_of(other.run.folder))
    return found


def _with_other_idle(name: str, settings: Settings, draw: random.Random) -> Settings:
    """The settings with other values of those that do nothing, as far as the configuration takes them together."""
    again, values = dict(settings), values_of(name)
    for setting in values:
        changed = again | {setting: draw.choice(values[setting])}
        try:
            configs = [toy_config(Path("model"), Path("run"), algorithm=name, **s) for s in (again, changed)]
        except ValueError:
            continue
        if all(setting in config.idle_settings() for config in configs):
            again = changed
    return again


def _trained(name: str, settings: Settings, model: Path, folder: Path, *, until: int | None = None) -> OnPolicyTrainer:
    """Train; with `until`, first as far as this step, and then on from its checkpoint."""

    def trainer() -> OnPolicyTrainer:
        config = toy_config(model, folder, algorithm=name, **settings)
        return algorithms()[name].trainer(config, task=toy_task())

    last = trainer()
    if until is not None:
        train_until(last, until)
        if (folder / "final").is_dir():  # one step was all, or it stopped early
            return last
        last = trainer()
    last.train()
    return last


def _wrong_in_lines(config: RLConfig, lines: list[dict]) -> list[str]:
    """What does not hold in the metrics of a run."""
    found = []
    steps = [line for line in lines if line["step"] > 0]
    stopped = config.early_stopping_patience > 0
    if not stopped and [line["step"] for line in steps] != list(range(1, config.num_steps + 1)):
        found.append(f"steps {[line['step'] for line in lines]} of {config.num_steps}")
    for line in lines:
        found += [f"{metric} is {value}" for metric, value in line.items() if not math.isfinite(value)]
    for line in steps:
        where = f"in step {line['step']}: "
        if line["lr"] != config.scheduled_rate(line["step"]):
            found.append(f"{where}lr {line['lr']}")
        if line.get("policy/first_ratio", 1.0) != 1.0 and not config.sampling_lag:
            found.append(f"{where}first ratio {line['policy/first_ratio']}")
        if config.trains_on_policy and line.get("policy/ratio", 1.0) != 1.0:
            found.append(f"{where}ratio {line['policy/ratio']} on policy")
        if line.get("policy/clip_fraction", 0.0) and config.trains_on_policy:
            found.append(f"{where}clipped on policy")
        if not 1 <= line["length"] <= config.max_completion_length:
            found.append(f"{where}length {line['length']}")
        if line["episodes"] != line["step"] * config.completions_per_step:
            found.append(f"{where}{line['episodes']} episodes")
        shares = [metric for metric in line if re.search(r"truncated|fraction|zero_advantage|accuracy$|pass@", metric)]
        found += [f"{where}{metric} {line[metric]}" for metric in shares if not 0 <= line[metric] <= 1]
        if not math.isclose(line["score"], _score_of(config, line), abs_tol=1e-5):
            found.append(f"{where}score {line['score']}, its parts make {_score_of(config, line)}")
        all_dropped = vars(config).get("sparse") and line.get("zero_advantage", 1) == 1  # absent: all masked
        if bool(config.kl_coef) is not ("kl" in line) and not all_dropped:
            found.append(f"{where}kl_coef {config.kl_coef}, kl {line.get('kl')}")
    if abs(steps[0].get("kl", 0)) > (1e-2 if config.sampling_lag else 0):  # with a lag up to the sampler's rounding
        found.append(f"the kl before the first update is {steps[0]['kl']}")
    if any(("eval/score" in line) is not _evaluates(config, line["step"]) for line in lines) and not stopped:
        found.append(f"evaluated in steps {[line['step'] for line in lines if 'eval/score' in line]}")
    return found


def _score_of(config: RLConfig, line: dict) -> float:
    """The score that the rewards of a line add up to."""
    names = config.rewards or ["digits", "sum"]
    own = [{"digits": 1.0, "sum": 0.5}[name] for name in names]
    parts = sum(w * line[f"reward/{name}"] for w, name in zip(config.reward_weights or own, names, strict=True))
    return parts - config.missing_eos_penalty * line["truncated"]


def _evaluates(config: RLConfig, step: int) -> bool:
    return bool(config.eval_every) and (step % config.eval_every == 0 or step == config.num_steps)


def _wrong_in_files(trainer: OnPolicyTrainer, folder: Path) -> list[str]:
    """What does not hold in the folder of a run, and in the weights."""
    config, found = trainer.config, []
    if not (folder / "final").is_dir():
        found.append("no final/")
    kept = len(list(folder.glob("checkpoint-*")))
    if kept > config.save_total_limit + 1 or bool(kept) is not (0 < config.save_every <= trainer.current_step):
        found.append(f"{kept} checkpoints with save_every={config.save_every}")
    samples = samples_of(folder) if (folder / "samples.jsonl").is_file() else []
    if bool(config.samples_every) is not any(row["split"] == "train" for row in samples):
        found.append(f"samples.jsonl with samples_every={config.samples_every}")
    return found


def _differences(what: str, one: OnPolicyTrainer, other: OnPolicyTrainer) -> list[str]:
    """Metrics and weights that are not the same to the last bit."""
    found = []
    for line, second in zip(metrics_of(one.run.folder), metrics_of(other.run.folder), strict=True):
        names = sorted(name for name in line.keys() | second.keys() if line.get(name) != second.get(name))
        found += [f"{what}: {n} of step {line['step']}: {line.get(n)} and {second.get(n)}" for n in names]
    with one.models.use("policy"), other.models.use("policy"):
        pairs = zip(one.policy.parameters, other.policy.parameters, strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            found.append(f"{what}: the weights differ")
    return found


def _far_apart(lines: list[dict], others: list[dict]) -> list[str]:
    """Metrics of the first step that differ by more than rounding."""
    by_step = {line["step"]: line for line in lines}
    found = []
    for other in others:
        if other["step"] == 1:  # after the step, rounding may have grown in what is evaluated
            line = by_step[other["step"]]
            names = [n for n in other if not n.startswith("eval/") and n != "lr"]
            found += [
                f"memory settings: {n} is {line.get(n)} and {other[n]}"
                for n in names
                if n not in line or not math.isclose(line[n], other[n], rel_tol=1e-3, abs_tol=1e-4)
            ]
    return found


def main() -> None:
    """Draw and run, and print what broke."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="runs of each algorithm")
    parser.add_argument("--seed", type=int, default=1, help="decides the draws; the suite has 0")
    parser.add_argument("--algorithms", nargs="+", default=list(algorithms()))
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    transformers.logging.disable_progress_bar()
    model, counts = save_toy_policy(root / "model"), Counter()
    for name in arguments.algorithms:
        draws = Draws(name, arguments.seed)
        for number in range(arguments.runs):
            settings = draws.next()
            for line in run_one(name, settings, model, root / "run", draws.random):
                counts[name] += 1
                print(f"{name} run {number}: {line}\n    {settings}", flush=True)
        print(f"{name}: {arguments.runs} runs, {len(draws.met)} pairs of values, {counts[name]} broken", flush=True)
    shutil.rmtree(root)


def run_one(name: str, settings: Settings, model: Path, folder: Path, draw: random.Random) -> list[str]:
    """As `broken`; an error is a line too, and the folder is removed."""
    try:
        return broken(name, settings, model, folder, draw)
    except Exception as error:  # whatever it is, the other runs go on
        return [f"{type(error).__name__}: {error}"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
