"""The recipes of docs/recipes.md: a command each, and what the memory plan and a card's rates say of it.

Their settings are those of the scripts; what is assumed is how long prompts and completions are.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from common.cli import as_arguments, parse_config
from common.memory.cards import GB, Card
from common.memory.cast import Casting
from common.memory.fit import without_storage
from common.memory.plan import Machine, Plan, make_plan
from common.memory.remedies import refusal, remedy
from common.memory.seconds import Tokens
from common.memory.work import Work
from common.tasks import reward_models
from GRPO.grpo_trainer import GRPOConfig

ROOT = Path(__file__).resolve().parent.parent
# What `python -m benchmarks.gpu --recipe` measured, a list of rows; the page reads it.
MEASURED = ROOT / "benchmarks" / "results" / "recipes.json"

# The configuration of the one reward model that a recipe has, OpenAssistant/reward-model-deberta-v3-large-v2.
DEBERTA_V3_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "pooler_hidden_size": 1024,
    "num_labels": 1,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A command.

    Attributes:
        title: what it trains, on what.
        folder: of the script, from the root.
        script: its name.
        words: of the command line.
        shape: size of its Qwen2.5 model, as in common/memory/fit.py.
        prompt: tokens of a prompt, in the mean: assumed.
        completion: tokens of a completion, in the mean: assumed.
        why: where these two are from.
    """

    title: str
    folder: str
    script: str
    words: tuple[str, ...] = ()
    shape: str
    prompt: int
    completion: int
    why: str

    def command(self, *more: str) -> str:
        """As it is typed in the root of the repository."""
        return " ".join(["cd", self.folder, "&&", "python", self.script, *self.words, *more])

    def tokens(self, config: GRPOConfig) -> Tokens:
        """What a step samples, as long as is assumed."""
        return Tokens(
            prompts=config.prompts_per_step,
            generations=config.num_generations,
            prompt=self.prompt,
            completion=self.completion,
            longest=config.max_completion_length,
        )

    def held_out(self, config: GRPOConfig) -> Tokens:
        """What an evaluation samples."""
        counts = {"prompts": config.num_eval_prompts, "generations": config.eval_num_samples}
        return replace(self.tokens(config), **counts)


RECIPES = {
    "hh-rlhf-1.5b": Recipe(
        title="hh-rlhf, Qwen2.5-1.5B-Instruct with LoRA, a DeBERTa reward model",
        folder="GRPO",
        script="grpo.py",
        shape="1.5B",
        prompt=160,
        completion=250,
        why="dialogues of harmless-base have 130 tokens in the mean (SmolLM2's tokenizer), helpful ones more",
    ),
    "countdown-3b": Recipe(
        title="Countdown, Qwen2.5-3B, all weights, as TinyZero and nano-aha-moment",
        folder="examples/r1-v0",
        script="grpo_r1.py",
        words=("--model", "Qwen/Qwen2.5-3B"),
        shape="3B",
        prompt=140,
        completion=400,
        why="a guess of 0.4 of the limit: short at first, and longer later",
    ),
    "gsm8k-3b-4bit": Recipe(
        title="GSM8K, Qwen2.5-3B-Instruct in 4 bits with LoRA (nano-r1)",
        folder="examples/nano-r1",
        script="nano_r1.py",
        shape="3B",
        prompt=160,
        completion=400,
        why="a question has 61 tokens in the mean, the system message about 90; a reward makes completions longer",
    ),
    "math-1.5b-8k": Recipe(
        title="MATH, Qwen2.5-1.5B, all weights, 8K of context",
        folder="examples/r1-v0",
        script="grpo_r1.py",
        words=("--task", "math", "--max_completion_length", "7680"),
        shape="1.5B",
        prompt=120,
        completion=1000,
        why="a problem has 76 tokens in the mean, the instruction about 20; completions of a base model, a guess",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A recipe on a card.

    Attributes:
        recipe: the command.
        config: its settings, with what the plan had to change.
        plan: of these settings.
        more: what is added to the command for this card.
        refused: what the plan says to the command without it; empty if it fits.
    """

    recipe: Recipe
    config: GRPOConfig
    plan: Plan
    more: tuple[str, ...] = ()
    refused: str = field(default="", repr=False)

    @property
    def command(self) -> str:
        """For this card."""
        return self.recipe.command(*self.more)


@cache
def settings(name: str) -> GRPOConfig:
    """The settings of a recipe, as its script has them on a machine with a GPU."""
    recipe = RECIPES[name]
    script = _script(ROOT / recipe.folder / recipe.script)
    words = [*recipe.words, "--preset", "none"]
    if "parse" in vars(script):
        return script.parse(words)
    return parse_config(script.SETTINGS, script=script.__file__, args=words)


def _script(path: Path) -> Any:
    """A script as a module; it imports what lies beside it."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@cache
def _temporary() -> TemporaryDirectory:
    """Lives as long as the process."""
    return TemporaryDirectory(prefix="recipes-")


@cache
def _reward_model(name: str) -> str:
    """A folder with the configuration of the reward model, so that the plan counts it without the hub."""
    folder = Path(_temporary().name) / name.split("/")[-1]
    kind = ["DebertaV2ForSequenceClassification"]
    transformers.DebertaV2Config(**DEBERTA_V3_LARGE, architectures=kind).save_pretrained(folder)
    return str(folder)


@cache
def _work(name: str) -> Work:
    """Predictions of passes, which no card changes."""
    return Work(settings(name))


@cache
def planned(name: str, gigabytes: int) -> Planned:
    """Plan a recipe for a card of so many GB, and change what the plan says where it does not fit.

    Raises:
        ValueError: nothing lets it fit.
    """
    recipe, config = RECIPES[name], settings(name)
    card = Card(name=f"{gigabytes}gb", total=gigabytes * GB)
    rewards = [_reward_model(each) for each in reward_models(config)]
    casting = Casting(config, without_storage(recipe.shape), card, rewards=rewards)
    machine, work = Machine(card=card), _work(name)
    plan = make_plan(config, casting.cast(config), machine, work=work)
    if plan.fits:
        return Planned(recipe=recipe, config=config, plan=plan)
    refused = refusal(config, plan, casting, machine, work)
    found = remedy(config, casting, machine, work)
    if found is None:
        raise ValueError(refused)
    changes = {key: value for key, value in found[0].items() if vars(config)[key] != value}
    changed = replace(config, **changes)
    return Planned(recipe=recipe, config=changed, plan=found[1], more=tuple(as_arguments(changes)), refused=refused)


def measured() -> list[dict[str, Any]]:
    """What was measured, the newest last."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else []
