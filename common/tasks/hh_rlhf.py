"""hh-rlhf: answer the human's last message in a dialogue; a reward model scores the answer.

The dialogues are those of Anthropic/hh-rlhf (huggingface.co/papers/2204.05862), or of a file in its form. Only their
prompts are used here; examples/reward_model learns from the answers that people preferred.
"""

import numpy as np
import transformers

from common.config import RLConfig
from common.data.dialogues import conversation, dialogue
from common.data.rows import SPLIT_SEED, read_rows
from common.tasks import Task

DATASET = "Anthropic/hh-rlhf"
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give dialogues that end in a human's turn; the reward is a model.

    Args:
        config: `dataset` (None for Anthropic/hh-rlhf), `dataset_split` and `num_eval_prompts` are read.
        tokenizer: with a chat template, prompts are chat messages; without one, text in the form of the data set,
            up to where the assistant answers.

    Raises:
        ValueError: the data cannot be read, a dialogue has no turn of a human, or `num_eval_prompts` leaves none to
            train on.
    """
    source = config.dataset or DATASET
    conversations = [
        _conversation_of(row["chosen"], f"dataset={source}: row {number}")
        for number, row in enumerate(read_rows(source, config.dataset_split, ["chosen"]), start=1)
    ]
    train, held_out = split_held_out(conversations, config.num_eval_prompts)
    write_prompt = dialogue if tokenizer.chat_template is None else list
    return Task(
        train=[{"prompt": write_prompt(messages)} for messages in train],
        eval=[{"prompt": write_prompt(messages)} for messages in held_out],
        rewards={},
        reward_weights={},
        accuracy=None,
        default_rewards=[REWARD_MODEL],
    )


def split_held_out(conversations: list[list[dict]], num_held_out: int) -> tuple[list[list[dict]], list[list[dict]]]:
    """Shuffle prompts and hold some out.

    Each prompt is kept once, however many pairs of answers the data has for it. So the prompts of a step differ, and
    no held-out prompt is trained on.

    Args:
        conversations: chat messages each.
        num_held_out: number of prompts to hold out.

    Returns:
        Prompts to train on and held-out prompts.

    Raises:
        ValueError: none would be left to train on.
    """
    distinct = list({dialogue(messages): messages for messages in conversations}.values())
    if num_held_out >= len(distinct):
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the data has {len(distinct)} different prompts, and at least one must "
            "be left to train on. Pass a smaller --num_eval_prompts or more data."
        )
    shuffled = [distinct[index] for index in np.random.default_rng(SPLIT_SEED).permutation(len(distinct))]
    return shuffled[num_held_out:], shuffled[:num_held_out]


def _conversation_of(text: object, where: str) -> list[dict[str, str]]:
    messages = conversation(text) if isinstance(text, str) else []
    if not messages:
        raise ValueError(
            f"{where} has chosen={text!r:.80} without a turn of the human, which the policy would answer. Need a "
            "dialogue such as '\\n\\nHuman: Hi\\n\\nAssistant: Hello': correct or remove the row."
        )
    return messages
