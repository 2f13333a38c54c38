"""Every completion that a policy over four tokens can give, so that an expectation is a sum and not an estimate.

The tokens are three letters and an end token. All completions of at most `max_length` tokens are enumerated, finished
ones and ones cut off at the limit; no two have the same text. The reference probabilities and gradients are in float64
and use transformers alone, none of the trainer's code.
"""

from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.rollouts import Completion
from common.tasks import Task
from common.trainer import OnPolicyTrainer
from common.update.learner import Learner

LETTERS, END = "abc", 3
PROMPT, PROMPT_IDS = "ba", [1, 0]


def save_four_token_model(folder: Path) -> Path:
    """A random policy of one layer over four tokens, with its tokenizer; the reference of every test."""
    tokenizer = Qwen2Tokenizer({"a": 0, "b": 1, "c": 2, "<end>": END}, [], unk_token=None, eos_token="<end>")
    config = Qwen2Config(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Qwen2ForCausalLM(config)
    policy.generation_config = GenerationConfig(eos_token_id=END)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class FixedSampler:
    """Gives the same completions for every request, and another one for every greedy request."""

    needs_push, has_weights, resident_bytes, samples_apart = False, True, 0, False

    def __init__(self, completions: list[Completion], greedy: Completion | None = None) -> None:
        self.completions, self.greedy = completions, greedy

    def generate(self, prompt_ids, settings, *, num_generations=1, seeds=None) -> list[Completion]:
        if settings.temperature == 0:
            return [self.greedy] * len(prompt_ids)
        assert len(self.completions) == len(prompt_ids) * num_generations
        return self.completions

    def push(self, weights) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Enumeration:
    """All N completions of one prompt under a policy and under its reference, the model in `folder`.

    Attributes:
        ids: token ids of each completion.
        mask: (N, T) bool.
        policy_logits, ref_logits: (N, T, 4) float64, normalised, of every possible token at each position.
        token_logprobs, token_ref_logprobs: (N, T) float64 of the tokens of the completions, 0 at padding.
        probabilities: (N,) float64 with gradient; they sum to 1.
        scores: (N,) float64, a table of random numbers with three digits, no two alike.
    """

    def __init__(self, folder: Path, max_length: int, *, temperature: float = 1.0, seed: int = 0) -> None:
        self.folder, self.max_length, self.temperature = folder, max_length, temperature
        self.ids = [
            [*letters, *([END] if length < max_length else [])]
            for length in range(max_length + 1)
            for letters in product(range(3), repeat=length)
        ]
        self.texts = ["".join(LETTERS[i] for i in ids if i != END) for ids in self.ids]
        lengths = torch.tensor([len(ids) for ids in self.ids])
        self.mask = torch.arange(max_length) < lengths[:, None]
        generator = torch.Generator().manual_seed(seed)
        self.ref = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
        self.policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter + noise).float())  # a number that float32 can represent
        self.weights = [parameter.detach().clone() for parameter in self.policy.parameters()]
        self.policy_logits, self.ref_logits = self._logits(self.policy), self._logits(self.ref)
        padded = torch.tensor([ids + [0] * (max_length - len(ids)) for ids in self.ids])[:, :, None]
        self.token_logprobs = self.policy_logits.gather(2, padded).squeeze(2) * self.mask
        self.token_ref_logprobs = self.ref_logits.gather(2, padded).squeeze(2) * self.mask
        self.logprobs, self.ref_logprobs = self.token_logprobs.sum(1), self.token_ref_logprobs.sum(1)
        self.probabilities = self.logprobs.exp()
        self.scores = torch.randperm(999, generator=generator)[: len(self.ids)].double() / 500 - 1

    def _logits(self, model: Qwen2ForCausalLM) -> Tensor:
        rows = torch.tensor([PROMPT_IDS + ids + [0] * (self.max_length - len(ids)) for ids in self.ids])
        logits = model(input_ids=rows).logits[:, len(PROMPT_IDS) - 1 : -1]  # (N, T, 4)
        return (logits / self.temperature).log_softmax(-1)

    @property
    def kl(self) -> Tensor:
        """KL(policy || reference) over whole completions, a scalar with gradient."""
        return (self.probabilities * (self.logprobs - self.ref_logprobs)).sum()

    def gradient(self, objective: Tensor) -> Tensor:
        """The gradient with respect to all weights of the policy in one vector."""
        parts = torch.autograd.grad(objective, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def values(self, kl_coef: float) -> dict[tuple[int, ...], float]:
        """The expected return of each state: the score minus the KL penalty of the remaining tokens.

        The state is the tokens so far, without the prompt.
        """
        kl = (self.token_logprobs - self.token_ref_logprobs).detach()
        totals: dict[tuple[int, ...], list[float]] = {}
        for i, ids in enumerate(self.ids):
            for t in range(len(ids)):
                weight = self.probabilities[i].item()
                total = totals.setdefault(tuple(ids[:t]), [0.0, 0.0])
                total[0] += weight * float(self.scores[i] - kl_coef * kl[i, t:].sum())
                total[1] += weight
        return {state: value / weight for state, (value, weight) in totals.items()}

    @property
    def completions(self) -> list[Completion]:
        """The completions in the form that a sampler gives."""
        return [
            Completion(ids, logprobs[: len(ids)].tolist(), truncated=ids[-1] != END)
            for ids, logprobs in zip(self.ids, self.token_logprobs.detach(), strict=True)
        ]

    @property
    def greedy(self) -> int:
        """Index of the completion that takes the most likely token at each position."""
        best = self.policy_logits.argmax(-1)
        ids: list[int] = []
        while ids not in self.ids:
            row = next(i for i, other in enumerate(self.ids) if other[: len(ids)] == ids)
            ids.append(int(best[row, len(ids)]))
        return self.ids.index(ids)

    def trainer(self, kind: type[OnPolicyTrainer], output_dir: Path, **settings: object) -> OnPolicyTrainer:
        """A trainer of this policy whose step samples every group of `num_generations` completions once.

        Each group belongs to its own prompt of the step.
        """
        defaults = {
            "model": str(self.folder),
            "output_dir": str(output_dir),
            "sampler": "transformers",
            "num_generations": 1,
            "max_prompt_length": len(PROMPT_IDS),
            "max_completion_length": self.max_length,
            "temperature": self.temperature,
            "whiten_advantages": False,
            "eval_every": 0,
            "samples_every": 0,
            "progress": False,
        }
        settings = defaults | settings
        settings["prompts_per_step"] = len(self.ids) ** settings["num_generations"]
        score_of = dict(zip(self.texts, self.scores.tolist(), strict=True))
        task = Task(
            train=[{"prompt": PROMPT}],
            eval=[],
            rewards={"table": lambda prompts, completions, **columns: [score_of[text] for text in completions]},
            reward_weights={"table": 1.0},
            accuracy=None,
        )
        config = kind.__annotations__["config"](**settings)
        trainer = kind(config, task=task)
        put_weights(trainer.policy.parameters, self.weights)
        return trainer

    def step_gradients(
        self, trainer: OnPolicyTrainer, *, move_to: list[Tensor] | None = None, sampler: "Enumeration | None" = None
    ) -> list[Tensor]:
        """Let a trainer take one real step on all groups, each weighted by its probability.

        Args:
            trainer: from `trainer`.
            move_to: weights that the policy gets instead of an optimizer step; None: it keeps its weights.
            sampler: another policy, from which the sampler draws; None: the trainer's own.

        Returns:
            For each optimizer step the expected gradient of a completion's loss; the loss is a sum over tokens if the
            mean is over a constant.
        """
        groups = torch.tensor(list(product(range(len(self.ids)), repeat=trainer.config.num_generations)))
        sampler = sampler or self
        completions = sampler.completions
        sampled = [completions[i] for i in groups.flatten().tolist()]
        trainer.policy_sampler.sampler = FixedSampler(sampled, greedy=completions[self.greedy])
        return self.weighed_step(trainer, sampler.probabilities.detach()[groups].prod(1), move_to=move_to)

    def weighed_step(
        self, trainer: OnPolicyTrainer, probabilities: Tensor, *, move_to: list[Tensor] | None = None
    ) -> list[Tensor]:
        """The same for the groups that the trainer's sampler gives; `probabilities` has one entry per group."""
        # The loss is a mean over groups; times the number of groups it is a sum.
        weights = (probabilities * len(probabilities)).float()  # (groups,)
        update = trainer.update

        def weighted_update(learner, rollouts, loss, **settings):
            def weighted_loss(model, minibatch):
                per_token, metrics = loss(model, minibatch)
                rows_per_group = len(minibatch.step_lengths) // len(weights)
                return per_token * weights[minibatch.rows // rows_per_group, None], metrics

            update(learner, rollouts, weighted_loss, **settings)

        trainer.update = weighted_update
        gradients = record_gradients(trainer.policy, move_to=move_to)
        trainer.current_step = 1
        trainer.step(trainer.training_prompts(1, len(weights)))
        scale = self.max_length if trainer.config.average_over == "constant" else 1
        return [scale * gradient for gradient in gradients]


def put_weights(parameters: list[nn.Parameter], weights: list[Tensor]) -> None:
    """Replace the weights of a model."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


def record_gradients(learner: Learner, *, move_to: list[Tensor] | None = None) -> list[Tensor]:
    """A list that gets the gradient of each optimizer step in float64; the steps themselves are not taken."""
    gradients: list[Tensor] = []

    def record(step: int, accelerator: object, *, rate: float | None = None) -> float:
        gradients.append(torch.cat([parameter.grad.flatten().double() for parameter in learner.parameters]))
        learner.optimizer.zero_grad()
        if move_to is not None:
            put_weights(learner.parameters, move_to)
        return float(gradients[-1].norm())

    learner.optimizer_step = record
    return gradients
