"""A Bitune model's directory: adapters with their masks, theta, the tokenizer and bitune.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bitune.model import BIDIRECTIONAL, CAUSAL, VARIANTS, Bitune
from ubmoe.bounds import read_json
from ubmoe.config import Config, UserError, error_reason
from ubmoe.files import replace_directory, write_json
from ubmoe.models import cards
from ubmoe.models.digests import fingerprint
from ubmoe.models.lora import check_base, check_patterns, strict, write_mode

FORM, THETA, ADAPTER_CONFIG = "bitune.json", "theta.safetensors", "adapter_config.json"
METADATA = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["ubmoe", "bitune"]}
QUESTION = "Where does Anna live?"
CHAT = f"""prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{QUESTION}"}}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)"""
CARD = """# A language model that reads its prompt twice

Adapters of Bitune (2405.14862): the prompt is read causally and in both directions, and a share of
the second reading is mixed into the first. Stock peft would read one of the two alone, so `ubmoe`
loads them. `.` is the folder of this card.

```python
{start}
import ubmoe
from transformers import AutoTokenizer
from ubmoe.bitune.model import merged
from ubmoe.bitune.saving import load

bitune = merged(load(ubmoe.load({base!r}), directory))
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
{prompt}
answer = tokenizer.decode(bitune.generate(**prompt, max_new_tokens=64)[0])
```

## How it was made

By ubmoe.bitune, variant {variant}, from {base}, seed {seed}.
"""


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
        (folder / cards.CARD).unlink(missing_ok=True)  # peft's: a form to be filled in, with a path
        base, name = fingerprint(bitune.model), bitune.decoder.name_or_path
        for kind in bitune.model.peft_config:
            write_mode(folder / kind, base, masks[kind])
            config = folder / kind / ADAPTER_CONFIG
            at = name if cards.is_hub_id(name) else None
            config.write_text(cards.with_base(config.read_text(), at))
        if theta := bitune.theta():
            save_file({name: value.detach().cpu() for name, value in theta.items()}, folder / THETA)
        tokenizer.save_pretrained(folder)
        metadata = {"variant": bitune.name, "theta_init": bitune.theta_init, "template": template}
        write_json(folder / FORM, metadata | {"base": cards.named(name)})

    replace_directory(directory, write)


def write_card(folder: Path, config: Config, scores: Mapping[str, Any]) -> None:
    """The card of a saved model, which names no path of this machine."""
    settings = config.bitune
    prompt = CHAT
    if settings.template is not None:
        text = settings.template.replace("{prompt}", QUESTION)
        prompt = f'prompt = tokenizer({text!r}, return_tensors="pt")'
    said = CARD.format(
        start=cards.START,
        base=cards.named(config.model.name),
        prompt=prompt,
        variant=settings.variant,
        seed=config.seed,
    )
    cards.write(folder, METADATA, said)
    results = (scores["tasks"], scores["metrics"], scores["perplexity"])
    cards.complete(folder, config, [settings.dataset], cards.generation_results(*results))


def load(model: PreTrainedModel, directory: str | Path) -> Bitune:
    """A saved Bitune model on its base, ready to generate. Raises UserError for what is none."""
    directory = Path(directory)
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
