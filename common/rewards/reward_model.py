"""RewardModel: a trained model that scores completions, used like any reward function.

It is any sequence classifier with one label. It uses its own tokenizer and chat template, never the policy's. The
score of a text does not depend on the rest of the batch. Reward models are not trained here.
"""

import itertools
import logging
from copy import deepcopy
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.data.dialogues import conversation
from common.mistakes import first_line
from common.models.attention import attention_for
from common.models.chat import check_keeps, render_chat
from common.models.configs import model_class, read_config, why_quantized
from common.models.loading import resolve_dtype
from common.models.outputs import use_plain_outputs
from common.models.pool import ModelPool
from common.models.spellings import Spellings
from common.update.rows import microbatch_rows

logger = logging.getLogger("nanorlhf")

_REMEDY = (
    "Need a folder with weights and tokenizer, or a hub id that this machine can reach, of an architecture that "
    "transformers has. Pass --rewards with one, a reward of the task or file.py:function."
)
# How dialogues are written without a chat template: in the form of hh-rlhf, which most pair encoders have seen.
_SPEAKERS = {"user": "Human: ", "assistant": "Assistant: "}
_JUDGED = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
# verbose=False: the tokenizer would warn about long texts, which are cut here.
_OPTIONS = {"return_attention_mask": True, "verbose": False}


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """The prompt as chat messages: text in the form of hh-rlhf becomes its turns, other text one user message."""
    if not isinstance(prompt, str):
        return prompt
    return (conversation(prompt) if prompt.startswith("\n\nHuman:") else []) or [{"role": "user", "content": prompt}]


class RewardModel:
    """Scores completions with a sequence classifier that has one label.

    The constructor reads the configuration and the tokenizer. Call `load` for the weights before the first score.

    Args:
        model: hub id or folder.
        max_tokens_per_microbatch: padded tokens per forward pass; larger is faster and needs more memory.
        dtype: precision on a CPU, a value of the setting `dtype`; on CUDA the model is as saved.

    Attributes:
        name: the last part of the hub id or folder.
        max_length: longest text in tokens. A longer one loses its beginning, as `without_beginning` says; a pair that
            a pair encoder reads loses that of its prompt, and the end of its completion if that alone is too long.
        num_truncated: number of texts cut so far.

    Raises:
        ValueError: if the model cannot be loaded, is not a sequence classifier or has several labels, if its chat
            template leaves out what it should judge, or if its tokenizer has tokens that the model does not have.
    """

    def __init__(self, model: str, *, max_tokens_per_microbatch: int = 16384, dtype: str = "auto") -> None:
        label = f"reward model {model!r}"
        config = read_config(model, label=label, remedy=_REMEDY, own_code_remedy=_REMEDY)
        self.tokenizer = _load_tokenizer(model, label)
        if reason := why_quantized(config):
            raise ValueError(f"{label}: {reason.split(':')[0]}, and would be scored by other numbers here. {_REMEDY}")
        architectures = config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ValueError(
                f"reward model {model!r}: its architecture is {', '.join(architectures) or 'not named'}. Need one "
                "that ends in ForSequenceClassification: any other would get a head of random weights. Pass a model "
                "that was trained to score, such as one by trl.RewardTrainer."
            )
        if model_class(config, transformers.AutoModelForSequenceClassification) is None:
            raise ValueError(
                f"{label}: transformers has no sequence classifier for model_type {config.model_type}, and code that "
                f"comes with a model is not run for it. {_REMEDY}"
            )
        if config.num_labels != 1:
            raise ValueError(
                f"reward model {model!r}: has {config.num_labels} labels. Need 1, since a completion gets one score. "
                "Pass a model with one label, or write a function that combines them into one number and pass "
                "file.py:function."
            )
        self.model = model
        self.name = Path(model).absolute().name
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.dtype = dtype
        self.num_truncated = 0
        settings = config.get_text_config().to_dict()
        limits = [
            self.tokenizer.model_max_length,
            settings.get("max_position_embeddings"),
            settings.get("n_positions"),
            *_num_positions(config),
        ]
        self.max_length = min(limit for limit in limits if limit is not None and limit > 0)
        pad = settings.get("pad_token_id")
        # Some models ship -1 for none.
        self._pad_token_id = pad if pad is not None and pad >= 0 else None
        self._models: ModelPool | None = None
        self._now: datetime | None = None
        if self.tokenizer.chat_template is not None:
            self._check_keeps(_JUDGED)
        self._spellings = Spellings(self.tokenizer)  # it runs the template, so after its check
        self._kept: set[tuple[str, ...]] = set()  # roles of conversations that the template was seen to write whole
        # Tokenizers of pair encoders have a token that divides texts, or one that begins them.
        names = (self.tokenizer.sep_token, self.tokenizer.cls_token)
        self._reads_pairs = self.tokenizer.chat_template is None and any(name is not None for name in names)
        if (num_tokens := settings.get("vocab_size")) is not None:
            self._check_tokens(num_tokens)

    def load(self, models: ModelPool, now: datetime | None = None) -> None:
        """Load the weights on the CPU and add them to the pool; in `dtype`, or as saved if the device is CUDA.

        Args:
            models: moves the model to the device while it scores.
            now: the time that its chat template sees; None: the clock.

        Raises:
            ValueError: if weights are missing, such as the head.
        """
        self._now = now
        dtype = "auto" if models.device.type == "cuda" else resolve_dtype(self.dtype, models.device)
        config = read_config(self.model)
        use_plain_outputs(config)
        cls = model_class(config, transformers.AutoModelForSequenceClassification)
        attention, _ = attention_for(config, "auto", models.device, dtype=config.dtype or torch.float32, cls=cls)
        with torch.random.fork_rng(devices=[]):
            module, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.model,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
            )
        if report["missing_keys"]:
            raise ValueError(
                f"reward model {self.model!r}: has no weights for {', '.join(sorted(report['missing_keys']))}. Need "
                "all of them, since random weights would score at random. Pass a model that was trained to score."
            )
        module.config.use_cache = False
        models.add(f"reward/{self.name}", module.eval().requires_grad_(False))
        self._models = models

    @torch.no_grad()
    def __call__(self, prompts: list[str | list[dict]], completions: list[str], **columns: list) -> list[float]:
        """Score completions.

        With a chat template, the model reads the conversation with the completion as its last turn. Without one, a
        pair encoder reads the pair of prompt and completion, a prompt of several turns as a dialogue. Any other model
        reads one text: a prompt that is text with the completion behind it, messages in the form of hh-rlhf.

        Args:
            prompts: B prompts, text or chat messages; a last message by the assistant is the completion's start.
            completions: B strings.
            columns: not used.

        Returns:
            B scores.
        """
        assert self._models is not None
        if not completions:
            return []
        rows = self._encode(prompts, completions)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        scores = torch.zeros(len(rows))
        with (
            self._models.use(f"reward/{self.name}") as module,
            torch.autocast(self._models.device.type, enabled=False),
        ):
            for numbers in microbatch_rows(lengths, self.max_tokens_per_microbatch):
                scores[numbers] = self._forward(module, [rows[i] for i in numbers]).float().cpu()
        return scores.tolist()

    def _forward(self, module: nn.Module, rows: list[dict[str, list[int]]]) -> Tensor:
        """(b,) scores of rows padded on the right."""
        pad = self._pad_token_id
        if pad is None:
            # Decoders read the score at the last token that is not padding: choose an id that ends no row here.
            ends = {row["input_ids"][-1] for row in rows}
            pad = next(i for i in itertools.count() if i not in ends)
            module.config.get_text_config().pad_token_id = pad
        inputs = {
            key: pad_sequence(
                [torch.tensor(row[key]) for row in rows],
                batch_first=True,
                padding_value=pad if key == "input_ids" else 0,
            ).to(self._models.device)
            for key in rows[0]
        }
        return module(**inputs).logits[:, 0]

    def _encode(self, prompts: list[str | list[dict]], completions: list[str]) -> list[dict[str, list[int]]]:
        """The model's inputs for each text, of at most max_length tokens."""
        parts: list[list[int | None]] = []
        if self.tokenizer.chat_template is not None:
            rows = self._encode_chats(_pairs(prompts, completions))
        elif self._reads_pairs:
            rows, parts = self._encode_pairs(_pairs(prompts, completions))
        else:
            rows = self._encode_texts(list(map(_continued, prompts, completions)))
        too_long = [row for row, inputs in enumerate(rows) if len(inputs["input_ids"]) > self.max_length]
        if too_long and not self.num_truncated:
            logger.warning(
                "reward model %s: %d of %d texts are longer than its limit of %d tokens, so it does not see the "
                "beginning of their prompts. Pass a smaller --max_prompt_length, or a reward model for longer texts.",
                *(self.name, len(too_long), len(rows), self.max_length),
            )
        self.num_truncated += len(too_long)
        for row in too_long:
            if not self._reads_pairs:
                rows[row] = {key: without_beginning(values, self.max_length) for key, values in rows[row].items()}
                continue
            cut_order = [i for i, part in enumerate(parts[row]) if part == 0]
            cut_order += [i for i, part in enumerate(parts[row]) if part == 1][::-1]
            cut = set(cut_order[: len(rows[row]["input_ids"]) - self.max_length])
            rows[row] = {key: [v for i, v in enumerate(values) if i not in cut] for key, values in rows[row].items()}
        return rows

    def _encode_chats(self, pairs: list[tuple[list[dict], str]]) -> list[dict[str, list[int]]]:
        """Conversations. A policy, or the data, must not write a turn into a text: special tokens stay text there."""
        spellings, render = self._spellings, partial(render_chat, self.tokenizer, now=self._now)
        chats = [[*messages, {"role": "assistant", "content": completion}] for messages, completion in pairs]
        for chat in chats:
            roles = tuple(message["role"] for message in chat)
            if roles not in self._kept:
                self._check_keeps(chat)
                self._kept.add(roles)
        written = [spellings.written(chat, render) for chat in chats]
        encoded = self.tokenizer([each.text for each in written], add_special_tokens=False, **_OPTIONS)
        rows = [{key: values[row] for key, values in encoded.items()} for row in range(len(pairs))]
        for row in [row for row, each in enumerate(written) if each.spelled]:
            ids = spellings.encode(written[row])
            rows[row] = {
                key: ids if key == "input_ids" else values[:1] * len(ids) for key, values in rows[row].items()
            }
        return rows

    def _encode_pairs(
        self, pairs: list[tuple[list[dict], str]]
    ) -> tuple[list[dict[str, list[int]]], list[list[int | None]]]:
        """Prompts and completions as pairs of texts.

        Returns:
            The model's inputs, and what each token belongs to: 0 the prompt, 1 the completion, None neither.
        """
        texts = [(_dialogue(messages), completion) for messages, completion in pairs]
        encoded = self.tokenizer([text for text, _ in texts], [text for _, text in texts], **_OPTIONS)
        rows = [{key: values[row] for key, values in encoded.items()} for row in range(len(pairs))]
        parts = [encoded.sequence_ids(row) for row in range(len(rows))]
        for row, pair in enumerate(texts):
            if any(map(self._spellings.in_text, pair)):
                alone = self.tokenizer(*([text] for text in pair), split_special_tokens=True, **_OPTIONS)
                rows[row], parts[row] = {key: values[0] for key, values in alone.items()}, alone.sequence_ids(0)
        return rows, parts

    def _encode_texts(self, texts: list[str]) -> list[dict[str, list[int]]]:
        """Texts that no template writes; special tokens that they spell stay text."""
        encoded = self.tokenizer(texts, **_OPTIONS)
        rows = [{key: values[row] for key, values in encoded.items()} for row in range(len(texts))]
        for row, text in enumerate(texts):
            if self._spellings.in_text(text):
                alone = self.tokenizer([text], split_special_tokens=True, **_OPTIONS)
                rows[row] = {key: values[0] for key, values in alone.items()}
        return rows

    def _check_keeps(self, chat: list[dict]) -> None:
        """Refuse a template that leaves out a turn of a conversation."""
        try:
            check_keeps(lambda messages: render_chat(self.tokenizer, messages, now=self._now), chat)
        except ValueError as error:
            raise ValueError(f"reward model {self.model!r}: {error}") from error

    def _check_tokens(self, num_tokens: int) -> None:
        """Refuse a tokenizer with tokens that the model has no embedding for; special ones may be unused."""
        special = set(self.tokenizer.all_special_ids)
        ordinary = {token for token in self.tokenizer.get_vocab().values() if token not in special}
        is_chat = self.tokenizer.chat_template is not None
        text = render_chat(self.tokenizer, _JUDGED) if is_chat else "question"
        written = self.tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"]
        if (last := max(ordinary | {*written})) >= num_tokens:
            raise ValueError(
                f"reward model {self.model!r}: its tokenizer has tokens up to number {last}, and the model knows "
                f"{num_tokens}, from 0 to {num_tokens - 1}, so many texts could not be scored: the tokenizer is not "
                "that of the model. Put the tokenizer's files that it was trained with into its folder."
            )
        if len(ordinary) < num_tokens / 2:
            logger.warning(
                "reward model %s: its tokenizer has %d tokens, and the model knows %d, so it may be that of another "
                "model, and scores would mean nothing. Compare its files with those of the model's backbone.",
                *(self.name, len(ordinary), num_tokens),
            )


def without_beginning(ids: list[int], max_length: int) -> list[int]:
    """At most max_length of the numbers: the first one and the last ones.

    Args:
        ids: token ids, or another number for each token. Some models read the score from the first token, the others
            from the last, which ends the answer.
        max_length: at least 1.
    """
    return ids if len(ids) <= max_length else ids[:1] + ids[len(ids) - max_length + 1 :]


def _load_tokenizer(model: str, label: str) -> transformers.PreTrainedTokenizerBase:
    """The model's own tokenizer; transformers makes an empty one for a folder without its files."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        reason = None
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            reason = "it has no tokenizer"
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
    if reason is not None:
        raise ValueError(f"{label}: cannot be loaded: {reason}. {_REMEDY}")
    return tokenizer


def _num_positions(config: transformers.PreTrainedConfig) -> list[int]:
    """How many tokens each table of positions has room for.

    Where a table has a row for padding, as RoBERTa's and those that follow it, positions begin after that row: of 66
    rows with padding at 1, 64 are left.
    """
    with torch.device("meta"):
        module = transformers.AutoModelForSequenceClassification.from_config(deepcopy(config), trust_remote_code=False)
    tables = [
        table for name, table in module.named_modules() if isinstance(table, nn.Embedding) and "position" in name
    ]
    return [table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None]


def _pairs(prompts: list[str | list[dict]], completions: list[str]) -> list[tuple[list[dict], str]]:
    """The messages before each answer, and the answer."""
    return [_split(as_messages(prompt), text) for prompt, text in zip(prompts, completions, strict=True)]


def _continued(prompt: str | list[dict], completion: str) -> str:
    """One text for a model without a chat template that reads no pairs: text goes on as it is, as in training."""
    if isinstance(prompt, str):
        return prompt + completion
    messages, answer = _split(prompt, completion)
    turns = "".join(f"\n\n{_SPEAKERS.get(message['role'], '')}{message['content']}" for message in messages)
    return f"{turns}\n\n{_SPEAKERS['assistant']}{answer}"


def _split(messages: list[dict], completion: str) -> tuple[list[dict], str]:
    """The messages before the answer, and the answer with its prefilled start."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"] + completion
    return messages, completion


def _dialogue(messages: list[dict]) -> str:
    """One turn as it is; several turns with their speakers, except for system messages."""
    several = sum(message["role"] != "system" for message in messages) > 1
    return "\n\n".join(_SPEAKERS.get(m["role"], "") * several + m["content"] for m in messages)
