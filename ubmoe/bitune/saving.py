"""A Bitune model's directory: adapters with their masks, theta, the tokenizer and bitune.json."""

from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bitune.model import BIDIRECTIONAL, CAUSAL, VARIANTS, Bitune
from ubmoe.bounds import read_json
from ubmoe.config import UserError, error_reason
from ubmoe.files import replace_directory, write_json
from ubmoe.models.digests import fingerprint
from ubmoe.models.lora import check_base, check_patterns, strict, write_mode

FORM, THETA = "bitune.json", "theta.safetensors"


def save(
    bitune: Bitune,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    directory: Path,
) -> None:
    """The adapters as peft saves them, theta, the tokenizer, and bitune.json: all to come back.

    Beside each adapter stands its mask, without which it would be silently wrong.
    """
    masks = {CAUSAL: "causal", BIDIRECTIONAL: str(bitune.variant.second)}

    def write(folder: Path) -> None:
        bitune.model.save_pretrained(str(folder))
        base = fingerprint(bitune.model)
        for kind in bitune.model.peft_config:
            write_mode(folder / kind, base, masks[kind])
        if theta := bitune.theta():
            save_file({name: value.detach().cpu() for name, value in theta.items()}, folder / THETA)
        tokenizer.save_pretrained(folder)
        metadata = {"variant": bitune.name, "theta_init": bitune.theta_init, "template": template}
        write_json(folder / FORM, metadata | {"base": bitune.decoder.name_or_path})

    replace_directory(directory, write)


def load(model: PreTrainedModel, directory: Path) -> Bitune:
    """A saved Bitune model on its base, ready to generate. Raises UserError for what is none."""
    expected = "expected the directory that python -m ubmoe.bitune saved"
    if not (directory / FORM).exists():
        raise UserError(f"{directory} has no {FORM}; {expected}")
    try:
        metadata = read_json(directory / FORM)
        modules = VARIANTS[metadata["variant"]].own
        kinds = [CAUSAL, *([BIDIRECTIONAL] if modules else [])]
        for kind in kinds:
            check_base(model, directory / kind)
            check_patterns(model, directory / kind)
        with strict():
            wrapped = PeftModel.from_pretrained(model, str(directory / CAUSAL), adapter_name=CAUSAL)
            for kind in kinds[1:]:
                wrapped.load_adapter(str(directory / kind), adapter_name=kind)
        bitune = Bitune(wrapped, metadata["variant"], metadata["theta_init"])
        if bitune.variant.mixed:
            bitune.take(load_file(directory / THETA))
    except Exception as error:  # the libraries raise nearly every type here
        reason = error_reason(error)
        raise UserError(
            f"{directory}: no Bitune model of {model.name_or_path} ({reason}); {expected}"
        ) from error
    return bitune.requires_grad_(False).eval()
