"""Models with a score that a value model can begin as: a reward model, or the value model of another run.

What is wrong with one is told from its configuration and the names and shapes in its files, before weights are loaded.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from common.config import RLConfig
from common.models.configs import model_class, read_config, why_quantized
from common.models.files import check_files, check_weights_fit

# Holds the head of a saved value model whose architecture has no class for token classification.
HEAD_FILE = "value_head.safetensors"

_REMEDY = "Pass --value_init none, zero_head, fit, or a folder or hub id of a model with a score."


@dataclass(frozen=True, kw_only=True)
class ScoredModel:
    """How a model with a score is loaded.

    Attributes:
        auto_class: of transformers.
        head: name of its head; None: the head is in HEAD_FILE.
    """

    auto_class: type
    head: str | None


def scored_model(path: str, config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> ScoredModel:
    """Find out how to load a model with a score, or refuse it.

    Args:
        path: hub id or folder of a model for sequence or token classification with one label, or of a saved value
            model.
        config: trust_remote_code is read.
        tokenizer: the policy's; the model must know the same tokens.

    Raises:
        ValueError: if its head, its tokens or its files do not fit, or it cannot be loaded.
    """
    label = f"value_init={path!r}"
    trust = config.trust_remote_code
    found = read_config(path, trust_remote_code=trust, label=label, remedy=_REMEDY, own_code_remedy=_REMEDY)
    if reason := why_quantized(found):
        raise ValueError(f"{label}: {reason.split(':')[0]}, and no gradient can change them. {_REMEDY}")
    is_saved = (Path(path) / HEAD_FILE).is_file()
    architecture = (found.architectures or [""])[0]
    kinds = {
        "ForTokenClassification": transformers.AutoModelForTokenClassification,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    kind = next((kind for ending, kind in kinds.items() if architecture.endswith(ending)), None)
    num_tokens = found.get_text_config().vocab_size
    if (kind is None and not is_saved) or found.num_labels != 1 or num_tokens < len(tokenizer):
        raise ValueError(
            f"{label}: {architecture or 'a model'} with {found.num_labels} label{'s' * (found.num_labels != 1)} and "
            f"{num_tokens} tokens; need one for sequence or token classification with 1 label and the "
            f"policy's {len(tokenizer)} tokens, since it reads the policy's token ids. Pass --value_init fit, or such "
            "a model."
        )
    head = None
    if not is_saved and model_class(found, kind) is None:
        raise ValueError(
            f"{label}: transformers has no {architecture} for model_type {found.model_type}, and code that comes with "
            f"a model is not run for it. {_REMEDY}"
        )
    if not is_saved:
        with torch.device("meta"):
            head = head_name(kind.from_config(found, trust_remote_code=False))
        if head is None:
            raise ValueError(
                f"{label}: the score of {architecture} is not one linear layer on each token's hidden state, so that "
                "there is no value of a token. Pass --value_init fit, or another model."
            )
    auto_class = transformers.AutoModel if is_saved else kind
    try:
        check_files(path)
        check_weights_fit(path, auto_class, found)
    except ValueError as error:  # they name the setting that most models come from
        raise ValueError(str(error).replace(f"model={path!r}", label, 1)) from error
    return ScoredModel(auto_class=auto_class, head=head)


def head_name(model: transformers.PreTrainedModel) -> str | None:
    """Name of the one linear layer with one output beside a classifier's backbone; None if its head is another.

    Args:
        model: without storage is enough.
    """
    others = [(name, part) for name, part in model.named_children() if name != model.base_model_prefix]
    others = [(name, part) for name, part in others if not isinstance(part, nn.Dropout)]
    if len(others) == 1 and isinstance(others[0][1], nn.Linear) and others[0][1].out_features == 1:
        return others[0][0]
    return None
