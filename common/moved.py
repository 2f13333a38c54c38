"""Where the names of earlier versions are now: an import from an old place fails and names the new one.

A user's rewards or algorithm may be older than the packages of `common`. Nothing can still be imported from an old
place, and nothing in the project tries to.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NoReturn

# Old module -> new place -> the names that moved there, "" for all others of the module. For something that was
# renamed, the place includes its new name.
MOVED: dict[str, dict[str, str]] = {
    "common.config": {"common.remarks": "remarks", "common.values": "ALL_LINEAR"},
    "common.batching": {"common.seeds": "hashed_seed seeded_permutation", "common.update.rows": ""},
    "common.passes": {"common.update.batches.Batches": "Passes", "common.update.batches": ""},
    "common.learner": {"common.update.learner": ""},
    "common.models": {
        "common.logprobs": "MAX_CHUNK_LOGITS token_logprobs",
        "common.embedded": "check_model resolve_model load_tokenizer",
        "common.models.chat": "turn_end_token",
        "common.models.loading": "end_token_ids unused_token_ids compute_dtype load_policy load_reference "
        "load_without_dropout lora_config add_adapter",
        "common.models.saving": "save_model",
        "common.update.batches": "forward_context",
    },
    "common.offload": {"common.models.pool": ""},
    "common.weights": {"common.models.weights": ""},
    "common.quantization": {"common.models.quantization": ""},
    "common.sampling": {
        "common.sampling.protocol": "sampling_seed Sampler SamplingSettings",
        "common.sampling.policy_sampler": "check_sampler make_sampler",
        "common.sampling.vllm_sampler": "VLLMSampler",
        "common.sampling.torch_sampler": "TransformersSampler",
    },
    "common.engine": {"common.sampling.vllm_engine": ""},
    "common.decoding": {"common.sampling.protocol": "", "common.sampling.torch_sampler": "decode"},
    "common.generation": {"common.sampling.policy_sampler.PolicySampler": "Generation"},
    "common.sources": {"common.data.rows": ""},
    "common.data": {"common.data.prompts": "PLACE PromptStyle AS_IT_IS render_prompt PromptSet"},
    "common.dialogues": {"common.data.dialogues": ""},
    "common.rewards": {"common.rewards.scorer": "RewardFunction Scorer"},
    "common.reward_choice": {"common.rewards.choose": ""},
    "common.reward_model": {"common.rewards.reward_model": ""},
    "common.workers": {
        "common.rewards.worker": "Limits DEFAULT_LIMITS RowAnswer RuleWorker",
        "common.rewards.rules": "",
    },
    "common.rewards.rules": {"common.rewards.worker": "Limits DEFAULT_LIMITS RowAnswer RuleWorker"},
    "common.arithmetic": {"common.tasks._arithmetic": ""},
    "common.tiny": {"common.embedded.policy": ""},
    "common.cache": {"common.data.cache": ""},
    "common.run": {"common.runs.run": ""},
    "common.checkpoints": {
        "common.runs.folder": "CONFIG_FILE LOCK_FILE MAY_CHANGE MAY_GROW prepare_run_folder has_begun versions",
        "common.runs.best": "better_checkpoint",
        "common.runs.checkpoints": "",
    },
    "common.runs.checkpoints": {
        "common.runs.folder": "CONFIG_FILE LOCK_FILE MAY_CHANGE MAY_GROW prepare_run_folder has_begun versions "
        "PROMPTS_FILE",
        "common.runs.best": "better_checkpoint",
    },
    "common.metrics": {
        "common.runs.trackers": "choose_trackers WandbRun WANDB_FILE PROJECT",
        "common.runs.log": "",
        "common.runs.metrics": "GB Stopwatch memory_report",
        "common.runs.metrics.StepMetrics": "MetricShares",
        "common.runs.progress": "Progress",
    },
    "common.plots": {"common.runs.plots": ""},
    "common.sanity": {"common.runs.metrics": ""},
    "common.declared": {"common.config": ""},
    "common.values": {"PPO.value_model": ""},
    "common.evaluation": {
        "common.runs.measures.rollout_means": "rollout_shares",
        "common.runs.measures": "judge is_one sizes_of_k pass_at_k confidence_interval with_confidence_interval",
        "common.runs.measures.evaluation_means": "evaluation_shares",
    },
    "common.samples": {"common.samples.page": ""},
    "common.runs.log": {
        "common.runs.progress": "Progress",
        "common.runs.trackers": "choose_trackers WandbRun WANDB_FILE PROJECT",
    },
    "common.losses": {"RLOO.rloo_trainer": "RATIO_LEVELS", "PPO.value_model": "clipped_value_loss"},
    "common.advantages": {"RAFT.raft_trainer": "best_of_group", "VinePPO.chunks": "chunk_advantages"},
    "common.cli": {"common.start": "report"},
    "common.tasks.prompts": {"common.data.rows": "SPLIT_SEED prompt_key take_held_out"},
    "VinePPO.continuations": {
        "VinePPO.chunks": "",
        "common.sampling.prefixes": "PrefixSampler",
        "common.trainer.OnPolicyTrainer.continue_from": "sample_continuations",
    },
    "common.updates": {"common.update.learner.Learner.update": "optimizer_steps"},
}


class _OldPlaces(MetaPathFinder):
    """Loads the modules of MOVED that still exist; for the others it raises an error that says where they are now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See MetaPathFinder.

        Raises:
            ModuleNotFoundError: if the module no longer exists.
        """
        if name not in MOVED:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(f"there is no {name} any more. {_places(name)}. Import from there.", name=name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.__getattr__ = partial(_explain, name)

        spec.loader.exec_module = exec_module
        return spec


def _places(module: str) -> str:
    named = [f"{', '.join(names.split())}: in {place}" for place, names in MOVED[module].items() if names]
    others = [place for place, names in MOVED[module].items() if not names]
    return "; ".join([*named, *(f"{'all else' if named else 'all of it'}: in {place}" for place in others)])


def _explain(module: str, name: str) -> NoReturn:
    """Raise the error for a name that a module of MOVED does not have."""
    for place, names in MOVED[module].items():
        if name in names.split():
            raise ImportError(f"{name} is not in {module} any more: it is in {place}. Import it from there.")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def explain_old_imports() -> None:
    """Make imports from old places fail with a message that names the new place."""
    sys.meta_path.insert(0, _OldPlaces())
