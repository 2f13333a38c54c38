"""An evaluation against direct calls of vLLM: `python -m benchmarks.evaluating --model FOLDER`, `--help` for more.

The evaluation samples, keeps each completion in its file, and scores them; bare vLLM only samples, in the same engine
with the same requests. Starting and loading are left out, since both need them.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.generation import bare_vllm, same_greedy
from benchmarks.timing import CLOCKS, comparison, machine, seconds_in_turns
from common.cli import run_script
from common.evaluation.command import Evaluation
from common.evaluation.settings import EvaluationSettings
from common.runs.metrics import Stopwatch
from common.sampling.protocol import sampling_seed
from common.tasks import task_scorer


def main() -> None:
    """Measure, write the numbers, print a line."""
    options = _options()
    with TemporaryDirectory() as folder:
        settings = EvaluationSettings(
            model=[options.model],
            task=options.task,
            dataset=options.dataset,
            num_problems=options.num_problems,
            num_samples=1,
            temperature=options.temperature,
            max_completion_length=options.completion_length,
            dtype=options.dtype,
            output_dir=str(Path(folder) / "result"),
        )
        result = compare_evaluation(Evaluation(settings), options)
    report = {"command": " ".join(["python", "-m", "benchmarks.evaluating", *sys.argv[1:]]), "machine": machine()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report | {"evaluation": result}, indent=1) + "\n", encoding="utf-8")
    speeds, ratio = result["tokens_per_second"], result["ratio"]
    print(
        f"evaluation {speeds['evaluation']:.0f} tokens/s, bare vLLM {speeds['vllm']:.0f}, ratio {ratio['median']:.2f} "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}), clock: {options.clock}, "
        f"{result['same_greedy_completions']:.1%} of greedy completions the same"
    )


def compare_evaluation(evaluation: Evaluation, options: argparse.Namespace) -> dict:
    """Completion tokens per second of both.

    Args:
        evaluation: with vLLM as its sampler; its result is not written.
        options: rounds and clock.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = task_scorer(evaluation.task, evaluation.config)
    generation = evaluation._load(device, Stopwatch(device))
    generation._refresh()
    config, sampler, prompts = evaluation.config, generation.sampler, evaluation.prompts.share()
    settings = generation._settings(config.eval_temperature, top_p=config.eval_top_p, top_k=config.eval_top_k)
    seeds = None
    if settings.temperature:
        seeds = [sampling_seed(config.seed, prompts.step, row, "eval") for row in prompts.rows]
    tokens: dict[str, int] = {}

    def whole() -> None:
        evaluation.unfinished.completions.clear()
        rollouts = evaluation._sample(generation)
        evaluation._judge(rollouts, scorer)
        tokens["evaluation"] = int(rollouts.lengths.sum())

    def bare() -> None:
        tokens["vllm"] = sum(map(len, bare_vllm(sampler, prompts.prompt_ids, settings, seeds=seeds)))

    with evaluation.unfinished as kept:
        same = same_greedy(sampler, prompts.prompt_ids, settings)
        ways = {"evaluation": whole, "vllm": bare}
        # The greedy completions have warmed both up.
        seconds = seconds_in_turns(ways, rounds=options.rounds, clock=CLOCKS[options.clock], is_warm=True)
        kept.remove()
    return comparison(seconds, tokens=tokens, of="evaluation", to="vllm") | {"same_greedy_completions": same}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluating", description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a hub id (default: tiny)")
    parser.add_argument("--task", default="countdown", help="as of common.evaluation (default: countdown)")
    parser.add_argument("--dataset", help="as of common.evaluation")
    parser.add_argument("--num-problems", type=int, default=64, help="one completion each (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    parser.add_argument("--completion-length", type=int, default=256, help="longest completion (default: 256)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed (default: 3)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the seconds; cpu suits a busy machine")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
